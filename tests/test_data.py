"""Records, token cache, step plan, packed batches, export and `python data.py`."""
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import data
import forks
from data import (COMPLETION, CONTEXT, INSTRUCTION, KINDS, SYSTEM, TEMPLATE, Tokenizer, collate, load_dataset,
                  load_template, plan, read_records)
from loss import coefficients, span_weights
from tiny import ROOT, make_model, make_records

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
    ({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": 1, "name": "x"}]}, MESSAGES),
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


@pytest.mark.parametrize("line, says", [
    ("{not json", "Expecting property name"), ("[]", "JSON object"), ("{}", "known layouts"),
    ('{"text": "x"}', "'text'"), ('{"messages": []}', "no messages"), ('{"messages": "x"}', "no messages"),
    ('{"messages": ["x"]}', "message 1 must be an object"),
    ('{"messages": [{"role": "robot", "content": "x"}]}', "unknown role 'robot'"),
    ('{"messages": [{"role": "user", "content": null}]}', "'content' is NoneType"),
    ('{"messages": [{"role": "user", "content": "x", "weight": 0.5}]}', "weight 0.5"),
    ('{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}', "tool_calls"),
    ('{"messages": [{"role": "user", "content": "x"}], "tools": [1]}', "'tools'"),
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
            ids, kinds = data.tokenize(data.render(messages, template), tokenizer)
            a, b = dataset.offsets[e:e + 2]
            assert dataset.ids[a:b].tolist() == ids and dataset.kinds[a:b].tolist() == kinds
            assert dataset.counts[e].tolist() == [kinds[1:].count(kind) for kind in range(5)]
            assert dataset.where(e).endswith(f"train.jsonl:{line}")
    assert (dataset.counts.sum(0) > 0).all()  # every kind occurs, so none is tested vacuously


def test_cache_key_follows_all_that_matters(folder):
    keys = [load(folder).key, load(folder, max_length=50).key, load(folder, overlong="drop").key,
            load(folder, template="tulu").key]
    make_records(folder / "other.jsonl", 20, seed=1)
    keys.append(load(folder, "other.jsonl").key)
    assert len(set(keys)) == len(keys)
    assert load(folder).key == keys[0]


def test_a_killed_writer_leaves_no_cache_behind(folder, monkeypatch):
    make_records(folder / "killed.jsonl", 10, seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
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
    assert dataset.trainable(span_weights("im")).tolist() == [0, 1, 2]
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
    from loss import weighted_nll
    from model import load_model
    dataset = load(folder)
    data.export(dataset, span_weights(loss), tmp_path / "x.jsonl")
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
    usable = dataset.trainable(span_weights(loss))
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


def test_data_py_errors_are_one_line(folder):
    for more, says in ((("--max-length", "1"), "--max-length 1"), (("--template", "nope"), "--template nope"),
                       (("--loss", "it", "--completion-weight", "0", "--export", "x"), "nothing to train")):
        done = forks.run(data_py(folder, *more))
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
