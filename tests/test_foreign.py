"""Malformed and hostile input: each ends soon in an error that names the file, line or flag, and takes little
memory. tests/fuzz.py looks for more."""
import json
import os
import signal
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import jinja2.sandbox
import pytest

import chat
import data
import records
import train
from eval import generate, look, results, spans
from eval.common import Loaded, read_objects
from runtime import checkpoint, distributed, folder, foreign
from runtime.flags import check_flag
from runtime.jinja import Refused, render_jinja
from runtime.model_config import ModelConfig
from runtime.model_folder import resolve_model
from runtime.start import launched
from runtime.tokenizer import Tokenizer, naming_file
from tiny import ROOT

MODEL = ROOT / "quickstart" / "model"
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
DEEP = "[" * 100_000 + "]" * 100_000


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fails if what runs in here takes more seconds of this process, or waits for a minute."""
    def late(*_: object) -> None:
        pytest.fail(f"has not ended after {seconds} s")
    before = [signal.signal(number, late) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), before):
            signal.signal(number, handler)


# ---------------------------------------------------------------- files


def test_json_may_be_nested_a_hundred_levels_deep():
    for text in ("[" * 100 + "]" * 100, '{"a":' * 99 + "[]" + "}" * 99, "1", '"x"', "[[], {}]"):
        assert foreign.parse_json(text) == json.loads(text)
    for text in ("[" * 101 + "]" * 101, "[" * 101 + "1" + "]" * 101, '{"a":' * 101 + "1" + "}" * 101, DEEP):
        with pytest.raises(ValueError, match="nested deeper than 100 levels"):
            foreign.parse_json(text)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json",
                                  "added_tokens.json", "special_tokens_map.json",
                                  "model.safetensors.index.json", "records.jsonl", "records.json",
                                  "run_config.json", "state.json", "result.json"])
def test_deep_json_is_refused_wherever_it_stands(name, tmp_path):
    for file in MODEL.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).write_text(DEEP)
    read = {"config.json": train.read_config, "model.safetensors.index.json": train.model_fingerprint,
            "run_config.json": lambda x: train.parse_args(["--config", str(x / name)]), "state.json":
            checkpoint.read_state}.get(name, Tokenizer)
    if name.startswith("records"):
        def read(x): return list(records.read_records(x / name))
    if name == "result.json":
        notes = []
        results.read_results([results.Run("A", tmp_path, {}, [], [], None)], [str(tmp_path / name)], notes)
        assert "nested deeper" in notes[0] and name in notes[0]
        return
    with within(10), pytest.raises(ValueError, match="nested deeper") as error:
        read(tmp_path)
    assert (name if name != "state.json" else str(tmp_path)) in str(error.value)


def special_files(out: Path) -> dict[str, str]:
    """What has a file's name and is none: {how its error begins: path}."""
    os.mkfifo(out / "pipe")
    (out / "loop").symlink_to(out / "loop")
    (out / "folder").mkdir()
    return {"is a pipe or device": out / "pipe", "Too many levels": out / "loop", "is a folder": out /
            "folder", "is a link to what does": out / "nothing", "is a pipe or device, ": Path("/dev/zero")}


def test_what_is_no_file_is_not_waited_for_nor_read_forever(tmp_path):
    for says, target in special_files(tmp_path).items():
        for name in ("x.jsonl", "x.json", "x.jsonl.gz", "x.jinja", "config.json", "tokenizer.json",
                     "run.json"):
            file = tmp_path / name
            file.unlink(missing_ok=True)
            file.symlink_to(target)
            with within(10), pytest.raises(ValueError) as error:
                if ".jsonl" in name or name == "x.json":
                    with pytest.raises(ValueError, match="x.json"):
                        data.hash_file(file)
                    list(records.read_records(file))
                elif name == "x.jinja":
                    chat.load_template(str(file), Tokenizer(MODEL))
                elif name == "run.json":
                    train.parse_args(["--config", str(file)])
                else:
                    {"config.json": train.read_config, "tokenizer.json": Tokenizer}[name](tmp_path)
            assert name in str(error.value) and says.strip(", ") in str(error.value)
            file.unlink()


def test_a_line_is_read_up_to_its_limit_only(tmp_path):
    file = tmp_path / "x.jsonl"
    with open(file, "w") as out:
        out.write(json.dumps({"messages": TURNS}) + "\n")
        out.write('"')
        for _ in range(100):
            out.write("x" * 2**20)
    for read in (lambda: list(records.read_records(file)), lambda: read_objects(str(file), {}, "a record")):
        tracemalloc.start()
        with pytest.raises(ValueError, match="x.jsonl:2: a record has more than 16,777,216 characters"):
            read()
        assert tracemalloc.get_traced_memory()[1] < 90e6
        tracemalloc.stop()


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "x.jsonl").write_text("\ufeff" + json.dumps({"messages": TURNS}) + "\n", encoding="utf-8")
    assert [line for _, line in records.read_records(tmp_path / "x.jsonl")] == [1]


def test_a_file_that_is_read_whole_has_a_limit_too(tmp_path):
    (tmp_path / "x").write_text("x" * 11)
    assert foreign.read_text(tmp_path / "x", limit=11) == "x" * 11
    with pytest.raises(ValueError, match="x: has more than 10 characters"):
        foreign.read_text(tmp_path / "x", limit=10)


def test_a_user_that_does_not_exist_is_no_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--model ~nosuchuser: no such folder"):
        resolve_model("~nosuchuser")
    source = SimpleNamespace(tokenizer=Tokenizer(MODEL))
    template = chat.load_template("auto", source.tokenizer, "2026-01-05")
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": TURNS}))
    data.load_dataset(["x.jsonl"], source.tokenizer, template, 64, "truncate", "~nosuchuser/cache")
    assert (tmp_path / "~nosuchuser").is_dir()


# ---------------------------------------------------------------- records and what is shown of them


def test_a_record_of_very_many_messages_is_refused_at_once():
    template = chat.load_template("tulu", Tokenizer(MODEL))
    with within(2), pytest.raises(ValueError, match="has 32,000 messages, more than 1,000: split the record"):
        chat.render(TURNS * 16_000, template)


def test_large_records_are_tokenized_few_at_a_time():
    pieces = [chat.Piece("x" * 2**20, chat.TEMPLATE)]
    batches = []
    waiting = iter([(pieces, 0, line) for line in range(9)] + [(pieces[:0], 0, line) for line in range(600)])
    while batch := data._batch(waiting):
        batches.append(len(batch))
    assert batches == [5, 512, 92]


def test_what_commands_a_terminal_is_shown_as_json_writes_it():
    assert foreign.printable("a\tb\nc é 日本 👩\u200d👩") == "a\tb\nc é 日本 👩\u200d👩"
    hostile = "\x1b[2J\x07\r\x7f\x9b5m\u202e\u2066\u2028\ud800"
    shown = foreign.printable(hostile)
    assert shown.isascii() and shown.isprintable()
    assert json.loads(f'"{shown}"') == hostile


@pytest.mark.parametrize("colour", [True, False])
def test_an_example_with_a_terminals_commands_is_shown_as_text(colour, tmp_path):
    tokenizer = Tokenizer(MODEL)
    record = {"messages": [{"role": "user", "content": "a\x1b[2Jb\x9b\u202e"}, TURNS[1]]}
    (tmp_path / "x.jsonl").write_text(json.dumps(record))
    template = chat.load_template("auto", tokenizer)
    dataset = data.load_dataset([str(tmp_path / "x.jsonl")], tokenizer, template, 64, "truncate", tmp_path /
                                "cache")
    text = look.coloured(dataset, 0, tokenizer, colour)
    assert "a\\u001b[2Jb\\u009b\\u202e" in text
    assert not {"\x1b[2J", "\x9b", "\u202e"} & {text[i:i + n] for i in range(len(text)) for n in (1, 4)}


def test_errors_and_answers_are_printable(capsys):
    distributed.report_error(ValueError("x\x1b[2Jy" + "z" * 10_000))
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and len(shown) < 5000 and shown.count("\n") == 1
    engine = SimpleNamespace(answers=lambda *args, **more: (args[6](0, token) for token in range(3)))
    tokenizer = SimpleNamespace(decode=lambda ids: "".join("a\x1bb"[i] for i in ids))
    template = chat.load_template("auto", Tokenizer(MODEL))
    loaded = Loaded("scripted", None, Tokenizer(MODEL), template, None, None)
    loaded.engine, loaded.tokenizer.decode = engine, tokenizer.decode
    args = SimpleNamespace(max_new_tokens=3, temperature=0, top_p=1, top_k=0, seed=0,
                           prompt_lookup_num_tokens=0, chat=False)
    assert generate.reply(loaded, TURNS[:1], args) == "a\x1bb"
    assert capsys.readouterr().out == "a\\u001bb\n"


# ---------------------------------------------------------------- templates

BOMBS = {"'x' * 10**12": "makes more", "9**(9**9)": "makes more", "10**(10**9)": "makes more", "[0] * 10**9":
         "makes more", "'%1000000000d' % 1": "makes more", "'%*d' % (10**10, 1)": "makes more",
         "'{:>10000000000}'.format(1)": "makes more", "'{:{}}'.format(1, 10**10)": "takes a width",
         "'%10000000000d'|format(1)": "makes more", "'x'|center(10**11)": "makes more", "'x'.zfill(10**11)":
         "makes more", "('x' * 10**6).replace('x', 'x' * 10**6)": "makes more",
         "('x' * 10**6)|replace('x', 'x' * 10**6)": "makes more", "('x' * 10**6).join('x' * 10**6)":
         "makes more", "range(99999)|join('x' * 10**6)": "makes more", "[1]|tojson(indent=10**10)":
         "makes more", "1|round(-10**9)": "makes more", "('x ' * 10**8).split()": "makes more",
         "(5).to_bytes(10**10, 'big')": "makes more", "('x' * 9).translate({120: 'x' * 10**8})": "makes more",
         "range(10**9)": "Range too big", "[1]|slice(10**9)": "No filter named 'slice'", "lipsum(n=10**9)":
         "undefined", "''.__class__.__mro__": "unsafe", "1 + " * 20_000 + "1": "is nested too deeply",
         "(" * 50_000 + "1" + ")" * 50_000: "is nested too deeply"}
LOOPS = "{% for a in range(9999) %}" * 3 + "{% endfor %}" * 3
PROGRAMS = {LOOPS:
            "takes longer", "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}":
            "is nested too deeply",
            "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}":
            "takes longer", "{% filter upper %}{% for a in range(9999) %}{% for b in range(9999) %}" + "x" *
            99 + "{% endfor %}{% endfor %}" "{% endfilter %}": "takes longer|makes more",
            "{% set n = namespace(x='xx') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}":
            "makes more",
            "{% set n = namespace(x='xx') %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}":
            "makes more",
            "{% set n = namespace(x='xx') %}{% for a in range(99) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
            "{% set n.x = y %}"
            "{% endfor %}": "makes more",
            "{% set n = namespace(x=[1]) %}{% for a in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
            "{{ n.x == n.x }}":
            "makes more", "{% for a in [1] %}" * 60 + "{% endfor %}" * 60: "nested blocks",
            "{% include '/etc/passwd' %}": "no loader", "x" * 300_000: "has 300,000 characters"}


@pytest.mark.parametrize("source, says", [*((f"{{{{ {expression} }}}}", says) for expression, says in
                                            BOMBS.items()), *PROGRAMS.items()], ids=lambda text: text[:40])
def test_a_template_that_asks_for_too_much_is_refused(source, says, monkeypatch):
    monkeypatch.setattr("runtime.jinja.SECONDS", 0.3)
    with within(10), pytest.raises(ValueError, match=f"template bomb.*({says})") as error:
        render_jinja(source, "bomb", "2026-01-05", messages=TURNS)
    # Refused would mean that the template may take other messages.
    assert not (isinstance(error.value, Refused) and says.startswith(("makes", "takes", "is nested")))


def test_too_much_is_no_refusal_of_the_messages(tmp_path, monkeypatch):
    """One that takes too long for a generation prompt only must not pass for one without such a prompt."""
    monkeypatch.setattr("runtime.jinja.SECONDS", 0.3)
    tokenizer = Tokenizer(MODEL)
    end = tokenizer.eos_token
    source = "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
    source += "{% if add_generation_prompt %}" + LOOPS + "{% endif %}"
    (tmp_path / "x.jinja").write_text(source)
    with pytest.raises(ValueError, match="template .*x.jinja takes longer than"):
        chat.load_template(str(tmp_path / "x.jinja"), tokenizer)


@pytest.mark.parametrize("source", [
    "{% for m in ms %}{{ loop.index }}/{{ loop.length }} {{ loop.last }} {{ m.role ~ ': ' ~ m.content }}\n"
    "{% endfor %}",
    "{% for m in ms recursive %}{{ m.role if m.role else m }}{% if m.role %}{{ loop([m.content]) }}"
    "{% endif %}{% endfor %}",
    "{{ ms[1:]|length }} {{ ms[0].content[:1] }} {{ 'a' * 3 }} {{ [1] * 2 }} {{ 2**8 }} {{ 7 % 4 }}",
    "{{ '%s-%03d' % ('x', 7) }}{{ '{:>4}|{a}'.format(1, a=2) }} {{ '%s'|format('y') }}{{ none }}",
    "{% macro f(x, y=2) %}<{{ x }}{{ y }}{{ caller() if caller }}>{% endmacro %}{{ f(1) }}"
    "{% call f(3) %}z{% endcall %}",
    "{% set n = namespace(l=[]) %}{% for m in ms %}{% set n.l = n.l + [m.role] %}{% endfor %}"
    "{{ n.l|join('-') }}",
    "{{ ms|map(attribute='role')|join }} {{ ms|selectattr('role', 'equalto', 'user')|list }}",
    "{{ {'b': 1, 'a': [1, 2]}|dictsort }} {{ 'a b c'.split()|reverse|list }}{{ ' x '|trim|upper|center(9) }}",
    "{% for a, b in {'x': 1}.items() %}{{ a, b }}{% else %}-{% endfor %}{{ ('a' ~ 1)|replace('a', 'bb') }}",
    "{% filter upper %}a{{ 'b' }}{% endfilter %}{% set t %}x{{ 1 }}{% endset %}{{ t }}{{ range(3)|list }}"])
def test_within_its_budget_a_template_writes_what_jinja_writes(source):
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    assert render_jinja(source, "x", "2026-01-05",
                        ms=TURNS) == plain.from_string(source).render(ms=TURNS)


def test_a_template_that_is_no_text_is_named(tmp_path):
    for file in MODEL.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for value in (5, {"a": 1}, [{"name": ["x"]}, {"name": "default", "template": 7}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        with pytest.raises(ValueError,
                           match="chat_template in chat_template.json or tokenizer_config.json must be"):
            Tokenizer(tmp_path)


# ---------------------------------------------------------------- checkpoint folders


@pytest.mark.parametrize("name, value", [("head_dim", 2**31), ("hidden_size", 10**12), ("num_hidden_layers",
    10**6), ("vocab_size", 10**30), ("num_attention_heads", 2**40), ("rms_norm_eps", 10**400), ("rope_theta",
    10**400), ("head_dim", "x" * 10**6), ("max_position_embeddings", 10**30)])
def test_a_size_beyond_any_model_is_refused_at_once(name, value):
    config = json.loads((MODEL / "config.json").read_text()) | {name: value}
    with within(5), pytest.raises(ValueError,
                                  match=f"config.json: {name} is .*it must be .* up to 1") as error:
        ModelConfig.from_dict(config)
    assert len(str(error.value)) < 500


def test_whatever_a_librarys_error_is_the_file_is_named():
    panic = type("PanicException", (BaseException,), {})
    for error, says in ((panic("index out of bounds"),
                         "x.json: does not hold what it should .*index out of bounds"), (KeyError("model"),
        r"x.json: does not hold what it should \(KeyError\('model'\)\)"), (Exception("missing field"),
        "x.json: missing field"), (ValueError("bad"), "x.json: bad"), (ValueError("x.json: bad"),
        "^x.json: bad$")):
        with pytest.raises(ValueError, match=says), naming_file("x.json"):
            raise error
    for error in (KeyboardInterrupt(), FileNotFoundError(2, "gone", "y")):
        with pytest.raises(type(error)), naming_file("x.json"):
            raise error


@pytest.mark.parametrize("name, content", [("tokenizer_config.json", {"tokenizer_class": 5}), ("config.json",
    {"model_type": ["llama"]}), ("tokenizer_config.json", {"extra_special_tokens": 5}), ("added_tokens.json",
    {"x": "y"}), ("tokenizer_config.json", {"added_tokens_decoder": {"x": 1}}), ("special_tokens_map.json",
    {"eos_token": 5}), ("tokenizer_config.json", {"model_specific_special_tokens": [1]})])
def test_a_side_file_with_values_of_other_types_is_one_line(name, content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((MODEL / "tokenizer.json").read_bytes())
    (tmp_path / name).write_text(json.dumps(content))
    try:
        Tokenizer(tmp_path)
    except ValueError as error:
        assert str(tmp_path) in str(error)


# ---------------------------------------------------------------- run folders and the token cache


def sealed(out: Path, **change: object) -> Path:
    """A checkpoint folder whose state.json has the right checksum."""
    state = {"step": 1, "identity": {}, "optimizer": "AdamW", "crc32": {}, "numbers": {}} | change
    state["state_crc32"] = checkpoint._state_checksum(state)
    (out / "state.json").write_text(json.dumps(state))
    return out


def test_a_state_with_a_right_checksum_and_other_content_is_refused(tmp_path):
    assert checkpoint.read_state(sealed(tmp_path))["step"] == 1
    for name, value in (("step", "1"), ("identity", []), ("optimizer", None), ("crc32", [1]), ("numbers", 5)):
        with pytest.raises(ValueError, match=f"state.json: {name} is missing or not of type"):
            checkpoint.read_state(sealed(tmp_path, **{name: value}))
    for name in ("../outside", "/etc/passwd", "a/b"):
        with pytest.raises(ValueError, match=f"state.json names {name}, which is not in the folder"):
            checkpoint.check_files(sealed(tmp_path, crc32={name: 0}))
    assert "does not say how long" in train.why_not_extendable(train.Config(), 5, {"epochs": "x"}, 1)


STEP = {"step": 1, "epoch": 1.0, "tokens": 9, "trained_tokens": 5, "seconds": 0.5, "peak_memory_mb": 1.0}
FOREIGN = ["[]", "5", "{}", '"x"', "null", '{"step": "1"}', '{"step": 1e400}', DEEP, "\x00", "{",
           '{"step": [1]}']


def test_lines_of_other_programs_in_a_runs_logs_are_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes("\n".join([json.dumps(STEP), *FOREIGN, json.dumps({**STEP, "step": 2})]).encode() +
                     b"\n\xff\n")
    lines, others = folder.read_log(file, folder.is_step)
    assert [line["step"] for line in lines] == [1, 2] and others == len(FOREIGN) + 1
    folder.keep_lines(file, 1, folder.is_step)
    assert file.read_text() == json.dumps(STEP) + "\n"
    for change in ({"tokens": None}, {"seconds": "x"}, {"nll_completion": [1]}, {"epoch": 10**400}):
        assert not folder.is_step({**STEP, **change})
    good = {"step": 1, "data": {"a": {"completion": {"nll_token_mean": 1.0}}}, "contents": {"a": "x"}}
    assert folder.is_evaluation(good)
    for change in ({"data": 5}, {"contents": {}}, {"contents": {"a": []}}, {"contents": {"a": {}}},
                   {"data": {"a": 5}}, {"exact_match": "x"}, {"data": {"a":
        {"completion": {"nll_token_mean": float("nan")}}}}):
        assert not folder.is_evaluation({**good, **change})


@pytest.mark.parametrize("content, date", [('{"date": "2026-01-05"}', "2026-01-05"), ('{"date": 5}', ""),
                                           ('{"date": null}', ""), ("[1]", ""), ("{", ""), ("{}", "")])
def test_only_text_is_taken_over_from_a_runs_identity(content, date, tmp_path):
    (tmp_path / "identity.json").write_text(content)
    assert folder.saved_flag(tmp_path, "date", "auto", False) == date
    for from_scratch in (("never", False), ("auto", True), (str(tmp_path / "none"), False)):
        assert folder.saved_flag(tmp_path, "date", *from_scratch) == ""


def test_a_run_config_of_another_program_names_no_checkpoint(tmp_path):
    (tmp_path / "run_config.json").write_text(json.dumps({"resume": [1]}))
    assert not folder._begun_from(tmp_path, "x")


@pytest.mark.parametrize("name, content", [("kinds.bin", b"\x09"), ("ids.bin", b"\xff\xff\xff\xff"),
                                           ("offsets.bin", b"\x01"), ("report.json", b"[]"), ("report.json",
    DEEP.encode()), ("report.json", b"{}"), ("origins.bin", b""), ("counts.bin", b"")])
def test_a_cache_with_right_checksums_and_other_content_is_made_again(name, content, tmp_path, capsys):
    tokenizer = Tokenizer(MODEL)
    template = chat.load_template("auto", tokenizer, "2026-01-05")
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": TURNS}))

    def load() -> data.Dataset:
        return data.load_dataset([str(tmp_path / "x.jsonl")], tokenizer, template, 64, "truncate", tmp_path /
                                 "c")
    made = load()
    cache = tmp_path / "c" / made.key
    old = (cache / name).read_bytes()
    raw = content if name == "report.json" else content + old[len(content):] if content else old[:-len(old) //
        2]
    (cache / name).unlink()
    (cache / name).write_bytes(raw)
    sums = json.loads((cache / "crc32.json").read_text())
    (cache / "crc32.json").write_text(json.dumps({**sums, name: zlib.crc32(raw)}))
    assert (load().ids == made.ids).all() and "is damaged; tokenizing again" in capsys.readouterr().err
    os.unlink(cache / name)
    os.mkfifo(cache / name)
    with within(10):
        assert (load().ids == made.ids).all()


# ---------------------------------------------------------------- the launcher's environment


def launch(monkeypatch, **variables: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


TWO = dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29500")


@pytest.mark.parametrize("variables, says", [(dict(RANK="1"),
                                              "RANK=1: must be less than WORLD_SIZE, which is not set"),
                                             (dict(RANK=""), "RANK=: must be a whole number, 0 or more"),
                                             (dict(RANK="-1"), "RANK=-1: must be"), (dict(RANK="x"),
    "RANK=x: must be"), (dict(WORLD_SIZE="0"), "WORLD_SIZE=0: must be a whole number, 1 or"),
                                             (dict(WORLD_SIZE="2"), "WORLD_SIZE=2, but RANK is not set"),
                                             (dict(RANK="9" * 30), "RANK=9999"), (dict(LOCAL_WORLD_SIZE="0"),
    "LOCAL_WORLD_SIZE=0: must be"), (dict(LOCAL_RANK="1.5"), "LOCAL_RANK=1.5: must"),
                                             (dict(LOCAL_WORLD_SIZE="1", LOCAL_RANK="1"),
                                              "LOCAL_RANK=1: must be less than LOCAL_WORLD_SIZE, which is 1"),
                                             (TWO | dict(RANK="2"),
                                              "RANK=2: must be less than WORLD_SIZE, which is 2"), (TWO |
    dict(MASTER_PORT=""), "MASTER_PORT=: must be rank 0's port"), (TWO | dict(MASTER_PORT="x"),
    "MASTER_PORT=x"), (TWO | dict(MASTER_PORT="70000"), "MASTER_PORT=70000"), (TWO | dict(MASTER_ADDR=""),
    "MASTER_ADDR is not set")])
def test_an_environment_that_torchrun_would_not_set_is_named(variables, says, monkeypatch):
    launch(monkeypatch, **variables)
    # Errors are reported by rank, and memory is shared by local ranks, before anything is checked.
    assert distributed.rank() >= 0 and distributed.world_size() >= 1 and launched("LOCAL_WORLD_SIZE",
        1) >= 1
    with pytest.raises(ValueError) as error:
        distributed.join_ranks("cpu")
    assert str(error.value).startswith(says)


def test_environments_of_other_launchers_are_accepted(monkeypatch):
    for variables in ({}, dict(RANK="0"), dict(RANK="0", WORLD_SIZE="1"), dict(WORLD_SIZE="1",
        LOCAL_RANK="3"), TWO | dict(LOCAL_RANK="1")):
        launch(monkeypatch, **variables)
        distributed._check_environment()


def test_a_rank_says_what_it_waits_for_and_names_the_address_when_it_gives_up(monkeypatch, capsys):
    launch(monkeypatch, **TWO | dict(MASTER_PORT="1"))
    place = "rank 0 at MASTER_ADDR=localhost MASTER_PORT=1"
    with within(30), pytest.raises(ValueError,
                                   match=f"rank 1 cannot reach {place} "):
        distributed.meet("gloo", timedelta(seconds=1), silent=0.2)
    waits = f"rank 1 waits for the answer of {place}; it gives up after 0:00:01\n"
    assert waits in capsys.readouterr().err


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("name, value, says", [("lr", "1e300",
                                                "--lr 1e300: must be a finite number above 0 and below 100"),
                                               ("epochs", "1e300", "--epochs 1e300: must be"), ("epochs",
    10**12, "--epochs 1000000000000: must be a whole number, 1 or more and below 2,147,483,648"),
                                               ("max_length", str(10**12),
                                                "--max-length 1000000000000: must be"), ("seed", 2**40,
    "--seed 1099511627776: must be"), ("batch_size", 10**400, "--batch-size 1000"), ("weight_decay", 1e300,
    r"--weight-decay 1e\+300: must be .*below 1,000"), ("kl_weight", "nan", "--kl-weight nan: must be"),
                                               ("ranks", 10**9,
                                                "--ranks 1000000000: must be .* below 10,000"), ("max_steps",
    -10**9, "--max-steps -1000000000: must be"), ("lr", "9" * 10**5, "--lr 999")])
def test_numbers_that_no_run_can_have_are_refused(name, value, says):
    with within(5), pytest.raises(ValueError, match=says) as error:
        check_flag(look.LookConfig.__dataclass_fields__[name], value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("flag, value, says", [("--bootstrap", str(10**9),
                                                "--bootstrap 1000000000: must be .* from 0 to 1,000,000 "),
                                               ("--confidence", "1e300",
                                                "--confidence 1e300: must be a number from"),
                                               ("--confidence", "nan", "--confidence nan"), ("--max-length",
    str(10**12), "--max-length 1000000000000: must be"), ("--seed", str(10**30), "--seed 1000"),
                                               ("--micro-batch-tokens", "-" + str(10**12),
                                                "--micro-batch-tokens -1000"), ("--seed", "x" * 10**5,
    "--seed")])
def test_numbers_that_no_evaluation_can_have_are_refused(flag, value, says):
    with within(5), pytest.raises(ValueError, match=says) as error:
        spans.parse_args(["--model", "m", "--data", "x", flag, value])
    assert len(str(error.value)) < 3000
