"""What a run would take, without loading the model: steps, packing and memory of a rank. train.py --dry-run.

The memory is counted from shapes, for the moment that needs most: the largest micro-batch's loss is computed,
and all that its backward pass will want is there. What the allocator wastes is not in it.
"""
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data import plan
from loss import CACHED_LOGITS, CHUNK_LOGITS
from machine import peak_memory_mb
from model import DTYPES, Llama, ModelConfig, activation_bytes, parameter_count, read_config, stored_weights
from shard import DTYPE_NAMES

if TYPE_CHECKING:
    from train import Config

WIDTH = 34  # of the table's first column


def packing(lengths: np.ndarray, counts: np.ndarray, trained: np.ndarray, seed: int, batch_size: int,
            capacity: int, ranks: int) -> dict[str, int]:
    """The first epoch's plan on so many ranks: micro_batches, tokens of all; and of the largest ones: tokens,
    trained targets (with weight), other targets. lengths: (E,); counts: (E, K) targets by kind; trained: (K,)
    which kinds carry weight."""
    steps = plan(lengths, seed, 0, batch_size, capacity, ranks)
    rows = [m for step in steps for rank in step for m in rank]
    tokens, weighted = ([int(x[m].sum()) for m in rows] for x in (lengths, counts[:, trained]))
    return {"micro_batches": len(rows), "tokens": sum(tokens), "largest": max(tokens),
            "trained": max(weighted), "other": max(a - b for a, b in zip(tokens, weighted))}


def memory(config: ModelConfig, packed: dict[str, int], dtype: torch.dtype, ranks: int, shard: bool,
           recompute: bool, reference: bool) -> dict[str, float]:
    """Bytes of a rank by purpose. packed: packing(); dtype: to compute in; reference: whether there is a
    second model for KL."""
    with torch.device("meta"):
        model = Llama(config)
    count, layers = sum(p.numel() for p in model.parameters()), config.num_hidden_layers
    layer, down = (sum(p.numel() for p in part.parameters())
                   for part in (model.model.layers[0], model.model.layers[0].mlp.down_proj))
    outer, head = count - layer * layers, config.vocab_size * config.hidden_size    # outer: not in the layers
    size, cast = dtype.itemsize, dtype.itemsize if dtype != torch.float32 else 0    # cast: a copy in dtype
    mine = count / (ranks if shard else 1)

    if shard:   # a layer as it comes and as it is used, its gradient made and sent; all that is outer
        gathered = layer * (3 * size + 2 * 4) + 4 * outer * (1 + reference)
    else:       # autograd keeps the copies that a layer computes with, but for down_proj's
        gathered = cast * (layer - down) * (1 if recompute else layers)
    tokens = packed["largest"]
    activations = activation_bytes(config, tokens, dtype, recompute)
    if recompute:   # of the layer that is being recomputed
        activations += activation_bytes(config, tokens, dtype, False) // layers

    def logits(rows: int) -> int:
        return min(rows * config.vocab_size, CHUNK_LOGITS)

    chunk, looked = logits(packed["trained"]), logits(packed["other"])
    at_once = [size * chunk + 3 * 4 * min(chunk, CACHED_LOGITS),    # the loss: logits, then their gradient
               (size + 2 * 4) * looked,                             # a look at other spans' NLL, in fp32
               reference * ((2 * size + 8 * 4) * chunk + 4 * head)]     # KL: log p, log q, p, and ways back
    return {"parameters": 4 * mine, "gradients": 4 * mine, "AdamW's averages": 8 * mine,
            "reference model": 4 * mine * reference, "weights gathered or cast": gathered,
            f"activations of {tokens:,} tokens": activations,
            "head: gradient, copy, logits": (4 + cast) * head + max(at_once)}


def table(columns: list[tuple[str, dict[str, float]]], program: float) -> str:
    """Gigabytes by purpose, a line each. columns: heading and memory(); program: bytes of the process."""
    heads = [head for head, _ in columns]
    parts = [{**part, "the program itself": program} for _, part in columns]
    rows = [(name, [part[name] for part in parts]) for name in parts[0]]
    rows = [row for row in rows if any(row[1])] + [("sum", [sum(part.values()) for part in parts])]
    return "\n".join([f"{'peak memory of a rank, GB':<{WIDTH}}" + "".join(f"{head:>11}" for head in heads),
                      *(f"  {name:<{WIDTH - 2}}" + "".join(f"{x / 1e9:>11.2f}" for x in values)
                        for name, values in rows)])


def forecast(config: "Config", folder: Path, dtype: torch.dtype, use_cuda: bool, lengths: np.ndarray,
             counts: np.ndarray, trained: np.ndarray) -> str:
    """What --dry-run prints: how steps pack, and what a rank needs with and without --shard and --recompute.
    As packing() and memory(); ValueError if the weights do not fit config.json."""
    model_config, ranks, capacity = read_config(folder), config.dry_run, config.micro_batch_tokens
    stored = {DTYPE_NAMES[tensor.dtype] for tensor in stored_weights(folder, model_config).values()}
    packed = packing(lengths, counts, trained, config.seed, config.batch_size, capacity, ranks)
    columns = [("+recompute" if recompute else "--shard" if shard else "DDP" if ranks > 1 else "plain",
                memory(model_config, packed, dtype, ranks, shard, recompute, config.kl_weight > 0))
               for shard in ((False, True) if ranks > 1 else (False,)) for recompute in (False, True)]
    program = 0 if use_cuda else peak_memory_mb(torch.device("cpu")) * 2**20    # with the tokenizer
    return (f"model: {parameter_count(model_config):,} parameters, stored as "
            f"{', '.join(name for name, kind in DTYPES.items() if kind in stored)}\n"
            f"on {ranks} rank(s): {packed['micro_batches']:,} micro-batches an epoch, "
            f"{packed['tokens'] / packed['micro_batches'] / capacity:.1%} of {capacity:,} tokens used,\n  "
            f"the largest has {packed['largest']:,} tokens; at most {packed['trained']:,} targets with "
            f"weight, {packed['other']:,} without\n\n{table(columns, program)}")
