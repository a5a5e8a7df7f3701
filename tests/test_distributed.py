"""Several ranks against one, with DDP and sharded: the same trajectory and files, less memory a rank."""
import json
import signal
import subprocess
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
                  same_weights, setup, wait_for, weights)

# Micro-batches of 200 tokens: two or more a step on two ranks. On three some have none in a step, but not in
# "im": the order of a sum shows in its bits only from three terms on.
RUNS = {
    "im": dict(neftune_alpha=5, kl_weight=0.1, batch_size=16, epochs=3, micro_batch_tokens=120, eval_every=3,
               save_every=3, keep_checkpoints=9),
    # Compiled, except alone, and without evaluations, which would be compiled as a second graph.
    "it": dict(loss="it", normalize="example", recompute=True, micro_batch_tokens=200, eval_data=None),
    "untied": dict(normalize="span", recompute=True, kl_weight=0.1, micro_batch_tokens=120),
    # 20 examples in steps of 19: an epoch's last step has a single one, and ranks with nothing to do
    "empty": dict(loss="it", batch_size=19),
    "bf16": dict(dtype="bf16", neftune_alpha=5, kl_weight=0.1, micro_batch_tokens=200),
}
# Which of them run in both modes on how many ranks, of which three divide no tensor evenly.
ON = {2: ("im", "it", "empty", "bf16"), 3: ("im", "untied", "empty")}
# (START, MODE, RANKS): "im" is resumed after its third step from the checkpoint of another.
RESUMED = [("alone-im", "ddp", 2), ("ddp-2-im", "shard", 2), ("shard-2-im", "shard", 3),
           ("shard-3-im", "ddp", 3)]
MODES = {"ddp": {}, "shard": dict(shard=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = setup(tmp_path_factory.mktemp("shard"))
    setup(folder / "untied", tie=False)
    make_records(folder / "one.jsonl", 1)   # evaluating on it leaves all ranks but one without a row
    return folder


def flags_of(folder: Path, name: str, out: str, **more: object) -> list[str]:
    home = folder / "untied" if name == "untied" else folder
    data = [folder / "train.jsonl", folder / "one.jsonl"]
    return arguments(home, folder / out, **{"eval_data": data, **RUNS[name], **more})


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
    """FOLDER/MODE-RANKS-NAME, the runs of ON; and FOLDER/START-to-MODE-RANKS, those of RESUMED."""
    for ranks, names in ON.items():
        # The last runs' folders are relative, and every rank works elsewhere: only rank 0 sees them.
        first = folder / f"runs-{ranks}.json.0"
        first.mkdir(exist_ok=True)
        for mode in MODES:
            (first / f"own-{mode}").symlink_to(folder / f"{mode}-{ranks}-im")
        run_many(folder, [
            *(flags_of(folder, name, f"{mode}-{ranks}-{name}", **more, compile=name == "it" or None)
              for name in names for mode, more in MODES.items()),
            *(resumed(folder, start, f"{start}-to-{mode}-{ranks}", **MODES[mode])
              for start, mode, on in RESUMED if on == ranks),
            *(flags_of(folder, "im", mode, **{**more, "output_dir": f"own-{mode}-resumed"},
                       resume=f"own-{mode}/checkpoints/step-00000003")
              for mode, more in MODES.items())], ranks)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks, name", [(ranks, name) for ranks in ON for name in ON[ranks]])
def test_neither_ranks_nor_sharding_change_the_trajectory(folder, alone, on_ranks, name, ranks, mode):
    start = weights(folder / ("untied/model" if name == "untied" else "model"))
    assert ("lm_head.weight" in start) == (name == "untied")
    one, several = alone[name], folder / f"{mode}-{ranks}-{name}"
    # bf16 rounds what other neighbours in a row make other matrix products of
    near, nearer = (0.01, 0.01) if name == "bf16" else (1e-5, 1e-4)
    moved = difference(start, weights(one / "final"))
    assert difference(weights(several / "final"), weights(one / "final")) < near < 0.05 < moved
    for key in ("loss", "grad_norm", "tokens", "trained_tokens", "nll_completion"):
        np.testing.assert_allclose([r[key] for r in metrics(several)], [r[key] for r in metrics(one)],
                                   rtol=nearer)
    if RUNS[name].get("eval_data", True):
        evaluations = [[json.loads(line)["data"] for line in open(f / "eval.jsonl")] for f in (several, one)]
        for mine, theirs in zip(*evaluations):
            assert mine.keys() == theirs.keys() == {"train", "one"}
            for data, kinds in theirs.items():
                for kind, value in kinds.items():
                    assert mine[data][kind] == pytest.approx(value, rel=max(1e-5, near))
        first, *_, last = (each["train"]["completion"]["nll_token_mean"] for each in evaluations[1])
        assert first != last and len(evaluations[0]) == len(evaluations[1])


def test_the_empty_run_leaves_a_rank_empty(folder, on_ranks):
    """What the trajectory of "empty" is about, from the plan and from the log."""
    tokenizer = Tokenizer(folder / "model")
    dataset = load_dataset([folder / "train.jsonl"], tokenizer, load_template("llama3", tokenizer), 120,
                           "truncate", folder / "cache")
    assert len(dataset.trainable(span_weights("it"))) == 20
    rows = metrics(folder / "ddp-2-empty")
    for epoch in (0, 1):
        ranks = plan(dataset.lengths, 0, epoch, 19, 4096, 2)[1]
        assert sorted(sum(map(len, rank)) for rank in ranks) == [0, 1]
        (single,) = (e for rank in ranks for examples in rank for e in examples)
        assert rows[2 * epoch + 1]["tokens"] == dataset.lengths[single]
    assert len(rows) == 4


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


@pytest.mark.parametrize("start, mode, ranks", [*RESUMED, ("ddp-2-im", "one", 1), ("shard-3-im", "one", 1)])
def test_any_checkpoint_resumes_on_any_ranks_in_any_mode(folder, on_ranks, alone, start, mode, ranks):
    out = folder / f"{start}-to-{mode}-{ranks}"
    if ranks == 1:
        assert run_here(resumed(folder, start, out)) == 0
    assert difference(weights(out / "final"), weights(alone["im"] / "final")) < 1e-5
    after = metrics(alone["im"])[3:]
    assert [r["step"] for r in metrics(out)] == [r["step"] for r in after] != []
    for key in ("loss", "kl", "grad_norm", "tokens", "lr"):
        np.testing.assert_allclose([r[key] for r in metrics(out)], [r[key] for r in after], rtol=1e-4,
                                   atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", ON)
def test_resumed_in_the_same_mode_on_as_many_ranks_it_ends_in_the_same_bits(folder, on_ranks, mode, ranks):
    """Though only rank 0 sees the checkpoint, and sends the others their rows."""
    homes = [folder / f"runs-{ranks}.json.{rank}" for rank in range(ranks)]
    for own in (f"own-{mode}/checkpoints/step-00000003", f"own-{mode}-resumed/final"):
        assert [(home / own).exists() for home in homes] == [True] + [False] * (ranks - 1)
    whole, out = folder / f"{mode}-{ranks}-im", homes[0] / f"own-{mode}-resumed"
    assert same_weights(out, whole)
    assert [r["loss"] for r in metrics(out)] == [r["loss"] for r in metrics(whole)[3:]]


def test_files_of_a_sharded_run_are_those_of_any_other(folder, on_ranks, alone):
    """Names, shapes, dtypes, order: the headers are equal, and so transformers reads them."""
    for name in ("final/model.safetensors", "checkpoints/step-00000003/model.safetensors",
                 "checkpoints/step-00000003/optimizer.safetensors"):
        headers = set()
        for run in ("alone-im", "ddp-2-im", "shard-2-im", "shard-3-im"):
            with open(folder / run / name, "rb") as file:
                headers.add(file.read(int.from_bytes(file.read(8), "little")))
            assert set(load_file(folder / run / name))
        assert len(headers) == 1


# ---------------------------------------------------------------- memory


def test_a_rank_holds_its_share_and_no_gathered_layer_between_forward_and_backward():
    """On the embedded default, so that padding shares to equal rows counts for little. What autograd keeps of
    a layer's weights must be the gathered weights, whose memory is gone, and no copy of them. Two ranks'
    gradients, each rounded to bf16, have a sum that bf16 does not hold."""
    results = json.loads(run_script("sharded_memory.py", ROOT / "quickstart" / "model", 2))
    assert len(results) == 4
    for result in results:
        assert 0.5 <= result["state"] / result["whole"] < 0.51
        assert result["kept_bytes"] == 0 and (result["kept"] > 20) == (not result["recompute"])
        assert result["exact"]


# ---------------------------------------------------------------- signals and errors


def test_a_signal_to_two_ranks_finishes_the_step_saves_and_resumes(folder):
    """SIGTERM, and Ctrl-C when the same command has resumed. As a user starts it."""
    out, step = folder / "signals", 0
    log = out / "metrics.jsonl"
    argv = command(arguments(folder, out, epochs=400), ranks=2)
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        wait_for(lambda: log.exists() and log.read_text().count("\n") > step, seconds=100)
        process.send_signal(number)
        stdout, _ = process.communicate(timeout=60)
        assert "the same command resumes from here" in stdout
        assert (f"resuming after step {step} " in stdout) == (step > 0)
        newest = max((out / "checkpoints").iterdir())
        assert len(metrics(out)) == int(newest.name.removeprefix("step-")) > step
        step = len(metrics(out))


def test_an_error_on_one_rank_ends_all_with_one_message(folder):
    code = ("import os, sys, train\n"
            "if os.environ['RANK'] == '1':\n"
            "    train.neftune_noise = lambda *a: (_ for _ in ()).throw(ValueError('rank one is unwell'))\n"
            "sys.exit(train.run(sys.argv[1:]))\n")
    done = forks.run(["-c", code, *arguments(folder, "unwell", neftune_alpha=5, epochs=50)], ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("error: rank one is unwell") == 1
    assert "Connection closed" not in done.stderr
