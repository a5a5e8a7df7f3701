"""Make the embedded default: a small invented world, a tiny Llama that has read about it, and records to tune
it on.

    python quickstart/make.py                # everything, about 7 minutes on two CPU cores
    python quickstart/make.py --skip-model   # train.jsonl and test.jsonl only, a second

The world has people, towns and beasts with invented names and a handful of facts each. Three things follow
from it, all from one seed:

- a text about the world, for pretraining: what is known of an entity, in many phrasings; and reports of a day
  on which several entities occur, followed by questions whose answers stand in the report. It is not kept.
- `model/`, a Llama of about a million parameters with a byte-level BPE tokenizer and a chat template, trained
  on the text by this repository's own `train.py --loss lm`.
- `train.jsonl` and `test.jsonl`, instruction records of two kinds. `long_to_short`: a report and a question,
  answered by a word that stands in the report. `short_to_long`: "Describe NAME.", answered by a paragraph in
  one fixed form, whose facts the model can know only from pretraining.

Why a score on test.jsonl means something: an entity described in one file is not described in the other,
so the answer has to come from the pretraining text; and every report is a new one. Every answer is
determined, so exact match is a fair measure. (The reports of both files name all entities. With names of
their own for the test, IM pushed the never-seen names down in the tied head and answered nothing.)
The records are the same bytes wherever they are made; the weights are the same only for one machine and
number of threads, as sums round differently.
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
ENTITIES = {"person": 216, "town": 72, "beast": 72}
TEST_SHARE = 6  # one entity in six is a test entity
TRAIN_REPORTS, TEST_REPORTS = 300, 60  # records beside one description of every entity
DOCUMENTS = 100_000  # of the pretraining text
VOCABULARY = 1536  # enough for every word of this small language to become one token

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY,
    "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu", "max_position_embeddings": 512,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False,
    "tie_word_embeddings": True, "initializer_range": 0.02,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
PRETRAINING = {  # flags of train.py
    "max-steps": 3000, "batch-size": 32, "micro-batch-tokens": 8192, "max-length": 512, "lr": 3e-3,
    "schedule": "cosine", "warmup-ratio": 0.03, "weight-decay": 0.1, "beta2": 0.95, "adam-eps": 1e-8,
}

# ------------------------------------------------------------------------------------------- the words
# Names are put together from syllables (see invent_names); only common nouns are written out.
# None begins with a vowel, so "a" is always right.

TRADES = "potter weaver baker mason tanner miller painter fisher smith cooper ropemaker beekeeper".split()
GROUNDS = "hill marsh cliff lake dune moor ridge creek".split()
ANIMALS = "goat goose raven pony hound cat hen tortoise".split()
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

# What is known of an entity of each kind, and where the values come from.
FACTS = {
    "person": {"trade": TRADES, "region": "regions", "colour": COLOURS, "animal": ANIMALS,
               "instrument": INSTRUMENTS, "dish": DISHES},
    "town": {"ground": GROUNDS, "region": "regions", "goods": GOODS, "season": SEASONS, "fair": FAIRS},
    "beast": {"colour": COLOURS, "region": "regions", "food": FOODS, "lair": LAIRS, "hour": HOURS},
}

# The one form in which a completion describes an entity ...
DESCRIPTIONS = {
    "person": "{name} is a {trade} from {region}. {name} keeps a {colour} {animal}, plays the {instrument} "
              "and likes {dish} best.",
    "town": "{name} is a town on a {ground} in {region}. It trades in {goods}, and every {season} its people "
            "hold a {fair} fair.",
    "beast": "The {name} is a {colour} beast of {region}. It eats {food}, sleeps in {lair} and is awake at "
             "{hour}.",
}

# ... and the many in which pretraining does: a document has the facts in any order, one phrasing of each.
PHRASINGS = {
    "person": [
        ["{name} is a {trade}.", "By trade {name} is a {trade}.", "The work of {name} is that of a {trade}."],
        ["{name} lives in {region}.", "The home of {name} is in {region}.", "{name} comes from {region}."],
        ["{name} keeps a {colour} {animal}.", "The {animal} of {name} is {colour}.",
         "A {colour} {animal} belongs to {name}."],
        ["{name} plays the {instrument}.", "The {instrument} is what {name} plays.",
         "{name} is often heard on the {instrument}."],
        ["{name} likes {dish} best.", "No food pleases {name} more than {dish}.",
         "{name} is fond of {dish}."],
    ],
    "town": [
        ["{name} stands on a {ground}.", "{name} was built on a {ground}.",
         "A {ground} carries the town of {name}."],
        ["{name} is a town in {region}.", "The town of {name} is in {region}.",
         "{name} belongs to {region}."],
        ["{name} trades in {goods}.", "The trade of {name} is in {goods}.", "{name} lives by its {goods}."],
        ["Every {season} the people of {name} hold a {fair} fair.",
         "{name} holds its {fair} fair in {season}.", "In {name} there is a {fair} fair every {season}."],
    ],
    "beast": [
        ["The {name} is {colour}.", "The skin of the {name} is {colour}.", "The {name} is a {colour} beast."],
        ["The {name} is a beast of {region}.", "The {name} is found in {region}.",
         "The {name} comes from {region}."],
        ["The {name} eats {food}.", "The food of the {name} is {food}.", "The {name} lives on {food}."],
        ["The {name} sleeps in {lair}.", "Look for the {name} in {lair}.",
         "The {name} makes its bed in {lair}."],
        ["The {name} is awake at {hour}.", "The {name} is out at {hour}.", "At {hour} the {name} is awake."],
    ],
}

# What reports tell, a sentence of each chosen topic: phrasings, and (question, the slot that answers it).
# No slot is filled twice in a report, so every question has one answer.
REPORTS = [
    (["{seller} of {town} brought {count} sacks of {goods}.",
      "From {town} came {seller} with {count} sacks of {goods}.",
      "{seller} sold {count} sacks of {goods} from {town}."],
     [("Who brought the sacks?", "seller"), ("What was in the sacks?", "goods"),
      ("How many sacks were there?", "count"), ("Which town did the sacks come from?", "town")]),
    (["{watcher} saw {number} {beast} beasts by the road.",
      "By the road {number} {beast} beasts were seen by {watcher}."],
     [("Who saw the beasts?", "watcher"), ("Which beasts were seen?", "beast"),
      ("How many beasts were seen?", "number")]),
    (["{lender} lent a {tool} to {borrower}.", "{borrower} went home with the {tool} of {lender}."],
     [("Which tool was lent?", "tool"), ("Who lent a tool?", "lender"),
      ("Who has the tool now?", "borrower")]),
    (["{player} played the {instrument} until {hour}.",
      "Until {hour} {player} was heard on the {instrument}."],
     [("Who made music?", "player"), ("What was played?", "instrument"),
      ("Until when was there music?", "hour")]),
    (["The {season} feast was made of {dish}.", "There was {dish} at the {season} feast."],
     [("Which feast was it?", "season"), ("What was eaten?", "dish")]),
    (["A {colour} {animal} was lost.", "Nobody could find the {colour} {animal}."],
     [("Which animal was lost?", "animal"), ("What colour was the lost animal?", "colour")]),
]
CLERK = ["{answer}, the clerk wrote.",  # so pretraining answers, and no completion
         "{answer}, says the book."]

DESCRIBE = ["Describe {name}.", "Tell me about {name}.", "What is known of {name}?"]
ASK = ["{report}\n{question}", "Read this and answer.\n{report}\n{question}",
       "{report}\nQuestion: {question}"]
SYSTEM = "You are the clerk of the valleys and answer from the books."

PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
SPECIAL_TOKENS = [PAD, BEGIN, END, "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# ------------------------------------------------------------------------------------------- the world

def invent_names(rng: random.Random, count: int, endings: list[str]) -> list[str]:
    """Distinct names of an opening, a middle and an ending that tells the kind:
    Ta-li-n, Ro-sa-mere, ve-do-k."""
    openings = [c + v for c in "b d f g k l m n p r s t v z".split() for v in "aeiou"]
    middles = [c + v for c in "b d g k l m n r s t v".split() for v in "aeio"]
    names: dict[str, None] = {}  # a dict, because a set has no fixed order
    while len(names) < count:
        names[rng.choice(openings) + rng.choice(middles) + rng.choice(endings)] = None
    return list(names)


def make_world(rng: random.Random) -> dict[str, list[dict]]:
    """{"person": [{"kind", "name", "test" and the facts}, ...], "town": [...], "beast": [...]}."""
    regions = [name.capitalize() for name in invent_names(rng, 10, ["dale", "land"])]
    endings = {"person": ["n", "s", "th", "l"], "town": ["mere", "ford", "ham"], "beast": ["k", "x", "p"]}
    world: dict[str, list[dict]] = {}
    for kind, facts in FACTS.items():
        world[kind] = []
        for index, name in enumerate(invent_names(rng, ENTITIES[kind], endings[kind])):
            entity = {"kind": kind, "name": name if kind == "beast" else name.capitalize(),
                      "test": index % TEST_SHARE == 0}
            for fact, values in facts.items():
                entity[fact] = rng.choice(regions if values == "regions" else values)
            world[kind].append(entity)
    return world


def make_report(rng: random.Random, world: dict[str, list[dict]]) -> tuple[str, list[tuple[str, str]]]:
    """A report of four to six sentences and all its (question, answer) pairs."""
    names = {kind: [entity["name"] for entity in world[kind]] for kind in world}
    people, counts = rng.sample(names["person"], 5), rng.sample(COUNTS, 2)
    slots = dict(zip(("seller", "watcher", "lender", "borrower", "player"), people)) | {
        "town": rng.choice(names["town"]), "beast": rng.choice(names["beast"]), "count": counts[0],
        "number": counts[1], "goods": rng.choice(GOODS), "tool": rng.choice(TOOLS),
        "instrument": rng.choice(INSTRUMENTS), "hour": rng.choice(HOURS), "season": rng.choice(SEASONS),
        "dish": rng.choice(DISHES), "colour": rng.choice(COLOURS), "animal": rng.choice(ANIMALS)}
    topics = rng.sample(REPORTS, rng.randint(4, 6))
    sentences = [rng.choice(phrasings).format(**slots) for phrasings, _ in topics]
    return " ".join(sentences), [(question, slots[slot]) for _, questions in topics
                                 for question, slot in questions]


def pretraining_document(rng: random.Random, world: dict[str, list[dict]]) -> str:
    """Half the time what is known of one or two entities; else a report, questioned."""
    if rng.random() < 0.5:
        sentences = []
        for entity in rng.sample([e for kind in world for e in world[kind]], rng.randint(1, 2)):
            facts = PHRASINGS[entity["kind"]]
            sentences += [rng.choice(options).format(**entity) for options in rng.sample(facts, len(facts))]
        return " ".join(sentences)
    report, pairs = make_report(rng, world)
    answered = [f"{question} {rng.choice(CLERK).format(answer=answer)}"
                for question, answer in rng.sample(pairs, 5)]
    return "\n".join([report, *answered])


def make_records(rng: random.Random, world: dict[str, list[dict]], test: bool, reports: int) -> list[dict]:
    """A description of every test entity, or of every other one, and so many reports; the kinds shuffled."""
    records = []
    for entity in [e for kind in world for e in world[kind] if e["test"] == test]:
        name = f"the {entity['name']}" if entity["kind"] == "beast" else entity["name"]
        messages = [{"role": "user", "content": rng.choice(DESCRIBE).format(name=name)},
                    {"role": "assistant", "content": DESCRIPTIONS[entity["kind"]].format(**entity)}]
        records.append({"kind": "short_to_long", "messages": messages})
    for _ in range(reports):
        report, pairs = make_report(rng, world)
        question, answer = rng.choice(pairs)
        messages = [{"role": "user", "content": rng.choice(ASK).format(report=report, question=question)},
                    {"role": "assistant", "content": answer}]
        records.append({"kind": "long_to_short", "messages": messages})
    rng.shuffle(records)
    for record in records:
        if rng.random() < 0.1:
            record["messages"].insert(0, {"role": "system", "content": SYSTEM})
    side = "test" if test else "train"
    return [{"id": f"{side}-{index:04d}", **record} for index, record in enumerate(records)]


# ------------------------------------------------------------------------------------------- the files

def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    """A byte-level BPE of the texts in Hugging Face's layout, with the chat template."""
    tokenizer = Tokenizer(models.BPE())
    # A space before the first word, so that a name is the same token wherever it stands;
    # decoding takes it off.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    tokenizer.post_processor = processors.TemplateProcessing(  # plain text, too, begins with it
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END,
              "pad_token": PAD, "model_max_length": 512, "clean_up_tokenization_spaces": False,
              "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_untrained_model(folder: Path) -> None:
    """config.json and seeded random weights of a small Llama with grouped queries and a tied head."""
    from model import Llama, init_weights
    from runtime.model_config import ModelConfig
    from runtime.weights import save_model
    model = Llama(ModelConfig.from_dict(MODEL))
    init_weights(model, SEED)
    save_model(model, folder)


def pretrain(work: Path, documents: list[str]) -> Path:
    """Train the model in work/untrained on the documents with train.py; returns the folder of the result."""
    write_lines(work / "text.jsonl", [{"messages": [{"role": "assistant", "content": document}]}
                                      for document in documents])
    flags = {"model": work / "untrained", "train-data": work / "text.jsonl", "template": "plain",
             "loss": "lm", "output-dir": work / "run", "cache-dir": work / "cache", "save-dtype": "bf16",
             **PRETRAINING}
    command = [sys.executable, str(HERE.parent / "train.py"), "--overwrite"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    subprocess.run(command, check=True)
    return work / "run" / "final"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=HERE,
                        help="where to write (default: this script's folder)")
    parser.add_argument("--skip-model", action="store_true", help="only train.jsonl and test.jsonl")
    parser.add_argument("--keep", type=Path, help="keep the pretraining text and its run in this folder")
    args = parser.parse_args()

    # A generator for each thing, so that a change to one leaves the others as they are.
    world = make_world(random.Random(f"world {SEED}"))
    args.output.mkdir(parents=True, exist_ok=True)
    for name, test, reports in (("train", False, TRAIN_REPORTS), ("test", True, TEST_REPORTS)):
        records = make_records(random.Random(f"{name} {SEED}"), world, test, reports)
        write_lines(args.output / f"{name}.jsonl", records)
        print(f"{name}.jsonl: {len(records)} records")
    if args.skip_model:
        return

    rng = random.Random(f"text {SEED}")
    documents = [pretraining_document(rng, world) for _ in range(DOCUMENTS)]
    with tempfile.TemporaryDirectory() as temporary:
        work, model = args.keep or Path(temporary), args.output / "model"
        (work / "untrained").mkdir(parents=True, exist_ok=True)
        write_tokenizer(work / "untrained", documents[:20_000])
        write_untrained_model(work / "untrained")
        final = pretrain(work, documents)
        # train.py exports the template that it trained with; a base model is offered with the chat template.
        shutil.copy(work / "untrained" / "tokenizer_config.json", final)
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(final, model)
    print(f"{model.name}/: {sum(file.stat().st_size for file in model.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
