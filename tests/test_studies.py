"""studies/: the paper's analyses, from the published sets to the page of findings."""
import gzip
import json
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from eval.study import StudyConfig, parse_contenders, parse_lrs
from eval.study_statistics import TRAINING
from runtime.flags import given_flags
from studies import prepare, report, run

ANALYSES = json.loads((run.HERE / "analyses.json").read_text())
GRIDS = run.load_grids()


def records(prefix, count):
    return [{"id": f"{prefix}_{i}", **prepare.messages(f"{prefix} {i}", "yes")} for i in range(count)]


def published_sets(folder):
    def write(name, rows):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if name.endswith(".gz"):
            (folder / name).write_bytes(gzip.compress(text.encode()))
        else:
            (folder / name).write_text(text)
    t0 = [row for i, size in enumerate((500, 300, 250, 200, 100)) for row in records(f"family{i}", size)]
    write("t0_long_to_short_3k.jsonl", t0 + t0[:50])      # some twice
    write("alpagasus_dolly_3k.jsonl", records("dolly", 800))
    write("lima.jsonl", records("lima", 120))
    write("test_user_oriented_252.jsonl", records("user", 252))
    write("gsm8k_test.jsonl", [{"question": f"q{i}", "answer": f"a{i}"} for i in range(100)])
    write("HumanEval.jsonl.gz", [{"prompt": f"def f{i}", "canonical_solution": "pass"} for i in range(90)])


def test_no_record_and_no_family_is_on_both_sides_of_the_split(tmp_path):
    published_sets(tmp_path)
    prepare.prepare(tmp_path, tmp_path / "out")
    of_file = {file.stem: file.read_text().splitlines() for file in (tmp_path / "out").iterdir()}
    assert {name: len(lines) for name, lines in of_file.items()} == {
        "t0-train": 480, "t0-validation": 96, "t0-near": 160, "t0-families": 160, "dolly-train": 480,
        "dolly-validation": 96, "dolly-near": 160, "user-oriented": 252, "lima": 100, "gsm8k": 80,
        "humaneval": 80}
    assert Counter(line for lines in of_file.values() for line in lines).most_common(1)[0][1] == 1

    def families(*names):
        return {json.loads(line)["id"].split("_")[0] for name in names for line in of_file[name]}
    assert families("t0-train", "t0-validation", "t0-near") == {"family0", "family2", "family4"}
    assert families("t0-families") == {"family1", "family3"}


def test_a_record_is_read_once_where_the_last_line_has_no_end(tmp_path):
    (tmp_path / "set.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a": 1}')
    assert prepare.read(tmp_path / "set.jsonl") == [{"a": 1}, {"a": 2}]


def test_a_missing_set_is_named(tmp_path):
    with pytest.raises(ValueError, match="t0_long_to_short_3k.jsonl is not in it"):
        prepare.prepare(tmp_path, tmp_path / "out")


def config_of(grid):
    argv = []
    for name, value in grid["flags"].items():
        values = value if isinstance(value, list) else [value]
        argv += ["--" + name.replace("_", "-"), *map(str, values)]
    return StudyConfig(**given_flags(StudyConfig, argv, "study", ""))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid["grid"])
def test_a_grids_flags_are_a_studys(grid):
    config = config_of(grid)
    assert parse_contenders(config) and parse_lrs(config)
    assert {*run.FILES} <= grid["flags"].keys()


@pytest.mark.parametrize("analysis", ANALYSES, ids=lambda analysis: analysis["name"])
def test_an_analysis_reads_runs_that_a_grid_makes_and_as_many_as_it_says(analysis):
    cells = set()
    for grid in GRIDS:
        config = config_of(grid)
        cells |= {(grid["study"], name, lr, seed) for name in parse_contenders(config)
                  for lr in parse_lrs(config) for seed in range(config.seeds)}
    wanted = {cell for cell in cells if cell[0] in analysis["studies"] and cell[1] in analysis["contenders"]}
    assert {(cell[0], cell[1]) for cell in wanted} == {
        (study, name) for study in analysis["studies"] for name in analysis["contenders"]}
    assert len(wanted) == analysis["runs"]
    file = analysis["primary"]["file"]
    if file != TRAINING:
        studies = [analysis["primary"]["study"]] if "study" in analysis["primary"] else analysis["studies"]
        assert all(file in grid["flags"]["eval_data"] for grid in GRIDS if grid["study"] in studies)


TOKENS = {"test": {"user-oriented": [4] * 30, "test": [2] * 20}, "validation": [3] * 10, "train": [5] * 10}


def line(contender, seed, effect, right=10):
    """A run whose examples have `effect(epoch)` nats a token more, beside noise that all runs share."""
    rng = np.random.default_rng([seed, len(contender), ord(contender[1])])

    def sums(counts, epoch):
        noise = np.random.default_rng(len(counts)).normal(size=len(counts))
        return [float(n * (2 + noise[i] + effect(epoch) + 0.01 * rng.normal())) for i, n in enumerate(counts)]
    evaluations = [{"step": 10 * epoch, "epoch": epoch, "validation": sums(TOKENS["validation"], epoch),
                    "train": sums(TOKENS["train"], epoch),
                    "test": {name: sums(counts, epoch) for name, counts in TOKENS["test"].items()}}
                   for epoch in (0, 1, 2)]
    return {"contender": contender, "lr": 1e-4, "seed": seed, "tokens": TOKENS, "evaluations": evaluations,
            "end": {"generate": {"test": [1] * right + [0] * (20 - right)}}}


def save(folder, study, lines):
    (folder / f"{study}.jsonl.gz").write_bytes(gzip.compress("".join(
        json.dumps(each) + "\n" for each in lines).encode()))


PRIMARY = {"study": "t0", "contender": "im", "measure": "nll_example_mean", "file": "user-oriented"}
COMPARISON = {"name": "overfitting", "kind": "differences", "studies": ["t0"], "primary": PRIMARY,
              "contenders": ["it", "im"], "measures": ["nll_example_mean"]}


def page_of(analysis, folder):
    name = analysis["name"]
    page = f"<!-- summary -->\n<!-- end -->\n<!-- {name} -->\nold\n<!-- end -->\nafter\n"
    return report.report([analysis | {"claim": "It is so", "paper": "yes", "runs": 8}], page, folder)


@pytest.mark.parametrize("effect, expected, says", [
    (-0.1, -1, "agrees"), (0.1, -1, "contradicts"), (0.0, -1, "not shown"), (0.1, 1, "agrees")])
def test_a_planted_difference_is_judged_by_its_sign(tmp_path, effect, expected, says):
    save(tmp_path, "t0", [line(name, seed, lambda epoch: (name == "im") * effect)
                          for seed in range(4) for name in ("it", "im")])
    page = page_of(COMPARISON | {"expected": expected}, tmp_path)
    summary = page.partition("<!-- end -->")[0]
    assert "8 of 8 runs; seeds 0, 1, 2, 3." in page
    assert says in summary and "old" not in page and page.endswith("after\n")
    if effect:
        assert f"| {effect:+.3f} [" in summary or f"| {effect:+.2f}" in summary
    assert (tmp_path / "overfitting.png").stat().st_size > 5_000


def test_losses_before_and_after_stand_with_the_rate_and_the_epoch_that_were_chosen(tmp_path):
    """IT loses 0.5 nats an epoch, IM 0.7, so the first epoch is chosen for both."""
    save(tmp_path, "t0", [line(name, seed, lambda epoch: worse * epoch) for seed in range(3)
                          for name, worse in (("it", 0.5), ("im", 0.7))])
    page = page_of(COMPARISON | {"expected": 1, "from_start": True, "files": ["user-oriented"]}, tmp_path)
    assert "|  | it: lr, epochs | im: lr, epochs |\n|---|---|---|\n| t0 | 0.0001, 1 | 0.0001, 1 |" in page
    [row] = [row for row in page.splitlines() if row.startswith("| user-oriented | ") and "[" not in row]
    before, it, im = map(float, row.strip("| ").split(" | ")[1:])
    assert (it - before, im - before) == pytest.approx((0.5, 0.7), abs=0.02)


def test_the_slope_of_a_trend_is_that_of_the_gains(tmp_path):
    # Gains of 5, 10, 20 and 25 points at 1, e, e^2 and e^3: 7 points for each factor of e. The squares of
    # what is left add up to 5, so the slope's error is sqrt(5 / 2 / 5), and t of two degrees of freedom 4.30.
    studies = {f"ratio-{i}": float(np.exp(i)) for i in range(4)}
    for i, study in enumerate(studies):
        save(tmp_path, study, [line(name, seed, lambda epoch: 0, right) for seed in range(3)
                               for name, right in (("it", 8), ("im", (9, 10, 12, 13)[i]))])
    page = page_of({"name": "ratio", "kind": "trend", "studies": studies, "x": "ratio", "expected": 1,
                    "contenders": ["it", "im"],
                    "primary": {"contender": "im", "measure": "exact_match", "file": "test"}}, tmp_path)
    assert "| +7.0 [+4.0, +10.0] | agrees |" in page
    assert "| 1 | 40.0 | 45.0 | +5.0 [" in page


def test_epochs_are_compared_with_each_other(tmp_path):
    # With the rate that is best on validation data, IT loses 0.3 nats between the epochs 1 and 2, IM 0.1.
    change = {"it": 0.3, "im": 0.1}
    save(tmp_path, "t0", [line(name, seed, lambda epoch: (epoch == 2) * change[name] + worse * epoch)
                          | {"lr": 1e-4 + worse}
                          for seed in range(4) for worse in (0, 0.5) for name in change])
    page = page_of({"name": "epochs", "kind": "epochs", "studies": ["t0"], "contenders": ["it", "im"],
                    "primary": PRIMARY | {"between": [1, 2]}, "expected": -1}, tmp_path)
    cells = page.partition("<!-- end -->")[0].split(" | ")
    [cell] = [cell for cell in cells if cell.startswith(("-0.", "+0."))]
    assert float(cell.split()[0]) == pytest.approx(-0.2, abs=0.01) and "agrees" in page
    assert cell.endswith("4 of 4 seeds")


def test_epochs_are_compared_over_the_seeds_that_both_losses_have(tmp_path):
    # As above, and every seed loses as many nats more as it has in its number.
    change = {"it": 0.3, "im": 0.1}
    save(tmp_path, "t0", [line(name, seed, lambda epoch: (epoch == 2) * (change[name] + seed))
                          for name, seeds in (("it", (0, 1, 2)), ("im", (1, 2, 3))) for seed in seeds])
    page = page_of({"name": "epochs", "kind": "epochs", "studies": ["t0"], "contenders": ["it", "im"],
                    "primary": PRIMARY | {"between": [1, 2]}, "expected": -1}, tmp_path)
    assert "6 of 8 runs; seeds 1, 2." in page
    cells = page.partition("<!-- end -->")[0].split(" | ")
    [cell] = [cell for cell in cells if cell.startswith(("-0.", "+0."))]
    assert float(cell.split()[0]) == pytest.approx(-0.2, abs=0.01) and cell.endswith("2 of 2 seeds")


def test_a_frontier_compares_at_the_same_loss_near(tmp_path):
    """IT's points lie on far = 5 - near, IM's about 0.2 below that line, further to the left and right; one
    of IT's is worse than others on both."""
    near_of = {"it": {1e-5: (3.0, 2.0), 1e-4: (2.5, 1.0)}, "im": {1e-5: (2.8, 1.5), 1e-4: (4.0, 0.5)}}
    lines = []
    for name, of_lr in near_of.items():
        for lr, near in of_lr.items():
            for seed in range(3):
                each = line(name, seed, lambda epoch: 0) | {"lr": lr}
                for evaluation, x in zip(each["evaluations"][1:], near):
                    worse = 1.0 if (name, lr, x) == ("it", 1e-4, 2.5) else 0.0
                    far = 5 - x + worse - (0.19 + 0.01 * seed if name == "im" else 0)
                    evaluation["test"] = {"test": [2 * x] * 20, "user-oriented": [4 * far] * 30}
                lines.append(each)
    # A rate that only one seed has does not count.
    extra = json.loads(json.dumps(lines[-1])) | {"lr": 1e-2}
    for evaluation in extra["evaluations"]:
        evaluation["test"]["user-oriented"] = [0.0] * 30
    save(tmp_path, "t0", [*lines, extra])
    analysis = {"name": "frontier", "kind": "frontier", "studies": ["t0"], "primary": PRIMARY,
                "contenders": ["it", "im"], "near": {"t0": "test"}, "expected": None}
    page = page_of(analysis, tmp_path)
    assert "| im - it | -0.200 [-0.225, -0.175], 3 of 3 seeds |" in page and "| exploratory |" in page
    # IM's worse near than all of IT's
    for each in lines:
        for evaluation in each["evaluations"][1:]:
            evaluation["test"]["test"] = [2 * (9 if each["contender"] == "im" else 3)] * 20
    save(tmp_path, "t0", lines)
    assert "Not measured yet: im in t0: no point of it is as low near." in page_of(analysis, tmp_path)


def test_what_was_not_run_is_said(tmp_path):
    save(tmp_path, "t0", [line("it", seed, lambda epoch: 0) for seed in range(2)])
    page = page_of(COMPARISON | {"expected": -1}, tmp_path)
    assert "Not measured yet: no run of im in t0." in page and "not measured yet |" in page


def test_the_best_regulariser_is_chosen_on_validation_data():
    curve = [{"step": 10, "mean": 2.0}, {"step": 20, "mean": 1.5}]
    choices = {name: {"lr": 1e-4, "step": step, "curve": {"0.0001": [
        point | {"mean": point["mean"] + more} for point in curve]}}
        for name, step, more in (("a", 20, 0.2), ("b", 20, 0.0), ("c", 10, 0.0))}
    assert report.best_on_validation({"choices": choices}, ["a", "b", "c"]) == "b"
    rows = [{"contender": name, "file": "test", "measure": "exact_match"} for name in "abc"]
    wanted = rows[0] | {"contender": "best of a, b on validation data"}
    assert report.primary_row(wanted, {"choices": choices}, rows) == rows[1]


def test_the_page_has_a_place_for_every_analysis():
    text = report.PAGE.read_text()
    for name in ("summary", *(analysis["name"] for analysis in ANALYSES)):
        assert f"<!-- {name} -->" in text


def test_publishing_twice_gives_the_same_bytes(tmp_path):
    (tmp_path / "out/t0").mkdir(parents=True)
    (tmp_path / "out/t0/runs.jsonl").write_text(json.dumps(line("it", 0, lambda epoch: 0)) + "\n")
    files = []
    for name in ("a", "b"):
        run.publish(tmp_path / "out", tmp_path / name)
        files.append((tmp_path / name / "t0.jsonl.gz").read_bytes())
    assert files[0] == files[1] and json.loads(gzip.decompress(files[0]))["contender"] == "it"


def test_the_advice_of_eval_look_gets_the_results_of_studies_that_were_run(tmp_path):
    save(tmp_path, "t0", [line(name, seed, lambda epoch: (name == "im") * -0.1) for seed in range(4)
                          for name in ("it", "im")])
    settings = [{"set": "a", "result": "1 -> 2"},
                {"set": "b", "study": "t0", "files": {"user-oriented": "far", "test": "near"}, "result": ""},
                {"set": "c", "study": "not-run", "files": {"test": "near"}, "result": "old"}]
    paper, own, missing = (each["result"] for each in report.evidence(settings, tmp_path))
    assert (paper, missing) == ("1 -> 2", "")
    assert own.startswith("NLL on far -0.1") and "; exact match, %, on near +0.0" in own


def test_a_grid_that_is_killed_ends_the_others(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(run, "wait_for", lambda command: started.append(command) or -9)
    records = ["--model", str(tmp_path), "--records", str(tmp_path)]
    assert run.main([*records, "--output-dir", str(tmp_path / "runs"), "t0-*", "dolly-*"]) == 128 + 9
    assert len(started) == 1
    # Each gets what is left of the time.
    run.main([*records, "--output-dir", str(tmp_path / "runs"), "--deadline", "50", "t0-losses"])
    assert 0 < json.loads((tmp_path / "runs" / "t0-losses.json").read_text())["deadline"] <= 50


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_waits_for_the_study_that_saves(number):
    """Ctrl-C as a terminal presses it: the study gets it, too. SIGTERM it does not get: it is passed on."""
    study = ("import signal, sys, time\ndef stop(number, _):\n"
             "    time.sleep(1)\n    print('saved')\n    sys.exit(128 + number)\n"
             f"signal.signal({number}, stop)\n"
             "print('running', flush=True)\ntime.sleep(60)")
    program = ("import sys; from studies.run import wait_for; from runtime.start import run_program; "
               f"run_program(lambda _: print('status', wait_for([sys.executable, '-c', {study!r}])))")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=run.REPOSITORY, text=True,
                               stdout=subprocess.PIPE, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert process.stdout.readline() == "running\n"
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.communicate(timeout=30)[0] == f"saved\nstatus {128 + number}\n"
