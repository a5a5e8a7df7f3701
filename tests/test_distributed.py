"""Several ranks against one, with DDP and sharded: the same trajectory and files, less memory a rank."""
import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import forks
from chat import load_template
from runtime.tokenizer import Tokenizer
from data import load_dataset, plan
from config import span_weights
from runtime import distributed
from tiny import (ROOT, arguments, command, difference, make_records, metrics, run_here, run_many, run_script,
                  setup, weights)

# Micro-batches of 200 tokens: two or more a step on two ranks. On four some have none in a step, but not in
# "im": the order of a sum shows in its bits only from three terms on.
RUNS = {
    "im": dict(neftune_alpha=5, kl_weight=0.1, batch_size=16, epochs=3, micro_batch_tokens=120, eval_every=3,
               save_every=3, keep_checkpoints=9),
    "it": dict(loss="it", normalize="example", recompute=True, micro_batch_tokens=200),
    "untied": dict(normalize="span", recompute=True, kl_weight=0.1, micro_batch_tokens=120),
    # 20 examples in steps of 19: an epoch's last step has a single one, and ranks with nothing to do
    "empty": dict(loss="it", batch_size=19),
}
MODES = {"ddp": {}, "shard": dict(shard=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = setup(tmp_path_factory.mktemp("shard"))
    setup(folder / "untied", tie=False)
    make_records(folder / "one.jsonl", 1)   # evaluating on it leaves all ranks but one without a row
    return folder


def flags_of(folder: Path, name: str, out: str, **more: object) -> list[str]:
    home = folder / "untied" if name == "untied" else folder
    return arguments(home, folder / out, eval_data=[folder / "train.jsonl", folder / "one.jsonl"],
                     **RUNS[name], **more)


def resumed(folder: Path, start: str, out: str, **more: object) -> list[str]:
    return flags_of(folder, "im", out, resume=folder / start / "checkpoints" / "step-00000003", **more)


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, Path]:
    """Every run on one rank, which test_train.py compares with a plain loop in transformers."""
    for name in RUNS:
        assert run_here(flags_of(folder, name, f"alone-{name}")) == 0
    return {name: folder / f"alone-{name}" for name in RUNS}


@pytest.fixture(scope="module")
def on_ranks(folder, alone) -> None:
    """FOLDER/MODE-RANKS-NAME, every run in both modes on 2 and on 4 ranks; and FOLDER/START-to-MODE-RANKS,
    "im" resumed after its third step from the checkpoint of another."""
    for ranks, starts in ((2, ("ddp-2-im", "shard-2-im", "alone-im")),
                          (4, ("ddp-4-im", "shard-4-im", "ddp-2-im", "shard-2-im"))):
        # The last runs' folders are relative, and every rank works elsewhere: only rank 0 sees them.
        first = folder / f"runs-{ranks}.json.0"
        first.mkdir(exist_ok=True)
        for mode in MODES:
            (first / f"own-{mode}").symlink_to(folder / f"{mode}-{ranks}-im")
        run_many(folder, [
            *(flags_of(folder, name, f"{mode}-{ranks}-{name}", **more)
              for name in RUNS for mode, more in MODES.items()),
            # Without evaluations, which would be compiled as a second graph.
            *(arguments(folder, folder / f"{mode}-{ranks}-compiled", compile=True, **{**RUNS["it"], **more})
              for mode, more in MODES.items() if ranks == 2),
            *(resumed(folder, start, f"{start}-to-{mode}-{ranks}", **more)
              for start in starts for mode, more in MODES.items()),
            *(flags_of(folder, "im", mode, **{**more, "output_dir": f"own-{mode}-resumed"},
                       resume=f"own-{mode}/checkpoints/step-00000003")
              for mode, more in MODES.items())], ranks)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", RUNS)
def test_sharding_does_not_change_the_trajectory(folder, alone, on_ranks, name, ranks):
    start = weights(folder / ("untied/model" if name == "untied" else "model"))
    assert ("lm_head.weight" in start) == (name == "untied")
    ddp, sharded = (folder / f"{mode}-{ranks}-{name}" for mode in MODES)
    for other in (ddp, alone[name]):
        moved = difference(start, weights(other / "final"))
        assert difference(weights(sharded / "final"), weights(other / "final")) < 1e-5 < 0.01 < moved
        for key in ("loss", "grad_norm", "tokens", "trained_tokens", "nll_completion"):
            np.testing.assert_allclose([r[key] for r in metrics(sharded)], [r[key] for r in metrics(other)],
                                       rtol=1e-4)
        for mine, theirs in zip(*(map(json.loads, open(f / "eval.jsonl")) for f in (sharded, other))):
            assert mine["data"].keys() == theirs["data"].keys() == {"train", "one"}
            for data, kinds in theirs["data"].items():
                for kind, value in kinds.items():
                    assert mine["data"][data][kind] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_compiled_layers_run_on_several_ranks(folder, alone, on_ranks, mode):
    out = weights(folder / f"{mode}-2-compiled" / "final")
    assert difference(out, weights(alone["it"] / "final")) < 1e-5 < 0.01 < difference(
        out, weights(folder / "model"))


def test_ddp_leaves_its_inputs_on_their_devices(monkeypatch):
    """Told a device, DDP would move the documents' bounds to it, and the host would wait to read them."""
    class Told(Exception):
        pass

    def told(model, **more):
        raise Told(more)
    monkeypatch.setattr(distributed, "DistributedDataParallel", told)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    with pytest.raises(Told) as raised:
        distributed.data_parallel(torch.nn.Linear(1, 1), torch.device("cuda"))
    assert raised.value.args == ({"gradient_as_bucket_view": True},)


@pytest.mark.parametrize("start, to", [
    ("alone-im", "ddp-2"), ("alone-im", "shard-2"), ("ddp-2-im", "shard-2"), ("shard-2-im", "ddp-2"),
    ("ddp-2-im", "ddp-4"), ("ddp-2-im", "shard-4"), ("shard-2-im", "ddp-4"), ("shard-2-im", "shard-4"),
    ("ddp-4-im", "shard-4"), ("shard-4-im", "ddp-4")])
def test_any_checkpoint_resumes_on_any_ranks_in_any_mode(folder, on_ranks, alone, start, to):
    out = folder / f"{start}-to-{to}"
    assert difference(weights(out / "final"), weights(alone["im"] / "final")) < 1e-5
    after = metrics(alone["im"])[3:]
    assert [r["step"] for r in metrics(out)] == [r["step"] for r in after] != []
    for key in ("loss", "kl", "grad_norm", "tokens", "lr"):
        np.testing.assert_allclose([r[key] for r in metrics(out)], [r[key] for r in after], rtol=1e-4,
                                   atol=1e-6)


@pytest.mark.parametrize("start", ["ddp-4-im", "shard-2-im", "shard-4-im"])
def test_one_rank_resumes_what_many_saved(folder, on_ranks, alone, start):
    assert run_here(resumed(folder, start, f"{start}-to-one")) == 0
    assert difference(weights(folder / f"{start}-to-one" / "final"), weights(alone["im"] / "final")) < 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_resumed_in_the_same_mode_on_as_many_ranks_it_ends_in_the_same_bits(folder, on_ranks, mode, ranks):
    whole, out = folder / f"{mode}-{ranks}-im", folder / f"{mode}-{ranks}-im-to-{mode}-{ranks}"
    expected = weights(whole / "final")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(out / "final").items())
    assert [r["loss"] for r in metrics(out)] == [r["loss"] for r in metrics(whole)[3:]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_do_not_see_the_checkpoint_are_sent_their_rows(folder, on_ranks, mode, ranks):
    homes = [folder / f"runs-{ranks}.json.{rank}" for rank in range(ranks)]
    for own in (f"own-{mode}/checkpoints/step-00000003", f"own-{mode}-resumed/final"):
        assert [(home / own).exists() for home in homes] == [True] + [False] * (ranks - 1)
    expected = weights(folder / f"{mode}-{ranks}-im" / "final")
    resumed = weights(homes[0] / f"own-{mode}-resumed" / "final")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.items())


def test_files_of_a_sharded_run_are_those_of_any_other(folder, on_ranks, alone):
    """Names, shapes, dtypes, order: the headers are equal, and so transformers reads them."""
    for name in ("final/model.safetensors", "checkpoints/step-00000003/model.safetensors",
                 "checkpoints/step-00000003/optimizer.safetensors"):
        headers = set()
        for run in ("alone-im", "ddp-2-im", "shard-2-im", "shard-4-im"):
            with open(folder / run / name, "rb") as file:
                headers.add(file.read(int.from_bytes(file.read(8), "little")))
            assert set(load_file(folder / run / name))
        assert len(headers) == 1


# ---------------------------------------------------------------- memory


def test_a_rank_holds_its_share_and_no_gathered_layer_between_forward_and_backward():
    """On the embedded default, so that padding shares to equal rows counts for little. What autograd keeps of
    a layer's weights must be the gathered weights, whose memory is gone, and no copy of them."""
    results = json.loads(run_script("sharded_memory.py", ROOT / "quickstart" / "model", 2))
    assert len(results) == 4
    for result in results:
        assert 0.5 <= result["state"] / result["whole"] < 0.51
        assert result["kept_bytes"] == 0 and (result["kept"] > 20) == (not result["recompute"])



# ---------------------------------------------------------------- two ranks against one, with DDP


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



# ---------------------------------------------------------------- signals and errors


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


def test_an_error_on_one_rank_ends_all_with_one_message(folder):
    code = ("import os, sys, train\n"
            "if os.environ['RANK'] == '1':\n"
            "    train.neftune_noise = lambda *a: (_ for _ in ()).throw(ValueError('rank one is unwell'))\n"
            "sys.exit(train.run(sys.argv[1:]))\n")
    done = forks.run(["-c", code, *arguments(folder, "unwell", neftune_alpha=5, epochs=50)], ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("error: rank one is unwell") == 1
    assert "Connection closed" not in done.stderr
