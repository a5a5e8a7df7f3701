"""Held-out NLL by span against transformers, its intervals against plain loops and the normal law."""
import gc
import json
import os
import shutil
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from chat import KINDS, load_template
from runtime.tokenizer import Tokenizer
from data import load_dataset
from eval import bootstrap, common, spans
from model import Llama
from runtime import report
from runtime.model_config import read_config
from tiny import copies_of_meta_tensors, flags, make_model, make_records, run_module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("spans")
    make_model(folder / "one", seed=1)
    make_model(folder / "two", seed=2)
    make_records(folder / "a.jsonl", 20)
    make_records(folder / "b.jsonl", 7, seed=5)
    return folder


def arguments(folder: Path, **more: object) -> list[str]:
    base = dict(model=[folder / "one", folder / "two"], data=[folder / "a.jsonl", folder / "b.jsonl"],
                template="llama3", max_length=120, cache_dir=folder / "cache", dtype="fp32", device="cpu",
                bootstrap=200)
    return flags(**{**base, **more})


def results(folder: Path, **more: object) -> dict[tuple, dict]:
    """The command's --json rows by (file, model, span), their names without folders."""
    spans.main(arguments(folder, json=folder / "out.json", **more))
    return {(Path(row["data"]).name, Path(row["model"]).name, row["span"]): row
            for row in json.loads((folder / "out.json").read_text())["results"]}


def transformers_sums(model: Path, data: Path, cache: Path) -> list[list[list[float]]]:
    """[example][kind] -> NLLs of its targets: one example at a time, every logit."""
    tokenizer = Tokenizer(model)
    dataset = load_dataset([data], tokenizer, load_template("llama3", tokenizer), 120, "truncate", cache)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    out = []
    for a, b in zip(dataset.offsets, dataset.offsets[1:]):
        ids = torch.tensor(dataset.ids[a:b].astype(np.int64))
        with torch.no_grad():
            log_p = theirs(ids[None]).logits[0].log_softmax(-1)
        out.append([[] for _ in KINDS])
        for t in range(len(ids) - 1):
            out[-1][dataset.kinds[a + t + 1]].append(-log_p[t, ids[t + 1]].item())
    return out


def test_nll_of_every_example_and_both_means_equal_transformers(folder):
    rows = results(folder, per_example=folder / "examples.jsonl", micro_batch_tokens=300)
    lines = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * (20 + 7)
    for model in ("one", "two"):
        for data in ("a.jsonl", "b.jsonl"):
            expected = transformers_sums(folder / model, folder / data, folder / "cache")
            mine = [line for line in lines if (line["model"], line["data"]) == (
                str(folder / model), str(folder / data))]
            assert [line["line"] for line in mine] == list(range(1, len(expected) + 1))
            for line, example in zip(mine, expected):
                assert line["tokens"] == {kind: len(x) for kind, x in zip(KINDS, example) if x}
                assert line["nll"] == pytest.approx({kind: sum(x) for kind, x in zip(KINDS, example) if x},
                                                    rel=1e-5)
            for k, kind in enumerate(KINDS):
                has = [example[k] for example in expected if example[k]]
                row = rows[data, model, kind]
                token_mean = sum(map(sum, has)) / sum(map(len, has))
                example_mean = sum(sum(x) / len(x) for x in has) / len(has)
                assert row["nll_token_mean"] == pytest.approx(token_mean, rel=1e-5)
                assert row["nll_example_mean"] == pytest.approx(example_mean, rel=1e-5)
                assert row["perplexity_token_mean"] == pytest.approx(np.exp(token_mean), rel=1e-4)
                assert row["perplexity_example_mean"] == pytest.approx(np.exp(example_mean), rel=1e-4)
                assert (row["tokens"], row["examples"]) == (sum(map(len, has)), len(has))
    assert any(abs(row["nll_token_mean"] - row["nll_example_mean"]) > 0.01 for row in rows.values())


def numbers(rows: dict[tuple, dict]) -> dict[tuple, list[float]]:
    return {key: np.hstack([v for v in row.values() if not isinstance(v, str)]).tolist()
            for key, row in rows.items()}


def test_neither_micro_batches_nor_ranks_change_the_numbers(folder):
    whole = numbers(results(folder))
    small = numbers(results(folder, micro_batch_tokens=120))
    run_module("eval.spans", arguments(folder, json=folder / "two.json", micro_batch_tokens=200), ranks=2)
    two = {(Path(row["data"]).name, Path(row["model"]).name, row["span"]): row
           for row in json.loads((folder / "two.json").read_text())["results"]}
    for other in (small, numbers(two)):
        assert other.keys() == whole.keys() and len(whole) == 2 * 2 * len(KINDS)
        for key in whole:
            np.testing.assert_allclose(other[key], whole[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("capacity", [120, 600])
def test_the_host_waits_for_a_file_once_however_many_rows_it_takes(folder, monkeypatch, capacity):
    tokenizer = Tokenizer(folder / "one")
    template = load_template("llama3", tokenizer)
    dataset = load_dataset([folder / "a.jsonl"], tokenizer, template, 120, "truncate", folder / "cache")
    with torch.device("meta"):
        model = Llama(read_config(folder / "one"))
    copies, rows = copies_of_meta_tensors(monkeypatch), []
    spans.example_sums(model, dataset, capacity, torch.device("meta"), progress=lambda x: rows.extend(x) or x)
    assert copies == ["cpu"] and len(rows) > 2


def test_a_seed_fixes_the_intervals_and_another_gives_others(folder):
    first, again, other = (numbers(results(folder, seed=seed)) for seed in (3, 3, 4))
    assert first == again != other


def test_first_checkpoint_of_two_is_as_alone_and_the_difference_is_of_means(folder):
    both, alone = results(folder), results(folder, model=folder / "one")
    for data, model, kind in alone:
        assert both[data, model, kind] == alone[data, model, kind]
        second = both[data, "two", kind]
        for mean in spans.MEANS:
            assert second[f"{mean}_minus_first"] == second[mean] - both[data, "one", kind][mean] != 0
            low, high = second[f"{mean}_minus_first_interval"]
            assert low < second[f"{mean}_minus_first"] < high


def samples(examples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(2, E) sums of two checkpoints that find the same examples hard, and (E,) counts."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 30, examples)
    mean = rng.normal(3, 1, examples)
    return np.stack([mean, mean - 0.1 + rng.normal(0, 0.05, examples)]) * counts, counts


@pytest.mark.parametrize("draws", [2**22, 100, 7])
def test_bootstrap_equals_a_plain_loop_whatever_is_drawn_at_once(monkeypatch, draws):
    monkeypatch.setattr(bootstrap, "DRAWS", draws)
    sums, counts = samples(13)
    got = spans.resampled_means(sums, counts, 50, seed=5)
    rng, expected = np.random.default_rng(5), np.empty((2, 50, 2))
    for r in range(50):
        drawn = rng.integers(13, size=13).tolist()
        for m in range(2):
            expected[0, r, m] = sum(sums[m, e] for e in drawn) / sum(counts[e] for e in drawn)
            expected[1, r, m] = sum(sums[m, e] / counts[e] for e in drawn) / 13
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("examples", [2, 7, 100, 333])
def test_a_columns_resampled_sums_are_the_same_bits_whatever_stands_beside_it(examples):
    columns = np.random.default_rng(0).normal(size=(examples, 11))
    together = bootstrap.resampled_sums(columns, 200, seed=3)
    for some in ([0], [3], [1, 4, 9], list(range(5))):
        assert np.array_equal(bootstrap.resampled_sums(columns[:, some], 200, seed=3), together[:, some])


@pytest.mark.parametrize("confidence, deviations", [(0.95, 1.95996), (0.8, 1.28155)])
def test_interval_is_as_wide_as_the_normal_law_says(confidence, deviations):
    sums, counts = samples(500)
    token, example = spans.resampled_means(sums, counts, 4000, seed=0)[:, :, 0]
    mean = sums[0].sum() / counts.sum()
    error = {"token": (sums[0] - mean * counts).std() / counts.mean() / 500**0.5,   # of a ratio
             "example": (sums[0] / counts).std() / 500**0.5}
    for values, of in ((token, "token"), (example, "example")):
        low, high = bootstrap.interval(values, confidence)
        assert high - low == pytest.approx(2 * deviations * error[of], rel=0.07)
        centre = mean if of == "token" else (sums[0] / counts).mean()
        assert abs((low + high) / 2 - centre) < 0.2 * error[of]


def test_pairs_make_the_interval_of_a_difference_narrow():
    sums, counts = samples(300)
    one, two = spans.compare(np.pad(sums[:, :, None], ((0, 0), (0, 0), (0, len(KINDS) - 1))),
                             np.pad(counts[:, None], ((0, 0), (0, len(KINDS) - 1))), 2000, 0.99, 0)
    one, two = one[KINDS[0]], two[KINDS[0]]
    for mean, drawn in zip(spans.MEANS, spans.resampled_means(sums, counts, 2000, 0)):
        for row, end, means in ((one, "", drawn[:, 0]), (two, "_minus_first", drawn[:, 1] - drawn[:, 0])):
            low, high = row[f"{mean}{end}_interval"]
            assert np.mean((means > low) & (means < high)) == pytest.approx(0.99, abs=1e-3)
        alone, other, paired = (np.diff(row[f"{mean}{end}_interval"]).item() for row, end in (
            (one, ""), (two, ""), (two, "_minus_first")))
        assert 0 < paired < 0.1 * np.hypot(alone, other)
        low, high = two[f"{mean}_minus_first_interval"]
        assert low < -0.1 < high < 0


def test_one_example_or_no_resamples_have_no_interval():
    counts = np.zeros((3, len(KINDS)), np.int64)
    counts[0, 0], counts[:, 1] = 4, 2
    row = spans.compare(counts[None] * 1.5, counts, 100, 0.95, 0)[0]
    assert set(row) == {KINDS[0], KINDS[1]}
    assert row[KINDS[0]]["nll_token_mean_interval"] is None
    assert row[KINDS[1]]["nll_token_mean_interval"] == [1.5, 1.5]
    row = spans.compare(counts[None] * 1.5, counts, 0, 0.95, 0)[0]
    assert row[KINDS[1]]["nll_token_mean_interval"] is None


def test_checkpoints_that_tokenize_differently_are_refused_before_any_is_run(folder, tmp_path, monkeypatch):
    make_model(tmp_path / "other", tokenizer="mistral")
    monkeypatch.setattr(spans, "example_sums", lambda *a: pytest.fail("evaluated"))
    with pytest.raises(ValueError, match="other tokenizes it differently from .*one "):
        spans.main(arguments(folder, model=[folder / "one", tmp_path / "other"], template="tulu"))


def test_another_cache_key_with_the_same_tokens_is_compared(folder, tmp_path):
    shutil.copytree(folder / "one", tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    config["pad_token"] = config["eos_token"]
    (tmp_path / "copy" / "tokenizer_config.json").write_text(json.dumps(config))
    rows = results(folder, model=[folder / "one", tmp_path / "copy"])
    assert rows["a.jsonl", "copy", "completion"]["nll_token_mean_minus_first_interval"] == [0, 0]


def test_checkpoints_are_not_held_together(folder, monkeypatch):
    original, models = spans.load, []

    def load(*args):
        gc.collect()
        assert all(model() is None for model in models)
        loaded = original(*args)
        models.append(weakref.ref(loaded.model))
        return loaded
    monkeypatch.setattr(spans, "load", load)
    spans.main(arguments(folder))
    assert len(models) == 2


def test_table_holds_the_numbers_in_80_columns(folder):
    rows = results(folder)
    done = run_module("eval.spans", arguments(folder))
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    wide = [line for line in lines if len(line) > 79 and str(folder) not in line]
    assert not wide, wide
    for (data, model, _), row in rows.items():
        low, high = row["nll_token_mean_interval"]
        label = "1" if model == "one" else "2"
        end = f"[{low:.4f}, {high:.4f}]{row['perplexity_token_mean']:9.2f}"
        assert any(line.startswith(f"{label} ") and f"{row['nll_token_mean']:.4f}" in line and end in line
                   for line in lines)
        if model == "two":
            assert any(line.startswith("2-1 ") and f"{row['nll_example_mean_minus_first']:+.4f}" in line
                       for line in lines)


@pytest.mark.parametrize("more, says", [
    (dict(confidence=1), "--confidence 1: must"), (dict(bootstrap=-1), "--bootstrap -1: must be"),
    (dict(max_length=1), "--max-length 1: must be a whole number, 2"), (dict(max_length="x"), "--max-length"),
    (dict(micro_batch_tokens=0), "--micro-batch-tokens 0"), (dict(seed=-1), "--seed -1"),
    (dict(data="nowhere.jsonl"), "nowhere.jsonl: no such file"), (dict(model="nowhere"), "--model nowhere"),
    (dict(json="nowhere/x.json"), "--json nowhere/x.json"), (dict(per_exampl="x"), "unrecognized"),
    (dict(per_example="."), "--per-example ."),
    (dict(data=["x.jsonl", "./x.jsonl"]), "--data x.jsonl ./x.jsonl: a file is given twice"),
    (dict(max_length=20, overlong="error"), "more than --max-length"),
])
def test_wrong_flags_are_named(folder, more, says):
    with pytest.raises(ValueError, match=says):
        spans.main(arguments(folder, **more))


@pytest.mark.parametrize("full", [True, False])
def test_neither_a_reader_that_is_gone_nor_a_full_disk_costs_the_other_result(folder, tmp_path, monkeypatch,
                                                                              capsys, full):
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full" if full else writer, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(report, "output_faults", [])
        spans.main(arguments(folder, json=tmp_path / "out.json", per_example=tmp_path / "each.jsonl"))
        # A reader that had enough is no fault.
        assert report.output_faults == ["No space left on device"] * full
    assert json.loads((tmp_path / "out.json").read_text())["results"]
    assert len((tmp_path / "each.jsonl").read_text().splitlines()) == 2 * (20 + 7)
    monkeypatch.setattr(spans, "write_examples", fails)
    capsys.readouterr()
    with pytest.raises(OSError, match="No space left"):
        spans.main(arguments(folder, per_example=tmp_path / "each.jsonl"))
    assert capsys.readouterr().out.count("completion: ") == 2


def test_examples_of_a_folder_are_told_apart_by_their_files(folder, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        shutil.copy(folder / name, tmp_path / "data")
    spans.main(arguments(folder, data=tmp_path / "data", model=folder / "one",
                         per_example=tmp_path / "examples.jsonl"))
    places = [(line["file"], line["line"]) for line in map(json.loads, open(tmp_path / "examples.jsonl"))]
    assert places == [(str(tmp_path / "data" / name), line)
                      for name, count in (("a.jsonl", 20), ("b.jsonl", 7)) for line in range(1, count + 1)]


def test_a_damaged_second_checkpoint_is_found_before_the_first_is_evaluated(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "two", tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    monkeypatch.setattr(spans, "evaluate", None)
    with pytest.raises(ValueError, match="cut/model.safetensors: not a readable safetensors file"):
        spans.main(arguments(folder, model=[folder / "one", tmp_path / "cut"]))


@pytest.mark.parametrize("flag", ["json", "per_example"])
@pytest.mark.parametrize("data", ["b.jsonl", "", "?.jsonl"])
def test_an_output_may_not_be_a_file_that_is_read(folder, tmp_path, flag, data):
    file = tmp_path / "b.jsonl"
    file.write_bytes((folder / "b.jsonl").read_bytes())
    with pytest.raises(ValueError, match="--data names this file, too"):
        spans.main(arguments(folder, data=f"{tmp_path}/{data}", **{flag: file}))
    assert file.read_bytes() == (folder / "b.jsonl").read_bytes()


@pytest.mark.parametrize("more, says", [
    (dict(confidence=1), "--confidence 1: must"),                                           # on every rank
    (dict(max_length=20, overlong="error"), "more than --max-length 20"),                   # on one
])
def test_an_error_on_two_ranks_is_one_line(folder, more, says):
    done = run_module("eval.spans", arguments(folder, **more), ranks=2, check=False)
    assert done.returncode != 0 and done.stderr.count("error: ") == 1
    assert says in done.stderr and "Connection closed" not in done.stderr


def test_a_template_is_refused_before_the_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr(common, "load_model", None)
    model = next(path.parent for path in folder.rglob("config.json"))
    with pytest.raises(ValueError, match="--template alpaca-7: neither auto, nor one of"):
        common.load(str(model), spans.parse_args(flags(model=model, data="x.jsonl", template="alpaca-7")),
                    torch.device("cpu"))
