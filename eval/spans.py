"""Held-out NLL of each kind of span: exact sums, whatever the packing and the number of ranks.

Shapes: E examples, K kinds of span.
"""
from typing import Callable

import numpy as np
import torch
import torch.distributed as dist

from data import KINDS, Dataset, collate, plan
from loss import nll
from model import Llama


@torch.no_grad()
def example_sums(model: Llama, dataset: Dataset, capacity: int, device: torch.device, rank: int = 0,
                 world_size: int = 1, progress: Callable = iter) -> np.ndarray:
    """(E, K) float64: the NLL of each example's targets, summed by kind, in nats. Ranks share the work; each
    gets all. capacity: tokens of a packed row; progress: wraps the list of rows, as tqdm does."""
    rows = [row for step in plan(dataset.lengths, 0, 0, 1024, capacity, world_size) for row in step[rank]]
    sums = torch.zeros(len(dataset) * len(KINDS), dtype=torch.float64)
    for examples in progress(rows):
        if not len(examples):
            continue
        batch = collate(dataset, examples, np.zeros((len(examples), len(KINDS)))).to(device)
        hidden = model(batch.ids, batch.positions, batch.cu_seqlens)
        values = nll(hidden, model.head_weight, batch.targets)
        cell = torch.from_numpy(examples)[batch.documents.cpu()] * len(KINDS) + batch.kinds.cpu()
        sums.index_add_(0, cell, values.double().cpu())
    if world_size > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    return sums.view(len(dataset), len(KINDS)).cpu().numpy()


def summary(sums: np.ndarray, counts: np.ndarray) -> dict[str, dict]:
    """sums, counts: (E, K) -> by kind: nll_token_mean, and nll_example_mean, the paper's mean over
    examples of each one's token mean (nats), with the tokens and examples that they are over.
    Kinds without a token are left out."""
    out = {}
    for kind, name in enumerate(KINDS):
        has = counts[:, kind] > 0
        if has.any():
            mine, tokens = sums[has, kind], counts[has, kind].astype(np.int64)
            out[name] = {"nll_token_mean": float(mine.sum() / tokens.sum()),
                         "nll_example_mean": float((mine / tokens).mean()),
                         "tokens": int(tokens.sum()), "examples": int(has.sum())}
    return out
