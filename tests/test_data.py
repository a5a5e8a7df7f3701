"""Token cache, step plan, packed batches."""
import io
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import chat
import data
import records
from chat import COMPLETION, CONTEXT, INSTRUCTION, SYSTEM, TEMPLATE, load_template
from records import read_records
from runtime.tokenizer import Tokenizer
from data import Steps, collate, load_dataset, plan
from config import span_weights
from loss import coefficients
from tiny import make_model, make_records

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


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
    original, edited = Path(records.__file__), home / "records.py"
    edited.write_text(original.read_text().replace('"human": "user"', '"human": "system"'))
    assert edited.read_text() != original.read_text()
    patch.setattr(data, "CODE", tuple(edited if file == original else file for file in data.CODE))


def other_library(home: Path, patch: pytest.MonkeyPatch) -> None:
    installed = data.version
    patch.setattr(data, "version", lambda name: "9.9" if name == "tokenizers" else installed(name))


def use_date(home: Path, date: str) -> dict:
    (home / "dated.jinja").write_text(chat.TEMPLATES["llama3"].read_text() + "{# {{ strftime_now('%Y') }} #}")
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
    "columns": (lambda home, patch: dict(columns=["system=persona"]), {"columns"}),
    "an edited to_messages": (edit_to_messages, {"code"}),
    "a library": (other_library, {"libraries"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_each_part_changes_the_cache_key_and_another_place_does_not(folder, tmp_path, name, monkeypatch):
    def parts(home: Path, cache: Path, max_length: int = 120, overlong: str = "truncate",
              columns: list[str] = (), **more: str) -> dict:
        tokenizer = Tokenizer(home / "model")
        template = load_template(more.pop("template", "llama3"), tokenizer, **more)
        asked = [home / "train.jsonl"], tokenizer, template, max_length, overlong
        found = data.cache_parts(*asked, columns)
        assert not cache.exists()   # nothing was tokenized yet
        dataset = load_dataset(*asked, cache, columns=columns)
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

    def grow(path: str, columns: list[str]):
        yield from read_records(path, columns)
        with open(path, "a") as file:
            file.write("\n")
    monkeypatch.setattr(data, "read_records", grow)
    with pytest.raises(ValueError, match="grows.jsonl: changed while being read"):
        load(tmp_path, "grows.jsonl")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("content, says", [
    (b"", ": holds no records"), (b"PAR1", ": is damaged, after record 0"), (b"{", ":1: is not JSON"),
    (b"\n{}", ":2: has none of the known layouts"), (b"\x1f\x8b", ": cannot be read, or is damaged"),
    (json.dumps(MESSAGES * 100).encode(), ": no example left of 1 records"),
    (json.dumps(MESSAGES).encode(), ""),
])
def test_standard_input_is_called_so(folder, content, says, monkeypatch):
    records._standard_input.cache_clear()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    tokenizer = Tokenizer(folder / "model")
    asked = tokenizer, load_template("llama3", tokenizer), 120, "drop", folder / "cache"
    if says:
        with pytest.raises(ValueError, match=f"^standard input{says}"):
            load_dataset(["-"], *asked)
    else:
        dataset = load_dataset(["-"], *asked)
        assert dataset.files == ["standard input"] and dataset.where(0) == "standard input:1"
    records._standard_input.cache_clear()


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
    little = span_weights("it", instruction=0.25)
    assert dataset.trainable(little, require_completion=False).tolist() == [0, 1, 2]
    assert dataset.trainable(span_weights("it", completion=0, system=1)).tolist() == []


# ---------------------------------------------------------------- which examples


def write(file: Path, records: list[dict]) -> list[dict]:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def test_records_with_one_instruction_are_never_on_both_sides(folder):
    """Eight instructions in all layouts, with other answers, system messages and white space."""
    records = write(folder / "groups.jsonl", [record for i in range(8) for record in (
        {"prompt": f"plum {i}", "completion": "red"}, {"prompt": f" plum  {i}\n", "completion": "blue"},
        {"instruction": "plum", "input": str(i), "output": "red"},
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": f"plum {i}"},
                      {"role": "assistant", "content": "a"}, {"role": "user", "content": "again"},
                      {"role": "assistant", "content": "b"}]})])
    dataset = load(folder, "groups.jsonl")
    sides = []
    for seed in range(10):
        held_out = data.hold_out(dataset.groups, 0.3, seed)
        by_instruction = held_out.reshape(8, 4)
        assert (by_instruction == by_instruction[:, :1]).all(), "an instruction is on both sides"
        # 9.6 of 32 records: two whole groups.
        assert held_out.sum() == 8
        subset = dataset.subset(np.flatnonzero(held_out))
        assert [subset.where(e) for e in range(8)] == [dataset.where(e) for e in np.flatnonzero(held_out)]
        sides.append(held_out.tolist())
    assert len({*map(tuple, sides)}) > 5
    # The same records are held out in another order, with another template and cut at another length.
    write(folder / "turned.jsonl", records[::-1])
    turned = load(folder, "turned.jsonl", max_length=9, template="tulu")
    assert data.hold_out(turned.groups, 0.3, 0).tolist() == sides[0][::-1]


def test_the_share_that_is_held_out_is_exact_where_records_differ_and_fair():
    """Of 1000 records each is held out about equally often, and few change sides when some are added."""
    groups = np.random.default_rng(0).integers(2**64, size=1000, dtype=np.uint64)
    sides = np.array([data.hold_out(groups, 0.1, seed) for seed in range(400)])
    assert (sides.sum(1) == 100).all()
    # Binomial: 40 with a standard deviation of 6.
    assert 10 < sides.sum(0).min() and sides.sum(0).max() < 70
    both = (sides[:200] & sides[200:]).sum(1).mean()
    assert 9 < both < 11, "two seeds have a tenth of a tenth in common"
    added = data.hold_out(np.append(groups, groups[:50] + np.uint64(1)), 0.1, 0)[:1000]
    assert (added != sides[0]).sum() < 15
    # A group that is larger than the share is trained on.
    assert data.hold_out(np.array([7] * 9 + [8], np.uint64), 0.1, 0).tolist() == [False] * 9 + [True]
    assert not data.hold_out(np.array([7] * 10, np.uint64), 0.9, 0).any()


def test_a_subset_holds_the_tokens_of_its_examples(folder):
    dataset, examples = load(folder), np.array([3, 4, 11])
    subset = dataset.subset(examples)
    assert len(subset) == 3 and subset.content != dataset.content
    assert subset.content != dataset.subset(np.array([3, 4, 12])).content
    for i, e in enumerate(examples):
        for name in ("ids", "kinds"):
            a, b = subset.offsets[i:i + 2]
            assert getattr(subset, name)[a:b].tolist() == getattr(dataset, name)[
                dataset.offsets[e]:dataset.offsets[e + 1]].tolist()
        assert subset.counts[i].tolist() == dataset.counts[e].tolist()
        assert subset.lengths[i] == dataset.lengths[e]


def test_a_mix_has_its_shares_in_every_epoch_and_uses_a_files_examples_equally_often():
    """Three files of 3, 10 and 7 examples, of which an epoch has 7, 4 and 9."""
    files = np.random.default_rng(0).permutation([0] * 3 + [1] * 10 + [2] * 7)
    epochs = [data.mixed_examples(files, [7, 4, 9], 5, epoch) for epoch in range(30)]
    for examples in epochs:
        assert np.bincount(files[examples]).tolist() == [7, 4, 9]
    for file, (size, count) in enumerate(((3, 7), (10, 4), (7, 9))):
        stream = np.concatenate([examples[files[examples] == file] for examples in epochs])
        whole = len(stream) // size * size
        passes = stream[:whole].reshape(-1, size)
        # Every pass has each of the file's examples once, and passes differ.
        assert (np.sort(passes) == np.flatnonzero(files == file)).all()
        assert len({*map(tuple, passes.tolist())}) > min(3, len(passes) // 2)
    assert data.mixed_examples(files, [7, 4, 9], 6, 0).tolist() != epochs[0].tolist()
    # Nor have two files of the same size the same order.
    one, other = data.mixed_examples(np.repeat([0, 1], 9), [9, 9], 5, 0).reshape(2, 9)
    assert one.tolist() != (other - 9).tolist()


# ---------------------------------------------------------------- plan


def flatten(steps: list) -> np.ndarray:
    return np.concatenate([m for step in steps for rank in step for m in rank])


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("capacity", [300, 1000, 100_000])
def test_plan_has_every_example_once_and_steps_that_packing_does_not_change(world_size, capacity):
    lengths = np.random.default_rng(0).integers(1, 300, 1000)
    steps = plan(lengths, 5, 1, 64, capacity, world_size)
    reference = [sorted(flatten([step])) for step in plan(lengths, 5, 1, 64, 10**9, 1)]
    assert len(steps) == 16
    assert [sorted(flatten([step])) for step in steps] == reference
    assert sorted(flatten(steps)) == list(range(1000))
    for step in steps:
        assert len({len(rank) for rank in step}) == 1, "ranks must have the same number of micro-batches"
        assert all(lengths[m].sum() <= capacity for rank in step for m in rank)


def test_plan_depends_on_seed_and_epoch():
    lengths = np.full(100, 5)
    first = [flatten(plan(lengths, *key, 10, 100, 1)).tolist() for key in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert first[0] == first[1] and len({*map(tuple, first)}) == 3


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
    assert batch.trained.tolist() == np.flatnonzero(batch.coefficients).tolist()
    weighted = set(batch.kinds[batch.trained].tolist())
    assert weighted == {SYSTEM, INSTRUCTION, COMPLETION}, "under IM no template or context target has weight"
    assert {TEMPLATE, CONTEXT} <= set(batch.kinds[batch.untrained].tolist())
    assert sorted([*batch.trained.tolist(), *batch.untrained.tolist()]) == list(range(at))


def test_a_batch_is_copied_to_a_gpu_from_pinned_memory_but_for_the_documents_bounds(folder, monkeypatch):
    dataset, examples = load(folder), np.array([5, 0, 7])
    batch = collate(dataset, examples, np.zeros_like(dataset.counts[examples]))
    pinned, copied = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *a, **more: copied.append((x, *a, more)) or x)
    batch.to(torch.device("cuda"))
    tensors = [x for name, x in vars(batch).items() if name not in ("cu_seqlens", "examples")]
    assert [id(x) for x in pinned] == [id(x) for x, *_ in copied] == [id(x) for x in tensors]
    assert all(how == [torch.device("cuda"), {"non_blocking": True}] for _, *how in copied)


def test_empty_batch(folder):
    batch = collate(load(folder), np.array([], np.int64), np.zeros((0, 5)))
    assert len(batch.ids) == len(batch.trained) == len(batch.untrained) == 0
    assert batch.cu_seqlens.tolist() == [0]


def test_the_end_of_turn_is_a_target_and_the_first_answer_token_too(folder):
    """Pitfalls: a mask by token id that takes EOS out with the padding, and one that starts a token late."""
    (folder / "one.jsonl").write_text(json.dumps({"messages": MESSAGES}))
    dataset = load(folder, "one.jsonl")
    batch = collate(dataset, np.array([0]), coefficients(dataset.counts, span_weights("it"), "token"))
    tokenizer = Tokenizer(folder / "model")
    trained = [tokenizer.reference.id_to_token(i) for i in batch.targets[batch.trained].tolist()]
    assert "".join(trained) == "Hello<|eot_id|>"


# ---------------------------------------------------------------- steps


def contents(steps: Steps, step: int) -> dict[int, tuple]:
    """A rank's examples of a step: {example: (ids, targets, kinds, coefficients)}."""
    out = {}
    for micro_batch in steps[step][0]:
        batch = collate(steps.dataset, *micro_batch)
        fields = [x.tolist() for x in (batch.ids, batch.targets, batch.kinds, batch.coefficients)]
        for example, a, b in zip(batch.examples.tolist(), batch.cu_seqlens[:-1], batch.cu_seqlens[1:]):
            out[example] = tuple(tuple(field[a:b]) for field in fields)
    return out


def test_a_mix_is_the_same_steps_on_any_ranks_and_in_any_order(folder):
    dataset = load(folder)
    dataset.origins = dataset.origins.copy()
    dataset.origins[:4, 0], dataset.origins[4:8, 0], dataset.origins[8:, 0] = 0, 1, 2
    dataset.names = np.array([0, 0, 1])     # the first name is of a folder with two files
    usable = np.arange(1, 20)
    weigh = partial(coefficients, weights=span_weights("im"), normalize="token")

    def steps(capacity: int, rank: int = 0, ranks: int = 1, seed: int = 3, draws: tuple = (15, 4)) -> Steps:
        return Steps(dataset, usable, weigh, seed=seed, batch_size=6, capacity=capacity, rank=rank,
                     world_size=ranks, draws=list(draws))

    # An example that is too long is named at once, also where the first epoch is without it.
    longest = dataset.lengths[usable].max()
    without = next(seed for seed in range(99) if dataset.lengths[
        steps(10**6, seed=seed, draws=(2, 2)).first_epoch].max() < longest)
    with pytest.raises(ValueError, match=f"--micro-batch-tokens {longest - 1} is less than an example of"):
        steps(longest - 1, seed=without, draws=(2, 2))

    def examples(of: list[Steps], step: int) -> list[int]:
        return sorted(e for each in of for micro_batch, _ in each[step][0] for e in micro_batch.tolist())

    alone, ranks = [steps(10**6)], [steps(150, rank, 2) for rank in range(2)]
    assert alone[0].per_epoch == ranks[0].per_epoch == 4
    expected = [examples(alone, step) for step in range(12)]
    for step in [*reversed(range(12)), *range(12)]:
        assert examples(ranks, step) == examples(alone, step) == expected[step]
    for epoch in range(3):
        drawn = np.array(sum(expected[4 * epoch:4 * epoch + 4], []))
        assert np.bincount(dataset.names_of(drawn)).tolist() == [15, 4]
        # Seven are usable under the first name; the fifteen are two whole passes and one more.
        assert {*drawn[drawn < 8]} == {*range(1, 8)}


@pytest.mark.parametrize("normalize", ["token", "example", "span"])
def test_a_step_is_the_same_examples_with_the_same_coefficients_on_any_ranks_and_in_any_order(
        folder, normalize):
    dataset = load(folder)
    usable = dataset.trainable(span_weights("it"))[1:]
    weigh = partial(coefficients, weights=span_weights("it"), normalize=normalize)

    def steps(capacity: int, rank: int = 0, ranks: int = 1) -> Steps:
        return Steps(dataset, usable, weigh, seed=3, batch_size=6, capacity=capacity, rank=rank,
                     world_size=ranks)

    alone, ranks = steps(10**6), [steps(150, rank, 2) for rank in range(2)]
    assert alone.per_epoch == ranks[0].per_epoch == -(-len(usable) // 6) > 1
    numbers = range(2 * alone.per_epoch)
    expected = [contents(alone, step) for step in numbers]
    for step in [*reversed(numbers), *numbers]:
        first, second = (contents(rank, step) for rank in ranks)
        assert len(ranks[0][step][0]) == len(ranks[1][step][0])
        assert not first.keys() & second.keys() and first | second == expected[step] == contents(alone, step)
        counts = dataset.counts[sorted(expected[step])]
        for steps_of_rank in (alone, *ranks):   # those of all ranks' examples
            assert sorted(steps_of_rank[step][1].tolist()) == sorted(counts.tolist())
    assert max(len(ranks[0][step][0]) for step in numbers) > 1
    for epoch in (expected[:alone.per_epoch], expected[alone.per_epoch:]):
        assert sorted(example for step in epoch for example in step) == usable.tolist()
    assert [*expected[0]] != [*expected[alone.per_epoch]]
