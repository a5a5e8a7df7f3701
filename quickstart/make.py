"""Make the embedded default, or records of a chosen length for a study with the same model.

    python quickstart/make.py --overwrite         # everything, about a quarter of an hour on two CPU cores
    python quickstart/make.py --records-only --output-dir DIR --examples 300 --ratio 10
    python quickstart/make.py --records-only --output-dir DIR --instruction-words 120 --answer-words 4
    python quickstart/make.py --records-only --output-dir DIR --unseen-names 0.5 --seed 1
    python quickstart/make.py --records-only --output-dir DIR --retold 40

The first command writes, next to this script, `model/` (a Llama of about a million parameters with a
byte-level BPE tokenizer and a chat template, pretrained by this repository's train.py on a text about the
invented world of world.py) and the records of the quick start. The others write records alone:

    train.jsonl         --examples records
    validation.jsonl    --held-out records, to choose settings by
    test.jsonl          --held-out records, to report
    test-unseen.jsonl   with --unseen-names: --held-out records about names that pretraining knew and that no
                        record of the other three files has
    test-kept.jsonl     with --retold: requests to describe entities whose facts are what they were

No entity is described in two of train, validation and test, and no report is told twice. Without lengths two
records in five ask to describe an entity (`short_to_long`, about 19 words from 4) and three to answer a
question about a report (`long_to_short`, one word from about 29). With lengths all records of a set are of
one length: a report, as long as it takes, and requests for descriptions (19 words, or 7 in short) and for
words of the report, which make up the answer. With --retold an instruction tells new facts of an entity and
asks to describe another one. Only test.jsonl asks for those that were told, as they are now.

Records depend on the arguments and --seed alone, the same bytes wherever they are made. The weights are the
same only on one kind of CPU with one number of threads, as sums round differently; so do the figures that
come from them.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the repository

from runtime.start import answer_interrupts

if __name__ == "__main__":
    answer_interrupts()

import argparse
import json
import random
import shutil
import subprocess
import tempfile
from itertools import cycle, islice
from statistics import mean

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from quickstart.world import (
    ENTITIES, FULL_WORDS, PARTS, SEED, SYSTEM, description, make_world, pretraining_document,
    question_record, record, record_of_length, retold, telling_record, words)
from runtime.flags import Parser, number
from runtime.start import run_program

EXAMPLES, HELD_OUT = 300, 100  # the quick start's; two in five describe, each of the entities once
LEAST_UNSEEN = 0.05  # of the names: six people and two towns, whose reports answer six questions or more
RETOLD = sum(ENTITIES.values()) // PARTS  # at most: as many as test has
DOCUMENTS = 48_000  # of the pretraining text
VOCABULARY = 1536  # enough for every word of this small language to become one token
POSITIONS = 1024

MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY,
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "hidden_act": "silu", "max_position_embeddings": POSITIONS,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False,
    "tie_word_embeddings": True, "initializer_range": 0.08,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
PRETRAINING = {  # flags of train.py
    "max-steps": 1500, "batch-size": 32, "micro-batch-tokens": 8192, "max-length": POSITIONS, "lr": 2e-3,
    "schedule": "cosine", "warmup-ratio": 0.03, "weight-decay": 0.1, "beta2": 0.95, "adam-eps": 1e-8,
}

PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
SPECIAL_TOKENS = [PAD, BEGIN, END, "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# ------------------------------------------------------------------------------------------- the records

def unseen_names(world: list[dict], share: float, seed: int) -> set[str]:
    """The names of so large a share of the entities of each kind, which no record is to have except those of
    test-unseen.jsonl."""
    rng, names = random.Random(f"unseen {seed}"), set()
    for kind in dict.fromkeys(entity["kind"] for entity in world):
        of_kind = [entity["name"] for entity in world if entity["kind"] == kind]
        names.update(rng.sample(of_kind, round(share * len(of_kind))))
    return names


def make_records(rng: random.Random, named: list[dict], described: list[dict], count: int,
                 lengths: tuple[float, float] | None) -> list[dict]:
    """So many records. named: the entities that may occur in reports. described: those that may be described.
    lengths: words of an instruction and of an answer; None: the quick start's two kinds, shuffled."""
    if lengths:
        return [record_of_length(rng, named, described, *map(round, lengths)) for _ in range(count)]
    order = cycle(rng.sample(described, len(described)))
    records = [record("short_to_long", *description(rng, [entity]))
               for entity in islice(order, round(count * 2 / 5))]
    records += [question_record(rng, named) for _ in range(count - len(records))]
    rng.shuffle(records)
    for each in records:
        if rng.random() < 0.1:
            each["messages"].insert(0, {"role": "system", "content": SYSTEM})
    return records


def retold_records(args: argparse.Namespace, world: list[dict]) -> dict[str, list[dict]]:
    """The records of each file with --retold."""
    of_part = {part: [entity for entity in world if entity["part"] == part]
               for part in ("train", "validation", "test")}
    rngs = {name: random.Random(f"{name} {args.seed}") for name in ("train", "validation", "test", "retold")}
    told = retold(rngs["retold"], rngs["retold"].sample(of_part["test"], args.retold), world)
    kept, described = of_part["train"][::3], [e for i, e in enumerate(of_part["train"]) if i % 3]

    def describe(entities: list[dict]) -> list[dict]:
        return [record("short_to_long", *description(rngs["test"], [entity])) for entity in entities]

    return {"train": [telling_record(rngs["train"], told, described) for _ in range(args.examples)],
            "validation": [telling_record(rngs["validation"], told, of_part["validation"])
                           for _ in range(args.held_out)],
            "test": describe(told), "test-kept": describe(kept)}


def mean_words(records: list[dict]) -> tuple[float, float]:
    """Of instructions, system messages aside, and of answers."""
    instructions, answers = zip(*(each["messages"][-2:] for each in records))
    return tuple(mean(words(message["content"]) for message in side) for side in (instructions, answers))


def records_of_files(args: argparse.Namespace, world: list[dict]) -> dict[str, list[dict]]:
    """The records of each file, by its name. ValueError for lengths that cannot be made, and for too few
    unseen names."""
    lengths = wanted_lengths(args)
    if args.retold:
        if lengths or args.unseen_names:
            raise ValueError(f"--retold {args.retold}: goes with no lengths and no --unseen-names; leave "
                             "them out")
        return retold_records(args, world)
    if 0 < args.unseen_names < LEAST_UNSEEN:
        raise ValueError(f"--unseen-names {args.unseen_names:g}: must be 0, or from {LEAST_UNSEEN} to 0.8: "
                         "with fewer names there is no report that answers a record's questions")
    unseen = unseen_names(world, args.unseen_names, args.seed)
    seen_entities = [entity for entity in world if entity["name"] not in unseen]
    sets = {part: (seen_entities, [entity for entity in seen_entities if entity["part"] == part])
            for part in ("train", "validation", "test")}
    if unseen:
        unseen_entities = [entity for entity in world if entity["name"] in unseen]
        sets["test-unseen"] = (unseen_entities, unseen_entities)
    made = {}
    for name, (named, described) in sets.items():
        count = args.examples if name == "train" else args.held_out
        # A generator for each file, so that a change to one leaves the others as they are.
        made[name] = make_records(random.Random(f"{name} {args.seed}"), named, described, count, lengths)
        for what, got, asked in zip(("instruction", "answer"), mean_words(made[name]), lengths or (0, 0)):
            if asked and abs(got - asked) > 1 + 0.1 * asked:
                raise ValueError(f"--{what}-words {asked:g}: with the other arguments {name}.jsonl would "
                                 f"have {got:.1f}; give about as many, or change the others")
    return made


def write_records(args: argparse.Namespace, folder: Path) -> None:
    """Write the files that the arguments ask for, and print the lengths of their records. ValueError for
    arguments that contradict, and for files that exist without --overwrite."""
    made = records_of_files(args, make_world())
    names = [*(f"{name}.jsonl" for name in made), *(() if args.records_only else ("model",))]
    present = [name for name in names if (folder / name).exists()]
    if present and not args.overwrite:
        raise ValueError(f"--output-dir {folder}: holds {', '.join(present)}; give --overwrite to replace "
                         "such files, or another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in made.items():
        write_lines(folder / f"{name}.jsonl",
                    [{"id": f"{name}-{index:04d}", **each} for index, each in enumerate(records)])
        instruction, answer = mean_words(records)
        print(f"{name}.jsonl: {len(records)} records, {instruction:.1f} words of instruction, {answer:.1f} "
              f"of answer ({instruction / answer:.2f})")


def wanted_lengths(args: argparse.Namespace) -> tuple[float, float] | None:
    """Words of instruction and answer. ValueError for arguments that leave one open, or contradict."""
    instruction, answer, ratio = args.instruction_words, args.answer_words, args.ratio
    if ratio and instruction and answer:
        raise ValueError("--ratio with --instruction-words and --answer-words: give two of the three")
    if ratio:
        # One kind of answer whatever the ratio, so that nothing but the instruction's length changes.
        answer = answer or (instruction / ratio if instruction else FULL_WORDS)
        instruction = instruction or ratio * answer
    if bool(instruction) != bool(answer):
        raise ValueError("--instruction-words and --answer-words: give both, or one of them and --ratio")
    return (instruction, answer) if instruction else None


# ------------------------------------------------------------------------------------------- the model

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
              "pad_token": PAD, "model_max_length": POSITIONS, "clean_up_tokenization_spaces": False,
              "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_untrained_model(folder: Path) -> None:
    """config.json and seeded random weights of a small Llama with grouped queries and a tied head. Layers add
    nothing to begin with: a layer's random output would drown the small embeddings that the layers after it
    read. In short trials only models that began like this learned to copy from a report."""
    import torch

    from model import Llama, init_weights
    from runtime.model_config import ModelConfig
    from runtime.weights import save_model
    model = Llama(ModelConfig.from_dict(MODEL))
    init_weights(model, SEED)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    save_model(model, folder)


def pretrain(work: Path) -> Path:
    """Make the pretraining text and train a new model on every token of it; returns the model's folder."""
    world, rng = make_world(), random.Random(f"text {SEED}")
    documents = [pretraining_document(rng, world) for _ in range(DOCUMENTS)]
    untrained = work / "untrained"
    untrained.mkdir(parents=True, exist_ok=True)
    write_tokenizer(untrained, [message["content"] for messages in documents[:20_000]
                                for message in messages])
    write_untrained_model(untrained)
    write_lines(work / "text.jsonl", [{"messages": messages} for messages in documents])
    flags = {"model": untrained, "train-data": work / "text.jsonl", "loss": "lm", "output-dir": work / "run",
             "cache-dir": work / "cache", "save-dtype": "bf16", **PRETRAINING}
    command = [sys.executable, str(HERE.parent / "train.py"), "--overwrite"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    subprocess.run(command, check=True)
    return work / "run" / "final"


def main(argv: list[str]) -> None:
    parser = Parser(prog="python quickstart/make.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=HERE, metavar="DIR",
                        help="where to write (default: this script's folder)")
    parser.add_argument("--records-only", action="store_true", help="no model: a second")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument("--keep", type=Path, metavar="DIR",
                        help="keep the pretraining text and its run in this folder")
    parser.add_argument("--examples", type=number(int, 1, 100_000), default=EXAMPLES, metavar="N",
                        help="records to train on (default %(default)s)")
    parser.add_argument("--held-out", type=number(int, 1, 100_000), default=HELD_OUT, metavar="N",
                        help="records of each of the other files (default %(default)s)")
    parser.add_argument("--instruction-words", type=number(float, 3, 300), metavar="N",
                        help="mean words of an instruction")
    parser.add_argument("--answer-words", type=number(float, 1, 100), metavar="N",
                        help="mean words of an answer")
    parser.add_argument("--ratio", type=number(float, 0.1, 300), metavar="R",
                        help="words of the instruction for each of the answer; without the other two, "
                        f"answers are descriptions of {FULL_WORDS:g} words")
    parser.add_argument("--unseen-names", type=number(float, 0, 0.8), default=0.0, metavar="SHARE",
                        help="share of the entities that only test-unseen.jsonl names")
    parser.add_argument("--retold", type=number(int, 1, RETOLD), metavar="N",
                        help="entities whose new facts only the training instructions tell")
    parser.add_argument("--seed", type=int, default=SEED, metavar="N",
                        help="of the records (default %(default)s)")
    args = parser.parse_args(argv)
    write_records(args, args.output_dir)
    if args.records_only:
        return

    with tempfile.TemporaryDirectory() as temporary:
        final, model = pretrain(args.keep or Path(temporary)), args.output_dir / "model"
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(final, model)
    print(f"{model.name}/: {sum(file.stat().st_size for file in model.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    run_program(main)
