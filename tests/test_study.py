"""A study's statistics against definitions and simulations; its grid against runs that were not disturbed."""
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

import forks
import study_plans
import tiny
import train
from data import load_dataset
from chat import load_template
from records import read_records
from eval import memorization, study, study_runs
from eval import study_statistics as statistics
from eval.study_report import draw_curves, draw_differences, report_text
from runtime.start import stop_signals
from runtime.tokenizer import Tokenizer
from harness_tasks import make_tasks
from tiny import ROOT, checked, is_running, make_records, run_apart, same_weights, setup, stop_after, wait_for

# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize("per_seed, agree", [([0, 0, 0], 0), ([1, 2, -1], 2), ([1, -1], 0), ([0, -3], 1)])
def test_seeds_without_a_difference_agree_with_nobody(per_seed, agree):
    row = statistics.difference(np.array(per_seed, float))
    assert row["seeds_agree"] == agree and row["seeds"] == len(per_seed)


def test_a_difference_of_zero_is_called_that():
    """Two contenders that give the same numbers, as where one's flag has no effect."""
    lines = [line(name, seed, [[4, 8], [2, 4]], [3, 1]) for name in ("it", "im") for seed in (0, 1)]
    result = statistics.verdict(lines)
    shown = report_text(result)
    assert result["sentences"] and all(text.startswith("im against it: does not change NLL on ")
                                       for text in result["sentences"])
    rows = [text for text in shown.splitlines() if text.startswith("  im ") and "interval" in text]
    assert rows and all(text.endswith(" equal") for text in rows) and "of 2 agree" not in shown


def test_percentages_and_nats_are_shown_with_the_decimals_that_mean_something():
    lines = [line(name, seed, [[4, 8], [2, 4 + seed]], [3, 1]) | {"end": {"generate": {"far": answers}}}
             for name, answers in (("it", [1, 0]), ("im", [1, 1])) for seed in (0, 1)]
    shown = report_text(statistics.verdict(lines))
    # The lowest of two learning rates' means is marked, once for each contender.
    worse = [each | {"lr": 1e-3} for each in json.loads(json.dumps(lines))]
    for each in worse:
        each["evaluations"][1]["validation"] = [2.0]
    marked = report_text(statistics.verdict([*lines, *worse]))
    assert marked.count("*") == marked.count("  0.0001: 1.0000*\n       0.001: 2.0000\n") == 2
    assert f"far: exact match, %; it has 50.00\n  {'im':<24}    +50.00 " in shown
    assert "far: NLL, mean over tokens; it has 1.6250, the start 3.0000\n" in shown


def test_one_contender_alone_is_not_compared():
    result = statistics.verdict([line("it", seed, [[4, 8], [2, 4]], [3, 1]) for seed in (0, 1)])
    assert report_text(result).endswith("\none contender, so there is nothing to compare")


def test_curves_of_one_epoch_are_seen_from_the_start():
    lines = [line(name, seed, [[4, 8], [2, 4 + seed]], [3, 1]) for name in ("it", "im") for seed in (0, 1)]
    result = statistics.verdict(lines)
    axes = draw_curves(result).axes[0]
    for curve in axes.get_lines():
        low, high = axes.get_ylim()
        assert curve.get_marker() not in ("", "None")
        assert all(low <= y <= high for y in curve.get_ydata())
    # Large dots at the chosen epoch's mean over seeds, of 4 / 4 + (0, 1 / 4) nats a token here.
    dots = [curve for curve in axes.get_lines() if curve.get_markersize() == 7]
    assert [(*dot.get_xdata(), *dot.get_ydata()) for dot in dots] == [(1.0, 1.625)] * 2
    result["differences"][0] |= {"value": 0.25, "interval": [0.1, 0.5]}
    _, dot, *_ = draw_differences(result).axes[0].get_lines()
    assert (*dot.get_xdata(), *dot.get_ydata()) == (0.25, 0)


def test_pictures_hold_their_labels_however_long_names_are():
    names = "it", *(f"a-contender-with-a-name-of-forty-letters-{i}" for i in range(8))
    lines = [line(name, seed, [[4, 8], [2 + i, 4 + seed]], [3, 1]) | {"end": {"tasks": {"acc": 0.1 * i}}}
             for i, name in enumerate(names) for seed in (0, 1)]
    result = statistics.verdict(lines, names[1])
    for figure in (draw_curves(result), draw_differences(result)):
        FigureCanvasAgg(figure).draw()
        drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= width and drawn.y1 <= height


def test_an_interval_worked_out_by_hand():
    """Two seeds, three examples. The mean is 3; seeds have 2, 4 and examples 2, 3, 4, so A = 3 (1 + 1) = 6
    and B = 2 (1 + 0 + 1) / 2 = 2; the remainders are 1, 0, -1 and -1, 0, 1, so C = 4 / 2 = 2."""
    d = np.array([[2.0, 2.0, 2.0], [2.0, 4.0, 6.0]])
    seeds, examples = 12.706204736174694, 4.302652729749462
    square = (seeds**2 * 6 - seeds * examples * 2 + examples**2 * 2) / 6
    assert statistics.half_width(d) == pytest.approx(math.sqrt(square), rel=1e-9)
    row = statistics.difference(d)
    assert row["value"] == 3 and row["per_seed"] == [2, 4] and row["seeds_agree"] == 2
    assert row["interval"] == pytest.approx([3 - math.sqrt(square), 3 + math.sqrt(square)])
    # One seed: the usual t interval over examples. scipy.stats.t.interval(0.95, 2, 4, sqrt(4 / 3))
    assert statistics.difference(d[1:])["interval"] == pytest.approx([-0.968275, 8.968275], abs=1e-5)
    # Numbers of whole runs: the usual t interval over seeds.
    assert statistics.difference(np.array([2.0, 4.0]))["interval"] == pytest.approx([3 - seeds, 3 + seeds])


def draws(seeds: int, examples: int, of_seed: float, of_example: float, count: int = 2000) -> np.ndarray:
    """(count, S, E) differences with mean 0: an effect of the seed, one of the example, and a remainder."""
    rng = np.random.default_rng([seeds, examples, int(100 * of_seed), int(100 * of_example)])
    return (of_seed * rng.normal(size=(count, seeds, 1)) + of_example * rng.normal(size=(count, 1, examples))
            + rng.normal(size=(count, seeds, examples)))


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("of_seed, of_example", [(0, 1), (0.05, 1), (0.2, 1), (0.5, 1), (1, 0.3), (0.1, 3)])
def test_intervals_hold_the_true_mean_as_often_as_they_say(seeds, of_seed, of_example):
    """And so a difference is shown where there is none in 3 to 7 % of studies; 2 % with only three seeds."""
    d = draws(seeds, 40, of_seed, of_example)
    covered = float((np.abs(d.mean((1, 2))) <= statistics.half_width(d)).mean())
    assert 0.93 <= covered <= (0.98 if seeds == 3 else 0.97)


def test_a_planted_difference_is_found():
    d = draws(5, 60, 0.05, 0.5, count=300) - 0.4
    found = d.mean((1, 2)) + statistics.half_width(d) < 0
    assert found.mean() > 0.9


def test_values_of_a_token_mean_have_its_mean_and_its_error():
    """Against a jackknife of the ratio over examples."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 60, 200)
    sums = (0.1 * tokens + rng.normal(0, 2, 200))[None]
    values = statistics.by_example(sums, tokens, "nll_token_mean")
    ratio = sums.sum() / tokens.sum()
    assert values.mean() == pytest.approx(ratio)
    left_out = (sums.sum() - sums[0]) / (tokens.sum() - tokens)
    jackknife = math.sqrt(199 / 200 * ((left_out - left_out.mean()) ** 2).sum())
    assert values.std(ddof=1) / math.sqrt(200) == pytest.approx(jackknife, rel=0.05)
    assert statistics.by_example(sums, tokens, "nll_example_mean").mean() == pytest.approx(
        (sums / tokens).mean())


# ---------------------------------------------------------------- selection and verdict


def line(contender: str, seed: int, test: list[list[float]], validation: list[float], lr: float = 1e-4
         ) -> dict:
    """A run with evaluations after 0, 1, ... epochs of 10 steps. test: NLL sums of two examples of 1 and 3
    tokens at each; validation: NLL of one token at each."""
    return {"contender": contender, "flags": {}, "lr": lr, "seed": seed, "steps": 10 * (len(test) - 1),
            "tokens": {"test": {"far": [1, 3]}, "validation": [1], "train": [2]},
            "evaluations": [{"step": 10 * i, "epoch": float(i), "test": {"far": sums}, "validation": [nll],
                             "train": [1.0]} for i, (sums, nll) in enumerate(zip(test, validation))],
            "end": {}, "seconds": 1.0}


def test_selection_takes_the_lowest_mean_over_seeds():
    curves = {1e-4: {10: [3.0, 1.0], 20: [2.5, 2.5]}, 1e-3: {10: [2.0, 1.8], 20: [1.0, 3.1]}}
    assert statistics.select(curves) == (1e-3, 10)
    # The same from lines, where the start has the lowest NLL of all and is not a choice.
    lines = [line("it", seed, [[1, 1]] * 3, [0.0, *(curves[lr][step][seed] for step in (10, 20))], lr)
             for seed in (0, 1) for lr in curves]
    assert statistics.validation_curves(lines) == {"it": curves}
    choice, notes = statistics.choose(lines)
    assert (choice["it"]["lr"], choice["it"]["step"], choice["it"]["epoch"]) == (1e-3, 10, 1.0)
    assert notes == ["it: lr 0.001 is the highest that was tried; a higher one may be better"]
    assert statistics.select({1e-3: {10: [math.nan]}, 1e-4: {10: [9.0]}}) == (1e-4, 10)
    # Of equal ones the lowest rate and the earliest step.
    assert statistics.select({1e-3: {10: [1.0]}, 1e-4: {30: [1.0], 20: [1.0], 10: [2.0]}}) == (1e-4, 20)
    with pytest.raises(ValueError, match="no learning rate gives a finite NLL on the validation data"):
        statistics.select({1e-3: {10: [math.nan]}})


def test_without_validation_data_the_last_step_of_one_rate_is_taken():
    lines = [line("it", seed, [[4, 8], [2, 4], [1, 2]], [3, 1, 2]) for seed in (0, 1)]
    for each in lines:
        each["tokens"]["validation"] = []
    assert statistics.verdict(lines)["choices"] == {"it": {"lr": 1e-4, "step": 20, "epoch": 2.0, "curve": {}}}
    lines += [each | {"lr": 1e-3} for each in lines]
    with pytest.raises(ValueError, match="several learning rates and no validation data to choose by"):
        statistics.verdict(lines)


def test_test_data_cannot_choose():
    """The choice is a function of numbers among which there are none of test files."""
    lines = [line(name, seed, [[4, 8], [2, 4], [1, 2]], [3, 1, 2])
             for name in ("it", "im") for seed in (0, 1)]
    for each in lines:
        for evaluation in each["evaluations"]:
            evaluation["test"] = evaluation["train"] = None
    curves = statistics.validation_curves(lines)
    assert curves["im"] == {1e-4: {10: [1.0, 1.0], 20: [2.0, 2.0]}}
    assert statistics.select(curves["im"]) == (1e-4, 10)
    assert "test" not in statistics.select.__code__.co_names + statistics.validation_curves.__code__.co_names


def test_a_verdict_worked_out_by_hand():
    """im has 0.5 and 0.6 less in example 1 (one token), 0.6 less in example 2 (three tokens)."""
    lines = [line("it", 0, [[9, 9], [2.0, 6.0], [0, 0]], [3, 1, 2]),
             line("it", 1, [[9, 9], [2.2, 6.0], [0, 0]], [3, 1, 2]),
             line("im", 0, [[9, 9], [7, 7], [1.5, 5.4]], [3, 2, 1]),
             line("im", 1, [[9, 9], [7, 7], [1.6, 5.4]], [3, 2, 1])]
    result = statistics.verdict(lines)
    assert [result["choices"][name]["epoch"] for name in ("it", "im")] == [1.0, 2.0]
    assert result["notes"] == ["im: validation NLL was lowest at the last evaluation; more --epochs may be "
                               "better"]
    tokens, examples = result["differences"][:2]
    assert [tokens["measure"], examples["measure"]] == [*statistics.MEANS]
    # (-0.55 - 0.6) / 4 and (-0.55 - 0.2) / 2
    assert tokens["value"] == pytest.approx(-0.2875) and examples["value"] == pytest.approx(-0.375)
    assert (tokens["contender"], tokens["file"], tokens["examples"]) == ("im", "far", 2)
    assert tokens["baseline_value"] == pytest.approx(8.1 / 4) and tokens["start_value"] == 18 / 4
    assert tokens["contender_value"] == pytest.approx(6.95 / 4)
    assert examples["per_seed"] == pytest.approx([-0.35, -0.4])
    # A = C = 0.0025, B = 0.1225, and both t are 12.7062: the half width is 12.7062 sqrt(0.1225 / 4).
    assert examples["interval"] == pytest.approx([-0.375 - 2.223586, -0.375 + 2.223586], abs=1e-5)
    assert result["sentences"][0].startswith(
        "im against it: no difference in NLL on far is shown: -0.287 [")
    assert result["curves"]["far"]["im"][2] == {"step": 20, "epoch": 2.0, "mean": pytest.approx(6.95 / 4),
                                                "low": pytest.approx(6.9 / 4), "high": pytest.approx(1.75)}
    # The order of lines and the other contender as the baseline change the sign only.
    turned = statistics.verdict(lines[::-1], "im")["differences"][0]
    assert turned["value"] == pytest.approx(0.2875) and turned["contender"] == "it"


@pytest.mark.parametrize("measure, row, expected", [
    ("nll_token_mean", (-0.1, [-0.13, -0.07]), "lowers NLL on far by 0.100 [0.070, 0.130] nats a token"),
    ("nll_token_mean", (0.1, [0.07, 0.13]), "raises NLL on far by 0.100 [0.070, 0.130] nats a token"),
    ("nll_token_mean", (-0.01, [-0.03, 0.02]),
     "no difference in NLL on far is shown: -0.010 [-0.030, 0.020] nats a token"),
    ("exact_match", (-3.0, [-5.25, -0.75]), "lowers exact match on far by 3.0 [0.8, 5.2] points"),
    ("nll_token_mean", (-0.01, None),
     "changes NLL on far by -0.010 nats a token; there is no interval from so few numbers")])
def test_a_difference_in_words(measure, row, expected):
    value, interval = row
    row = {"contender": "im", "file": "far", "measure": measure, "value": value, "interval": interval}
    assert statistics.sentence(row, "it") == f"im against it: {expected}"


def test_a_run_counts_once_and_percentages_end_at_100():
    lines = [line(name, seed, [[4, 8], [2, 4 + seed]], [3, 1]) for name in ("it", "im") for seed in (0, 1)]
    with pytest.raises(ValueError, match=r"2 lines are of one run \(im, lr 0.0001, seed 1\)"):
        statistics.verdict([*lines, lines[-1]])
    # That of the starting model may come twice, from two machines whose files were joined.
    start = {**lines[0], "contender": None, "lr": 0.0, "seed": 0}
    assert statistics.verdict([*lines, start, start]) == statistics.verdict(lines)
    for each in lines:
        each["end"] = {"generate": {"far": [int(each["seed"] == 0), int(each["contender"] == "im")]}}
    rows = statistics.by_measure(statistics.verdict(lines)["differences"])["far", "exact_match"]
    assert rows[0]["value"] == 50 and rows[0]["interval"] == [-100, 100]


def test_what_models_generate_is_compared_in_percent_and_with_the_start():
    def ends(exact: list[int], prefix: list[float], bleu: float) -> dict:
        return {"end": {"memorization": {"exact": exact, "prefix": prefix, "bleu": bleu}}}

    of_names = {"it": ends([0, 0], [0.5, 0.25], 20.0), "im": ends([1, 0], [0.5, 0.5], 30.0)}
    lines = [line(name, seed, [[4, 8], [2, 4 + seed]], [3, 1]) | of_names[name]
             for seed in (0, 1) for name in of_names]
    start = {**lines[0], "contender": None, "lr": 0.0, "seed": 0, **ends([0, 1], [0.0, 0.5], 8.0)}
    rows = statistics.by_measure(statistics.verdict([start, *lines])["differences"])
    names = "value", "baseline_value", "contender_value", "start_value"
    assert {measure: [rows[statistics.TRAINING, f"memorized_{measure}"][0][name] for name in names]
            for measure in ("exact", "prefix", "bleu")} == {
        "exact": [50, 0, 50, 50], "prefix": [12.5, 37.5, 50, 25], "bleu": [10, 20, 30, 8]}


def test_a_verdict_has_the_same_seeds_for_all_and_says_what_it_leaves_out():
    lines = [line(name, seed, [[4, 8], [2, 4 + seed]], [3, 1], lr) for name in ("it", "im")
             for seed in (0, 1, 2) for lr in (1e-4, 1e-3)]
    unfinished = [each for each in lines if (each["contender"], each["seed"]) != ("im", 2)
                  and (each["contender"], each["lr"], each["seed"]) != ("it", 1e-3, 1)]
    result = statistics.verdict(unfinished)
    assert result["seeds"] == [0, 1] and list(result["choices"]["it"]["curve"]) == ["0.0001"]
    assert result["notes"][:2] == ["seed 2 is left out: not every contender has finished it",
                                   "it with lr 0.001 is left out: it has not finished every seed"]
    with pytest.raises(ValueError, match="no seed is finished for every contender"):
        statistics.verdict([lines[0], line("im", 7, [[4, 8], [2, 4]], [3, 1])])
    other = line("im", 0, [[4, 8], [2, 4]], [3, 1])
    other["tokens"]["train"] = [3]
    with pytest.raises(ValueError, match="im, lr 0.0001, seed 0: was evaluated on other data than it"):
        statistics.verdict([lines[0], other])


# ---------------------------------------------------------------- data


def test_records_with_one_instruction_are_never_on_both_sides_of_a_study(tmp_path):
    """30 instructions, each with three or four answers."""
    records = [{"prompt": f"plum {i % 30}", "completion": f"red {i}"} for i in range(100)]
    file, sides = tmp_path / "train.jsonl", []
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    for seed in range(5):
        config = study.StudyConfig(train_data=[str(file)], output_dir=str(tmp_path / "out"),
                                   validation_fraction=0.2, split_seed=seed)
        (training,), validation, _, files = study.prepare_data(config)
        training, held_out = ([json.loads(line)["messages"] for line in files[each].splitlines()]
                              for each in (training, validation))
        asked, asked_held_out = ({messages[0]["content"] for messages in side}
                                 for side in (training, held_out))
        assert not asked & asked_held_out and len(asked | asked_held_out) == 30
        assert len(training) + len(held_out) == 100 and 18 <= len(held_out) <= 20
        sides.append(asked_held_out)
    assert all(side != sides[0] for side in sides[1:])
    # With --max-examples the sample is drawn from what is trained on, the first of the file.
    (training,), _, sample, files = study.prepare_data(dataclasses.replace(config, max_examples=7))
    assert sorted(files[sample].splitlines()) == sorted(files[training].splitlines()[:7])
    # It has as many as either of its uses needs.
    for sizes in ((3, 5), (5, 3)):
        config.train_sample, config.memorization = sizes
        assert len(study.prepare_data(config)[3][sample].splitlines()) == 5


def test_the_split_keeps_every_record_as_it_is(folder):
    """In another layout, and with a message that is not trained: the same tokens of the same kinds."""
    (folder / "layouts.jsonl").write_text(
        '{"prompt": "red", "completion": "blue", "id": 3}\n{"messages": [{"role": "user", "content": "a"}, '
        '{"role": "assistant", "content": "b", "weight": 0}, {"role": "user", "content": "a"}, '
        '{"role": "assistant", "content": "plum"}]}\n')
    (folder / "again.jsonl").write_text("".join(
        study.as_line(messages) + "\n" for messages, _ in read_records(folder / "layouts.jsonl")))
    tokenizer = Tokenizer(folder / "model")
    before, after = (load_dataset([str(folder / name)], tokenizer, load_template("llama3", tokenizer), 120,
                                  "truncate", folder / "cache") for name in ("layouts.jsonl", "again.jsonl"))
    assert np.array_equal(before.ids, after.ids) and np.array_equal(before.kinds, after.kinds)


# ---------------------------------------------------------------- the grid


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = setup(tmp_path_factory.mktemp("study"), 30, layers=1)
    make_records(folder / "near.jsonl", 8, seed=7)
    make_records(folder / "far.jsonl", 6, seed=9, longest=6)
    return folder


def arguments(folder: Path, out: str, **more: object) -> list[str]:
    """A study of two losses with two seeds in runs of six steps."""
    base = dict(eval_data=[folder / "near.jsonl", folder / "far.jsonl"], losses=["it", "im"], seeds=2,
                validation_fraction=0.2, train_sample=6, memorization=4, generate=2, batch_size=8)
    return tiny.arguments(folder, out, **{**base, **more})


def results(folder: Path, out: str) -> list[dict]:
    """runs.jsonl without times."""
    lines = [json.loads(text) for text in (folder / out / "runs.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    """A study that nothing disturbs, and that keeps its weights."""
    assert study.main([*arguments(folder, "whole"), "--keep-weights"]) == 0
    return folder / "whole"


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Verdicts without their pictures, which take longer than the tiny runs."""
    monkeypatch.setattr(study, "pictures", lambda *_: ["no picture"])


def test_a_run_of_a_study_equals_a_process_of_its_own(folder, whole):
    """Bit for bit: the first run by flags written here, the last by the file of flags that the study left."""
    data = whole / "data"
    alone = [tiny.arguments(folder, "alone", batch_size=8, loss="it", lr=0.01, seed=0, eval_every=3,
                            train_data=data / "study-train.jsonl", eval_data=[
                                folder / "near.jsonl", folder / "far.jsonl", data / "study-validation.jsonl",
                                data / "study-train-sample.jsonl"]),
             ["--config", str(whole / "runs/im-lr0.01-seed1/flags.json"),
              "--output-dir", str(folder / "alone")]]
    for name, argv in zip(("it-lr0.01-seed0", "im-lr0.01-seed1"), alone):
        run_apart([*argv, "--overwrite"])
        flags = json.loads((folder / "alone" / "run_config.json").read_text())
        assert f"{flags['loss']}-lr{flags['lr']:g}-seed{flags['seed']}" == name
        expected, own = folder / "alone", whole / "runs" / name / "train"
        assert same_weights(expected, own)
        assert (expected / "eval.jsonl").read_text() == (own / "eval.jsonl").read_text()


def test_the_lines_hold_what_the_runs_evaluated(folder, whole):
    start, *lines = results(folder, "whole")
    assert start["contender"] is None and {"memorization", "generate"} == start["end"].keys()
    assert [(line["contender"], line["lr"], line["seed"]) for line in lines] == [
        (name, 0.01, seed) for seed in (0, 1) for name in ("it", "im")]
    for line in lines:
        assert [e["epoch"] for e in line["evaluations"]] == [0, 1, 2] and line["steps"] == 6
        own = whole / "runs" / f"{line['contender']}-lr0.01-seed{line['seed']}" / "train" / "eval.jsonl"
        for evaluation, logged in zip(line["evaluations"], map(json.loads, own.read_text().splitlines())):
            for role, name in (("validation", "study-validation"), ("train", "study-train-sample")):
                expected = logged["data"][name]["completion"]["nll_token_mean"]
                assert np.sum(evaluation[role]) / np.sum(line["tokens"][role]) == pytest.approx(
                    expected, rel=1e-4)
            for name in ("near", "far"):
                expected = logged["data"][name]["completion"]
                nats, tokens = (np.array(x["test"][name]) for x in (evaluation, line["tokens"]))
                assert (nats / tokens).mean() == pytest.approx(expected["nll_example_mean"], rel=1e-4)
                assert len(tokens) == expected["examples"]
        assert len(line["end"]["memorization"]["prefix"]) == 4
        assert {name: len(x) for name, x in line["end"]["generate"].items()} == {"near": 2, "far": 2}
    # What models generate, by the command of its own.
    memorization.main(tiny.flags(
        model=whole / "runs/im-lr0.01-seed1/train/final", data=whole / "data/study-train-sample.jsonl",
        limit=4, max_length=120, dtype="fp32", device="cpu", bootstrap=0, json=folder / "memorization.json"))
    [expected] = json.loads((folder / "memorization.json").read_text())["results"]
    own = lines[-1]["end"]["memorization"]
    assert [100 * np.mean(own["exact"]), 100 * np.mean(own["prefix"]), own["bleu"]] == pytest.approx(
        [expected[name] for name in ("exact_match", "shared_prefix", "bleu")], abs=1e-2)
    assert 0 < expected["shared_prefix"] < 100


def test_a_study_that_is_stopped_resumes_exactly(folder, whole, monkeypatch, undrawn):
    """In the middle of a run, then between two runs, then killed while it wrote a line."""
    argv = arguments(folder, "stopped", save_every=3)
    with monkeypatch.context() as patch:
        stop_after(patch, 10)   # in the second run's second epoch
        assert study.main(argv) == 128 + signal.SIGTERM
    assert len(results(folder, "stopped")) == 2
    assert list((folder / "stopped/runs/im-lr0.01-seed0/train/checkpoints").iterdir())
    with monkeypatch.context() as patch:
        perform = study_runs.perform

        def stop_behind(plan, run):
            line = perform(plan, run)
            if run.seed == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return line
        patch.setattr(study_runs, "perform", stop_behind)
        assert study.main(argv) == 128 + signal.SIGTERM
    file = folder / "stopped" / "runs.jsonl"
    done = len(results(folder, "stopped"))
    file.write_text(file.read_text()[:-20])
    assert study.main(argv) == 0
    assert done < 5 and results(folder, "stopped") == results(folder, "whole")
    assert (folder / "stopped/study.json").read_text() == (whole / "study.json").read_text()
    for name in ("final", "checkpoints"):
        assert not list((folder / "stopped").glob(f"runs/*/train/{name}")), "they are deleted once measured"


def test_the_signal_handlers_come_back(folder, whole, undrawn):
    before = [signal.getsignal(number) for number in stop_signals()]
    assert study.main([*arguments(folder, "whole"), "--keep-weights"]) == 0
    assert [signal.getsignal(number) for number in stop_signals()] == before


def test_what_is_added_is_run_and_nothing_else(folder, monkeypatch, capsys, undrawn):
    trained, main = [], train.main
    monkeypatch.setattr(train, "main", lambda argv, *more: trained.append(argv) or main(argv, *more))
    base = dict(memorization=0, generate=0, epochs=1, max_examples=12, dtype="auto")
    argv = arguments(folder, "added", seeds=1, **base)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert study.main(argv) == 0 and len(trained) == 2
    # On another CPU it goes on in the same dtype.
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert study.main(argv) == 0 and len(trained) == 2
    assert study.main(arguments(folder, "added", losses=["it", "im:span"], variants="im-noisy=--loss im "
                                "--neftune-alpha 5", **base)) == 0
    added = [Path(argv[1]).parent.name for argv in trained[2:]]
    assert added == ["im=span-lr0.01-seed0", "im-noisy-lr0.01-seed0", "it-lr0.01-seed1",
                     "im=span-lr0.01-seed1", "im-noisy-lr0.01-seed1"]
    flags = [json.loads(Path(argv[1]).read_text()) for argv in trained[2:4]]
    assert [(each["loss"], each["normalize"], each["neftune_alpha"], each["dtype"]) for each in flags] == [
        ("im", "span", 0.0, "bf16"), ("im", "token", 5.0, "bf16")]
    result = json.loads((folder / "added" / "study.json").read_text())
    assert result["contenders"] == ["it", "im:span", "im-noisy"] and result["seeds"] == [0, 1]
    fits_the_terminal(capsys.readouterr().out, folder)


def fits_the_terminal(printed: str, folder: Path) -> None:
    assert max(len(text) for text in printed.splitlines() if str(folder) not in text) <= 80


def test_a_run_that_fails_is_one_line_and_the_others_go_on(folder, capsys, monkeypatch, undrawn):
    """With an infinite loss in the second step of one learning rate's runs."""
    check_finite = train.check_finite

    def of_a_run(step, totals, grad_norm, nll_by_batch, dataset, lr):
        loss = {"loss": math.inf} if (step, lr) == (2, 9.0) else {}
        check_finite(step, totals | loss, grad_norm, nll_by_batch, dataset, lr)
    monkeypatch.setattr(train, "check_finite", of_a_run)
    argv = arguments(folder, "failed", memorization=0, generate=0, epochs=1, lrs=["0.01", "9"], seeds=1)
    assert study.main(argv) == 1
    errors = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
    assert len(errors) == 2 and errors[0].startswith("error: it lr 9 seed 0: step 2: loss ")
    assert [line["lr"] for line in results(folder, "failed")] == [0.01, 0.01]
    assert json.loads((folder / "failed" / "study.json").read_text())["choices"]["im"]["lr"] == 0.01


@pytest.mark.parametrize("given", [True, False])
def test_a_test_file_that_shares_questions_with_the_other_data_is_named(folder, tmp_path, capsys, given):
    rows = [json.dumps({"prompt": f"q{i}", "completion": "a"}) + "\n" for i in range(40)]
    for name, lines in {"train": rows[:30], "validation": rows[30:], "test": rows[-4:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    config = study.StudyConfig(
        model=str(folder / "model"), template="llama3", cache_dir=str(tmp_path / "cache"),
        train_data=[str(tmp_path / f"{'train' if given else 'validation'}.jsonl")],
        validation_data=str(tmp_path / "validation.jsonl") if given else "", validation_fraction=0.5,
        eval_data=[str(tmp_path / "test.jsonl")], output_dir=str(tmp_path / "out"))
    study.prepare(config, {"it": {"loss": "it"}})
    said = " ".join(capsys.readouterr().out.split())
    chosen, known = (re.search(rf"warning: (\d) of the 4 examples of test have the first user message of a "
                               rf"{kind} example", said) for kind in ("validation", "training"))
    assert int(chosen[1]) + int(known[1] if known else 0) == 4 and bool(known) != given
    assert "examples of study-train-sample" not in said


def test_until_a_run_has_begun_nothing_is_bound_and_weights_that_were_kept_stay(folder, capsys, undrawn):
    def argv(**more: object) -> list[str]:
        return arguments(folder, "bound", **{**dict(memorization=0, generate=0, epochs=1, seeds=1), **more})

    make_records(folder / "long.jsonl", 7, seed=3, longest=6)
    long = [json.loads(text) for text in (folder / "long.jsonl").read_text().splitlines()]
    for record in long[:4]:
        record["messages"][0]["content"] = 100 * "red "
    (folder / "long.jsonl").write_text("".join(json.dumps(record) + "\n" for record in long))
    with pytest.raises(ValueError, match=r"long.jsonl: 3 of 7 record\(s\) have an answer within --max-length "
                                         r"120, and 5 must"):
        study.main(argv(validation_data=folder / "long.jsonl"))
    make_records(folder / "training records.jsonl", 6, seed=3)
    with pytest.raises(ValueError, match="results call other data 'training records'"):
        study.main(argv(eval_data=[folder / "training records.jsonl"]))
    assert (folder / "bound" / "data").is_dir() and not (folder / "bound" / "settings.json").exists()
    assert study.main([*argv(lr=0.02, batch_size=4), "--keep-weights"]) == 0
    printed = capsys.readouterr().out
    assert "examples with an answer: 24 of 24 to train on, 8 of 8 of" in printed.replace("\n  ", " ")
    final = folder / "bound" / "runs" / "it-lr0.02-seed0" / "train" / "final"
    assert final.is_dir() and study.main(argv(lr=0.02, batch_size=4)) == 0 and final.is_dir()
    with pytest.raises(ValueError, match="was started differently"):
        study.main(argv(lr=0.02))


def test_when_the_starting_model_cannot_be_measured_nothing_is_trained(folder, capsys, monkeypatch):
    def fails(*_: object) -> None:
        raise ValueError("no such task")
    monkeypatch.setattr(study_runs, "measure", fails)
    monkeypatch.setattr(train, "main", None)
    assert study.main(arguments(folder, "unmeasured")) == 1
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 1 and "the starting model: no such task" in captured.err
    assert "1 failed: 4 run(s) and the starting model left" in captured.out


def test_a_deadline_starts_no_more_runs(folder, capsys):
    argv = arguments(folder, "late", memorization=0, generate=0)
    assert study.main([*argv, "--deadline", "0.001"]) == 0
    assert "4 run(s) left; the same command resumes" in capsys.readouterr().out
    assert results(folder, "late") == [] and not (folder / "late" / "study.json").exists()


def test_workers_give_the_same_lines(folder, whole):
    """As a user starts the command."""
    checked(subprocess.run([sys.executable, "-m", "eval.study", *arguments(folder, "jobs", jobs=2)], cwd=ROOT,
                           capture_output=True, text=True))
    assert results(folder, "jobs") == results(folder, "whole")
    assert (folder / "jobs/study.json").read_text() == (whole / "study.json").read_text()


def test_a_worker_that_dies_costs_its_run_only(tmp_path, monkeypatch):
    runs, reports = [study_runs.Run(None, lr) for lr in (1, 2, 3, 4, 5)], {}
    waiting = iter(runs)
    with forks.server() as context:     # in place of processes that import torch
        monkeypatch.setattr(study_runs.multiprocessing, "get_context", lambda _: context)
        study_runs.run_in_workers(study_plans.plan(study_plans.Deadly, tmp_path), 1,
                                  lambda: next(waiting, None), reports.__setitem__)
    assert reports.keys() == {*runs}
    assert reports[runs[1]] == ("error", "its process was killed, as a system does that is out of memory; "
                                "give fewer --jobs, or a smaller --micro-batch-tokens")
    assert [reports[run][1]["lr"] for run in runs if run.lr != 2] == [1, 3, 4, 5]


def test_a_line_that_cannot_be_written_ends_a_study_of_several_jobs_with_the_reason(tmp_path, monkeypatch):
    waiting = iter([study_runs.Run(None, lr) for lr in (1, 3)])

    def full(*of_run: object) -> None:
        raise OSError("No space left")

    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)

    with forks.server() as context, pytest.raises(OSError, match="No space left"):
        monkeypatch.setattr(study_runs.multiprocessing, "get_context", lambda _: context)
        study_runs.run_in_workers(study_plans.plan(study_plans.Counting, tmp_path), 2,
                                  lambda: next(waiting, None), full)
    assert (tmp_path / "threads").read_text() == "3", "workers share the cores"


def test_workers_end_with_a_study_that_is_killed(tmp_path):
    process = subprocess.Popen([sys.executable, str(ROOT / "tests" / "study_plans.py"), str(tmp_path)],
                               stderr=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
    process.kill()
    wait_for(lambda: not is_running(int((tmp_path / "pid").read_text())))


def test_without_a_size_of_micro_batches_all_runs_have_the_one_that_fits_every_contender(folder, monkeypatch,
                                                                                         capsys):
    asked = []

    def default(config: train.Config, *more: object) -> int:
        asked.append((config.loss, more[-1]))
        return {"it": 300, "im": 200}[config.loss]

    monkeypatch.setattr(train, "micro_batch_tokens", default)
    argv = arguments(folder, "sized", micro_batch_tokens=0, jobs=3)
    config = train.parse_args(argv, study.StudyConfig, "study", "")
    plan, _, announce = study.prepare(config, study.parse_contenders(config))
    assert plan.base.micro_batch_tokens == 200
    assert asked == [("it", 3), ("im", 3)]
    # Three at a time take a third of the time of one after another.
    monkeypatch.setattr(study, "probe", lambda *_: 1.0)
    config.jobs = 1
    for each in (announce, study.prepare(config, study.parse_contenders(config))[2]):
        each([study_runs.Run("it", 0.1)], done=0)
    three, one = (60 * int(minutes) + int(seconds) + 3600 * int(hours) for hours, minutes, seconds in
                  re.findall(r"about (\d+):(\d+):(\d+)", capsys.readouterr().out))
    assert one == pytest.approx(3 * three, abs=2) and three > 60


def test_a_study_keeps_its_date_and_its_earlier_contenders(folder):
    def prepared(**more: object) -> tuple[study_runs.Plan, dict]:
        config = train.parse_args(arguments(folder, "dated", **more), study.StudyConfig, "study", "")
        return study.prepare(config, study.parse_contenders(config))[:2]

    plan, settings = prepared(date="2024-02-29", losses=["it", "im"])
    (plan.folder / "settings.json").write_text(json.dumps(settings))
    plan, settings = prepared(losses=["it", "im:span"])
    assert (plan.base.date, settings["date"]) == ("2024-02-29", "2024-02-29")
    assert list(settings["contenders"]) == ["it", "im", "im:span"]


def test_records_with_other_names_of_fields_are_asked(folder, tmp_path):
    record = {"query": "red plum", "reply": "blue"}
    (tmp_path / "x.jsonl").write_text(json.dumps(record))
    base = train.Config(model=str(folder / "model"), template="llama3", device="cpu", dtype="fp32",
                        columns=["prompt=query", "completion=reply"])
    plan = study_runs.Plan(tmp_path, base, {}, [str(tmp_path / "x.jsonl")], "", "", 0, 1, [], False)
    assert len(study_runs.measure(plan, base.model, tmp_path)["generate"]["x"]) == 1


def leave_out_own_tasks(monkeypatch) -> None:
    """The harness's, whose reading takes ten seconds."""
    import lm_eval.tasks
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager,
                                                              include_defaults=False))


def test_tasks_of_the_harness_are_numbers_of_a_run(folder, tmp_path, monkeypatch):
    """And a verdict pairs them by seed, with the usual t interval."""
    leave_out_own_tasks(monkeypatch)
    make_tasks(tmp_path / "tasks", 4)
    base = train.Config(model=str(folder / "model"), device="cpu", dtype="fp32")
    flags = ["--tasks", "tiny_choice", "--include_path", str(tmp_path / "tasks")]
    plan = study_runs.Plan(tmp_path, base, {}, [], "", "", 0, 0, flags, False)
    tasks = study_runs.measure(plan, plan.base.model, tmp_path)["tasks"]
    assert tasks.keys() == {"tiny_choice acc", "tiny_choice acc_norm"} and 0 <= tasks["tiny_choice acc"] <= 1
    lines = [line(name, seed, [[4, 8], [2, 4]], [3, 1]) | {"end": {"tasks": {"acc": score}}}
             for name, seed, score in (("it", 0, 0.25), ("it", 1, 0.5), ("im", 0, 0.5), ("im", 1, 0.5))]
    [row] = [row for row in statistics.verdict(lines)["differences"] if row["measure"] == "task"]
    assert (row["file"], row["value"], row["per_seed"]) == ("acc", 0.125, [0.25, 0])
    assert row["interval"] == pytest.approx([0.125 - 12.706205 * 0.125, 0.125 + 12.706205 * 0.125])


def test_a_finished_study_does_not_read_the_harnesss_tasks_again(folder, monkeypatch):
    read = []
    monkeypatch.setattr(study.harness, "open_tasks", read.append)
    monkeypatch.setattr(study_runs, "measure", lambda *_: {"tasks": {"x acc": 0.5}})
    argv = arguments(folder, "tasks", tasks="x", epochs=1, seeds=1)
    assert study.main(argv) == 0 and len(read) == 1
    assert study.main(argv) == 0 and len(read) == 1
    assert study.main([*argv[:argv.index("--seeds")], *argv[argv.index("--seeds") + 2:], "--seeds", "2"]) == 0
    assert len(read) == 2


def test_a_study_may_be_a_file_of_flags(folder, tmp_path):
    (tmp_path / "study.json").write_text(json.dumps({"losses": ["it", "im"], "lrs": [1e-3, "1e-2"],
                                                     "seeds": 3, "variants": ["a=--loss im --kl-weight 1"]}))
    config = train.parse_args(["--config", str(tmp_path / "study.json"), "--model", "x", "--train-data", "y"],
                              study.StudyConfig)
    assert study.parse_contenders(config) == {"it": {"loss": "it"}, "im": {"loss": "im"},
                                              "a": {"loss": "im", "kl_weight": 1.0}}
    assert study.parse_lrs(config) == [1e-3, 1e-2] and config.seeds == 3


def test_the_verdict_of_lines_alone_is_the_studys(folder, whole, tmp_path, capsys):
    assert study.main(["--from", str(whole / "runs.jsonl"), "--output-dir", str(tmp_path)]) == 0
    assert (tmp_path / "study.json").read_text() == (whole / "study.json").read_text()
    printed = capsys.readouterr().out
    result = json.loads((whole / "study.json").read_text())
    assert report_text(result) in printed
    fits_the_terminal(printed, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"study.json", "curves.png", "differences.png"}


def test_the_verdict_of_lines_in_another_order_compares_with_it(folder, whole, tmp_path, undrawn):
    """As they are in runs.jsonl where several runs went at once."""
    lines = (whole / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_text("".join(reversed(lines)))
    assert study.main(["--from", str(tmp_path / "runs.jsonl")]) == 0
    expected, result = (json.loads((of / "study.json").read_text()) for of in (whole, tmp_path))
    assert json.loads(lines[-1])["contender"] == "im" and result["baseline"] == "it"
    assert result["differences"] == expected["differences"]
    assert study.main(["--from", str(tmp_path / "runs.jsonl"), "--baseline", "im"]) == 0
    assert json.loads((tmp_path / "study.json").read_text())["baseline"] == "im"


def test_a_line_that_is_no_runs_is_named(folder, whole, tmp_path):
    first, second, *_ = map(json.loads, (whole / "runs.jsonl").read_text().splitlines())
    del second["contender"]
    file = tmp_path / "runs.jsonl"
    file.write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    with pytest.raises(ValueError, match=f"{file}:2: not a run's line .*contender must be of type str "):
        study.main(["--from", str(file)])
    with pytest.raises(ValueError, match="study.json:1: not a run's line .*contender must be of type"):
        study.main(["--from", str(whole / "study.json")])


def test_every_contender_trains_on_the_same_examples(folder, undrawn):
    """train.py leaves out records without a completion under every loss; one that ignores completions would
    train on fewer, where a record has no system message."""
    more = dict(losses="im", memorization=0, generate=0, epochs=1, seeds=1)
    with pytest.raises(ValueError, match="contender odd: .* example.* have nothing to train on"):
        study.main(arguments(folder, "odd", **more,
                             variants="odd=--loss it --completion-weight 0 --system-weight 1"))
    # Nothing is in the way of the command mended.
    assert study.main(arguments(folder, "odd", **more, variants="odd=--loss it --system-weight 1")) == 0


@pytest.mark.parametrize("flags, message", [
    (dict(losses=["it", "imm"]), "--losses imm: must be one of it, im, lm"),
    (dict(losses=["it", "im:word"]), "--losses im:word: must be one of"),
    (dict(losses=["it", "it"]), "--losses it: is given twice"),
    (dict(variants="a=--loss im --loss-of 3"), "contender a: --loss-of 3: unrecognized"),
    (dict(variants="a=--epochs 3"), "contender a: --epochs must be the same for all contenders"),
    (dict(variants="a b=--loss im"), "--variants a b=--loss im: write NAME="),
    (dict(variants="again=--loss im --completion-weight 1"), "contender again: trains exactly as"),
    (dict(variants="again=--loss it --instruction-weight 1 --system-weight 1 --weight-decay 0"),
     "contender again: trains exactly as contender im"),
    (dict(variants="a=--loss im --neftune-alpha -1"), "contender a: --neftune-alpha -1: must be"),
    (dict(lrs=["1e-3", "0"]), "--lrs 0: must be a finite number above 0"),
    (dict(lrs=["1e-3", "0.001"]), "--lrs 0.001 0.001: a learning rate is given twice"),
    (dict(seeds=0), "--seeds 0: must be a whole number, 1 or more"),
    (dict(validation_fraction=0.05), "--validation-fraction 0.05: leaves 28 record(s) to train on and 2"),
    (dict(validation_fraction=0.99), "--validation-fraction 0.99: leaves 0 record(s) to train on and 30"),
    (dict(validation_fraction=0, lrs=["1e-3", "1e-2"]), "--validation-fraction 0: 2 learning rates need"),
    (dict(validation_data="near.jsonl"), "--validation-data .*near.jsonl: has a file of --eval-data"),
    (dict(validation_data="near.jsonl", eval_data="n*r.jsonl"), "near.jsonl: has a file of --eval-data"),
    (dict(validation_data="n*r.jsonl"), "--validation-data .*: has a file of --eval-data"),
    (dict(overwrite=True), "--overwrite: a study decides this itself"),
    (dict(eval_fraction=0.1), "--eval-fraction: a study decides this itself"),
    (dict(train_data=None, mix="a.jsonl=1"), "--mix a.jsonl=1: a study holds out records of --train-data"),
    (dict(tasks_flags="--limit 3"), "--tasks-flags --limit 3: needs --tasks"),
    (dict(tasks="nothing"), "--tasks nothing: the harness has no such task")])
def test_bad_flags_are_refused_before_anything_is_run(folder, tmp_path, flags, message, monkeypatch):
    flags = {name: folder / value if name.endswith("_data") and value else value
             for name, value in flags.items()}
    if "tasks" in flags:
        leave_out_own_tasks(monkeypatch)
    monkeypatch.setattr(train, "main", None)
    with pytest.raises(ValueError, match=re.sub("([()])", r"\\\1", message)):
        study.main(arguments(folder, str(tmp_path / "study"), **flags))
    assert not (tmp_path / "study").exists()


def test_a_study_with_other_settings_is_refused_by_flag(folder, whole):
    def refused(message: str, **more: object) -> None:
        with pytest.raises(ValueError, match=message):
            study.main(arguments(folder, "whole", **more))

    refused("--epochs was 2, is 3", epochs=3)
    refused("--memorization was 4, is 5", memorization=5)
    refused("--eval-every was 0, is 4", eval_every=4)
    refused("contender im was .*, is .*; give it another name", losses=["it"],
            variants="im=--loss im --neftune-alpha 5")
    refused("--validation-fraction was 0.2, is 0.3", validation_fraction=0.3)
    refused("--eval-data: other files, or other contents.;", eval_data=[folder / "near.jsonl"])
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty and is not a study's folder"):
        study.main(arguments(folder, "foreign"))
    for more in (arguments(folder, "foreign/thesis.txt"),
                 ["--from", str(whole / "runs.jsonl"), "--output-dir", str(folder / "foreign/thesis.txt/x")]):
        with pytest.raises(ValueError, match="--output-dir .*thesis.txt is not a writable folder"):
            study.main(more)


def test_other_validation_records_are_another_study(folder, tmp_path):
    file, identities = tmp_path / "v.jsonl", []
    for seed in (1, 2):
        make_records(file, 6, seed=seed)
        argv = arguments(folder, "x", validation_data=file)
        config = train.parse_args(argv, study.StudyConfig, "study", "")
        identities.append(study.study_identity(config, train.open_source(config)))
    differ = {name for name in identities[0] if identities[0][name] != identities[1][name]}
    assert differ == {"validation_data"}


@pytest.mark.parametrize("flags", [
    "--normalize span", "--neftune-alpha 5", "--kl-weight 0.1", "--schedule cosine", "--warmup-ratio 0.1",
    "--weight-decay 0.1", "--beta1 0.8", "--beta2 0.9", "--adam-eps 1e-6", "--clip-grad-norm 2",
    "--instruction-weight 0.5", "--template-weight 0.1"])
def test_a_contender_may_have_flags_of_the_optimization(flags):
    config = study.StudyConfig(train_data=["t"], losses=["it"], variants=[f"own={flags}"])
    assert list(study.parse_contenders(config)) == ["it", "own"]


@pytest.mark.parametrize("missing, seeds, rates", [
    ([("im", 1e-4, 0)], [1, 2, 3], 2),          # 3 seeds of 4 cells, not 4 seeds of 3
    ([("im", 1e-4, seed) for seed in (0, 1, 2)], [0, 1, 2, 3], 1),
    ([(name, lr, 0) for name in ("it", "im") for lr in (1e-5, 1e-4)], [1, 2, 3], 2)])
def test_as_many_runs_as_possible_are_judged_when_some_are_missing(missing, seeds, rates):
    lines = [{"contender": name, "lr": lr, "seed": seed} for name in ("it", "im") for lr in (1e-5, 1e-4)
             for seed in range(4) if (name, lr, seed) not in missing]
    complete, _ = statistics.complete(lines)
    assert sorted({line["seed"] for line in complete}) == seeds
    assert len({line["lr"] for line in complete if line["contender"] == "im"}) == rates
