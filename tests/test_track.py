"""--track: what TensorBoard and wandb hold is what metrics.jsonl and eval.jsonl hold, each step once."""
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from runtime.track import Tracker
from tiny import arguments, flags, metrics, run_here, setup, stop_after


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return setup(tmp_path_factory.mktemp("track"))


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]}


def evaluations(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]


def test_an_interrupted_and_resumed_runs_event_files_hold_each_line_once(folder, monkeypatch):
    """Killed in its sixth step, after a checkpoint and an evaluation at the fourth."""
    argv = arguments(folder, "run", track="tensorboard", eval_data=folder / "train.jsonl", eval_every=2,
                     save_every=4)
    run, as_killed = folder / "run", {}
    with monkeypatch.context() as patch:
        original, calls = train.learning_rate, []

        def rate(*given):
            calls.append(1)
            if len(calls) == 6:
                as_killed.update(read_events(run / "tensorboard" / "metrics"))
                raise ValueError("killed")
            return original(*given)
        patch.setattr(train, "learning_rate", rate)
        with pytest.raises(ValueError, match="killed"):
            run_here(argv)
    assert [step for step, _ in as_killed["loss"]] == [1, 2, 3, 4, 5]
    assert run_here(argv) == 0
    found, lines = read_events(run / "tensorboard" / "metrics"), metrics(run)
    for name in ("loss", "lr", "grad_norm", "nll_completion", "nll_system", "tokens", "seconds"):
        expected = [(line["step"], pytest.approx(line[name])) for line in lines if line[name] is not None]
        assert expected and found[name] == expected, name
    assert "attention" not in found
    found = read_events(run / "tensorboard" / "eval")
    for kind in ("completion", "instruction"):
        assert found[f"data/train/{kind}/nll_token_mean"] == [
            (line["step"], pytest.approx(line["data"]["train"][kind]["nll_token_mean"]))
            for line in evaluations(run)]
    assert [step for step, _ in found["data/train/completion/tokens"]] == [0, 2, 4, 6, 8]
    # From scratch, nothing of before is left.
    run_here([*argv, "--overwrite", "--max-steps", "1"])
    assert [step for step, _ in read_events(run / "tensorboard" / "metrics")["loss"]] == [1]
    assert len(list((run / "tensorboard" / "metrics").iterdir())) == 1


def test_a_run_that_is_not_tracked_writes_nothing_for_it(folder):
    run_here(arguments(folder, "plain", max_steps=1))
    assert not (folder / "plain" / "tensorboard").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named_with_what_installs_it(name, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else find(asked))
    with pytest.raises(ValueError, match=f"--track {name}: it is not installed: pip install {name}$"):
        train.parse_args(flags(model="m", train_data="t.jsonl", track=name))


def test_without_a_login_wandb_says_so_in_one_line(tmp_path, monkeypatch):
    """A stand-in for wandb, so that this is tested where it is not installed."""
    class Error(Exception):
        pass

    def init(**_: object) -> None:
        raise Error("No API key configured.")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=Error))
    with pytest.raises(ValueError, match="^--track wandb: No API key configured. .WANDB_MODE=offline"):
        Tracker("wandb", tmp_path, {}, 0, False)


def test_wandb_offline_gets_the_lines_and_a_resumed_run_keeps_its_id(folder, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged, ids, original = {}, [], wandb.init

    def init(**given):
        run = original(**given)
        ids.append(run.id)
        log = run.log

        def remember(numbers, step):
            logged.setdefault(step, {}).update(numbers)
            log(numbers, step=step)
        run.log = remember
        return run
    monkeypatch.setattr(wandb, "init", init)
    argv = arguments(folder, "wandb", track="wandb", eval_data=folder / "train.jsonl", max_steps=4)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        run_here(argv)
    assert run_here(argv) == 0
    assert len(ids) == 2 and len({*ids}) == 1
    assert len(list((folder / "wandb" / "wandb").glob(f"offline-run-*-{ids[0]}/run-*.wandb"))) == 2
    for line in metrics(folder / "wandb"):
        assert logged[line["step"]]["loss"] == line["loss"]
    for line in evaluations(folder / "wandb"):
        assert logged[line["step"]]["data/train/completion/nll_token_mean"] == (
            line["data"]["train"]["completion"]["nll_token_mean"])
