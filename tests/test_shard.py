"""Sharded training beside DDP and one rank: the same trajectory, the same files, less memory a rank."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny import arguments, difference, metrics, run_here, run_many, setup, weights

# Micro-batches of 200 tokens: two or more a step on two ranks. On four some have none in a step.
RUNS = {
    "im": dict(neftune_alpha=5, kl_weight=0.1, micro_batch_tokens=200),
    "it": dict(loss="it", normalize="example", recompute=True, micro_batch_tokens=200),
    "untied": dict(normalize="span", recompute=True, kl_weight=0.1, micro_batch_tokens=120),
    "empty": dict(loss="it", batch_size=2, max_steps=21, lr=1e-3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = setup(tmp_path_factory.mktemp("shard"))
    setup(folder / "untied", tie=False)
    return folder


def flags_of(folder: Path, name: str, out: str, **more: object) -> list[str]:
    home = folder / "untied" if name == "untied" else folder
    return arguments(home, folder / out, eval_data=folder / "train.jsonl", **RUNS[name], **more)


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, Path]:
    """Every run on one rank, which test_train.py compares with a plain loop in transformers."""
    for name in RUNS:
        assert run_here(flags_of(folder, name, f"alone-{name}")) == 0
    return {name: folder / f"alone-{name}" for name in RUNS}


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharding_does_not_change_the_trajectory(folder, alone, ranks):
    run_many(folder, [flags_of(folder, name, f"{mode}-{ranks}-{name}", shard=True) if mode == "shard" else
                      flags_of(folder, name, f"{mode}-{ranks}-{name}")
                      for name in RUNS for mode in ("ddp", "shard")], ranks)
    for name, one in alone.items():
        ddp, sharded = (folder / f"{mode}-{ranks}-{name}" for mode in ("ddp", "shard"))
        start = weights(folder / ("untied/model" if name == "untied" else "model"))
        assert ("lm_head.weight" in start) == (name == "untied")
        for other in (ddp, one):
            moved = difference(start, weights(other / "final"))
            assert difference(weights(sharded / "final"), weights(other / "final")) < 1e-5 < 0.01 < moved
            for key in ("loss", "grad_norm", "tokens", "trained_tokens", "nll_completion"):
                np.testing.assert_allclose([r[key] for r in metrics(sharded)],
                                           [r[key] for r in metrics(other)], rtol=1e-4)
            for mine, theirs in zip(*(map(json.loads, open(f / "eval.jsonl")) for f in (sharded, other))):
                for kind, value in theirs["data"]["train"].items():
                    assert mine["data"]["train"][kind] == pytest.approx(value, rel=1e-5)
