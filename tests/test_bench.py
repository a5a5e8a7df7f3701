"""The benchmarks measure what they say: train.py's own step, and the steps after the warm-up."""
import json
from pathlib import Path

import pytest

import train
from bench import step, training
from tiny import arguments, metrics, run_here, setup

# A train.py whose measured steps take SECONDS for 10 tokens, and all others 100 s.
PROGRAM = """
import json, sys
from pathlib import Path
sys.argv.remove("--overwrite")
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert flags["--lr"] == "1" and flags["--batch-size"] == "3"
count, folder = int(flags["--max-steps"]), Path(flags["--output-dir"])
folder.mkdir(parents=True, exist_ok=True)
seconds = [100, 100, *[SECONDS] * (count - 3), 100]
(folder / "metrics.jsonl").write_text("".join(json.dumps(
    {"seconds": s, "tokens": 10, "trained_tokens": 4, "peak_memory_mb": 2048}) + "\\n" for s in seconds))
"""


def test_two_checkouts_are_compared_by_the_steps_after_the_warm_up_and_before_the_last(
        tmp_path, monkeypatch, capsys):
    for name, seconds in (("this", 2), ("other", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.py").write_text(PROGRAM.replace("SECONDS", str(seconds)))
    monkeypatch.setattr(training, "REPOSITORY", tmp_path / "this")
    training.main(["--model", "m", "--train-data", "d", "--compare", str(tmp_path / "other"), "--batch-size",
                   "3", "--steps", "4", "--warmup", "2", "--rounds", "2", "--", "--lr", "1"])
    *lines, last = capsys.readouterr().out.splitlines()
    [result] = json.loads(last)["results"]
    speeds = {Path(name).name: [run["tokens_per_second"] for run in runs]
              for name, runs in result["runs"].items()}
    assert speeds == {"train.py": [5.0, 5.0], "other": [2.0, 2.0]}
    assert lines[-1].endswith("2.50 (2.50-2.50)")


@pytest.mark.parametrize("batch_tokens", [4096, 120])   # one micro-batch a step, and several
def test_the_step_that_is_measured_is_the_step_of_train(tmp_path, batch_tokens):
    setup(tmp_path)
    flags = arguments(tmp_path, "run", schedule="constant", warmup_ratio=0, max_steps=4,
                      micro_batch_tokens=batch_tokens)
    assert run_here(flags) == 0
    _, one_step = step.training(train.parse_args(flags))
    for number, line in enumerate(metrics(tmp_path / "run")):
        measured = one_step(number)
        assert measured["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert [measured["tokens"], measured["trained_tokens"]] == [line["tokens"], line["trained_tokens"]]


def test_synthetic_documents_have_the_length_that_was_asked_for():
    dataset = step.synthetic(5, 40, vocabulary=7)
    assert dataset.lengths.tolist() == [40] * 5 and dataset.ids.max() == 6
    assert dataset.counts.sum(1).tolist() == [40] * 5 and (dataset.counts[0] > 0).sum() == 2
