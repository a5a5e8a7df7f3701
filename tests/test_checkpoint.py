"""Checkpoints: stopped, killed and damaged runs end bit for bit like whole ones, with any optimizer."""
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import forks
import train
from runtime import checkpoint
from tiny import arguments, command, flip_a_bit, metrics, run_here, setup, stop_after, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return setup(tmp_path_factory.mktemp("train"))


SCHEDULED = dict(neftune_alpha=5, kl_weight=0.1, weight_decay=0.1, schedule="cosine", warmup_ratio=0.3,
                 log_every=3)


@pytest.fixture(scope="module")
def whole_run(folder) -> Path:
    """What a stopped run must end like: the same run, never stopped."""
    run_here(arguments(folder, "whole", **SCHEDULED))
    return folder / "whole"


@pytest.mark.parametrize("step", [2, 3, 4, 5, 7])  # within, at and after the end of the first epoch
def test_a_run_stopped_at_any_step_and_resumed_ends_bit_for_bit_the_same(
        folder, whole_run, step, monkeypatch, capsys):
    out = folder / f"stopped-{step}"
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        assert run_here(arguments(folder, out, **SCHEDULED)) == 128 + signal.SIGTERM
    assert "SIGTERM: finishing this step" in capsys.readouterr().out
    assert len(metrics(out)) == step and not (out / "final").exists()
    assert run_here(arguments(folder, out, **SCHEDULED)) == 0
    assert f"resuming after step {step}" in capsys.readouterr().out
    whole = weights(whole_run / "final")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(out / "final").items())
    rows, expected = metrics(out), metrics(whole_run)
    assert [r["step"] for r in rows] == list(range(1, len(expected) + 1))
    assert [r["loss"] for r in rows] == [r["loss"] for r in expected]


def test_killed_while_writing_resumes_from_the_checkpoint_before(folder, whole_run):
    """SIGKILL in the middle of a checkpoint, its largest file half there;
    metrics run ahead of the checkpoint."""
    argv = arguments(folder, "killed", **SCHEDULED, save_every=2)
    code = ("import os, signal, sys; from runtime import checkpoint\n"
            "def write_tensors(path, *a):\n"
            "    if 'step-00000004' in str(path) and 'optimizer' in str(path):\n"
            "        open(path, 'wb').write(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return real(path, *a)\n"
            "real, checkpoint.write_tensors = checkpoint.write_tensors, write_tensors\n"
            "import train; sys.exit(train.run(sys.argv[1:]))\n")
    done = forks.run(["-c", code, *argv])
    assert done.returncode == -signal.SIGKILL
    assert len(metrics(folder / "killed")) == 4
    with open(folder / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # a line that was being written
    done = subprocess.run(command(argv), capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step-00000004.part was not written to its end" in done.stdout
    assert "resuming after step 2" in done.stdout
    assert [r["step"] for r in metrics(folder / "killed")] == list(range(1, 9))
    whole = weights(whole_run / "final")
    assert all(torch.equal(tensor, whole[name])
               for name, tensor in weights(folder / "killed" / "final").items())


DAMAGE = {
    "bit-flipped weights": lambda folder: flip_a_bit(folder / "model.safetensors"),
    "bit-flipped averages": lambda folder: flip_a_bit(folder / "optimizer.safetensors"),
    "short averages": lambda folder: os.truncate(folder / "optimizer.safetensors", 5000),
    "unreadable weights": lambda folder: ((folder / "model.safetensors").unlink(),
                                          (folder / "model.safetensors").mkdir()),
    "lost weights": lambda folder: (folder / "model.safetensors").unlink(),
    "lost state": lambda folder: (folder / "state.json").unlink(),
    "another step": lambda folder: (folder / "state.json").write_text(
        (folder / "state.json").read_text().replace('"step": 6', '"step": 7')),
    "empty state": lambda folder: (folder / "state.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
        folder, whole_run, damage, monkeypatch, capsys):
    out = folder / f"damaged-{damage}".replace(" ", "-")
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        run_here(arguments(folder, out, **SCHEDULED, save_every=3))
    newest = out / "checkpoints" / "step-00000006"
    assert (newest / "state.json").read_text().count('"step": 6') == 1
    DAMAGE[damage](newest)
    capsys.readouterr()
    with pytest.raises(ValueError, match="step-00000006"):
        run_here(arguments(folder, folder / "elsewhere", **SCHEDULED, resume=newest))
    assert not (folder / "elsewhere").exists()
    assert run_here(arguments(folder, out, **SCHEDULED, save_every=3)) == 0
    printed = capsys.readouterr().out
    assert "warning: " in printed and "step-00000006" in printed and "resuming after step 3" in printed
    whole = weights(whole_run / "final")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(out / "final").items())
    assert [r["step"] for r in metrics(out)] == list(range(1, 9))
    checkpoint.check_files(newest)      # written anew on the way


def test_no_whole_checkpoint_stops_the_run(folder, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        run_here(arguments(folder, "all-damaged", save_every=2))
    for saved in (folder / "all-damaged" / "checkpoints").iterdir():
        flip_a_bit(saved / "optimizer.safetensors")
    before = (folder / "all-damaged" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="none of its 2 checkpoint.s. is whole.*--overwrite"):
        run_here(arguments(folder, "all-damaged", save_every=2))
    assert (folder / "all-damaged" / "metrics.jsonl").read_text() == before


def test_only_the_newest_checkpoints_are_kept(folder, monkeypatch):
    stop_after(monkeypatch, 7)
    run_here(arguments(folder, "kept", save_every=1, keep_checkpoints=3))
    assert sorted(p.name for p in (folder / "kept" / "checkpoints").iterdir()) == [
        f"step-{n:08d}" for n in (5, 6, 7)]


def test_resume_from_a_named_checkpoint_in_another_folder(folder, monkeypatch):
    run_here(arguments(folder, "straight"))
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        run_here(arguments(folder, "branch", save_every=3, keep_checkpoints=9))
    saved = folder / "branch" / "checkpoints" / "step-00000003"
    run_here(arguments(folder, "branched", resume=saved))
    a, b = weights(folder / "straight" / "final"), weights(folder / "branched" / "final")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_was_just_saved_is_kept_beside_later_checkpoints(folder, monkeypatch):
    """A run whose newest checkpoints are damaged resumes before them."""
    saved = folder / "back" / "checkpoints"
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        run_here(arguments(folder, "back", save_every=3, keep_checkpoints=9))
    for newer in ("step-00000006", "step-00000007"):
        flip_a_bit(saved / newer / "optimizer.safetensors")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        run_here(arguments(folder, "back", keep_checkpoints=1))
    assert sorted(p.name for p in saved.iterdir()) == [f"step-{n:08d}" for n in (5, 6, 7)]
