"""Records, token cache, step plan, packed batches, export and `python data.py`."""
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import chat
import data
import train
import forks
from chat import (COMPLETION, CONTEXT, INSTRUCTION, KINDS, SYSTEM, TEMPLATE, Tokenizer, load_template,
                  read_records)
from data import collate, load_dataset, plan
from loss import coefficients, span_weights
from tiny import ROOT, flags, make_model, make_records

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize("record, expected", [
    ({"messages": MESSAGES, "id": 7}, MESSAGES),
    ({"prompt": "Hi", "completion": "Hello"}, MESSAGES),
    ({"instruction": "Hi", "output": "Hello"}, MESSAGES),
    ({"instruction": "Hi", "input": "", "output": "Hello"}, MESSAGES),
    ({"instruction": "Translate.", "input": "Hi", "output": "Salut"},
     [{"role": "user", "content": "Translate.\n\nHi"}, {"role": "assistant", "content": "Salut"}]),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, MESSAGES),
    ({"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}]},
     [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "S"},
     [{"role": "system", "content": "S"}, *MESSAGES]),
    ({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 0}]}, [MESSAGES[0], {**MESSAGES[1], "weight": 0}]),
    ({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 1, "name": "x", "id": 3}]},  # the template may read
     [MESSAGES[0], {**MESSAGES[1], "name": "x", "id": 3}]),
    ({"conversations": [{"from": "human", "value": "Hi", "name": "x"}, {"from": "gpt", "value": "Hello"}]},
     [{**MESSAGES[0], "name": "x"}, MESSAGES[1]]),
    ({"messages": MESSAGES, "system": "S"}, [{"role": "system", "content": "S"}, *MESSAGES]),
    ({"messages": MESSAGES, "system_prompt": "S"}, [{"role": "system", "content": "S"}, *MESSAGES]),
    ({"messages": [{"role": "system", "content": "S"}, *MESSAGES], "system": "S"},
     [{"role": "system", "content": "S"}, *MESSAGES]),
    # null means absent, and so does what is empty or says what holds anyway
    ({"messages": None, "prompt": "Hi", "completion": "Hello", "tools": None, "system": None}, MESSAGES),
    ({"instruction": "Hi", "input": None, "output": "Hello", "history": [], "weight": 1, "label": True},
     MESSAGES),
    ({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": None, "train": None, "tool_calls": None,
                                 "reasoning": "", "prefix": False, "images": []}],
      "tools": [], "chat_template_kwargs": {}},
     [MESSAGES[0], {**MESSAGES[1], "reasoning": "", "prefix": False, "images": []}]),
])
@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz"])
def test_every_layout_in_every_file_type(record, expected, kind, tmp_path):
    file = tmp_path / f"x.{kind}"
    text = (json.dumps([record, record]) if kind == "json"
            else f"{json.dumps(record)}\n\n{json.dumps(record)}\n")
    (gzip.open if kind == "jsonl.gz" else open)(file, "wt").write(text)
    read = list(read_records(file))
    assert [messages for messages, _ in read] == [expected] * 2
    assert [line for _, line in read] == ([1, 2] if kind == "json" else [1, 3])


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
    assert chat.to_messages({layout: turns}) == [
        MESSAGES[0], MESSAGES[1] | ({} if weight else {"weight": 0})]


# Fields by which other trainers and servers train or serve something else, with values that say so.
MESSAGE_FIELDS = {
    "reasoning": "hm", "reasoning_content": "hm", "reasoning_details": [{"text": "hm"}], "thinking": "hm",
    "thoughts": "hm", "tool_calls": [1], "function_call": {"name": "f"}, "images": ["a.png"],
    "image_url": "a.png", "audio": {"id": 1}, "videos": ["v"], "documents": ["d"], "prefix": True,
    "train_detail": [{"begin_offset": 0}], "training_detail": [1], "train_on": "all", "loss_scale": 0.5,
    "loss_weight": 2, "loss_mask": [0, 1], "step_loss_mask": 0, "labels": [1], "weights": [1], "label": False}
RECORD_FIELDS = {
    "tools": [1], "functions": [1], "builtin_tools": ["x"], "tool_choice": "auto", "documents": ["d"],
    "history": [["a", "b"]], "images": ["a.png"], "audio": "a.wav", "audios": ["a"], "video": "v",
    "chat_template_kwargs": {"enable_thinking": False}, "template_kwargs": {"x": 1}, "enable_thinking": False,
    "thinking": False, "reasoning": "on", "reasoning_effort": "high", "chat_template": "{{ x }}",
    "add_generation_prompt": True, "continue_final_message": True, "prefill": "Sure", "train": False,
    "loss": 0, "mask": [1], "weight": 0.5, "sample_weight": 2, "label": False, "labels": [1],
    "rejected": "x", "rejected_response": "x", "chosen": "x"}


@pytest.mark.parametrize("field", MESSAGE_FIELDS)
def test_a_messages_field_that_would_change_what_is_trained_is_refused_by_name(field):
    for i in (0, 1):
        messages = [{**m, field: MESSAGE_FIELDS[field]} if i == j else m for j, m in enumerate(MESSAGES)]
        with pytest.raises(ValueError, match=f"message {i + 1} has '{field}', which"):
            chat.to_messages({"messages": messages})


@pytest.mark.parametrize("field", RECORD_FIELDS)
def test_a_records_field_that_would_change_what_is_trained_is_refused_by_name(field):
    for record in ({"messages": MESSAGES}, {"prompt": "Hi", "completion": "Hello"}):
        with pytest.raises(ValueError, match=f"the record has '{field}', which"):
            chat.to_messages({**record, field: RECORD_FIELDS[field]})


@pytest.mark.parametrize("fields", [
    # of well-known data sets
    {"prompt": "Hi", "prompt_id": "x"}, {"id": 1, "source": "x", "dataset": "y"},
    {"is_reasoning_complete": [True], "finish_reasons": ["stop"], "used_in_training": ["x"]},
    {"category": "qa", "model_name": None, "skip_prompt_formatting": False, "split": "train"},
    {"text": "whole", "timestamp": 0, "tool_call_id": "1", "refusal": None, "score": 1.0},
])
def test_metadata_is_let_through(fields):
    assert chat.to_messages({"messages": MESSAGES, **fields}) == MESSAGES
    assert chat.to_messages({"messages": [{**m, **fields} for m in MESSAGES]}) == [
        {**m, **{k: v for k, v in fields.items() if v is not None}} for m in MESSAGES]


@pytest.mark.parametrize("line, says", [
    ("{not json", "Expecting property name"), ("[]", "JSON object"), ("{}", "known layouts"),
    ('{"text": "x"}', "'text'"), ('{"messages": []}', "no messages"), ('{"messages": "x"}', "no messages"),
    ('{"messages": ["x"]}', "message 1 must be an object"),
    ('{"messages": [{"role": "robot", "content": "x"}]}', "unknown role 'robot'"),
    ('{"messages": [{"role": "user", "content": null}]}', "'content' is NoneType"),
    ('{"messages": [{"role": "user", "content": "x", "weight": 0.5}]}', "'weight': 0.5"),
    ('{"messages": [{"role": "user", "content": "x", "train": "no"}]}', "'train': 'no'"),
    ('{"messages": [{"role": "user", "content": "x", "mask": [0]}]}', "'mask': [0]"),
    ('{"messages": [{"role": "user", "content": "x", "weight": 1, "train": false}]}',
     "'weight' is 1, 'train' is False"),
    ('{"messages": [{"role": "user", "content": "x", "mask": 1, "loss": true}]}',
     "'loss' is True, 'mask' is 1"),
    ('{"messages": [{"role": ["user"], "content": "x"}]}', "unknown role ['user']"),
    ('{"conversations": [{"from": ["human"], "value": "x"}]}', "unknown role ['human']"),
    ('{"messages": [{"role": "user", "content": "x", "name": "\\ud800"}]}', "surrogate"),
    ('{"messages": [{"role": "system", "content": "S"}], "system": "T"}', "'system' is not what"),
    ('{"prompt": "x", "completion": null}', "known layouts"),
    ('{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}', "tool_calls"),
    ('{"messages": [{"role": "user", "content": "x"}], "tools": [1]}', "'tools'"),
    ('{"prompt": "capital", "input": "of France", "completion": "Paris"}', "'input' is in none of its"),
    ('{"instruction": "a", "output": "b", "context": "of France"}', "'context' is in none"),
    ('{"messages": [{"role": "user", "content": "x"}], "prompt": "a", "completion": "b"}', "'prompt' is in"),
    ('{"messages": [{"role": "user", "content": "x"}], "conversations": [{}]}', "both 'messages' and"),
    ('{"instruction": "a", "input": 0, "output": "b"}', "'instruction' and 'input' must be text"),
    ('{"conversations": [{"from": "human", "role": "assistant", "value": "x"}]}', "'from' and 'value'"),
    ('{"messages": [{"role": "user", "content": "x", "compute_loss": false}]}', "'compute_loss'"),
    ('{"messages": [{"role": "user", "content": "x", "Train": false}]}', "'Train'"),
    ('{"messages": [{"role": "user", "content": "x", "ignore": true}]}', "'ignore'"),
    ('{"conversations": ["x"]}', "'conversations'"), ('{"instruction": 1, "output": "x"}', "'instruction'"),
    ('{"prompt": ["x"], "completion": "y"}', "'content' is list"),
    ('{"prompt": "\\ud800", "completion": "y"}', "surrogate"), ("\udcff", "can't decode"),
])
def test_a_bad_record_is_named_with_file_and_line(line, says, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(f'{json.dumps({"messages": MESSAGES})}\n{line}\n'.encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as error:
        list(read_records(file))
    assert says in str(error.value) and "bad.jsonl:2:" in str(error.value)


def test_bad_files_are_named(tmp_path):
    for name, content, says in (("none.jsonl", None, "no such file"), ("x.csv", b"a", "unknown file type"),
                                ("x.json", b"{}", "not a list"), ("x.jsonl.gz", b"no gzip", "x.jsonl.gz")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=says):
            list(read_records(tmp_path / name))


# ---------------------------------------------------------------- token cache


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_model(folder / "model")
    make_records(folder / "train.jsonl", 20)
    return folder


def load(folder: Path, file: str = "train.jsonl", max_length: int = 120, overlong: str = "truncate",
         template: str = "llama3") -> data.Dataset:
    tokenizer = Tokenizer(folder / "model")
    return load_dataset([folder / file], tokenizer, load_template(template, tokenizer), max_length, overlong,
                        folder / "cache")


def test_dataset_holds_what_tokenizing_one_by_one_gives(folder):
    tokenizer = Tokenizer(folder / "model")
    template = load_template("llama3", tokenizer)
    for dataset in (load(folder, max_length=999), load(folder, max_length=999)):  # written, then mapped
        assert isinstance(dataset.ids, np.memmap) and len(dataset) == 20
        for e, (messages, line) in enumerate(read_records(folder / "train.jsonl")):
            ids, kinds = chat.tokenize(chat.render(messages, template), tokenizer)
            a, b = dataset.offsets[e:e + 2]
            assert dataset.ids[a:b].tolist() == ids and dataset.kinds[a:b].tolist() == kinds
            assert dataset.counts[e].tolist() == [kinds[1:].count(kind) for kind in range(5)]
            assert dataset.where(e).endswith(f"train.jsonl:{line}")
    assert (dataset.counts.sum(0) > 0).all()  # every kind occurs, so none is tested vacuously


def change_json(file: Path, **more: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **more}))


def edit_to_messages(home: Path, patch: pytest.MonkeyPatch) -> None:
    edited = home / "data.py"
    edited.write_text(Path(data.__file__).read_text().replace('"user": INSTRUCTION', '"user": SYSTEM'))
    assert edited.read_text() != Path(data.__file__).read_text()
    patch.setattr(data, "CODE", (edited,))


def other_library(home: Path, patch: pytest.MonkeyPatch) -> None:
    installed = data.version
    patch.setattr(data, "version", lambda name: "9.9" if name == "tokenizers" else installed(name))


def use_date(home: Path, date: str) -> dict:
    (home / "dated.jinja").write_text(chat.TEMPLATES["llama3"] + "{# {{ strftime_now('%Y') }} #}")
    return dict(template=str(home / "dated.jinja"), date=date)


# name: (a change in a folder, which may return other arguments; the parts of the key that it changes)
CHANGES = {
    "nothing": (lambda home, patch: None, set()),
    "a byte of the data": (lambda home, patch: (home / "train.jsonl").write_bytes(
        (home / "train.jsonl").read_bytes() + b"\n") and None, {"data"}),
    "tokenizer.json": (lambda home, patch: change_json(home / "model" / "tokenizer.json", truncation=None),
                       {"tokenizer"}),
    "named tokens": (lambda home, patch: change_json(home / "model" / "tokenizer_config.json",
                                                     pad_token="<|eot_id|>"), {"special_tokens"}),
    "template": (lambda home, patch: dict(template="tulu"), {"template"}),
    "date": (lambda home, patch: use_date(home, "2020-01-02"), {"template", "date"}),
    "date that the template does not use": (lambda home, patch: dict(date="2020-01-02"), set()),
    "max_length": (lambda home, patch: dict(max_length=50), {"max_length"}),
    "overlong": (lambda home, patch: dict(overlong="drop"), {"overlong"}),
    "an edited to_messages": (edit_to_messages, {"code"}),
    "a library": (other_library, {"libraries"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_part_changes_the_cache_key_and_another_place_does_not(folder, tmp_path, name, monkeypatch):
    def parts(home: Path, cache: Path, max_length: int = 120, overlong: str = "truncate", **more: str
              ) -> dict:
        tokenizer = Tokenizer(home / "model")
        template = load_template(more.pop("template", "llama3"), tokenizer, **more)
        asked = [home / "train.jsonl"], tokenizer, template, max_length, overlong
        found = data.cache_parts(*asked)
        assert not cache.exists()   # nothing was tokenised yet
        dataset = load_dataset(*asked, cache)
        return {**found, "key": dataset.key}

    shutil.copytree(folder / "model", tmp_path / "model")
    shutil.copy(folder / "train.jsonl", tmp_path)
    before = parts(folder, tmp_path / "before")
    change, differ = CHANGES[name]
    after = parts(tmp_path, tmp_path / "after", **(change(tmp_path, monkeypatch) or {}))
    assert {part for part in before if before[part] != after[part]} == differ | ({"key"} if differ else set())


def test_special_tokens_and_the_date_of_a_template_that_prints_it_are_in_the_key(folder, tmp_path):
    shutil.copytree(folder / "model", tmp_path / "model")
    tokenizer = Tokenizer(tmp_path / "model")
    file, keys = folder / "train.jsonl", []
    for date in ("2020-01-02", "2020-01-03"):
        arguments = use_date(tmp_path, date)
        template = load_template(arguments["template"], tokenizer, date)
        keys.append(load_dataset([file], tokenizer, template, 120, "truncate", tmp_path / "cache").key)
    tokenizer.added_tokens[0]["lstrip"] = True
    keys.append(load_dataset([file], tokenizer, template, 120, "truncate", tmp_path / "cache").key)
    assert len(set(keys)) == 3


def test_data_that_changes_while_it_is_read_is_not_cached_under_its_old_hash(folder, tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to(folder / "model")
    make_records(tmp_path / "grows.jsonl", 5)

    def grow(path: Path):
        yield from read_records(path)
        with open(path, "a") as file:
            file.write("\n")
    monkeypatch.setattr(data, "read_records", grow)
    with pytest.raises(ValueError, match="grows.jsonl: changed while being read"):
        load(tmp_path, "grows.jsonl")
    assert not list((tmp_path / "cache").iterdir())


def test_a_killed_writer_leaves_no_cache_behind(folder, monkeypatch):
    make_records(folder / "killed.jsonl", 10, seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(data, "commit", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            load(folder, "killed.jsonl")
    assert len(load(folder, "killed.jsonl")) == 10


def test_overlong_policies_are_counted(folder):
    whole = load(folder)
    total = np.diff(whole.offsets)
    limit = int(np.median(total))
    cut, dropped = load(folder, max_length=limit), load(folder, max_length=limit, overlong="drop")
    over = int((total > limit).sum())
    assert 0 < over < 20
    assert cut.report["truncated"] == dropped.report["dropped_overlong"] == over
    assert np.diff(cut.offsets).tolist() == np.minimum(total, limit).tolist()
    assert np.diff(dropped.offsets).tolist() == total[total <= limit].tolist()
    with pytest.raises(ValueError, match=rf"train.jsonl:\d+: \d+ tokens, more than --max-length {limit}"):
        load(folder, max_length=limit, overlong="error")
    with pytest.raises(ValueError, match="no example left"):
        load(folder, max_length=3, overlong="drop")


def test_examples_with_nothing_to_train_on_are_left_out(folder):
    file = folder / "nothing.jsonl"
    file.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (
        MESSAGES, MESSAGES[:1], [MESSAGES[0], {**MESSAGES[1], "weight": 0}])))
    dataset = load(folder, "nothing.jsonl")
    assert dataset.trainable(span_weights("it")).tolist() == [0]
    assert dataset.trainable(span_weights("im")).tolist() == [0]    # as under it
    assert dataset.trainable(span_weights("im"), require_completion=False).tolist() == [0, 1, 2]
    assert dataset.trainable(span_weights("it"), require_completion=False).tolist() == [0]
    assert dataset.trainable(span_weights("it", completion=0, system=1)).tolist() == []


# ---------------------------------------------------------------- plan


def flatten(steps: list) -> np.ndarray:
    return np.concatenate([m for step in steps for rank in step for m in rank])


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("capacity", [300, 1000, 100_000])
def test_plan_has_every_example_once_and_steps_that_packing_does_not_change(world_size, capacity):
    lengths = np.random.default_rng(0).integers(1, 300, 1000)
    steps = plan(lengths, 5, 1, 64, capacity, world_size)
    reference = [sorted(flatten([step])) for step in plan(lengths, 5, 1, 64, 10**9, 1)]
    assert len(steps) == 16 == data.steps_per_epoch(1000, 64)
    assert [sorted(flatten([step])) for step in steps] == reference
    assert sorted(flatten(steps)) == list(range(1000))
    for step in steps:
        assert len({len(rank) for rank in step}) == 1, "ranks must have the same number of micro-batches"
        assert all(lengths[m].sum() <= capacity for rank in step for m in rank)


def test_plan_depends_on_seed_and_epoch():
    lengths = np.full(100, 5)
    first = [flatten(plan(lengths, *key, 10, 100, 1)).tolist() for key in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert first[0] == first[1] and first[0] != first[2] and first[0] != first[3]


def test_plan_is_tight_and_even():
    lengths = np.minimum(np.random.default_rng(0).lognormal(5, 1, 4000).astype(int) + 1, 2047)
    for world_size in (1, 2, 4):
        steps = plan(lengths, 0, 0, 128, 4096, world_size)[:-1]
        for step in steps:
            tokens = np.array([[lengths[m].sum() for m in rank] for rank in step])
            assert tokens.shape[1] <= -(-tokens.sum() // (4096 * world_size)) + 1
            assert tokens.sum(1).max() < 1.15 * tokens.sum(1).mean()


def test_plan_of_many_examples_is_fast_enough_to_remake_every_epoch():
    lengths = np.random.default_rng(0).integers(10, 600, 20_000)
    assert len(plan(lengths, 0, 0, 128, 4096, 2)) == 157


def test_plan_survives_few_examples_and_refuses_too_long_ones():
    steps = plan(np.array([5, 5]), 0, 0, 8, 5, 4)
    # Two of four ranks have an empty micro-batch.
    assert [len(m) for rank in steps[0] for m in rank].count(0) == 2
    with pytest.raises(ValueError, match="--micro-batch-tokens 4"):
        plan(np.array([5]), 0, 0, 8, 4, 1)


# ---------------------------------------------------------------- batches


def test_batch_shifts_and_counts_positions_within_each_document(folder):
    dataset = load(folder)
    examples = np.array([5, 0, 7])
    counts = dataset.counts[examples]
    table = coefficients(counts, span_weights("im"), "example")
    batch = collate(dataset, examples, table)
    at = 0
    for d, e in enumerate(examples):
        ids = dataset.ids[dataset.offsets[e]:dataset.offsets[e + 1]].tolist()
        kinds = dataset.kinds[dataset.offsets[e]:dataset.offsets[e + 1]].tolist()
        rows = slice(at, at + len(ids) - 1)
        assert batch.ids[rows].tolist() == ids[:-1] and batch.targets[rows].tolist() == ids[1:]
        assert batch.kinds[rows].tolist() == kinds[1:]
        assert batch.positions[rows].tolist() == list(range(len(ids) - 1))
        assert (batch.documents[rows] == d).all()
        np.testing.assert_allclose(batch.coefficients[rows], table[d][kinds[1:]], rtol=1e-6)
        at += len(ids) - 1
        assert batch.cu_seqlens[d + 1] == at
    assert at == len(batch.ids)
    assert batch.rows.tolist() == np.flatnonzero(batch.coefficients).tolist()
    weighted = set(batch.kinds[batch.rows].tolist())
    assert weighted == {SYSTEM, INSTRUCTION, COMPLETION}, "under IM no template or context target has weight"
    assert {TEMPLATE, CONTEXT} <= set(batch.kinds.tolist())


def test_empty_batch(folder):
    batch = collate(load(folder), np.array([], np.int64), np.zeros((0, 5)))
    assert len(batch.ids) == len(batch.rows) == 0 and batch.cu_seqlens.tolist() == [0]


def test_the_end_of_turn_is_a_target_and_the_first_answer_token_too(folder):
    """Pitfalls: a mask by token id that takes EOS out with the padding, and one that starts a token late."""
    (folder / "one.jsonl").write_text(json.dumps({"messages": MESSAGES}))
    dataset = load(folder, "one.jsonl")
    batch = collate(dataset, np.array([0]), coefficients(dataset.counts, span_weights("it"), "token"))
    tokenizer = Tokenizer(folder / "model")
    trained = [tokenizer.reference.id_to_token(i) for i in batch.targets[batch.rows].tolist()]
    assert "".join(trained) == "Hello<|eot_id|>"


# ---------------------------------------------------------------- export, command line


@pytest.mark.parametrize("loss", ["it", "im"])
def test_exported_labels_give_our_loss_in_transformers(folder, loss, tmp_path):
    """The mean over labelled tokens that transformers computes is the `token` denominator
    over the same examples."""
    from kernels.head import weighted_nll
    from model import load_model
    dataset = load(folder)
    usable = dataset.trainable(span_weights(loss))
    train.export(dataset, usable, span_weights(loss), tmp_path / "x.jsonl")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    total = labelled = 0
    rows = [json.loads(line) for line in open(tmp_path / "x.jsonl")]
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["span_kinds"])
        assert set(row["span_kinds"]) <= set(KINDS)
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            out = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss
        count = int((labels[:, 1:] != -100).sum())
        total, labelled = total + out.item() * count, labelled + count
    assert len(rows) == len(usable)
    batch = collate(dataset, usable, coefficients(dataset.counts[usable], span_weights(loss), "token"))
    mine = load_model(folder / "model")
    hidden = mine(batch.ids, batch.positions, batch.cu_seqlens)
    value, _ = weighted_nll(hidden[batch.rows], mine.head_weight, batch.targets[batch.rows],
                            batch.coefficients[batch.rows])
    assert 0 < labelled < dataset.lengths.sum() and labelled == len(batch.rows)
    assert value.item() == pytest.approx(total / labelled, rel=1e-5)


def data_py(folder: Path, *more: str) -> list[str]:
    return [str(ROOT / "data.py"), "--model", str(folder / "model"), "--train-data",
            str(folder / "train.jsonl"), "--template", "llama3", "--cache-dir", str(folder / "cache"), *more]


def test_data_py_shows_statistics_and_marked_examples(folder):
    done = subprocess.run([sys.executable, *data_py(folder, "--show", "1", "--max-length", "60")],
                          capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    first = json.loads(open(folder / "train.jsonl").readline())["messages"]
    assert f"[system|{first[0]['content']}]" in done.stdout
    assert f"[instruction|{first[1]['content']}]" in done.stdout
    assert "\x1b" not in done.stdout and max(map(len, done.stdout.split("---")[0].splitlines())) <= 110
    stats = json.loads(forks.run(data_py(folder, "--json", "--max-length", "60")).stdout)
    dataset = load(folder, max_length=60)
    assert stats["records"] == 20 and stats["truncated"] == dataset.report["truncated"] > 0
    assert stats["spans"]["completion"]["tokens"] == int(dataset.counts[:, COMPLETION].sum())


def test_data_py_tells_the_templates_warning(folder, monkeypatch, capsys):
    for template, warns in ((ROOT / "tests" / "templates" / "distill.jinja", True), ("llama3", False)):
        monkeypatch.setattr(sys, "argv", ["data.py", *flags(
            model=folder / "model", train_data=folder / "train.jsonl", template=template,
            cache_dir=folder / "cache")])
        train.main()
        assert ("warning: template" in capsys.readouterr().err) == warns


def test_data_py_errors_are_one_line(folder):
    for more, says in ((("--max-length", "1"), "--max-length 1"), (("--template", "nope"), "--template nope"),
                       (("--loss", "it", "--completion-weight", "0", "--export", "x"), "nothing to train")):
        done = forks.run(data_py(folder, *more))
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
