"""What a run would take, without loading the model: steps, packing and memory of a rank. train.py --dry-run.

The memory is counted from shapes, for the moment of the largest micro-batch that needs most: its loss is
computed, and all that its backward pass will want is there; that pass is in the first layer that it comes
to; or it is at the embeddings, where gradients as large as they are added up. What the allocator wastes is
not in it.
"""
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from data import plan
from kernels.head import CACHED_LOGITS, CHUNK_LOGITS
from runtime.machine import peak_memory_mb
from model import Llama, ModelConfig, parameter_count, read_config, stored_weights
from runtime.weights import DTYPE_NAMES, DTYPES

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


def activation_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype, recompute: bool) -> int:
    """What a forward pass over so many tokens keeps for the backward pass, computing in dtype; without the
    loss, and with recomputation without the layer that is being recomputed."""
    heads, key_heads, stream = config.num_attention_heads, config.num_key_value_heads, 4 * config.hidden_size
    # q, k, v and what comes out; gate and up
    kept = (2 * heads + 2 * key_heads) * config.head_dim + 2 * config.intermediate_size
    layer = 2 * (stream + 4) + dtype.itemsize * kept        # with what both norms are given, and their scales
    if config.qk_norm:
        layer += (heads + key_heads) * (dtype.itemsize * config.head_dim + 4)
    layers = config.num_hidden_layers * (stream if recompute else layer)
    return tokens * (layers + stream + 4 + 4 * config.head_dim)     # + the last norm, cos and sin


def memory(config: ModelConfig, packed: dict[str, int], dtype: torch.dtype, ranks: int, shard: bool,
           recompute: bool, reference: bool, cuda: bool = False) -> dict[str, float]:
    """Bytes of a rank by purpose, at the moment that needs most. packed: packing(); dtype: to compute in;
    reference: whether there is a second model for KL; cuda: the loss is computed in larger blocks there."""
    with torch.device("meta"):
        model = Llama(config)
    count, layers = sum(p.numel() for p in model.parameters()), config.num_hidden_layers
    layer, down = (sum(p.numel() for p in part.parameters())
                   for part in (model.model.layers[0], model.model.layers[0].mlp.down_proj))
    outer, head = count - layer * layers, config.vocab_size * config.hidden_size    # outer: not in the layers
    size, cast = dtype.itemsize, dtype.itemsize if dtype != torch.float32 else 0    # cast: a copy in dtype
    mine, tokens = count / (ranks if shard else 1), packed["largest"]

    if shard:   # all that is outer; a layer as it comes and as it is used, its gradient made and sent
        held, working = 4 * outer * (1 + reference), layer * (3 * size + 2 * 4)
    else:       # autograd keeps the copies that a layer computes with, but for down_proj's
        copies = cast * (layer - down)
        held, working = (0, copies) if recompute else (copies * layers, 0)
        working += (2 * 4 + cast) * down    # gradients of the two largest before they are added up
    kept = activation_bytes(config, tokens, dtype, recompute)
    # of the layer whose backward pass it is: what is recomputed; SwiGLU's product and ways back to it
    again = activation_bytes(config, tokens, dtype, False) // layers if recompute else 0
    again += 4 * size * config.intermediate_size * tokens
    at_end = 2 if shard or config.tie_word_embeddings else 1    # gradients as large as the head

    def logits(rows: int) -> tuple[int, int]:   # of a chunk, and of the two that are there when one follows
        chunks = -(-rows * config.vocab_size // CHUNK_LOGITS)
        chunk = -(-rows // max(1, chunks)) * config.vocab_size
        return chunk, min(chunks, 2) * chunk

    (chunk, pair), (looked, _) = logits(packed["trained"]), logits(packed["other"])
    exact = 0 if not cast else 4 * (pair if cuda else min(pair, 2 * CACHED_LOGITS))
    at_once = [size * pair + exact,                                 # the loss: logits, then their gradient
               (size + 2 * 4) * looked,                             # a look at other spans' NLL, in fp32
               reference * ((2 * size + 8 * 4) * chunk + 4 * head)]     # KL: log p, log q, p, and ways back
    moments = [(held, kept, (4 + cast) * head + max(at_once)), (held + working, kept + again, 4 * head),
               (held, 4 * config.hidden_size * tokens, 4 * head * at_end)]
    gathered, activations, at_head = max(moments, key=sum)
    return {"parameters": 4 * mine, "gradients": 4 * mine, "AdamW's averages": 8 * mine,
            "reference model": 4 * mine * reference, "weights gathered or cast": gathered,
            f"activations of {tokens:,} tokens": activations, "head: gradient, copy, logits": at_head}


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
                memory(model_config, packed, dtype, ranks, shard, recompute, config.kl_weight > 0, use_cuda))
               for shard in ((False, True) if ranks > 1 else (False,)) for recompute in (False, True)]
    program = 0 if use_cuda else peak_memory_mb(torch.device("cpu")) * 2**20    # with the tokenizer
    return (f"model: {parameter_count(model_config):,} parameters, stored as "
            f"{', '.join(name for name, kind in DTYPES.items() if kind in stored)}\n"
            f"on {ranks} rank(s): {packed['micro_batches']:,} micro-batches an epoch, "
            f"{packed['tokens'] / packed['micro_batches'] / capacity:.1%} of {capacity:,} tokens used,\n  "
            f"the largest has {packed['largest']:,} tokens; at most {packed['trained']:,} targets with "
            f"weight, {packed['other']:,} without\n\n{table(columns, program)}")
