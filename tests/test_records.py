"""Records of every layout and file type -> messages, the files that names stand for, and what is refused."""
import argparse
import contextlib
import csv
import gzip
import io
import json
import os
import random
import re
import sys
import tracemalloc
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

import forks
import records
import train
from config import local_files
from data import Dataset
from eval import generate, memorization, spans, study
from eval.examples import read_examples
from model import load_model
from records import data_files, parse_columns, read_all, read_records, to_messages
from tiny import flags, make_model

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "H"},
                                      {"type": "text", "text": "i", "image": None}]},
         {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}]

LAYOUTS = [
    ({"messages": MESSAGES, "id": 7}, MESSAGES),
    ({"messages": PARTS}, MESSAGES),
    ({"messages": SHAREGPT}, MESSAGES),
    ({"messages": json.dumps(MESSAGES)}, MESSAGES),
    ({"messages": repr(MESSAGES)}, MESSAGES),       # as pandas writes a list into .csv
    (MESSAGES, MESSAGES),
    (SHAREGPT, MESSAGES),
    ({"prompt": "Hi", "completion": "Hello"}, MESSAGES),
    ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, MESSAGES),
    ({"prompt": json.dumps(MESSAGES[:1]), "completion": json.dumps(MESSAGES[1:])}, MESSAGES),
    ({"prompt": PARTS[0]["content"], "completion": "Hello"}, MESSAGES),
    # What is asked is given: its answers are not trained.
    ({"prompt": [*MESSAGES, MESSAGES[0]], "completion": MESSAGES[1:]},
     [MESSAGES[0], {**MESSAGES[1], "weight": 0}, *MESSAGES]),
    ({"prompt": [MESSAGES[0], {**MESSAGES[1], "train": True}, MESSAGES[0]], "completion": "Hello"},
     [*MESSAGES, *MESSAGES]),
    ({"instruction": "Hi", "output": "Hello"}, MESSAGES),
    ({"instruction": "Hi", "input": "", "output": "Hello"}, MESSAGES),
    ({"instruction": "Translate.", "input": "Hi", "output": "Salut"},
     [{"role": "user", "content": "Translate.\n\nHi"}, {"role": "assistant", "content": "Salut"}]),
    ({"instruction": "Hi", "context": "", "response": "Hello", "category": "open_qa"}, MESSAGES),
    ({"instruction": "Who?", "context": "I am.", "response": "You."},
     [{"role": "user", "content": "Who?\n\nI am."}, {"role": "assistant", "content": "You."}]),
    ({"prompt": "Hi", "response": "Hello"}, MESSAGES),
    ({"question": "Hi", "answer": "Hello"}, MESSAGES),
    ({"input": "Hi", "output": "Hello"}, MESSAGES),
    ({"conversations": SHAREGPT}, MESSAGES),
    ({"conversations": MESSAGES}, MESSAGES),
    ({"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}]},
     [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]),
    ({"conversations": SHAREGPT, "system": "S"}, [{"role": "system", "content": "S"}, *MESSAGES]),
    ({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0}]}, [MESSAGES[0], {**MESSAGES[1], "weight": 0}]),
    ({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 1, "name": "x", "id": 3}]},  # the template may read
     [MESSAGES[0], {**MESSAGES[1], "name": "x", "id": 3}]),
    ({"conversations": [{**SHAREGPT[0], "name": "x"}, SHAREGPT[1]]},
     [{**MESSAGES[0], "name": "x"}, MESSAGES[1]]),
    ({"messages": MESSAGES, "system": "S"}, [{"role": "system", "content": "S"}, *MESSAGES]),
    ({"messages": MESSAGES, "system_prompt": "S"}, [{"role": "system", "content": "S"}, *MESSAGES]),
    ({"messages": [{"role": "system", "content": "S"}, *MESSAGES], "system": "S"},
     [{"role": "system", "content": "S"}, *MESSAGES]),
    # A conversation, and the question and answer that it consists of.
    ({"instruction": "Hi", "response": "Hello", "conversations": SHAREGPT}, MESSAGES),
    ({"messages": [MESSAGES[0], {**MESSAGES[1], "id": 3}], "conversations": SHAREGPT},
     [MESSAGES[0], {**MESSAGES[1], "id": 3}]),
    ({"messages": MESSAGES, "prompt": SHAREGPT, "context": [{"text": "Hi", "id": 7}], "input": [[], ""]},
     MESSAGES),
    # null means absent, and so does what is empty or says what holds anyway
    ({"messages": MESSAGES, "system": [], "system_prompt": {}}, MESSAGES),
    ({"messages": None, "prompt": "Hi", "completion": "Hello", "tools": None, "system": None}, MESSAGES),
    ({"messages": "", "prompt": "Hi", "completion": "Hello", "weight": float("nan")}, MESSAGES),
    ({"instruction": "Hi", "input": None, "output": "Hello", "history": [], "weight": 1, "label": True},
     MESSAGES),
    ({"messages": MESSAGES, "tools": "[]"}, MESSAGES), ({"messages": MESSAGES, "tools": "null"}, MESSAGES),
    ({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": None, "train": None, "tool_calls": None,
                                 "reasoning": "", "prefix": False, "images": []}],
      "tools": [], "chat_template_kwargs": {}},
     [MESSAGES[0], {**MESSAGES[1], "reasoning": "", "prefix": False, "images": []}]),
]


@pytest.mark.parametrize("record, expected", LAYOUTS)
def test_every_layout(record, expected):
    assert to_messages(record) == expected


# Ways to write three records, and the lines or numbers that they then have.
THREE = [MESSAGES, {"prompt": "é🙂\n", "completion": "Hello"}, {"messages": MESSAGES}]
WRITTEN = {
    "lines": ("\n\n".join(map(json.dumps, THREE)) + "\n", [1, 3, 5]),
    "lines after a byte order mark": ("\ufeff" + "\r\n".join(map(json.dumps, THREE)), [1, 2, 3]),
    "a list in one line": (json.dumps(THREE, ensure_ascii=False), [1, 2, 3]),
    "a list in many lines": (json.dumps(THREE, indent=2), [1, 2, 3]),
    "values in many lines": ("\n".join(json.dumps(record, indent=1) for record in THREE), [1, 11, 15]),
}


def write(file: Path, text: str) -> Path:
    """The text in a file, compressed as its name says."""
    data = text.encode()
    if file.suffix == ".zst":
        with pyarrow.CompressedOutputStream(str(file), "zstd") as out:
            out.write(data)
    else:
        file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


@pytest.mark.parametrize("way", WRITTEN)
@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.txt", "x.jsonl.gz", "x.json.zst"])
def test_json_of_every_shape_is_read_whatever_the_files_name(way, name, tmp_path):
    text, lines = WRITTEN[way]
    read = list(read_records(write(tmp_path / name, text)))
    assert [messages for messages, _ in read] == [to_messages(record) for record in THREE]
    assert [line for _, line in read] == lines


def test_compression_shows_in_the_contents_and_not_in_the_name(tmp_path):
    file = write(tmp_path / "x.jsonl.zst", "\n".join(map(json.dumps, THREE))).rename(tmp_path / "x.jsonl")
    assert len(list(read_records(file))) == 3
    for name in ("x.csv.gz", "x.csv.zst"):
        file = write(tmp_path / name, "prompt,completion\nHi,Hello\n")
        assert list(read_records(file)) == [(MESSAGES, 2)]
        assert list(read_records(file.rename(tmp_path / "x.csv"))) == [(MESSAGES, 2)]
    # Two compressed files one after the other are one, too.
    for name in ("y.gz", "y.zst"):
        file = write(tmp_path / name, json.dumps(MESSAGES) + "\n")
        file.write_bytes(2 * file.read_bytes())
        assert list(read_records(file)) == [(MESSAGES, 1), (MESSAGES, 2)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_a_value_may_end_anywhere_in_what_is_read_at_once(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "CHUNK", chunk)
    for way, (text, lines) in WRITTEN.items():
        read = list(read_records(write(tmp_path / "x.json", text)))
        assert [messages for messages, _ in read] == [to_messages(record) for record in THREE], way
        assert [line for _, line in read] == lines
    text = '{"prompt": "a", "completion": "b", "x": [true, false, null, -1.5e3, "\\u00e9"]}'
    assert len(list(read_records(write(tmp_path / "x.json", text)))) == 1


@pytest.mark.parametrize("way", ["lines", "a list in one line"])
def test_a_file_is_never_read_as_a_whole(way, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "CHUNK", 2**14)
    many = [{"prompt": f"{i} " + "x" * 1000, "completion": "y"} for i in range(2000)]
    text = json.dumps(many) if way != "lines" else "\n".join(map(json.dumps, many))
    file = write(tmp_path / "x.json", text)
    tracemalloc.start()
    assert sum(1 for _ in read_records(file)) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(text) > 2_000_000 and peak < 500_000


# ---------------------------------------------------------------- tables


def test_csv_may_have_cells_of_several_lines_and_empty_ones(tmp_path):
    rows = [["", "instruction", "input", "output", "messages"],
            ["0", "Say \"x\",\nplease", "", "x", ""], ["1", "", "", "", json.dumps(MESSAGES)],
            ["2", "Hi", "", "Hello", ""]]
    for name, delimiter in (("x.csv", ","), ("x.tsv", "\t")):
        text = io.StringIO()
        csv.writer(text, delimiter=delimiter).writerows(rows)
        assert list(read_records(write(tmp_path / name, "\ufeff" + text.getvalue()))) == [
            ([{"role": "user", "content": "Say \"x\",\nplease"}, {"role": "assistant", "content": "x"}], 2),
            (MESSAGES, 4), (MESSAGES, 5)]


def test_a_table_may_look_as_spreadsheets_leave_it(tmp_path):
    text = "prompt, completion,,\r\nHi,Hello,,\r\n,,,\r\n\r\nHi,Hello,,\r\n"
    assert list(read_records(write(tmp_path / "x.csv", text))) == [(MESSAGES, 2), (MESSAGES, 5)]


@pytest.mark.parametrize("text, says", [
    ("prompt,completion\nHi,Hello\na,b,c\n", ":3: has 3 cells, and the header has 2"),
    ("prompt,completion\nHi,Hello\na\n", ":3: has 1 cell, and the header has 2"),
    ("prompt,prompt\nHi,Hello\n", ":1: the header has 'prompt' more than once"),
    ("prompt,completion\nHi,\"Hello\n", ":2: unexpected end of data"),
    ("prompt;completion\nHi;Hello\n", ":1: the header is one cell, 'prompt;completion': separate cells with"),
    ("prompt,completion\nHi,\n", ":2: 'completion' holds nothing: write it, or leave the record out"),
    ("prompt,completion\nHi,\udcff\n", ":2: is not text in UTF-8 (byte 0xff"),
    pytest.param("prompt,completion\n" + 499 * "Hé,Hello\n" + "\udce9,Hello\n",
                 ":501: is not text in UTF-8 (byte 0xe9", id="a line far down"),
    ("prompt,completion\nHi,\"two\r\nlines \udcff\"\n", ":3: is not text in UTF-8 (byte 0xff"),
    ("prompt,completion\n", ": holds no records"), ("", ": holds no records"),
    ("messages\n[{'role': 'user'} {'role': 'assistant'}]\n", ":2: 'messages' must be a list of messages, or"),
])
def test_a_bad_row_of_a_table_is_named_with_file_and_line(text, says, tmp_path):
    (tmp_path / "x.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as error:
        list(read_records(tmp_path / "x.csv"))
    assert says in str(error.value) and str(error.value).startswith(f"{tmp_path}/x.csv")


def test_a_table_holds_no_cell_that_would_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE", 1000)
    with pytest.raises(ValueError, match="x.csv:2: field larger than field limit"):
        list(read_records(write(tmp_path / "x.csv", 'prompt,completion\nHi,"' + "x" * 5000)))


def test_parquet_has_messages_with_null_for_what_others_have(tmp_path):
    table = pyarrow.Table.from_pylist([
        {"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0}], "prompt": None, "score": float("nan")},
        {"messages": json.loads(json.dumps(MESSAGES)), "weight": float("nan")},
        {"messages": None, "prompt": "Hi", "completion": "Hello"}],
        pyarrow.schema([("messages", pyarrow.list_(pyarrow.struct([
            ("role", pyarrow.string()), ("content", pyarrow.string()), ("weight", pyarrow.int64())]))),
            ("prompt", pyarrow.string()), ("completion", pyarrow.string()), ("weight", pyarrow.float64())]))
    pyarrow.parquet.write_table(table, tmp_path / "x")      # known by its contents
    assert list(read_records(tmp_path / "x")) == [
        ([MESSAGES[0], {**MESSAGES[1], "weight": 0}], 1), (MESSAGES, 2), (MESSAGES, 3)]


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl"])
def test_fields_that_a_table_adds_to_the_objects_of_a_column_are_absent_at_any_depth(name, tmp_path):
    def tool(name: str, **properties: dict) -> dict:
        return {"function": {"name": name, "parameters": {"properties": properties}}}

    def call(name: str, **arguments: object) -> dict:
        return {"type": "function", "function": {"name": name, "arguments": arguments}}

    messages = [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [
        call("weather", town="Rome", days=[1, None]), call("add", a=1, b={"x": 0.5})]}]
    record = {"tools": [tool("weather", town={"type": "string"}), tool("add", a={"type": "number"})],
              "messages": messages}
    table = pyarrow.Table.from_pylist([record])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    text = json.dumps(table.to_pylist()[0])
    assert '"town": null' in text
    write(tmp_path / "x.jsonl", text)
    ((read, _),) = read_records(tmp_path / name)
    assert read == [{**MESSAGES[0], "tools": record["tools"]}, messages[1]]


def test_null_in_the_json_text_of_tools_and_arguments_stays():
    tool = {"name": "f", "parameters": {"properties": {"x": {"default": None}}}}
    asks = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": '{"x": null}'}]}
    first, second = to_messages({"messages": [MESSAGES[0], asks], "tools": json.dumps([tool])})
    assert first["tools"] == [tool] and second["tool_calls"][0]["function"]["arguments"] == {"x": None}


@pytest.mark.parametrize("columns, says", [
    ({"prompt": ["Hi", "Hi"], "completion": ["a", None]}, ": record 2: 'completion' holds nothing: write it"),
    ({"prompt": ["Hi"], "completion": ["a"], "Completion": ["b"]}, "has 'completion' more than once"),
    ({"prompt": ["Hi"], "completion": ["a"], "at": pyarrow.array([10**15], pyarrow.timestamp("s"))},
     "after record 0: .* too large"),
])
def test_a_bad_record_or_column_of_parquet_is_named(columns, says, tmp_path):
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table.rename_columns([name.lower() for name in columns]), tmp_path / "x")
    with pytest.raises(ValueError, match=f"^{tmp_path}/x: .*{says}|^{tmp_path}/x{says}"):
        list(read_records(tmp_path / "x"))


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    files = write(tmp_path / "x.jsonl.zst", json.dumps(MESSAGES)), tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["Hi"], "completion": ["Hello"]}), files[1])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for file in files:
        with pytest.raises(ValueError, match=f"{file.name}: pyarrow is not installed.*pip install pyarrow"):
            list(read_records(file))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("switch, weight", [
    ({"train": False}, 0), ({"train": True}, 1), ({"training": 0}, 0), ({"trainable": False}, 0),
    ({"loss": False}, 0), ({"loss": 1}, 1), ({"mask": True}, 0), ({"mask": False}, 1), ({"masked": 1}, 0),
    ({"masked": 0}, 1), ({"weight": 0, "train": False, "mask": 1}, 0), ({"weight": 1.0, "loss": True}, 1),
    ({"weight": False}, 0), ({"train": None}, 1),
])
@pytest.mark.parametrize("layout", ["messages", "conversations"])
def test_switches_of_other_trainers_are_weights(switch, weight, layout):
    fields = ("role", "content") if layout == "messages" else ("from", "value")
    turns = [dict(zip(fields, ("user", "Hi"))), {**dict(zip(fields, ("assistant", "Hello"))), **switch}]
    assert to_messages({layout: turns}) == [
        MESSAGES[0], MESSAGES[1] | ({} if weight else {"weight": 0})]


# Fields by which other trainers and servers train or serve something else, with values that say so.
MESSAGE_FIELDS = {
    "reasoning": "hm", "reasoning_details": [{"text": "hm"}], "thinking": "hm",
    "thoughts": "hm", "function_call": {"name": "f"}, "images": ["a.png"],
    "image_url": "a.png", "audio": {"id": 1}, "videos": ["v"], "documents": ["d"], "prefix": True,
    "train_detail": [{"begin_offset": 0}], "training_detail": [1], "train_on": "all", "loss_scale": 0.5,
    "loss_weight": 2, "loss_mask": [0, 1], "step_loss_mask": 0, "labels": [1], "weights": [1], "label": False}
RECORD_FIELDS = {
    "functions": [1], "builtin_tools": ["x"], "tool_choice": "auto", "documents": ["d"],
    "history": [["a", "b"]], "images": ["a.png"], "audio": "a.wav", "audios": ["a"], "video": "v",
    "chat_template_kwargs": {"enable_thinking": False}, "template_kwargs": {"x": 1}, "enable_thinking": False,
    "thinking": False, "reasoning": "on", "reasoning_effort": "high", "chat_template": "{{ x }}",
    "add_generation_prompt": True, "continue_final_message": True, "prefill": "Sure", "train": False,
    "loss": 0, "mask": [1], "weight": 0.5, "sample_weight": 2, "label": False, "labels": [1],
    "rejected": "x", "rejected_response": "x"}


@pytest.mark.parametrize("field", MESSAGE_FIELDS)
def test_a_messages_field_that_would_change_what_is_trained_is_refused_by_name(field):
    for i in (0, 1):
        messages = [{**m, field: MESSAGE_FIELDS[field]} if i == j else m for j, m in enumerate(MESSAGES)]
        with pytest.raises(ValueError, match=f"message {i + 1} has '{field}', which"):
            to_messages({"messages": messages})


@pytest.mark.parametrize("field", RECORD_FIELDS)
def test_a_records_field_that_would_change_what_is_trained_is_refused_by_name(field):
    for record in ({"messages": MESSAGES}, {"prompt": "Hi", "completion": "Hello"}):
        with pytest.raises(ValueError, match=f"the record has '{field}', which"):
            to_messages({**record, field: RECORD_FIELDS[field]})


@pytest.mark.parametrize("fields", [
    # of well-known data sets
    {"prompt": "Hi", "prompt_id": "x"}, {"id": 1, "source": "x", "dataset": "y"},
    {"is_reasoning_complete": [True], "finish_reasons": ["stop"], "used_in_training": ["x"]},
    {"category": "qa", "model_name": None, "skip_prompt_formatting": False, "split": "train"},
    {"text": "whole", "timestamp": 0, "tool_call_id": "1", "refusal": None, "score": 1.0},
])
def test_metadata_is_let_through(fields):
    assert to_messages({"messages": MESSAGES, **fields}) == MESSAGES
    assert to_messages({"messages": [{**m, **fields} for m in MESSAGES]}) == [
        {**m, **{k: v for k, v in fields.items() if v is not None}} for m in MESSAGES]


U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("record", [
    {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_rating": 5, "rejected_rating": 1},
    {"question": "q", "chosen": "a", "rejected": "b"}, {"instruction": "q", "chosen": "a", "rejected": "b"},
    {"prompt": [U], "chosen": [A], "rejected": [{**A, "content": "b"}]},
    {"prompt": "q", "chosen": [U, A], "rejected": [U, {**A, "content": "b"}]},
    {"chosen": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "rejected": [U, A]}])
def test_a_pair_of_preferences_is_refused_with_the_flag_that_trains_on_the_chosen_answer(record, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="pairs.jsonl:1: holds a pair of preferences") as caught:
        list(read_records(file))
    columns = re.search(r"--columns (\S+)", str(caught.value))[1]
    assert list(read_records(file, [columns])) == [([U, A], 1)]


def test_of_large_records_in_parquet_few_are_in_memory_at_once(tmp_path):
    table = pyarrow.table({"prompt": [f"{i} " + os.urandom(2**17).hex() for i in range(256)],
                      "completion": ["a"] * 256})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", compression="none", write_batch_size=4)
    del table
    before, largest, count = pyarrow.total_allocated_bytes(), 0, 0
    for _ in read_records(tmp_path / "x.parquet"):
        largest, count = max(largest, pyarrow.total_allocated_bytes() - before), count + 1
    assert count == 256 and largest < 2**25, "of 2**26 bytes"


def test_records_that_are_a_pointer_of_git_lfs_say_how_to_get_them(tmp_path):
    file = tmp_path / "x.parquet"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=f"{file}: is a Git LFS pointer, .* run git -C {tmp_path} lfs pull"):
        list(read_records(file))


@pytest.mark.parametrize("line, says", [
    ("{not json", "Expecting property name"), ("[]", "no messages"), ("{}", "known layouts"),
    ("7", "not int 7"), ("null", "not null"), ('"Hi"', "not a text"),
    ('{"text": "x"}', "has only a 'text', in which question and answer cannot be told apart"),
    ('{"messages": []}', "no messages"),
    ('{"question": "a", "answer": ["b"]}', "'answer' must be text, not a list"),
    ('{"Instruction": "a", "Output": "b"}', "--columns instruction=Instruction output=Output reads others"),
    ('{"dialog": [{"role": "user", "content": "a"}]}', "--columns messages=dialog reads others"),
    ('{"messages": "x"}', "not 'x'; to_json"),
    ('{"messages": "7"}', "not '7'"), ('{"messages": 7}', "'messages' must be a list of messages, not int 7"),
    ('{"messages": ["x"]}', "message 1 must be an object"),
    ('{"messages": [{"role": "robot", "content": "x"}]}', "unknown role 'robot'"),
    ('{"messages": [{"role": "user", "content": null}]}', "'content' is null"),
    ('{"messages": [{"role": "user", "content": "x", "weight": 0.5}]}', "'weight': 0.5"),
    ('{"messages": [{"role": "user", "content": "x", "train": "no"}]}', "'train': 'no'"),
    ('{"messages": [{"role": "user", "content": "x", "mask": [0]}]}', "'mask': [0]"),
    ('{"messages": [{"role": "user", "content": "x", "weight": 1, "train": false}]}',
     "'weight' is 1, 'train' is False"),
    ('{"messages": [{"role": "user", "content": "x", "mask": 1, "loss": true}]}',
     "'loss' is True, 'mask' is 1"),
    ('{"messages": [{"role": ["user"], "content": "x"}]}', "unknown role ['user']"),
    (json.dumps({"messages": [{"role": "user" * 999, "content": "x"}]}), "[...] "),
    (json.dumps({"messages": [{"role": "user", "content": "x", "weight": "1" * 9999}]}), "[...] "),
    ('{"messages": [{"role": "user", "content": 1' + "0" * 4000 + "}]}", "[...] "),
    (json.dumps({"messages": MESSAGES, "prompt": "Hi", "completion": "Hello you"}), "has two layouts"),
    (json.dumps({"messages": MESSAGES, "conversations": [SHAREGPT[0], {**SHAREGPT[1], "weight": 0}]}),
     "has two layouts"),
    (json.dumps({"messages": MESSAGES, "conversations": [*SHAREGPT, *SHAREGPT]}), "has two layouts"),
    ('{"conversations": [{"from": ["human"], "value": "x"}]}', "unknown role ['human']"),
    ('{"messages": [{"role": "user", "content": "x", "name": "\\ud800"}]}', "surrogate"),
    ('{"messages": [{"role": "system", "content": "S"}], "system": "T"}', "'system' is not what"),
    ('{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}', "tool_calls"),
    ('{"messages": [{"role": "user", "content": "x"}], "tools": [1]}', "'tools'"),
    ('{"prompt": "capital", "input": "of France", "completion": "Paris"}',
     "'input' has \"of France\", which is in none of its"),
    ('{"instruction": "a", "output": "b", "context": "of France"}', "'context' has \"of France\", which"),
    ('{"question": "a", "answer": "b", "context": {"title": ["a"], "sentences": [["c"]]}}',
     "'context' has \"c\", which is in none of its"),
    ('{"question": "a", "answer": "b", "context": ["a", "one"]}', "'context' has \"one\", which"),
    ('{"question": "a", "answer": "b", "context": 7}', "'context' has 7, which"),
    (json.dumps({"messages": MESSAGES, "prompt": [{"role": "system", "content": "Be"}, *MESSAGES]}),
     "'prompt' has \"Be\", which is in none of its"),
    ('{"messages": [{"role": "user", "content": "x"}], "prompt": "a", "completion": "b"}',
     "two layouts, 'messages' and 'prompt' + 'completion'"),
    ('{"messages": [{"role": "user", "content": "x"}], "conversations": [{}]}',
     "two layouts, 'messages' and 'conversations'"),
    ('{"instruction": "a", "input": "b", "output": "c", "response": "d"}',
     "two layouts, 'instruction' + 'input' + 'output' and 'instruction' + 'response'"),
    ('{"prompt": "x"}', "its fields are 'prompt'"),
    ('{"prompt": "x", "completion": null}', "'completion' holds nothing: write it, or leave the record out"),
    ('{"prompt": "x", "completion": 4}', "'completion' must be text, not int 4"),
    ('{"prompt": "x", "completion": []}', "'content' is a list"),
    ('{"question": "a", "answer": "b", "instruction": "Translate."}', "'instruction' has \"Translate.\","),
    ('{"prompt": "a", "completion": "b", "question": "c"}', "'question' has \"c\","),
    ('{"instruction": {"0": "a"}, "output": {"0": "b"}}', "not an object; pandas writes records with"),
    ('{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}',
     'message 1 has in its content the part {"type": "image_url", "image_url": {"url": "x"}}, and only'),
    ('{"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}', 'part {"type": "text"'),
    ('{"prompt": "x", "completion": "a", "prompt": "y"}', "an object has 'prompt' more than once: keep one"),
    ('{"messages": [{"role": "user", "content": "x", "content": "y"}]}', "an object has 'content' more than"),
    ('{"chosen": "Human: x", "rejected": "Human: y"}', "write the chosen one as {\"messages\": [...]}"),
    ('{"messages": [{"role": "user", "content": ["Hi"]}]}', "'content' is a list"),
    ('[{"role": "user", "content": "Hi"}, 7]', "message 2 must be an object"),
    ('{"prompt": "a", "completion": "b"} {"prompt": "a", "completion": "b"}', "must end with its line"),
    ('{"prompt": "a", "completion": "b"},', "must end with its line"),
    ('{"prompt": "a", "compl', "is not JSON, or is cut short: Invalid"),
    ('{"prompt": "a\tb", "completion": "b"}', "is not JSON: Invalid control character"),
    ("[" * 100_000, "nested deeper than 100 levels"), ("1" * 5000, "more digits than Python reads"),
    ('{"instruction": "a", "input": 0, "output": "b"}', "'input' must be text, not int 0"),
    ('{"conversations": [{"from": "human", "role": "assistant", "value": "x"}]}', "'from' and 'value'"),
    ('{"messages": [{"role": "user", "content": "x", "compute_loss": false}]}', "'compute_loss'"),
    ('{"messages": [{"role": "user", "content": "x", "Train": false}]}', "'Train'"),
    ('{"messages": [{"role": "user", "content": "x", "ignore": true}]}', "'ignore'"),
    ('{"conversations": ["x"]}', "message 1 must be an object"),
    ('{"instruction": 1, "output": "x"}', "'instruction'"),
    ('{"prompt": ["x"], "completion": "y"}', "'prompt' must be text, not a list"),
    ('{"prompt": "\\ud800", "completion": "y"}', "surrogate"), ("\udcff", "is not text in UTF-8 (byte 0xff"),
])
def test_a_bad_record_is_named_with_file_and_line(line, says, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(f'{json.dumps({"messages": MESSAGES})}\n{line}\n'.encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as error:
        list(read_records(file))
    assert says in str(error.value) and "bad.jsonl:2:" in str(error.value)
    # What the JSON reader says ends so before a position, which the line number takes the place of.
    assert not str(error.value).endswith(" at") and len(str(error.value)) < 1500


@pytest.mark.parametrize("text, place", [
    ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": "b"\n\n', r":2: .*delimiter$"),
    ('{"prompt": "a", "completion": "b"\n{"prompt": "c", "completion": "d"}\n',
     ":2: is not JSON: Expecting ',' delimiter, in the record that begins in line 1$"),
    ('[{"prompt": "a", "completion": "b"},\n {"prompt": "a",\n "completion": "b",\n}]\n',
     ":4: .*in the record that begins in line 2$")])
def test_of_a_record_that_goes_on_in_the_next_line_its_first_line_is_named(text, place, tmp_path):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=place):
        list(read_records(tmp_path / "bad.json"))


def cut(data: bytes) -> bytes:
    return data[:-9]


def flipped(data: bytes) -> bytes:
    return data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 255]) + data[len(data) // 2 + 1:]


@pytest.mark.parametrize("name, damage", [
    ("x.jsonl.gz", cut), ("x.jsonl.gz", flipped), ("x.csv.gz", flipped), ("x.jsonl.zst", cut),
    ("x.parquet", cut), ("x.parquet", flipped)])
def test_a_damaged_file_is_one_line_that_names_it(damage, name, tmp_path):
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh ", k=200)) for _ in range(500)]
    file = tmp_path / name
    if name == "x.parquet":
        table = pyarrow.table({"prompt": texts, "completion": texts})
        pyarrow.parquet.write_table(table, file, compression="zstd", write_page_checksum=True)
    elif "csv" in name:
        write(file, "prompt,completion\n" + "".join(f"{text},Hello\n" for text in texts))
    else:
        write(file, "".join(json.dumps({"prompt": text, "completion": "Hello"}) + "\n" for text in texts))
    assert len(list(read_records(file))) == 500
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError) as error:
        list(read_records(file))
    assert str(error.value).startswith(f"{file}:") and "\n" not in str(error.value)


@pytest.mark.parametrize("name, content, says", [
    ("none.jsonl", None, "none.jsonl: no such file"), ("x.jsonl", b"", "x.jsonl: holds no records"),
    ("x.json", b" \n", "holds no records"), ("x.json", b"[]", "x.json:1: holds an empty list"),
    ("x.json", b"{}", "x.json:1: has none of the known layouts.*its fields are none"),
    ("x.json", b'{"data": [{"prompt": "Hi"}]}', "its fields are 'data'"),
    ("x.json", b'[{"prompt": "Hi", "completion": "a"}', "x.json:1: the list has no end"),
    ("x.json", b'[{"prompt": "Hi", "completion": "a"},\n {"prompt": "Hi"}]', "x.json: record 2: has none"),
    ("x.json", b'[{"prompt": "Hi", "completion": "a"}\n{"prompt"', "x.json:2: ',' or ']' must follow, not"),
    ("x.json", b'[{"prompt": "Hi", "completion": "a"}]\n{}', "x.json:2: more follows after the list"),
    ("x.json", b'[["x"]]', "x.json: record 1: message 1 must be an object"),
    ("x.json", b'["x"]', "record 1: a record must be a JSON object or a list of messages, not a text"),
    ("x.jsonl.gz", b"no gzip", "x.jsonl.gz:1: is not JSON"),
    ("x.png", b"\x89PNG\r\n", "x.png:1: is not text"),
    ("x.json", "\ufeffé".encode("utf-16"), "x.json:1: is not text in UTF-8 .*save it as UTF-8"),
    ("x.parquet", b"{}", "x.parquet: is not a Parquet file"), ("x.parquet", b"PAR1", "x.parquet: is damaged"),
    ("x.yaml", b"prompt: Hi\n", "x.yaml:1: is not JSON: Expecting value; JSON, JSON Lines, .csv and"),
    ("x.jsonl", b"PK\x03\x04", "x.jsonl:1: is not JSON.*; it is a zip archive: unpack it"),
    ("x.jsonl", b"<!doctype html>", "it is a web page or XML, not what the link promised"),
    ("x.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "a number has more digits than Python reads: write it as"),
])
def test_bad_files_are_named(name, content, says, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        list(read_records(tmp_path / name))


def test_a_record_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE", 10_000)
    monkeypatch.setattr(records, "CHUNK", 1000)
    file = write(tmp_path / "x.jsonl", f'{json.dumps(MESSAGES)}\n{{"prompt": "{"x" * 10**6}')
    with pytest.raises(ValueError, match="x.jsonl:2: a record has more than 10,000 characters: split it"):
        list(read_records(file))
    # One that was read as a whole has the same limit.
    monkeypatch.setattr(records, "CHUNK", 10**6)
    for length, fits in ((9_900, True), (10_100, False)):
        write(tmp_path / "x.jsonl", json.dumps({"prompt": "x" * length, "completion": "y"}))
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="x.jsonl:1: a record has"):
            assert len(list(read_records(file))) == 1


# ---------------------------------------------------------------- --columns


def test_columns_have_other_names_in_the_file(tmp_path):
    file = write(tmp_path / "x.csv", "query,reply,input\nHi,Hello,\n")
    assert list(read_records(file, ["instruction=query", "output=reply"])) == [(MESSAGES, 2)]
    # Two may change places, and another field of the known name gives way.
    file = write(tmp_path / "x.jsonl", json.dumps({"prompt": "Hello", "completion": "Hi", "messages": "x"}))
    swap = ["prompt=completion", "completion=prompt"]
    with pytest.raises(ValueError, match="two layouts"):
        list(read_records(file, swap))
    file = write(tmp_path / "x.jsonl", json.dumps({"messages": "x", "dialog": MESSAGES, "persona": "S"}))
    assert list(read_records(file, ["messages=dialog", "system=persona"])) == [
        ([{"role": "system", "content": "S"}, *MESSAGES], 1)]
    file = write(tmp_path / "x.jsonl", json.dumps({"prompt": "Hello", "completion": "Hi"}))
    assert list(read_records(file, swap)) == [(MESSAGES, 1)]


@pytest.mark.parametrize("columns, says", [
    (["prompt"], "--columns prompt: write KNOWN=NAME"), (["prompt="], "write KNOWN=NAME"),
    (["text=query"], "--columns text=query: 'text' must be one of messages, conversations, prompt,"),
    (["prompt=a", "prompt=b"], "--columns prompt=b: 'prompt' is given twice"),
    (["prompt=a,completion=b"], "write KNOWN=NAME KNOWN=NAME, with spaces and no commas"),
])
def test_a_bad_mapping_names_the_flag(columns, says):
    with pytest.raises(ValueError, match=says):
        parse_columns(columns)
    with pytest.raises(ValueError, match=says):
        train.parse_args(flags(model="x", train_data="y", columns=columns))


@pytest.fixture(scope="module")
def named_otherwise(tmp_path_factory) -> Path:
    """A model, and a folder of two files whose fields have other names."""
    folder = make_model(tmp_path_factory.mktemp("named") / "model").parent
    (folder / "shards").mkdir()
    for i in range(2):
        write(folder / "shards" / f"{i}.csv.gz", f"query,reply\nname a colour {i},red\na fruit,plum\n")
    return folder


def test_every_command_reads_folders_and_columns(named_otherwise, tmp_path):
    folder, columns = str(named_otherwise / "shards"), ["prompt=query", "completion=reply"]
    given = flags(model=named_otherwise / "model", columns=columns, template="llama3")
    source = train.open_source(train.Config(model=str(named_otherwise / "model"), template="llama3"))
    questions = ["name a colour 0", "a fruit", "name a colour 1", "a fruit"]

    def contents(dataset: Dataset) -> str:
        return source.tokenizer.decode(dataset.ids.tolist())

    config = train.parse_args([*given, *flags(train_data=folder, eval_data=folder, cache_dir=tmp_path)])
    train_set, _, eval_sets = train.load_data(config, source)
    assert all(question in contents(train_set) for question in questions)
    assert train_set.where(3) == f"{folder}/1.csv.gz:3" and list(eval_sets) == ["shards"]
    assert contents(eval_sets["shards"]) == contents(train_set)

    [[dataset]] = spans.load_data(spans.parse_args([*given, *flags(data=folder, cache_dir=tmp_path)]))
    assert dataset.key == train_set.key
    targets, _ = memorization.read_targets(memorization.parse_args([*given, *flags(data=folder)]),
                                           source.tokenizer, source.template)
    assert [target["text"] for target in targets] == ["red", "plum"] * 2
    assert [example.where for example in read_examples(folder, 3, columns)] == [
        f"{folder}/0.csv.gz:2", f"{folder}/0.csv.gz:3", f"{folder}/1.csv.gz:2"]
    args = argparse.Namespace(data=folder, columns=columns, limit=None)
    asked, _ = generate.read_questions(args, source.template)
    assert [question[0]["content"] for question, _ in asked] == questions
    assert [json.loads(study.as_line(messages))["messages"][0]["content"]
            for messages, _, _ in read_all([folder], columns)] == questions
    model = load_model(named_otherwise / "model")
    answers = generate.answer_records(model, source.tokenizer, source.template, [folder], 3, columns=columns)
    assert [answer["prompt"] for answer in answers] == questions[:3]


# ---------------------------------------------------------------- names -> files


def test_a_folder_and_a_glob_are_the_files_of_records_in_order(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.jsonl.gz", "README.md", ".hidden.jsonl", "_temporary.jsonl", "sub/c.jsonl",
                 "dataset_info.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    a, b, c = (f"{tmp_path}/{name}" for name in ("a.jsonl.gz", "b.jsonl", "sub/c.jsonl"))
    assert data_files([tmp_path]) == data_files([f"{tmp_path}/"]) == [a, b]
    assert data_files([f"{tmp_path}/b*"]) == [b]
    assert data_files([f"{tmp_path}/**/[a-z]*.jsonl*"]) == [a, b, c]
    # In the order of the names.
    assert data_files([b, f"{tmp_path}/[a]*", c]) == [b, a, c]
    (tmp_path / "x[1].jsonl").write_text("")
    assert data_files([f"{tmp_path}/x[1].jsonl"]) == [f"{tmp_path}/x[1].jsonl"]     # a file comes first
    # Whatever order the file system has.
    for names in (["a.jsonl.gz", "b.jsonl"], ["b.jsonl", "a.jsonl.gz"]):
        monkeypatch.setattr(os, "listdir", lambda folder, names=names: names)
        assert data_files([tmp_path]) == [a, b]


def test_names_without_records_say_why(tmp_path):
    for name in ("saved/data-00000-of-00001.arrow", "saved/state.json", "both/a.jsonl", "both/a.parquet",
                 "none/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    os.mkfifo(tmp_path / "pipe")
    for name, says in (("saved", "written by save_to_disk.*to_parquet"), ("gone", "no such file or folder"),
                       ("both", "holds .jsonl and .parquet"),
                       ("none", "this folder holds no .*none/[*][*]/[*].jsonl"),
                       ("*.csv", "no file matches"), ("pipe", "is a pipe or device.* to a file"),
                       ("x" * 300, "no such file"), ("gone/x.jsonl", "no such file or folder")):
        with pytest.raises(ValueError, match=says):
            data_files([f"{tmp_path}/{name}"])
    # What looks like a name on the hub, and is only misspelled, before anything is tokenized.
    for name in ("data/train.jsonl", "tests/none"):
        for find in (lambda name: data_files([name]), local_files):
            with pytest.raises(ValueError, match=f"^{name}: no such file or folder$"):
                find(name)
    assert local_files("owner/none") == []


def test_files_in_folders_within_a_folder_are_not_left_out_silently(tmp_path, capsys):
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": MESSAGES}))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "notes.txt").write_text("")
    data_files([str(tmp_path)])
    assert capsys.readouterr().err == ""
    (tmp_path / "more" / "two.jsonl").write_text((tmp_path / "one.jsonl").read_text())
    found = data_files([str(tmp_path)]), data_files([str(tmp_path)])
    warning = capsys.readouterr().err
    assert found == ([str(tmp_path / "one.jsonl")],) * 2
    assert warning.count("\n") == 1 and f"such as {tmp_path}/more;" in warning
    pattern = re.search("'(.*)'", warning)[1]
    assert [Path(file).name for file in data_files([pattern])] == ["two.jsonl", "one.jsonl"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(files...) puts a dataset's files into a local stand-in for the hub; returns the list of calls."""
    calls = []

    def publish(*files: str) -> list:
        records._files_on_hub.cache_clear()

        def download(repository: str, *, repo_type: str, revision: str, allow_patterns: list[str]) -> str:
            calls.append((repository, repo_type, revision))
            for file in files:
                if any(fnmatch(file, pattern) for pattern in allow_patterns):
                    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
                    write(tmp_path / file, json.dumps(MESSAGES))
            return str(tmp_path)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        return calls
    return publish


SHARDS = [f"data/{split}-0000{i}-of-00002.jsonl" for split in ("test", "train") for i in (0, 1)]


@pytest.mark.parametrize("files, name, expected", [
    (SHARDS, "owner/name", SHARDS[2:]), (SHARDS, "owner/name:test", SHARDS[:2]),
    (SHARDS, "owner/name:test@v1", SHARDS[:2]), (["README.md", "a.jsonl"], "owner/name", ["a.jsonl"]),
    (["a.jsonl", "test.jsonl"], "owner/name", ["a.jsonl"]),
    (["a.jsonl", "dataset_infos.json"], "owner/name", ["a.jsonl"]),
    # Without a file of that name, train_prefs is train, and test_prefs is not.
    (["test_prefs-1.json", "train_prefs-1.json", "train_prefs-2.json"], "owner/name",
     ["train_prefs-1.json", "train_prefs-2.json"]),
    (["train.json", "pretrain.json", "train_gen.json"], "owner/name", ["train.json"]),
    (["train_gen-1.json", "train_sft-1.json"], "owner/name:train_sft", ["train_sft-1.json"]),
    (["main/train-1.jsonl", "other/train-1.jsonl"], "owner/name:main/train", ["main/train-1.jsonl"]),
])
def test_a_split_on_the_hub_is_the_files_named_after_it(files, name, expected, hub, tmp_path):
    calls = hub(*files)
    assert data_files([name]) == [f"{tmp_path}/{file}" for file in expected]
    assert set(calls) == {("owner/name", "dataset", "v1" if "@" in name else None)}
    # What was not asked for is not downloaded.
    if expected == SHARDS[:2]:
        assert not list(tmp_path.glob("data/train*"))
    # The same files for the whole of a run, even if the repository changes.
    before = len(calls)
    assert [messages for messages, _, _ in read_all([name])] == [MESSAGES] * len(expected)
    assert len(calls) == before


@pytest.mark.parametrize("files, name, says", [
    (SHARDS, "owner/name:dev", "owner/name:dev: holds no dev split in JSON"),
    (["train_gen-1.json", "train_sft-1.json"], "owner/name:train", "its files are train_gen-1.json, train_"),
    ([f"data/{split}-1.json" for split in ("test_gen", "test_sft", "train_gen", "train_sft")], "owner/name",
     "holds no train split .*data/train_sft-1.json; give the split, as in owner/name:train_sft"),
    (["main/train-1.jsonl", "other/train-1.jsonl"], "owner/name",
     "in several folders .main, other.; give one, as in owner/name:other/train"),
    (["train.json", "train.csv"], "owner/name", "holds .csv and .json files"),
])
def test_a_split_that_is_not_clear_is_refused(files, name, says, hub):
    hub(*files)
    with pytest.raises(ValueError, match=says):
        data_files([name])


def test_without_huggingface_hub_a_dataset_says_that_it_needs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        data_files(["owner/gone"])


def test_a_local_path_comes_before_the_hub(hub, tmp_path, monkeypatch):
    calls = hub(*SHARDS)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write(tmp_path / "owner" / "name" / "x.jsonl", json.dumps(MESSAGES))
    monkeypatch.chdir(tmp_path)
    assert data_files(["owner/name"]) == ["owner/name/x.jsonl"] and not calls


def test_standard_input_can_be_read_again_and_leaves_no_file(tmp_path):
    """Gzipped, and read by a process of its own."""
    program = """
import os, sys, tempfile
sys.stdin = open(sys.argv[1])
tempfile.tempdir = sys.argv[2]
from data import hash_file
from records import data_files, read_records
[file] = data_files(["-"])
assert data_files(["-"]) == [file]
first, second = list(read_records(file)), list(read_records(file))
assert first == second and len(hash_file(file)) == 64
print(first, os.listdir(tempfile.gettempdir()), file)
"""
    file, empty = write(tmp_path / "x.gz", json.dumps(MESSAGES)), tmp_path / "empty"
    empty.mkdir()
    done = forks.run(["-c", program, str(file), str(empty)])
    assert done.stdout.strip() == f"{[(MESSAGES, 1)]} [] standard input", done.stderr


def test_standard_input_is_refused_where_it_cannot_be_read_again(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="^-: a study that is resumed reads the records again"):
        study.check(study.StudyConfig(train_data=["-"], eval_data=["x"]), [1e-4])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^-: standard input reaches only one rank"):
        data_files(["-"])
