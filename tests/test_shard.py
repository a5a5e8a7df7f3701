"""Sharded training beside DDP and one rank: the same trajectory, the same files, less memory a rank."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny import (ROOT, arguments, difference, make_model, make_records, metrics, run_here, run_many,
                  run_script, setup, weights)

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
        first.mkdir()
        for mode in MODES:
            (first / f"own-{mode}").symlink_to(folder / f"{mode}-{ranks}-im")
        run_many(folder, [
            *(flags_of(folder, name, f"{mode}-{ranks}-{name}", **more)
              for name in RUNS for mode, more in MODES.items()),
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


# ---------------------------------------------------------------- loading


def test_ranks_load_a_head_of_its_own_and_the_one_that_reads_a_nan_names_it(tmp_path):
    """See sharded_loading.py."""
    for name in ("untied", "broken"):
        make_model(tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        if name == "untied":
            embedding = tensors["model.embed_tokens.weight"]
            tensors["lm_head.weight"] = head = embedding + 1
        else:
            tensors["model.embed_tokens.weight"][-1, -1] = float("nan")
        save_file(tensors, tmp_path / name / "model.safetensors", {"format": "pt"})
    found = json.loads(run_script("sharded_loading.py", tmp_path, 2))
    assert torch.equal(torch.tensor(found["head"]), head)
    assert torch.equal(torch.tensor(found["embedding"]), embedding)
    assert found["faults"][0] == "" and "tensor model.embed_tokens.weight holds NaN" in found["faults"][1]


# ---------------------------------------------------------------- memory


def test_a_rank_holds_its_share_and_no_gathered_layer_between_forward_and_backward():
    """On the embedded default, so that padding shares to equal rows counts for little. What autograd keeps of
    a layer's weights must be the gathered weights, whose memory is gone, and no copy of them."""
    results = json.loads(run_script("sharded_memory.py", ROOT / "quickstart" / "model", 2))
    assert len(results) == 4
    for result in results:
        assert 0.5 <= result["state"] / result["whole"] < 0.51
        assert result["kept_bytes"] == 0 and (result["kept"] > 20) == (not result["recompute"])
