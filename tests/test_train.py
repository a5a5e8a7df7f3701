"""Whole runs: against a plain loop in transformers, under other packings and ranks,
resumed, killed, refused."""
import argparse
import dataclasses
import json
import math
import os
import signal
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from runtime import checkpoint
from runtime import weights
import forks
from kernels import head
import model as model_module
import data
import train
from chat import COMPLETION, INSTRUCTION, KINDS, SYSTEM, Tokenizer, load_template
from data import collate, load_dataset, plan
from runtime.flags import flag_name
from loss import neftune_noise, span_weights
from tiny import (arguments, command, difference, flags, make_model, make_records, metrics, run_apart,
                  run_here, run_many, setup, weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return setup(tmp_path_factory.mktemp("train"))


WEIGHTS = {"it": {COMPLETION: 1.0}, "im": {SYSTEM: 1.0, INSTRUCTION: 1.0, COMPLETION: 1.0}}
# A run's values with the flags of arguments().
PLAIN = dict(lr=1e-2, beta1=0.9, beta2=0.98, adam_eps=1e-6, weight_decay=0.0, clip_grad_norm=1.0, warmup=1,
             neftune_alpha=0.0, kl_weight=0.0, seed=0, batch_size=6)


def average(values: list[list[tuple[int, torch.Tensor]]], weight: dict[int, float], normalize: str
            ) -> torch.Tensor:
    """values: of each example, [(kind, value)]. Their mean, from the definition."""
    every = [pair for example in values for pair in example]
    if normalize == "token":
        return sum(weight[k] * n for k, n in every if k in weight) / sum(k in weight for k, _ in every)
    if normalize == "example":
        means = [sum(weight[k] * n for k, n in example if k in weight)
                 / sum(weight[k] for k, _ in example if k in weight) for example in values]
        return sum(means) / len(means)
    return sum(weight[kind] * sum(n for k, n in every if k == kind) / sum(k == kind for k, _ in every)
               for kind in weight if any(k == kind for k, _ in every))


def plain_training(folder: Path, weight: dict[int, float], normalize: str, **more: object
                   ) -> tuple[dict, list[dict]]:
    """What train.py promises, written plainly: transformers' model, one example at a time, every logit, the
    loss from its definition over lists of numbers, AdamW and clipping spelled out. more: over PLAIN.
    Shares the order of examples, the spans and the draws of noise only."""
    set_to = argparse.Namespace(**{**PLAIN, **more})
    tokenizer = Tokenizer(folder / "model")
    dataset = load_dataset([folder / "train.jsonl"], tokenizer, load_template("llama3", tokenizer), 120,
                           "truncate", folder / "cache")
    model, start = (transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
                    for _ in range(2))
    parameters = dict(model.named_parameters())
    averages = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    usable = [e for e in range(len(dataset)) if any(dataset.counts[e, k] for k in weight)]
    per_epoch = -(-len(usable) // set_to.batch_size)
    total, log = 2 * per_epoch, []
    for step in range(total):
        order = np.concatenate(plan(dataset.lengths[usable], set_to.seed, step // per_epoch,
                                    set_to.batch_size, 10**9, 1)[step % per_epoch][0])
        nlls, kls = [], []  # of each example, [(kind, value)]
        for e in [usable[i] for i in order]:
            a, b = dataset.offsets[e:e + 2]
            ids = torch.tensor(dataset.ids[a:b].astype(np.int64))
            kinds = dataset.kinds[a + 1:b].tolist()
            noise = 0.0
            if set_to.neftune_alpha:
                noise = neftune_noise(collate(dataset, np.array([e]), np.zeros((1, len(KINDS)))),
                                      model.config.hidden_size, set_to.neftune_alpha, set_to.seed, step)
            log_p, log_q = (each(inputs_embeds=(each.get_input_embeddings()(ids[:-1]) + noise)[None])
                            .logits[0].log_softmax(-1) for each in (model, start))
            log_q = log_q.detach()
            nlls.append(list(zip(kinds, -log_p[range(len(kinds)), ids[1:]])))
            kls.append(list(zip(kinds, (log_p.exp() * (log_p - log_q)).sum(-1))))
        loss, kl = (average(values, weight, normalize) for values in (nlls, kls))
        model.zero_grad()
        (loss + set_to.kl_weight * kl).backward()
        norm = sum(p.grad.square().sum() for p in parameters.values()).sqrt()
        clip = min(1.0, set_to.clip_grad_norm / (norm + 1e-6)) if set_to.clip_grad_norm else 1.0
        # The rate rises over `warmup` steps and falls to one step's worth in a line.
        rise = (step + 1) / set_to.warmup
        lr = set_to.lr * (rise if step < set_to.warmup else (total - step) / (total - set_to.warmup))
        for name, p in parameters.items():
            first, second = averages[name]
            first.lerp_(p.grad * clip, 1 - set_to.beta1)
            second.lerp_((p.grad * clip).square(), 1 - set_to.beta2)
            with torch.no_grad():
                if "norm" not in name and not name.endswith("bias"):
                    p -= lr * set_to.weight_decay * p
                p -= (lr * first / (1 - set_to.beta1 ** (step + 1))
                      / ((second / (1 - set_to.beta2 ** (step + 1))).sqrt() + set_to.adam_eps))
        every = [pair for example in nlls for pair in example]
        log.append({"loss": loss.item(), "kl": kl.item(), "grad_norm": norm.item(), "lr": lr,
                    "tokens": len(every), "trained_tokens": sum(k in weight for k, _ in every),
                    "nll": {kind: np.mean([n.item() for k, n in every if k == kind]) for kind in range(5)
                            if any(k == kind for k, _ in every)}})
    return {n: p.detach() for n, p in parameters.items() if n != "lm_head.weight"}, log


def check_against_plain(folder: Path, out: str, expected: dict, log: list[dict], steps: int) -> None:
    """A finished run with --log-every 1 against plain_training()'s: its weights and every step's numbers."""
    rows = metrics(folder / out)
    assert len(rows) == len(log) == steps
    start, got = weights(folder / "model"), weights(folder / out / "final")
    assert difference(got, expected) < 1e-5 < 0.05 < difference(start, expected)
    for row, plain in zip(rows, log):
        assert row["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
        assert row["lr"] == pytest.approx(plain["lr"], rel=1e-9)
        assert (row["tokens"], row["trained_tokens"]) == (plain["tokens"], plain["trained_tokens"])
        assert row.get("kl", plain["kl"]) == pytest.approx(plain["kl"], rel=1e-4, abs=1e-7)
        for kind, value in plain["nll"].items():  # of every span, trained or not
            if KINDS[kind] != "context":
                assert row[f"nll_{KINDS[kind]}"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("loss", ["it", "im"])
@pytest.mark.parametrize("normalize", ["token", "example", "span"])
def test_training_equals_a_plain_loop_in_transformers(folder, loss, normalize):
    out = f"plain-{loss}-{normalize}"
    assert run_here(arguments(folder, out, loss=loss, normalize=normalize, micro_batch_tokens=300,
                              log_every=1)) == 0
    check_against_plain(folder, out, *plain_training(folder, WEIGHTS[loss], normalize), steps=8)


@pytest.mark.parametrize("normalize", ["token", "example"])
def test_every_flag_of_the_objective_and_the_optimizer_means_what_a_plain_loop_does(folder, normalize):
    """Each at another value than its default."""
    more = dict(lr=2e-2, beta1=0.8, beta2=0.95, adam_eps=1e-3, weight_decay=0.5, clip_grad_norm=0.7,
                neftune_alpha=5.0, kl_weight=0.5, seed=3)
    out = f"plain-flags-{normalize}"
    assert run_here(arguments(folder, out, normalize=normalize, micro_batch_tokens=300, log_every=1,
                              warmup_ratio=0.3, system_weight=0.25, completion_weight=2, **more)) == 0
    weight = {SYSTEM: 0.25, INSTRUCTION: 1.0, COMPLETION: 2.0}
    expected, log = plain_training(folder, weight, normalize, warmup=3, **more)
    check_against_plain(folder, out, expected, log, steps=8)
    assert all(row["grad_norm"] > 0.7 and row["kl"] > 0.01 for row in metrics(folder / out)[1:])


def test_without_clipping_a_large_gradient_moves_the_weights_as_it_is(folder):
    """With an epsilon so large that AdamW's step grows with the gradient."""
    more = dict(adam_eps=10.0, clip_grad_norm=0.0)
    assert run_here(arguments(folder, "unclipped", normalize="span", loss="it", completion_weight=30,
                              log_every=1, lr=0.1, **more)) == 0
    expected, log = plain_training(folder, {COMPLETION: 30.0}, "span", lr=0.1, **more)
    check_against_plain(folder, "unclipped", expected, log, steps=8)
    assert all(row["grad_norm"] > 5 for row in log)


def test_examples_with_nothing_to_train_on_change_no_step(folder):
    """Every second record has no answer to train on: it is marked with weight 0, or was cut off."""
    home = folder / "some-usable"
    home.mkdir()
    (home / "model").symlink_to(folder / "model")
    lines = (folder / "train.jsonl").read_text().splitlines()
    unusable = [{"messages": [{"role": "user", "content": "a plum " * (1 if i % 2 else 99)},
                              {"role": "assistant", "content": "red", **({"weight": 0} if i % 2 else {})}]}
                for i in range(len(lines))]
    (home / "train.jsonl").write_text("".join(f"{json.dumps(record)}\n{line}\n"
                                              for record, line in zip(unusable, lines)))
    assert run_here(arguments(home, "out", loss="it", log_every=1)) == 0
    expected, log = plain_training(home, WEIGHTS["it"], "token")
    check_against_plain(home, "out", expected, log, steps=8)
    same, _ = plain_training(folder, WEIGHTS["it"], "token")    # as if these were not there
    assert difference(expected, same) == 0


@pytest.mark.parametrize("normalize", ["token", "example", "span"])
def test_packing_and_micro_batch_size_do_not_change_the_trajectory(folder, normalize):
    results = []
    for tokens in (120, 200, 4096):
        out = f"micro-{normalize}-{tokens}"
        run_here(arguments(folder, out, normalize=normalize, micro_batch_tokens=tokens, neftune_alpha=5,
                           kl_weight=0.1))
        results.append((weights(folder / out / "final"), metrics(folder / out)))
    for other, rows in results[:-1]:
        assert difference(other, results[-1][0]) < 1e-5
        assert [r["tokens"] for r in rows] == [r["tokens"] for r in results[-1][1]]
        np.testing.assert_allclose([r["loss"] for r in rows], [r["loss"] for r in results[-1][1]], rtol=1e-5)
        np.testing.assert_allclose([r["kl"] for r in rows], [r["kl"] for r in results[-1][1]], rtol=1e-3,
                                   atol=1e-6)


RANK_RUNS = {
    "token": dict(normalize="token", neftune_alpha=5), "example": dict(normalize="example", loss="it"),
    "span": dict(normalize="span"),
    # 20 examples in steps of 19: an epoch's last step has a single one, which leaves a rank nothing to do
    "empty": dict(normalize="token", loss="it", batch_size=19),
    "bf16": dict(dtype="bf16", neftune_alpha=5, kl_weight=0.1),
}


@pytest.fixture(scope="module")
def rank_runs(folder) -> dict[str, tuple[Path, Path]]:
    """Each of RANK_RUNS on one rank and on two, there with smaller micro-batches."""
    setup(folder / "untied", tie=False)     # "span" has a head of its own
    homes = {name: folder / "untied" if name == "span" else folder for name in RANK_RUNS}
    one, two = ({name: arguments(homes[name], f"ranks-{name}-{ranks}", **{
        "eval_data": homes[name] / "train.jsonl", "micro_batch_tokens": tokens, **more})
        for name, more in RANK_RUNS.items()} for ranks, tokens in ((1, 4096), (2, 200)))
    for argv in one.values():
        run_here(argv)
    run_many(folder, list(two.values()), 2)
    return {name: (homes[name] / f"ranks-{name}-1", homes[name] / f"ranks-{name}-2") for name in RANK_RUNS}


@pytest.mark.parametrize("name", RANK_RUNS)
def test_two_ranks_do_not_change_the_trajectory(folder, rank_runs, name):
    one, two = rank_runs[name]
    # bf16 rounds what other neighbours in a row make other matrix products of
    near, nearer = (0.01, 0.01) if name == "bf16" else (1e-5, 1e-4)
    start = weights(one.parent / "model")
    assert difference(weights(two / "final"), weights(one / "final")) < near < 0.05 < difference(
        start, weights(one / "final"))
    for key in ("loss", "grad_norm", "tokens", "trained_tokens"):
        np.testing.assert_allclose([r[key] for r in metrics(two)], [r[key] for r in metrics(one)],
                                   rtol=nearer)
    first, second = ([json.loads(line)["data"]["train"] for line in open(f / "eval.jsonl")]
                     for f in (one, two))
    assert ("lm_head.weight" in weights(one / "final")) == (name == "span")
    assert first[0]["completion"]["nll_token_mean"] != first[1]["completion"]["nll_token_mean"]
    for a, b in zip(first, second):
        for kind in a:
            assert a[kind] == pytest.approx(b[kind], rel=max(1e-5, near))


def test_the_empty_run_leaves_a_rank_empty(folder, rank_runs):
    """What test_two_ranks_do_not_change_the_trajectory[empty] is about, from the plan and from the log."""
    tokenizer = Tokenizer(folder / "model")
    dataset = load_dataset([folder / "train.jsonl"], tokenizer, load_template("llama3", tokenizer), 120,
                           "truncate", folder / "cache")
    assert len(dataset.trainable(span_weights("it"))) == 20
    rows = metrics(rank_runs["empty"][1])
    for epoch in (0, 1):
        ranks = plan(dataset.lengths, 0, epoch, 19, 200, 2)[1]
        assert sorted(sum(map(len, rank)) for rank in ranks) == [0, 1]
        (alone,) = (e for rank in ranks for examples in rank for e in examples)
        assert rows[2 * epoch + 1]["tokens"] == dataset.lengths[alone]
    assert len(rows) == 4


# ---------------------------------------------------------------- stop and resume


def stop_after(monkeypatch, steps: int) -> None:
    """Send this process SIGTERM in step `steps` - 1 when the ranks have agreed to go on,
    so it ends after `steps`."""
    original, calls = torch.nn.utils.clip_grad_norm_, []

    def clip(*args, **kwargs):
        calls.append(1)
        if len(calls) == steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)


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
    code = ("import os, signal, sys, checkpoint\n"
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


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_two_ranks_finishes_the_step_saves_and_resumes(folder, number):
    out = folder / f"signal-{number}"
    argv = arguments(folder, out, epochs=400)
    process = subprocess.Popen(command(argv, ranks=2), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    deadline = time.monotonic() + 100
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    stdout, _ = process.communicate(timeout=60)
    assert "the same command resumes from here" in stdout
    (saved,) = (out / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))
    assert len(metrics(out)) == step > 0
    process = subprocess.Popen(command(argv, ranks=1), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    while len((out / "metrics.jsonl").read_text().splitlines()) <= step and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    stdout, _ = process.communicate()
    assert f"resuming after step {step}" in stdout


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


def test_folders_that_are_not_this_run_are_refused_by_name(folder, monkeypatch):
    def refused(says: str, out: str, **more: object) -> None:
        before = sorted((str(p), p.stat().st_mtime) for p in (folder / out).rglob("*"))
        with pytest.raises(ValueError, match=says):
            run_here(arguments(folder, out, **more))
        assert before == sorted((str(p), p.stat().st_mtime) for p in (folder / out).rglob("*"))

    run_here(arguments(folder, "done"))
    refused("finished run", "done")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        run_here(arguments(folder, "half"))
    refused("--lr was 0.01, is 0.02", "half", lr=0.02)
    refused("--loss was im, is it", "half", loss="it")
    refused("--resume is never", "half", resume="never")
    setup(folder / "other", count=21, seed=1)
    refused("--train-data .*other/train.jsonl: other contents", "half",
            train_data=folder / "other" / "train.jsonl")
    refused("--model .*other/model: other weights", "half", model=folder / "other" / "model")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.txt").write_text("years of work")
    refused("is not a run folder", "foreign")
    run_here(arguments(folder, "foreign", overwrite=True))
    assert (folder / "foreign" / "thesis.txt").read_text() == "years of work"
    refused("holds the --model itself", "done", model=folder / "done" / "final", overwrite=True)
    # These change no weight: it goes on.
    run_here(arguments(folder, "half", micro_batch_tokens=130, save_every=5))
    assert (folder / "half" / "final").is_dir()


# Flags that may change where an interrupted run is resumed, by hand; of all others another value is refused.
MAY_CHANGE = {"output_dir", "overwrite", "save_every", "keep_checkpoints", "save_dtype", "resume",
              "eval_every", "log_every", "eval_generate", "eval_data", "date", "micro_batch_tokens", "device",
              "shard", "recompute", "compile", "dry_run", "cache_dir"}
# These may where the steps already trained stay as they were.
MAY_IN_PART = {"epochs", "max_steps", "warmup_ratio"}


@pytest.fixture(scope="module")
def stopped_run(folder) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        run_here(arguments(folder, "stopped"))
    make_records(folder / "other-records.jsonl", 20, seed=1)
    other = shutil.copytree(folder / "model", folder / "other-config")      # the same weights
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    return folder / "stopped"


@pytest.mark.parametrize("field", [f for f in dataclasses.fields(train.Config)
                                   if f.name not in MAY_CHANGE | MAY_IN_PART], ids=lambda f: f.name)
def test_every_flag_that_changes_the_weights_is_refused_on_resume_with_another_value(
        folder, stopped_run, field):
    argv = arguments(folder, stopped_run)
    now = getattr(train.parse_args(argv), field.name)
    if field.name in ("model", "train_data", "template"):
        other = {"model": folder / "other-config", "train_data": folder / "other-records.jsonl",
                 "template": "tulu"}[field.name]
    elif choices := field.metadata["choices"]:
        other = next(choice for choice in choices if choice != now)
    elif isinstance(now, bool):
        other = not now
    else:
        other = now + 1 if isinstance(now, int) else (now or 1) / 2
    before = {path: path.stat().st_mtime_ns for path in stopped_run.rglob("*")}
    name = flag_name(field.name)
    more = flags(**{field.name: other}) if other is not False else [name.replace("--", "--no-")]
    with pytest.raises(ValueError, match=rf"was started differently \((.*; )?{name}[: ]"):
        run_here([*argv, *more])
    assert before == {path: path.stat().st_mtime_ns for path in stopped_run.rglob("*")}


def test_a_models_fingerprint_follows_its_config_and_its_weights(folder, tmp_path):
    prints = set()
    for name in ("same", "config", "weights"):
        copy = shutil.copytree(folder / "model", tmp_path / name)
        if name == "config":
            config = json.loads((copy / "config.json").read_text())
            (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
        if name == "weights":
            flip_a_bit(copy / "model.safetensors")
        prints.add(weights.model_fingerprint(copy))
    assert len(prints) == 3 and weights.model_fingerprint(folder / "model") in prints


# ---------------------------------------------------------------- --dry-run


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_dry_run_counts_what_the_run_will_do(folder, ranks, monkeypatch, capsys):
    """Against the micro-batches that a run collates; nothing is loaded, no folder is made."""
    argv = arguments(folder, f"dry-{ranks}", micro_batch_tokens=250, max_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(train, "load_model", None)
        assert run_here([*argv, "--dry-run", str(ranks)]) == 0
    assert not (folder / f"dry-{ranks}").exists()
    printed = capsys.readouterr().out
    batches = []
    original = data.collate
    with monkeypatch.context() as patch:
        patch.setattr(train, "collate", lambda *a: batches.append(original(*a)) or batches[-1])
        if ranks == 1:
            run_here(argv)
        else:   # what each of two ranks would collate
            patch.setattr(train, "plan", lambda *a: [
                [sum(([*rank] for rank in step), [])] for step in plan(*a[:-1], world_size=ranks)])
            run_here(argv)
    tokens, trained = [len(b.ids) for b in batches], [len(b.rows) for b in batches]
    assert len(batches) > 4 and len(set(tokens)) > 1
    for text in ("4 steps, 4 an epoch", f"on {ranks} rank(s): {len(batches)} micro-batches",
                 f"{sum(tokens) / 250 / len(tokens):.1%} of 250 tokens used",
                 f"the largest has {max(tokens)} tokens", f"at most {max(trained)} targets with weight, "
                 f"{max(a - b for a, b in zip(tokens, trained))} without"):
        assert text in printed, text
    assert ("--shard" in printed.split("peak memory")[1]) == (ranks == 2)


def test_a_head_that_differs_from_a_tied_embedding_is_counted_trained_saved_and_resumed(folder, capsys):
    make_model(folder / "head" / "model")
    file = folder / "head" / "model" / "model.safetensors"
    before = load_file(file)
    before["lm_head.weight"] = before["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(before, file, {"format": "pt"})
    argv = arguments(folder, "head-out", model=file.parent, max_steps=2, save_every=1)
    assert run_here([*argv, "--dry-run"]) == 0
    assert f"model: {sum(x.numel() for x in before.values()):,} parameters" in capsys.readouterr().out
    assert run_here(argv) == 0
    after = weights(folder / "head-out" / "final")
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert after.keys() == before.keys() and min(moved.values()) > 0
    argv = arguments(folder, "head-again", model=file.parent, max_steps=2, save_every=1,
                     resume=folder / "head-out" / "checkpoints" / "step-00000001")
    assert run_here(argv) == 0
    again = weights(folder / "head-again" / "final")
    assert all(torch.equal(again[name], after[name]) for name in after)


def test_a_dry_run_refuses_weights_that_do_not_fit(folder):
    make_model(folder / "misfit" / "model", tie=False)
    config = folder / "misfit" / "model" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ValueError, match="missing model.layers.2"):
        run_here(arguments(folder, "dry-misfit", model=folder / "misfit" / "model", dry_run=True))


# ---------------------------------------------------------------- objectives and options


def test_neftune_changes_training_forward_only(folder):
    for alpha in (0, 20):
        run_here(arguments(folder, f"noise-{alpha}", neftune_alpha=alpha, eval_data=folder / "train.jsonl"))
    quiet, noisy = ([json.loads(line)["data"] for line in open(folder / f"noise-{a}" / "eval.jsonl")]
                    for a in (0, 20))
    assert quiet[0] == noisy[0] and quiet[1] != noisy[1]
    assert metrics(folder / "noise-0")[0]["loss"] != metrics(folder / "noise-20")[0]["loss"]


def test_kl_is_zero_at_the_first_step_and_holds_the_model_back(folder):
    for weight in (1e-9, 10):
        run_here(arguments(folder, f"kl-{weight}", kl_weight=weight, normalize="token"))
    free, held = (metrics(folder / f"kl-{w}") for w in (1e-9, 10))
    assert free[0]["kl"] == held[0]["kl"] == pytest.approx(0, abs=1e-7)
    assert 0 < held[-1]["kl"] < free[-1]["kl"] / 2


def test_recompute_changes_nothing(folder):
    run_here(arguments(folder, "eager"))
    run_here(arguments(folder, "recompute", recompute=True))
    assert difference(weights(folder / "recompute" / "final"), weights(folder / "eager" / "final")) < 1e-6


def test_compile_compiles_every_layer_alike_and_changes_nothing(folder, monkeypatch):
    """By a backend that runs the traced operations as they are: what is tested is what is handed to it. With
    ten layers, because PyTorch gives up on code that it had to compile eight times."""
    make_model(folder / "deep", layers=10)
    compiled, graphs, calls, original = [], [], [], torch.nn.Module.compile

    def compile_eagerly(module: torch.nn.Module, **more: object) -> None:
        compiled.append(module)
        original(module, **more, backend=backend)

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(graph)
        return lambda *args: calls.append(1) or graph.forward(*args)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    argv = dict(model=folder / "deep", max_steps=2, lr=1e-3)
    run_here(arguments(folder, "not-compiled", **argv))
    assert not compiled
    run_here(arguments(folder, "compiled", **argv, compile=True))
    assert {type(module) for module in compiled} == {model_module.Layer} and len(set(compiled)) == 10
    assert len(calls) == len(graphs) * 10 * 2 > 0      # in each layer of each step
    start, plain, traced = (weights(folder / name)
                            for name in ("deep", "not-compiled/final", "compiled/final"))
    assert difference(traced, plain) < 1e-5 < 1e-3 < difference(start, plain)


def test_what_was_not_computed_is_null_in_the_metrics(folder):
    """Under IT the other kinds' NLL is looked at in the first step, every third and the last; and no step has
    a kind that the data lacks."""
    file = folder / "no-system.jsonl"
    file.write_text("".join(line for line in open(folder / "train.jsonl") if '"system"' not in line))
    run_here(arguments(folder, "nulls", train_data=file, loss="it", log_every=3, batch_size=3))
    rows = metrics(folder / "nulls")
    assert len(rows) == 2 * -(-len(file.read_text().splitlines()) // 3) == 10
    looked = [row["step"] in (1, 3, 6, 9, 10) for row in rows]
    for kind in ("instruction", "template"):
        assert [row[f"nll_{kind}"] is not None and row[f"nll_{kind}"] > 0 for row in rows] == looked
        assert [row[f"nll_{kind}"] is None for row in rows] == [not look for look in looked]
    assert all(row["nll_completion"] > 0 and row["nll_system"] is None for row in rows)


def test_held_out_examples_may_be_longer_than_a_micro_batch(folder):
    """119 targets, which training in rows of 60 tokens could not take. Their NLL is that of transformers."""
    make_records(folder / "short.jsonl", 8, longest=3)
    message = {"role": "user", "content": "a plum"}, {"role": "assistant", "content": "red town " * 50}
    (folder / "long.jsonl").write_text(json.dumps({"messages": message}))
    argv = arguments(folder, "long", train_data=folder / "short.jsonl", micro_batch_tokens=60, max_steps=1,
                     eval_data=folder / "long.jsonl")
    assert run_here(argv) == 0
    got = json.loads((folder / "long" / "eval.jsonl").read_text().splitlines()[0])["data"]["long"]
    tokenizer = Tokenizer(folder / "model")
    dataset = load_dataset([folder / "long.jsonl"], tokenizer, load_template("llama3", tokenizer), 120,
                           "truncate", folder / "cache")
    assert dataset.lengths.tolist() == [119]
    ids = torch.tensor(dataset.ids.astype(np.int64))[None]
    labels = ids.masked_fill(torch.tensor(dataset.kinds != COMPLETION), -100)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    assert got["completion"]["tokens"] == int((labels != -100).sum()) > 60
    expected = theirs(ids, labels=labels).loss.item()
    assert got["completion"]["nll_token_mean"] == pytest.approx(expected, rel=1e-5)


def test_bf16_trains_fp32_parameters_close_to_fp32(folder):
    """Pitfall: bf16 parameters drop updates smaller than their spacing."""
    run_here(arguments(folder, "fp32-small", lr=1e-5))
    run_here(arguments(folder, "bf16-small", lr=1e-5, dtype="bf16"))
    start, fp32, bf16 = (weights(folder / name) for name in ("model", "fp32-small/final", "bf16-small/final"))
    for name in start:
        if start[name].dim() == 2:
            full, got = fp32[name] - start[name], bf16[name] - start[name]
            assert full.norm() > 0 and torch.cosine_similarity(full.flatten(), got.flatten(), 0) > 0.9


def changed_in_step(number: int, original: Callable, change: Callable) -> Callable:
    """A function that is called once a step; in step `number` its result goes through `change`."""
    calls = []

    def function(*args: object, **more: object) -> object:
        calls.append(1)
        result = original(*args, **more)
        return change(result) if len(calls) == number else result
    return function


@pytest.mark.parametrize("what, owner, name, change, says", [
    ("loss", head._WeightedNLL, "forward", lambda r: (r[0] * math.nan, r[1] * math.nan),
     r"loss nan, .*Its loss is not finite for .*train\.jsonl:\d+"),
    ("gradient", head._WeightedNLL, "backward", lambda r: (r[0], r[1] * math.inf, None, None),
     r"loss \d+\.\d+, KL \d+\.\d+, gradient norm (inf|nan)"),
    ("KL", train, "kl_divergence", lambda r: r + math.nan, r"loss \d+\.\d+, KL nan, gradient norm \d+\.\d+"),
], ids=["loss", "gradient", "KL"])
def test_what_is_not_finite_stops_the_run_before_the_weights_change(
        folder, monkeypatch, what, owner, name, change, says):
    """Each alone: the others are finite."""
    monkeypatch.setattr(owner, name, changed_in_step(3, getattr(owner, name), change))
    stepped = []
    original_step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step",
                        lambda self, *a: stepped.append(1) or original_step(self, *a))
    with pytest.raises(ValueError, match=f"step 3: {says}"):
        run_here(arguments(folder, f"not-finite-{what}", kl_weight=0.1))
    assert len(stepped) == 2 and len(metrics(folder / f"not-finite-{what}")) == 2


def test_the_records_whose_loss_is_not_finite_are_named_with_their_lines(folder, monkeypatch):
    """Two of a step of several micro-batches, behind one with nothing to train on; told by a letter that only
    they have."""
    lines = (folder / "train.jsonl").read_text().splitlines()
    lines[0] = json.dumps({"messages": [{"role": "user", "content": "a"},
                                        {"role": "assistant", "content": "b", "weight": 0}]})
    for i in (11, 16):
        lines[i] = json.dumps({"messages": [{"role": "user", "content": "a"},
                                            {"role": "assistant", "content": "red zzz red"}]})
    file = folder / "not-finite.jsonl"
    file.write_text("\n".join(lines))
    ids = Tokenizer(folder / "model").reference.encode("zzz", add_special_tokens=False).ids
    original, marked = head._WeightedNLL.forward, []

    def forward(ctx, hidden, head, targets, scale):
        value, nlls = original(ctx, hidden, head, targets, scale)
        bad = torch.isin(targets, torch.tensor(ids))
        marked.append(bool(bad.any()))
        return value + bad.sum() * math.nan if bad.any() else value, nlls.masked_fill(bad, math.nan)
    monkeypatch.setattr(head._WeightedNLL, "forward", forward)
    with pytest.raises(ValueError) as error:
        run_here(arguments(folder, "not-finite", train_data=file, loss="it", batch_size=20,
                           micro_batch_tokens=200))
    assert len(marked) > 3 and 0 < sum(marked) <= 2
    assert str(error.value).endswith(f"Its loss is not finite for {file}:12, {file}:17.")


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_schedules_start_and_end_above_zero_and_peak_at_lr(schedule, total):
    config = train.Config(lr=2.0, schedule=schedule, warmup_ratio=0.1)
    rates = [train.learning_rate(config, step, total) for step in range(total)]
    assert min(rates) > 0 and max(rates) == pytest.approx(2.0)
    warmup = -(-total // 10)
    assert rates[:warmup] == pytest.approx([2.0 * (s + 1) / warmup for s in range(warmup)])
    if schedule == "linear" and total == 100:
        assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and rates[99] == pytest.approx(2 / 90)
    if schedule == "cosine" and total == 100:
        assert rates[55] == pytest.approx(1.0)


@pytest.mark.parametrize("more, rates", [
    # 20 records in steps of 6: 4 steps an epoch, 8 in all
    (dict(warmup_ratio=0), [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
    (dict(max_steps=3, warmup_ratio=0), [1, 2 / 3, 1 / 3]),
    (dict(max_steps=10, warmup_ratio=0), [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
    (dict(epochs=1, warmup_ratio=0), [1, 3 / 4, 2 / 4, 1 / 4]),
    (dict(warmup_ratio=0.3), [1 / 3, 2 / 3, 1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]),
    (dict(schedule="constant", warmup_ratio=0.3), [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1]),
    (dict(schedule="cosine", max_steps=4, warmup_ratio=0), [1, 0.85355339, 0.5, 0.14644661]),
    (dict(schedule="cosine", max_steps=6, warmup_ratio=0.2), [1 / 2, 1, 1, 0.85355339, 0.5, 0.14644661]),
], ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "")
def test_a_runs_learning_rates_are_those_written_here_and_so_is_their_number(folder, more, rates):
    assert run_here(arguments(folder, "rates", overwrite=True, lr=3e-3, **more)) == 0
    rows = metrics(folder / "rates")
    assert [row["lr"] for row in rows] == pytest.approx([3e-3 * rate for rate in rates], rel=1e-7)
    assert [row["epoch"] for row in rows] == [step / 4 for step in range(1, len(rates) + 1)]


def test_flags_config_file_and_their_errors(folder, tmp_path, capsys):
    config = train.parse_args(arguments(folder, "x", lr="1", clip_grad_norm="0", neftune_alpha="1e-4"))
    assert config.lr == 1.0 and config.neftune_alpha == 1e-4 and config.loss == "im" and config.epochs == 2
    saved = {**vars(config), "loss": "it", "seed": 7, "date": "2026-01-05"}
    (tmp_path / "c.json").write_text(json.dumps(saved))
    again = train.parse_args(["--config", str(tmp_path / "c.json"), "--seed", "9"])
    assert again.loss == "it" and again.seed == 9 and again.lr == 1.0
    embedded = train.parse_args([])
    assert Path(embedded.model).is_dir() and embedded.loss == "im" and embedded.eval_generate == 1000
    assert train.parse_args(["--shard"]).eval_generate == 0
    assert [train.parse_args(argv).dry_run for argv in ([], ["--dry-run"], ["--dry-run", "8"])] == [0, 1, 8]
    for argv, says in ((["--lr", "0"], "--lr 0: must be"), (["--batch-size", "0"], "--batch-size 0"),
                       (["--bach-size", "1"], "unrecognized"), (["--batch", "1"], "unrecognized"),
                       (["--loss", "rl"], "--loss"), (["--epochs", "x"], "--epochs"),
                       (["--beta2", "1"], "--beta2"), (["--train-data", "x"], "--model"),
                       (["--config", "nowhere"], "--config nowhere"),
                       (["--max-length", "1"], "--max-length 1"), (["--dry-run", "-1"], "--dry-run -1"),
                       (["--shard", "--compile"], "--compile"),
                       (["--shard", "--eval-generate", "5"], "--eval-generate 5: must be 0 with --shard")):
        with pytest.raises(ValueError, match=says):
            train.parse_args(argv)


@pytest.mark.parametrize("more, says", [
    (dict(max_length=120, micro_batch_tokens=50), "--micro-batch-tokens 50"),
    (dict(model="nowhere"), "--model nowhere"),
    (dict(train_data="nowhere.jsonl"), "nowhere.jsonl: No such file"),
    (dict(template="auto"), "no chat template"), (dict(template="chatml"), "could not learn to stop"),
    (dict(loss="it", completion_weight=0, template_weight=0, instruction_weight=0), "nothing to train"),
])
def test_wrong_input_is_one_line_and_leaves_no_folder(folder, more, says):
    done = run_apart(arguments(folder, "wrong", **more), check=False)
    assert done.returncode == 1 and says in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1
    assert not (folder / "wrong").exists()


def test_an_error_on_one_rank_ends_all_with_one_message(folder):
    code = ("import os, sys, train\n"
            "if os.environ['RANK'] == '1':\n"
            "    train.neftune_noise = lambda *a: (_ for _ in ()).throw(ValueError('rank one is unwell'))\n"
            "sys.exit(train.run(sys.argv[1:]))\n")
    done = forks.run(["-c", code, *arguments(folder, "unwell", neftune_alpha=5, epochs=50)], ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("error: rank one is unwell") == 1
    assert "Connection closed" not in done.stderr


def test_final_folder_generates_the_same_in_transformers_and_trains_again(folder):
    from eval.engine import Engine
    from eval.generate import generate
    from model import load_model
    run_here(arguments(folder, "exported", save_dtype="bf16"))
    final = folder / "exported" / "final"
    assert {tensor.dtype for tensor in weights(final).values()} == {torch.bfloat16}     # the source is fp32
    assert json.loads((final / "config.json").read_text())["dtype"] == "bfloat16"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(final)
    mine = load_model(final)
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                             tokenize=True, return_dict=False)
               for text in ("red", "be brief and", "a")]
    stop = theirs.generation_config.eos_token_id
    assert stop == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    for prompt, got in zip(prompts, generate(Engine(mine), prompts, {stop}, 20)):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=20,
                                   do_sample=False)[0, len(prompt):].tolist()
        assert got == (expected[:expected.index(stop)] if stop in expected else expected)
    assert run_here(arguments(folder, "again", model=final, template="auto", max_steps=1)) == 0
    assert json.loads((folder / "again" / "final" / "config.json").read_text())["dtype"] == "float32"
