"""Checkpoints: stopped, killed and damaged runs end bit for bit like whole ones, with any optimizer."""
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import forks
import train
from runtime import checkpoint
from tiny import (arguments, checked, difference, flip_a_bit, metrics, run_apart, run_here, same_weights,
                  setup, stop_after, weights)


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


# Within, at and after the end of the first epoch.
@pytest.mark.parametrize("step, number", [(2, signal.SIGTERM), (3, signal.SIGHUP), (4, signal.SIGINT),
                                          (5, signal.SIGTERM), (7, signal.SIGTERM)])
def test_a_run_stopped_at_any_step_and_resumed_ends_bit_for_bit_the_same(
        folder, whole_run, step, number, monkeypatch, capsys):
    """And what it saves on the way is what the whole run would save."""
    out, more = folder / f"stopped-{step}", dict(**SCHEDULED, save_every=3, keep_checkpoints=9)
    with monkeypatch.context() as patch:
        stop_after(patch, step, number)
        assert run_here(arguments(folder, out, **more)) == 128 + number
    assert f"{number.name}: finishing this step" in capsys.readouterr().out
    assert len(metrics(out)) == step and not (out / "final").exists()
    assert run_here(arguments(folder, out, **more)) == 0
    assert {saved.name for saved in (out / "checkpoints").iterdir()} == {
        f"step-{n:08d}" for n in (step, 3, 6, 8)}
    assert f"resuming after step {step}" in capsys.readouterr().out
    assert same_weights(out, whole_run)
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
    done = run_apart(argv)
    assert "step-00000004.part was not written to its end" in done.stdout
    assert "resuming after step 2" in done.stdout
    assert [r["step"] for r in metrics(folder / "killed")] == list(range(1, 9))
    assert same_weights(folder / "killed", whole_run)


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
    assert same_weights(out, whole_run)
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


def test_only_the_newest_checkpoints_are_kept_and_a_users_copy_is_left_alone(folder, monkeypatch, capsys):
    saved = folder / "kept" / "checkpoints"
    for steps in (3, 4):
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            run_here(arguments(folder, "kept", save_every=1, keep_checkpoints=3))
        if steps == 3:
            shutil.copytree(saved / "step-00000003", saved / "step-00000003-mine")
    assert f"resuming after step 3 from {saved / 'step-00000003'}\n" in capsys.readouterr().out
    assert sorted(p.name for p in saved.iterdir()) == [
        "step-00000003-mine", *(f"step-{n:08d}" for n in (5, 6, 7))]


def test_resume_from_a_named_checkpoint_in_another_folder(folder, monkeypatch):
    run_here(arguments(folder, "straight"))
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        run_here(arguments(folder, "branch", save_every=3, keep_checkpoints=9))
    saved = folder / "branch" / "checkpoints" / "step-00000003"
    run_here(arguments(folder, "branched", resume=saved))
    assert same_weights(folder / "branched", folder / "straight")


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


# ---------------------------------------------------------------- any optimizer


def matrices(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.dim() == 2]


def vectors(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.dim() == 1]


# {name: (how it is made, what it keeps for a matrix)}
OPTIMIZERS = {
    "SGD": (lambda model, lr: torch.optim.SGD(model.parameters(), lr, momentum=0.9), {"momentum_buffer"}),
    "Adafactor": (lambda model, lr: torch.optim.Adafactor(model.parameters(), lr), {"row_var", "col_var"}),
    "Muon": (lambda model, lr: torch.optim.Muon(matrices(model), lr), {"momentum_buffer"}),
    "RMSprop": (lambda model, lr: torch.optim.RMSprop(model.parameters(), lr, momentum=0.9, centered=True),
                {"square_avg", "momentum_buffer", "grad_avg"}),
    "AdamW": (lambda model, lr: torch.optim.AdamW(model.parameters(), lr, amsgrad=True),
              {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
}


def train_with(monkeypatch: pytest.MonkeyPatch, make: Callable) -> None:
    """From now on runs have the optimizer make(model, lr)."""
    monkeypatch.setattr(train, "make_optimizer", lambda model, config: make(model, config.lr))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_any_optimizer_keeps_is_saved_and_resumed_bit_for_bit(folder, name, monkeypatch):
    make, keeps = OPTIMIZERS[name]
    train_with(monkeypatch, make)
    whole, out = folder / f"whole-{name}", folder / f"stopped-{name}"
    assert run_here(arguments(folder, whole)) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert run_here(arguments(folder, out)) == 128 + signal.SIGTERM
    tensors = load_file(out / "checkpoints" / "step-00000003" / "optimizer.safetensors")
    matrix = "model.layers.0.mlp.up_proj.weight"
    assert {key.removesuffix(f".{matrix}") for key in tensors if key.endswith(matrix)} == keeps
    assert all(tensor.any() for tensor in tensors.values())
    assert run_here(arguments(folder, out)) == 0
    assert same_weights(out, whole)
    assert [r["loss"] for r in metrics(out)] == [r["loss"] for r in metrics(whole)]


# many_runs.py with another optimizer.
WITH_SGD = """
import runpy, torch, train
def make_optimizer(model, config):
    return torch.optim.SGD(model.parameters(), config.lr, momentum=0.9)
train.make_optimizer = make_optimizer
runpy.run_path("tests/many_runs.py")
"""


def test_another_optimizers_state_is_saved_and_resumed_in_shards(folder, monkeypatch):
    whole, out, alone = (folder / f"{name}-sharded-SGD" for name in ("whole", "resumed", "alone"))
    more = dict(save_every=3, keep_checkpoints=9, lr=0.1)
    saved = whole / "checkpoints" / "step-00000003"
    runs = folder / "sharded-SGD.json"
    runs.write_text(json.dumps([arguments(folder, whole, **more, shard=True),
                                arguments(folder, out, **more, shard=True, resume=saved)]))
    checked(forks.run(["-c", WITH_SGD, str(runs)], ranks=2))
    assert same_weights(out, whole)
    train_with(monkeypatch, OPTIMIZERS["SGD"][0])
    assert run_here(arguments(folder, alone, **more)) == 0
    assert difference(weights(whole / "final"), weights(alone / "final")) < 1e-5 < 0.01 < difference(
        weights(folder / "model"), weights(alone / "final"))
    name = "checkpoints/step-00000003/optimizer.safetensors"
    ours, theirs = load_file(whole / name), load_file(alone / name)
    assert difference(ours, theirs) < 1e-4 and {key.partition(".")[0] for key in ours} == {"momentum_buffer"}


def test_another_optimizer_than_the_one_that_wrote_a_checkpoint_is_refused_by_name(folder, monkeypatch):
    with monkeypatch.context() as patch:
        train_with(patch, OPTIMIZERS["SGD"][0])
        stop_after(patch, 3)
        run_here(arguments(folder, "swapped"))
    with pytest.raises(ValueError, match="step-00000003: was written with the optimizer SGD, this "
                                         "run has AdamW"):
        run_here(arguments(folder, "swapped"))


class KeepsAList(torch.optim.SGD):
    def step(self, closure: None = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["history"] = [1.0]


class KeepsComplexNumbers(torch.optim.SGD):
    def step(self, closure: None = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["history"] = torch.zeros(2, dtype=torch.complex64)


@pytest.mark.parametrize("kind", [KeepsAList, KeepsComplexNumbers])
def test_an_optimizer_that_keeps_what_cannot_be_stored_is_refused_after_its_first_step(
        folder, kind, monkeypatch):
    train_with(monkeypatch, lambda model, lr: kind(model.parameters(), lr))
    says = f"{kind.__name__} keeps 'history' for model.embed_tokens.weight, a "
    with pytest.raises(ValueError, match=says):
        run_here(arguments(folder, kind.__name__))
    assert not checkpoint.find_checkpoints(folder / kind.__name__)
    assert not (folder / kind.__name__ / "metrics.jsonl").exists()


def test_a_groups_own_rate_keeps_its_ratio_through_the_schedule_and_after_a_resume(folder, monkeypatch):
    rates, step = [], torch.optim.SGD.step

    def note(optimizer: torch.optim.SGD, *more: object) -> None:
        rates.append([group["lr"] for group in optimizer.param_groups])
        step(optimizer, *more)

    monkeypatch.setattr(torch.optim.SGD, "step", note)
    train_with(monkeypatch, lambda model, lr: torch.optim.SGD(
        [{"params": matrices(model), "lr": 0.25 * lr}, {"params": vectors(model)}], lr, momentum=0.9))
    scheduled = dict(schedule="cosine", warmup_ratio=0.3)
    assert run_here(arguments(folder, "whole-groups", **scheduled)) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        run_here(arguments(folder, "groups", **scheduled))
    assert run_here(arguments(folder, "groups", **scheduled)) == 0
    assert rates[8:] == rates[:8] and len({rate for _, rate in rates}) > 4
    assert [rate for _, rate in rates[:8]] == [row["lr"] for row in metrics(folder / "groups")]
    assert [rate for rate, _ in rates] == pytest.approx([0.25 * rate for _, rate in rates], rel=1e-12)
    assert same_weights(folder / "groups", folder / "whole-groups")
