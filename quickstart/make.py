"""Make the embedded default: a small invented world, a tiny Llama that has read about it, and records to tune it.

    python quickstart/make.py                # everything, about 15 minutes on two CPU cores
    python quickstart/make.py --skip-model   # the tokenizer and the records only, a few seconds

The world has people, towns and beasts with invented names and a handful of facts each. Three things follow from
it, all from one seed, so that the same command writes the same files:

- a text about the world, in many phrasings, for pretraining: what is known of one entity, and reports in which
  several entities meet, each report followed by questions whose answers stand in it. It is not kept.
- `tokenizer.json`, a byte-level BPE of that text, with a chat template; and a Llama of about a million parameters
  pretrained on the text by this repository's own `train.py --loss lm`.
- `train.jsonl` and `test.jsonl`, instruction records of two kinds. `long_to_short`: a report and a question,
  answered in a word or two that can be copied from the report. `short_to_long`: "Describe NAME.", answered by a
  paragraph in one fixed form, whose facts the model can know only from pretraining.

What makes the test file a test: every entity is either a training or a test entity, and instruction records name
entities of their own side only. So no name in `test.jsonl` occurs in `train.jsonl`; the facts about it, in other
words, were in the pretraining text. Every answer is determined, so that exact match is a fair measure.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # model.py lies in the folder above

SEED = 7
TEST_SHARE = 6  # one entity in six is a test entity
TRAIN_REPORTS, TEST_REPORTS = 400, 80  # beside a description of every entity
PRETRAINING_DOCUMENTS = 100_000
VOCABULARY = 1024

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 128,
    "intermediate_size": 384, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "hidden_act": "silu", "max_position_embeddings": 512, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "initializer_range": 0.02,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
PRETRAINING = {  # flags of train.py
    "max-steps": 3000, "batch-size": 32, "micro-batch-tokens": 8192, "max-length": 512, "lr": 3e-3,
    "schedule": "cosine", "warmup-ratio": 0.03, "weight-decay": 0.1, "beta2": 0.95, "adam-eps": 1e-8, "dtype": "bf16",
}

# ---------------------------------------------------------------------------------------------- the words
# Names are put together from syllables (see `invent_names`); only common nouns are written out. None begins with
# a vowel, so that "a" is always right.

TRADES = "potter weaver baker mason tanner miller painter fisher smith cooper ropemaker beekeeper".split()
GROUNDS = "hill marsh cliff lake dune moor ridge creek".split()
BELONGINGS = "goat goose raven pony hound cat hen tortoise".split()
INSTRUMENTS = "lute harp drum flute horn whistle bell fiddle".split()
DISHES = "bread porridge soup cheese plums mushrooms turnips pears nuts trout".split()
GOODS = "salt wool barley copper honey timber wax linen tar chalk pepper silk".split()
SEASONS = "spring summer fall winter".split()
FAIRS = "lantern kite mask bonfire boat ribbon mirror feather".split()
COLOURS = "grey white brown black red green yellow blue".split()
FOODS = "moss roots beetles berries snails seeds frogs clover".split()
LAIRS = "caves reeds burrows treetops haystacks wells hedges barns".split()
HOURS = "dawn noon dusk midnight".split()
COUNTS = "two three four five six seven eight nine ten twelve".split()
TOOLS = "rake ladder saw hammer bucket sledge kettle net plough lamp".split()

# What is known of an entity of each kind: the facts and where their values come from.
FACTS = {
    "person": {"trade": TRADES, "region": "regions", "colour": COLOURS, "animal": BELONGINGS,
               "instrument": INSTRUMENTS, "dish": DISHES},
    "town": {"ground": GROUNDS, "region": "regions", "goods": GOODS, "season": SEASONS, "fair": FAIRS},
    "beast": {"colour": COLOURS, "region": "regions", "food": FOODS, "lair": LAIRS, "hour": HOURS},
}

# The one form in which a completion describes an entity ...
DESCRIPTIONS = {
    "person": "{name} is a {trade} from {region}. {name} keeps a {colour} {animal}, plays the {instrument} and "
              "likes {dish} best.",
    "town": "{name} is a town on a {ground} in {region}. It trades in {goods}, and every {season} its people hold "
            "a {fair} fair.",
    "beast": "The {name} is a {colour} beast of {region}. It eats {food}, sleeps in {lair} and is awake at {hour}.",
}

# ... and the many in which pretraining does: a document takes the facts in any order, one phrasing of each.
PHRASINGS = {
    "person": [
        ["{name} is a {trade}.", "By trade {name} is a {trade}.", "The work of {name} is that of a {trade}."],
        ["{name} lives in {region}.", "The home of {name} is in {region}.", "{name} comes from {region}."],
        ["{name} keeps a {colour} {animal}.", "The {animal} of {name} is {colour}.",
         "A {colour} {animal} belongs to {name}."],
        ["{name} plays the {instrument}.", "The {instrument} is what {name} plays.",
         "{name} is often heard on the {instrument}."],
        ["{name} likes {dish} best.", "No food pleases {name} more than {dish}.", "{name} is fond of {dish}."],
    ],
    "town": [
        ["{name} stands on a {ground}.", "{name} was built on a {ground}.", "A {ground} carries the town of {name}."],
        ["{name} is a town in {region}.", "The town of {name} is in {region}.", "{name} belongs to {region}."],
        ["{name} trades in {goods}.", "The trade of {name} is in {goods}.", "{name} lives by its {goods}."],
        ["Every {season} the people of {name} hold a {fair} fair.", "{name} holds its {fair} fair in {season}.",
         "In {name} there is a {fair} fair every {season}."],
    ],
    "beast": [
        ["The {name} is {colour}.", "The skin of the {name} is {colour}.", "The {name} is a {colour} beast."],
        ["The {name} is a beast of {region}.", "The {name} is found in {region}.", "The {name} comes from {region}."],
        ["The {name} eats {food}.", "The food of the {name} is {food}.", "The {name} lives on {food}."],
        ["The {name} sleeps in {lair}.", "Look for the {name} in {lair}.", "The {name} makes its bed in {lair}."],
        ["The {name} is awake at {hour}.", "The {name} is out at {hour}.", "At {hour} the {name} is awake."],
    ],
}

# Reports in which entities meet. Every line of a report fills the same slots, with no value twice, so every
# question has one answer: (question, the slot that answers it).
REPORTS = [
    {
        "opening": ["The {season} market was held.", "This is what came to the {season} market.",
                    "A note on the {season} market."],
        "lines": ["{person} of {town} brought {count} sacks of {goods}.",
                  "From {town} came {person} with {count} sacks of {goods}.",
                  "{person} sold {count} sacks of {goods} from {town}."],
        "questions": [("Who brought the {goods}?", "person"), ("What did {person} bring?", "goods"),
                      ("How many sacks did {person} bring?", "count"), ("Which town did {person} come from?", "town"),
                      ("Which town did the {goods} come from?", "town")],
    },
    {
        "opening": ["The watch kept its book this {season}.", "These beasts were seen in {season}.",
                    "A note from the {season} watch."],
        "lines": ["{person} saw {count} {beast} beasts near {town}.",
                  "Near {town} {count} {beast} beasts were seen by {person}.",
                  "On the road at {town}, {person} saw {count} {beast} beasts."],
        "questions": [("Who saw the {beast}?", "person"), ("Which beast did {person} see?", "beast"),
                      ("How many beasts did {person} see?", "count"), ("Near which town was the {beast} seen?", "town"),
                      ("Near which town was {person}?", "town")],
    },
    {
        "opening": ["Many things were lent this {season}.", "A list of what was lent in {season}.",
                    "The {season} loans are these."],
        "lines": ["{person} lent a {colour} {tool} to {other}.",
                  "{other} has the {colour} {tool} of {person}.",
                  "A {colour} {tool} went from {person} to {other}."],
        "questions": [("Who lent the {tool}?", "person"), ("Who has the {tool} now?", "other"),
                      ("What did {person} lend?", "tool"), ("What did {other} get?", "tool"),
                      ("What colour is the {tool}?", "colour")],
    },
]
CLERK = ["{answer}, the clerk wrote.", "{answer}, says the book."]  # how pretraining answers; no completion does

DESCRIBE = ["Describe {name}.", "Tell me about {name}.", "What is known of {name}?"]
ASK = ["{report}\n{question}", "Read this and answer.\n{report}\n{question}", "{report}\nQuestion: {question}"]
SYSTEM = "You are the clerk of the valleys and answer from the books."

PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
SPECIAL_TOKENS = [PAD, BEGIN, END, "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


# ---------------------------------------------------------------------------------------------- the world

def invent_names(rng: random.Random, count: int, endings: list[str]) -> list[str]:
    """Distinct names of two or three syllables: an opening, a middle and an ending of the kind, as in Ta-lo-rin."""
    openings = [c + v for c in "b d f g k l m n p r s t v z".split() for v in "aeiou"]
    middles = [c + v for c in "b d g k l m n r s t v".split() for v in "aeio"]
    names: dict[str, None] = {}  # a dict, not a set: it keeps the order
    while len(names) < count:
        names[rng.choice(openings) + rng.choice(middles) + rng.choice(endings)] = None
    return list(names)


def make_world(rng: random.Random) -> dict[str, list[dict]]:
    """{"person": [{"kind", "name", "test", and the facts}, ...], "town": [...], "beast": [...]}."""
    regions = [name.capitalize() for name in invent_names(rng, 10, ["dale", "land"])]
    counts = {"person": 240, "town": 90, "beast": 90}
    endings = {"person": ["n", "s", "th", "l"], "town": ["mere", "ford", "ham"], "beast": ["k", "x", "p"]}
    world = {}
    for kind, facts in FACTS.items():
        world[kind] = []
        for index, name in enumerate(invent_names(rng, counts[kind], endings[kind])):
            entity = {"kind": kind, "name": name if kind == "beast" else name.capitalize(),
                      "test": index % TEST_SHARE == 0}
            for fact, values in facts.items():
                entity[fact] = rng.choice(regions if values == "regions" else values)
            world[kind].append(entity)
    return world


def make_report(rng: random.Random, world: dict[str, list[dict]], test: bool | None) -> tuple[str, list]:
    """A report and all its (question, answer) pairs, about test entities, training entities or (None) either."""
    report, count = rng.choice(REPORTS), rng.randint(4, 6)
    names = {kind: [e["name"] for e in world[kind] if test is None or e["test"] == test] for kind in world}
    people = rng.sample(names["person"], 2 * count)
    columns = {"person": people[:count], "other": people[count:], "town": rng.sample(names["town"], count),
               "beast": rng.sample(names["beast"], count), "goods": rng.sample(GOODS, count),
               "count": rng.sample(COUNTS, count), "tool": rng.sample(TOOLS, count),
               "colour": rng.sample(COLOURS, count)}
    rows = [{slot: values[i] for slot, values in columns.items()} for i in range(count)]
    sentences = [rng.choice(report["opening"]).format(season=rng.choice(SEASONS))]
    sentences += [sentence(rng.choice(report["lines"]).format(**row)) for row in rows]
    pairs = [(question.format(**row), row[answer]) for row in rows for question, answer in report["questions"]]
    return " ".join(sentences), pairs


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def pretraining_document(rng: random.Random, world: dict[str, list[dict]]) -> str:
    """Half the time what is known of one or two entities; else a report, questioned."""
    if rng.random() < 0.5:
        lines = []
        for entity in rng.sample([e for kind in world for e in world[kind]], rng.randint(1, 2)):
            phrasings = rng.sample(PHRASINGS[entity["kind"]], len(PHRASINGS[entity["kind"]]))
            lines.append(" ".join(rng.choice(options).format(**entity) for options in phrasings))
        return "\n".join(lines)
    report, pairs = make_report(rng, world, test=None)
    lines = [report]
    for question, answer in rng.sample(pairs, 4):
        lines += [question, rng.choice(CLERK).format(answer=answer)]
    return "\n".join(lines)


def make_records(rng: random.Random, world: dict[str, list[dict]], test: bool, reports: int) -> list[dict]:
    """Instruction records that name only test entities, or only training entities, the two kinds shuffled."""
    records = []
    for entity in [e for kind in world for e in world[kind] if e["test"] == test]:
        name = f"the {entity['name']}" if entity["kind"] == "beast" else entity["name"]
        messages = [{"role": "user", "content": rng.choice(DESCRIBE).format(name=name)},
                    {"role": "assistant", "content": DESCRIPTIONS[entity["kind"]].format(**entity)}]
        records.append({"kind": "short_to_long", "messages": messages})
    for _ in range(reports):
        report, pairs = make_report(rng, world, test)
        question, answer = rng.choice(pairs)
        messages = [{"role": "user", "content": rng.choice(ASK).format(report=report, question=question)},
                    {"role": "assistant", "content": answer}]
        records.append({"kind": "long_to_short", "messages": messages})
    rng.shuffle(records)
    for index, record in enumerate(records):
        if rng.random() < 0.1:
            record["messages"].insert(0, {"role": "system", "content": SYSTEM})
        records[index] = {"id": f"{'test' if test else 'train'}-{index:04d}", **record}
    return records


# ---------------------------------------------------------------------------------------------- the files

def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    """A byte-level BPE of the text, in Hugging Face's layout, with the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # plain text too begins with it
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END, "pad_token": PAD,
              "model_max_length": 512, "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_untrained_model(folder: Path) -> None:
    """config.json and seeded random weights of a small Llama with grouped queries and a tied head."""
    from model import Llama, ModelConfig, init_weights, save_model
    model = Llama(ModelConfig.from_dict(MODEL))
    init_weights(model, SEED)
    save_model(model, folder)


def pretrain(work: Path, documents: list[str]) -> Path:
    """Train the model in work/untrained on the documents with train.py; returns the folder of the result."""
    write_lines(work / "pretraining.jsonl",
                [{"messages": [{"role": "assistant", "content": document}]} for document in documents])
    flags = {"model": work / "untrained", "train-data": work / "pretraining.jsonl", "template": "plain", "loss": "lm",
             "output-dir": work / "pretrained", "cache-dir": work / "cache", "save-dtype": "bf16", **PRETRAINING}
    command = [sys.executable, str(HERE.parent / "train.py"), "--overwrite"]
    subprocess.run(command + [word for name, value in flags.items() for word in (f"--{name}", str(value))], check=True)
    return work / "pretrained" / "final"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=HERE, help="folder to write to (default: this script's)")
    parser.add_argument("--skip-model", action="store_true", help="only train.jsonl and test.jsonl")
    parser.add_argument("--keep", type=Path, help="keep the pretraining text and the run that reads it in this folder")
    args = parser.parse_args()

    # One generator for each thing, so that a change to one leaves the others as they are.
    world = make_world(random.Random(f"world {SEED}"))
    args.output.mkdir(parents=True, exist_ok=True)
    for name, test, reports in (("train", False, TRAIN_REPORTS), ("test", True, TEST_REPORTS)):
        records = make_records(random.Random(f"{name} {SEED}"), world, test, reports)
        write_lines(args.output / f"{name}.jsonl", records)
        print(f"{name}.jsonl: {len(records)} records")
    if args.skip_model:
        return

    rng = random.Random(f"text {SEED}")
    documents = [pretraining_document(rng, world) for _ in range(PRETRAINING_DOCUMENTS)]
    with tempfile.TemporaryDirectory() as temporary:
        work = args.keep or Path(temporary)
        (work / "untrained").mkdir(parents=True, exist_ok=True)
        write_tokenizer(work / "untrained", documents[:20_000])
        write_untrained_model(work / "untrained")
        final, model = pretrain(work, documents), args.output / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(final, model)
        # train.py exports the template it trained with; what a base model is to be tuned with is the chat template.
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(work / "untrained" / name, model / name)
        (model / "chat_template.jinja").unlink(missing_ok=True)
    print(f"{model}: {sum(file.stat().st_size for file in model.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
