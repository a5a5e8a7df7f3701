"""Feeds malformed and hostile input to the functions that read what strangers wrote.

    python tests/fuzz.py                            300 inputs of each kind, other ones each time
    python tests/fuzz.py --examples 100000 --only template flags

Every input must be accepted, or be refused with an error that becomes one line
(runtime.distributed.message) and that names the file or flag; within DEADLINE seconds. tests/test_fuzz.py
runs a few inputs of each kind, always the same ones. An input that found a fault is kept as a plain test in
tests/test_foreign.py.
"""

import argparse
import copy
import gzip
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import tokenizers
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

import chat
import data
import train
from eval import compare, look, memorization, results, spans
from model import parameter_count, stored_weights
from config import QUICKSTART
from records import naming, read_records
from runtime import checkpoint, distributed, folder, jinja
from runtime.flags import flag_name
from runtime.foreign import printable
from runtime.model_config import read_config
from runtime.report import print_change
from runtime.tokenizer import Tokenizer
from runtime.weights import checkpoint_tensors

DEADLINE = 10  # seconds for an input
MODEL = QUICKSTART / "model"
SPECIAL = ["<s>", "</s>", "<unk>"]
# A chat template for them.
BODY = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"

# ---------------------------------------------------------------- values that nobody expects

# json.dumps cannot write these: they take the place of a text in what it has written.
DEEP = {'"@deep list@"': "[" * 100_000 + "]" * 100_000, '"@deep object@"': '{"a":' * 2000 + "1" + "}" * 2000,
        '"@digits@"': "9" * 5000}
TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(["", " ", "\0", "\x1b[2J\x9b5m", "\u202e",
                                                         "../../etc/passwd", "/etc/passwd", "~nosuchuser",
                                                         "</s>", "{{ x }}", "x" * 20_000, "\ud800", "1e400",
                                                         "-1", "NaN", "@deep list@", "@deep object@",
                                                         "@digits@", "user", "assistant", "system", "default",
                                                         "llama3", "linear", "float32", "model.safetensors",
                                                         "F32"]))
NUMBERS = st.one_of(st.integers(-3, 3), st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**400, 1e300,
                                                         -1e300, 1e-320, 0.5, float("nan"), float("inf"),
                                                         1e19]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS,
    inner, max_size=4)), max_leaves=8)


def as_json(value: object) -> str:
    text = json.dumps(value)
    for name, deep in DEEP.items():
        text = text.replace(name, deep)
    return text


@st.composite
def changed(draw: st.DrawFn, bases: list) -> object:
    """One of the values of `bases` with up to three of its parts replaced, removed or added."""
    value = copy.deepcopy(draw(st.sampled_from(bases)))
    for _ in range(draw(st.integers(0, 3))):
        inside = value
        while isinstance(inside, dict | list) and inside:
            key = draw(st.sampled_from(sorted(inside) if isinstance(inside, dict) else range(len(inside))))
            if isinstance(inside[key], dict | list) and inside[key] and draw(st.integers(0, 4)):
                inside = inside[key]
                continue
            what = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
            if what == "remove":
                del inside[key]
            elif what == "add" and isinstance(inside, dict):
                inside[draw(TEXTS)] = draw(VALUES)
            else:
                inside[key] = draw(VALUES)
            break
    return draw(VALUES) if draw(st.integers(0, 30)) == 0 else value


def files_of(bases: list) -> st.SearchStrategy[bytes]:
    """Contents of a JSON file: changed, cut, with a byte that is not UTF-8, or nothing like JSON."""
    texts = changed(bases).map(lambda value: as_json(value).encode())
    return st.one_of(texts, texts, texts, texts, st.tuples(texts, st.integers(0, 400)).map(lambda x: x[0][:
        x[1]]), texts.map(lambda text: text[:20] + b"\xff" + text[20:]), st.binary(max_size=30))


# ---------------------------------------------------------------- kinds of input

Names = list[str]  # one of them must be in the error's message
DRIVES: dict[str, tuple[st.SearchStrategy, Callable[[object, Path], Names]]] = {}


def drive(strategy: st.SearchStrategy) -> Callable:
    """Makes a function that names what an input's error must name, and then yields to read the input."""

    def register(function: Callable) -> Callable:
        DRIVES[function.__name__.replace("_", " ")] = strategy, function
        return function

    return register


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello </s>", "weight": 1}]
RECORDS = [{"messages": TURNS}, {"messages": [{"role": "system", "content": "S"}, *TURNS * 2]}, {"prompt":
    "Hi", "completion": "Hello"}, {"instruction": "Hi", "input": "x", "output": "Hello"}, {"conversations":
    [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "S"}]
LINES = st.lists(files_of(RECORDS), min_size=1, max_size=3).map(b"\n".join)


@drive(st.tuples(st.sampled_from((".jsonl", ".json", ".jsonl.gz")), LINES, st.integers(0, 9), st.integers(0,
    60)))
def records(case: tuple, out: Path):
    ending, raw, damage, place = case
    file = out / f"x{ending}"
    if ending == ".jsonl.gz":
        raw = gzip.compress(raw)
        if damage < 3:
            raw = raw[:place] if damage else raw[:place] + b"\x55" + raw[place + 1 :]
    file.write_bytes(raw)
    yield [str(file)]
    template = LOADED["template"]
    for messages, line in read_records(file):
        with naming(f"{file}:{line}"):
            ids, kinds = chat.tokenize(chat.render(messages, template), LOADED["tokenizer"])
        assert len(ids) == len(kinds) and printable(str(messages))


CONFIG = json.loads((MODEL / "config.json").read_text())
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512}


@drive(files_of([CONFIG, {**CONFIG, "rope_scaling": ROPE, "layer_types": ["full_attention"]}, {**CONFIG,
    "model_type": "mistral", "sliding_window": None}]))
def config_json(raw: bytes, out: Path):
    copy_model(out)
    (out / "config.json").write_bytes(raw)
    yield [str(out)]
    config = read_config(out)
    parameter_count(config)
    stored_weights(out, config)


def small_tokenizers() -> list[dict]:
    """One of each of the library's models, with what else a tokenizer.json may have."""
    vocabulary = {text: index for index, text in enumerate([*SPECIAL, "a", "b", "ab", "▁", "H", "i", "##i"])}
    made = []
    for model in (models.BPE(vocabulary, [("a", "b")], unk_token="<unk>"), models.WordLevel(vocabulary,
        "<unk>"), models.WordPiece(vocabulary, unk_token="<unk>"), models.Unigram([(text, -1.0) for text in
        vocabulary], 2)):
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.add_special_tokens(SPECIAL)
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("x", "a"),
                                                     normalizers.Strip(), normalizers.Prepend("▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first"),
                                                           pre_tokenizers.Split("b", "isolated")])
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
        tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.Strip(" ", 1, 0)])
        tokenizer.enable_padding(length=4, pad_id=1, pad_token="</s>")
        tokenizer.enable_truncation(8)
        made.append(json.loads(tokenizer.to_str()))
    return made


def read_tokenizer(out: Path) -> None:
    tokenizer = Tokenizer(out)
    template = chat.load_template("auto" if tokenizer.chat_template else "tulu", tokenizer)
    ids, _ = chat.tokenize(chat.render(TURNS, template), tokenizer)
    tokenizer.decode(ids)


@drive(files_of([json.loads((MODEL / "tokenizer.json").read_text()), *small_tokenizers() * 3]))
def tokenizer_json(raw: bytes, out: Path):
    (out / "tokenizer.json").write_bytes(raw)
    (out / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    yield [str(out)]
    read_tokenizer(out)


SIDE_FILES = {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "eos_token": {"content": "</s>",
    "lstrip": True}, "bos_token": "<s>", "chat_template": BODY, "extra_special_tokens": {"image_token":
    "<image>"}, "additional_special_tokens": ["<a>"], "added_tokens_decoder": {"0": {"content": "<s>",
    "special": True}}}, "special_tokens_map.json": {"eos_token": "</s>", "unk_token": None,
                                                    "extra_special_tokens": ["<b>"]}, "added_tokens.json":
              {"<a>": 90}, "chat_template.json": {"chat_template": [{"name": "default", "template": BODY}]},
              "config.json": {"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}}


@drive(st.sampled_from(sorted(SIDE_FILES)).flatmap(lambda name: st.tuples(st.just(name),
    files_of([SIDE_FILES[name]]))))
def tokenizer_side_files(case: tuple, out: Path):
    name, raw = case
    (out / "tokenizer.json").write_text(json.dumps(small_tokenizers()[0]))
    for other, content in SIDE_FILES.items():
        (out / other).write_bytes(raw if other == name else json.dumps(content).encode())
    yield [str(out), "template"]
    read_tokenizer(out)


NAMES = ["x", "y", "m", "messages", "messages[0].content", "1", "-1", "0.5", "10**9", "99999", "'ab'", "none",
         "'%9999999999d'", "'{:9999999999}'", "true", "loop", "loop.length", "f", "namespace(x=y)"]
OPERATORS = "* ** + - % ~ / // == < in and".split()
FILTERS = """abs center(y) default(y) dictsort first float format(y) groupby('a') indent(y) int items join(y)
    last length list lower map('upper') max min replace(x,y) reverse round(y) select sort string title
    tojson(indent=y) trim truncate(y) unique upper wordcount batch(y) sum urlize""".split()
METHODS = """split(y) center(y) format(y) join(y) replace('a',y) zfill(y) expandtabs(y) items() __class__
    append(y) to_bytes(y,'big') count(y) splitlines() translate({97:y})""".split()
EXPRESSIONS = st.recursive(st.sampled_from(NAMES), lambda inner: st.one_of(
    st.tuples(inner, st.sampled_from(OPERATORS), inner).map(lambda x: f"({x[0]} {x[1]} {x[2]})"),
    st.tuples(inner, st.sampled_from(FILTERS)).map("|".join),
    st.tuples(inner, st.sampled_from(METHODS)).map(".".join),
    st.lists(inner, min_size=1, max_size=3).map(lambda x: f"[{', '.join(x)}]"),
    st.tuples(inner, inner).map(lambda x: f"{x[0]}[{x[1]}:]"),
    st.tuples(st.sampled_from(("range", "f")), inner).map(lambda x: f"{x[0]}({x[1]})")), max_leaves=6)
FRAGMENTS = ["text", "{{ messages[0].content }}", "{% set y = y ~ y %}", "{% set y = [y, y] %}", "{% for",
             "</s>", "{% break %}", "{% include 'x' %}", "{% set n.x = n.x ~ n.x %}"]
BLOCKS = [("{% macro f(x) %}", "{% endmacro %}{{ f(y) }}"), ("{% set y %}", "{% endset %}"),
          ("{% filter upper %}", "{% endfilter %}"), ("{% for m in messages %}" * 60, "{% endfor %}" * 60)]
STATEMENTS = st.recursive(
    st.one_of(EXPRESSIONS.map("{{{{ {} }}}}".format), EXPRESSIONS.map("{{% set y = {} %}}".format),
              st.sampled_from(FRAGMENTS)),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.tuples(st.sampled_from(BLOCKS), inner).map(lambda x: x[1].join(x[0])),
        st.tuples(EXPRESSIONS, inner).map(lambda x: f"{{% for x in {x[0]} %}}{x[1]}{{% endfor %}}"),
        st.tuples(EXPRESSIONS, inner).map(
            lambda x: f"{{% for x in {x[0]} recursive %}}{x[1]}{{{{ loop(y) }}}}{{% endfor %}}"),
        st.tuples(EXPRESSIONS, inner).map(lambda x: f"{{% if {x[0]} %}}{x[1]}{{% endif %}}")), max_leaves=8)


@drive(st.tuples(st.booleans(), STATEMENTS))
def template(case: tuple, out: Path):
    usual, source = case
    source = "{% set n = namespace(x='ab') %}{% set x = 'ab' %}{% set y = 'cd' %}" + source + BODY * usual
    yield ["template"]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    made = chat.Template("fuzz", source, tokens, tuple(SPECIAL), "2026-01-05", "</s>")
    chat.render(TURNS, made)


INDEX = {"metadata": {"total_size": 8}, "weight_map": {"model.norm.weight": "model-1.safetensors",
                                                       "model.embed_tokens.weight": "model-2.safetensors"}}
HEADER = {"__metadata__": {"format": "pt"}, "model.norm.weight": {"dtype": "F32", "shape": [2],
    "data_offsets": [0, 8]}, "model.embed_tokens.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets":
                                                           [8, 16]}}


@drive(st.tuples(files_of([INDEX]), files_of([HEADER]), st.integers(0, 9)))
def weight_files(case: tuple, out: Path):
    index, header, length = case
    (out / "model.safetensors.index.json").write_bytes(index if length > 4 else json.dumps(INDEX).encode())
    for i, name in enumerate(("model.norm.weight", "model.embed_tokens.weight"), 1):
        good = json.dumps({name: {**HEADER[name], "data_offsets": [0, 8]}}).encode()
        text = header if length < 5 and i == 1 else good
        size = len(text) if length != 3 else 2**40
        (out / f"model-{i}.safetensors").write_bytes(size.to_bytes(8, "little") + text + bytes(8))
    (out.parent / "outside.safetensors").touch()
    yield [str(out)]
    for stored in checkpoint_tensors(out).values():
        assert stored.file.resolve().parent == out.resolve(), f"{stored.file} is outside"


STEP = {"step": 1, "epoch": 0.5, "loss": 1.0, "tokens": 10, "trained_tokens": 5, "seconds": 0.1,
        "peak_memory_mb": 9.0, "nll_completion": 1.5, "nll_instruction": None}
EVALUATION = {"step": 1, "data": {"test": {"completion": {"nll_token_mean": 1.0, "tokens": 3}}}, "contents":
              {"test": "a"}, "exact_match": 0.5, "answers": 2}
SETTINGS = {f: getattr(train.Config(), f) for f in vars(train.Config())} | {"model": "m", "train_data":
    ["a.jsonl"]}
IDENTITY = {"launch": "host a", "epochs": 1, "max_steps": 0, "warmup_ratio": 0.1, "train_data": ["hash"],
            "lr": 0.1}
STATE = {"identity": IDENTITY, "step": 1, "optimizer": "AdamW", "crc32": {"model.safetensors": 0}, "numbers":
         {"step.model.norm.weight": [1.0, "F32"]}}
RUN = {"metrics.jsonl": STEP, "eval.jsonl": EVALUATION, "run_config.json": SETTINGS, "identity.json":
       IDENTITY, "checkpoints/step-00000001/state.json": STATE}


@drive(st.sampled_from(sorted(RUN)).flatmap(lambda name: st.tuples(st.just(name), files_of([RUN[name]]),
    st.booleans())))
def run_folder(case: tuple, out: Path):
    name, raw, sealed = case
    (out / "checkpoints/step-00000001").mkdir(parents=True)
    for other, content in RUN.items():
        if other.endswith("state.json"):
            content = {**content, "state_crc32": checkpoint._state_checksum(content)}
        if other == name and sealed and other.endswith("state.json"):
            try:
                content = json.loads(raw)
                content["state_crc32"] = checkpoint._state_checksum(content)
                raw = json.dumps(content).encode()
            except (ValueError, TypeError, RecursionError):
                pass
        (out / other).write_bytes(raw if other == name else json.dumps(content).encode())
    yield [str(out)]
    folder.saved_flag(out, "date", "auto", False)
    for identity in (IDENTITY, {**IDENTITY, "epochs": 2}):
        try:
            folder.check_folder(out, identity, SETTINGS, MODEL)
        except ValueError as error:
            assert str(out) in str(error), error
    try:
        folder._begun_from(out, "x")
        checkpoint.check_files(out / "checkpoints/step-00000001")
        state = checkpoint.read_state(out / "checkpoints/step-00000001")
        train.why_not_extendable(train.Config(), 5, state["identity"], state["step"])
    except ValueError as error:
        assert str(out) in str(error), error
    run = results.read_run("A", str(out), notes := [])
    made = results.make_tables(results.run_cells([run]) | results.read_results([run], [], notes), ["A"])
    for title, rows in made.items():
        compare.table_text(title, rows, ["A"])
    results.curves([run])
    if run.evaluations:
        print_change(run.evaluations[0], EVALUATION)
    for file, fits in (("metrics.jsonl", folder.is_step), ("eval.jsonl", folder.is_evaluation)):
        folder.keep_lines(out / file, 5, fits)


@drive(st.tuples(st.sampled_from([*data.CACHE_FILES, "crc32.json"]), st.one_of(st.binary(max_size=64),
    st.lists(st.integers(-5, 2**31 - 1), max_size=8).map(lambda x: b"".join(i.to_bytes(4, "little",
    signed=True) for i in x)), files_of([data.NO_RECORDS]), st.none()), st.booleans()))
def token_cache(case: tuple, out: Path):
    name, raw, sealed = case
    for file in LOADED["cache"].iterdir():
        shutil.copy(file, out)
    raw = (out / name).read_bytes() if raw is None else raw
    (out / name).write_bytes(raw)
    if sealed and name != "crc32.json":
        sums = json.loads((out / "crc32.json").read_text())
        (out / "crc32.json").write_text(json.dumps({**sums, name: zlib.crc32(raw)}))
    yield [str(out)]
    arrays, report, content = data._open_cache(out, 1)
    dataset = data.Dataset(["x"], **arrays, report=report, key="", content=content,
                           names=data.np.zeros(1, int))
    for example in range(len(dataset)):
        data.collate(dataset, data.np.array([example]), data.np.ones((1, len(chat.KINDS))))


VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@drive(st.dictionaries(st.sampled_from(VARIABLES), st.one_of(st.integers(-2, 3).map(str), st.sampled_from(["",
    " ", "x", "1.5", "1e3", "٣", "9" * 30, "localhost", "\x1b[2J", "29500"])), max_size=6))
def environment(case: dict, out: Path):
    before, meet = dict(os.environ), distributed.meet
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(case)
    distributed.meet = lambda backend: None
    try:
        yield list(VARIABLES)
        distributed.keep = distributed.rank(), distributed.is_main(), distributed.local_rank()
        distributed.join_ranks("cpu")
    finally:
        distributed.meet = meet
        os.environ.clear()
        os.environ.update(before)


PROGRAMS = {"train": train.parse_args, "look": lambda argv: train.parse_args(argv, look.LookConfig), "spans":
            spans.parse_args, "memorization": memorization.parse_args, "compare": compare.parse_args}
FLAG_NAMES = sorted({flag_name(name) for name in vars(look.LookConfig())} | {"--data", "--bootstrap",
    "--confidence", "--batch-size", "--max-new-tokens", "--limit", "--answers"})
WORDS = st.one_of(st.sampled_from(["", "0", "-1", "1", "2", "1e300", "-1e300", "nan", "inf", "1000000000", "1"
                                   + "0" * 12, "9" * 5000, "1_000", "0x10", "true", "~nosuchuser/x",
                                   "\x1b[2J", "it", "fp32", "cpu", "\0", "x.jsonl", "/dev/zero",
                                   "/proc/self/mem", "{", "@"]), st.text(max_size=5))


@drive(st.tuples(st.sampled_from(sorted(PROGRAMS)), st.lists(st.tuples(st.sampled_from(FLAG_NAMES), WORDS),
    max_size=4), st.one_of(st.none(), files_of([SETTINGS]))))
def flags(case: tuple, out: Path):
    program, words, config = case
    argv = [word for pair in words for word in pair]
    needed = {"spans": ["--model", "m", "--data", "x"], "memorization": ["--model", "m", "--data", "x"],
              "compare": ["a", "b", "--output", str(out / "page.html")]}
    argv += needed.get(program, [])
    if config is not None and program in ("train", "look"):
        (out / "run_config.json").write_bytes(config)
        argv += ["--config", str(out / "run_config.json")]
    yield ["--", str(out), "argument"]
    PROGRAMS[program](argv)


# ---------------------------------------------------------------- running

LOADED: dict[str, object] = {}


def copy_model(out: Path) -> None:
    """The quick start's model without config.json; its weights by a link, which is not written to."""
    for file in MODEL.iterdir():
        if file.suffix == ".safetensors":
            (out / file.name).symlink_to(file)
        elif file.name != "config.json":
            shutil.copy(file, out)


def prepare(out: Path) -> None:
    """What several kinds read: a tokenizer, a template, a token cache."""
    if not LOADED:
        LOADED["tokenizer"] = Tokenizer(MODEL)
        LOADED["template"] = chat.load_template("auto", LOADED["tokenizer"], "2026-01-05")
        file = out / "cached.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
        made = data.load_dataset([str(file)], LOADED["tokenizer"], LOADED["template"], 64, "truncate", out /
                                 "cache")
        LOADED["cache"] = out / "cache" / made.key


@dataclass
class Tally:
    """What became of the inputs of one kind. faults: {where and what: an input}."""

    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    faults: dict[str, object] = field(default_factory=dict)


def attempt(kind: str, case: object, out: Path, tally: Tally) -> None:
    """Read one input and note what happens."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    reading, names = DRIVES[kind][1](case, out), []
    started, fault = time.process_time(), ""
    try:
        names = next(reading)
        started = time.process_time()
        next(reading, None)
        tally.accepted += 1
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        line = distributed.message(error) if isinstance(error, Exception) else None
        if line is None:
            frames = [f"{Path(x.filename).name}:{x.name}" for x in traceback.extract_tb(error.__traceback__)]
            fault = f"{type(error).__name__} in {' > '.join(frames[-3:])}: {str(error)[:100]}"
        elif not any(name in line for name in names):
            fault = f"no name in {line[:100]!r}"
        tally.refused += not fault
    finally:
        reading.close()
    seconds = time.process_time() - started
    tally.slowest = max(tally.slowest, seconds)
    if seconds > DEADLINE:
        fault = fault or "too slow"
    if fault:
        tally.faults.setdefault(fault, case)


def hunt(kind: str, examples: int, out: Path, number: int) -> Tally:
    """Read so many inputs of a kind, chosen by the seed `number`."""
    prepare(out)
    tally = Tally()

    @seed(number)
    @settings(max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(DRIVES[kind][0])
    def each(case: object) -> None:
        attempt(kind, case, out / "case", tally)

    each()
    return tally


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--examples", type=int, default=300, help="inputs of each kind")
    parser.add_argument("--only", nargs="+", default=sorted(DRIVES), choices=sorted(DRIVES), metavar="KIND")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    args = parser.parse_args(argv)
    resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
    # Many templates never end.
    jinja.SECONDS = 0.5
    print(f"seed {args.seed}\n{'kind':<22}{'inputs':>8}{'accepted':>10}{'refused':>9}{'faults':>8}"
          f"{'slowest':>9}")
    found = 0
    with tempfile.TemporaryDirectory() as out:
        for kind in args.only:
            # What is printed about records and runs is no part of the table.
            with open(os.devnull, "w") as nowhere:
                sys.stdout, shown = nowhere, sys.stdout
                try:
                    tally = hunt(kind, args.examples, Path(out), args.seed)
                finally:
                    sys.stdout = shown
            inputs = tally.accepted + tally.refused + len(tally.faults)
            print(f"{kind:<22}{inputs:>8}{tally.accepted:>10}{tally.refused:>9}{len(tally.faults):>8}"
                  f"{tally.slowest:>7.1f} s", flush=True)
            for fault, case in tally.faults.items():
                print(f"  {printable(fault)}\n    {printable(repr(case))[:400]}", flush=True)
            found += len(tally.faults)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
