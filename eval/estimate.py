"""What a rank of a run needs, counted without the model's weights: how its steps pack, and memory by purpose.

Memory is counted from shapes at three moments of the largest micro-batch, and the largest sum is taken: when
the loss is computed, and all that the backward pass will need is kept; when the backward pass is in its
first layer; and when it ends at the embeddings. What the allocator wastes, and a CPU's padding, are not
counted.
"""
import numpy as np
import torch

from kernels.attention import VARLEN_KEYWORDS
from kernels.head import CACHED_LOGITS, HEAD_ROWS, chunks
from model import parameter_count
from runtime.model_config import ModelConfig


def packing(plan: list[list[list[np.ndarray]]], lengths: np.ndarray, counts: np.ndarray, trained: np.ndarray
            ) -> dict[str, int]:
    """What an epoch's plan (data.plan) packs: micro_batches and tokens of all ranks; and the most that one
    micro-batch has: largest (tokens), trained (targets with weight), other (targets without). lengths: (E,);
    counts: (E, K) targets by kind; trained: (K,) which kinds have weight."""
    micro_batches = [examples for step in plan for of_rank in step for examples in of_rank]
    weighted = counts[:, trained].sum(1)
    tokens, targets = (np.array([int(x[m].sum()) for m in micro_batches]) for x in (lengths, weighted))
    return {"micro_batches": len(micro_batches), "tokens": int(tokens.sum()), "largest": int(tokens.max()),
            "trained": int(targets.max()), "other": int((tokens - targets).max())}


def activation_bytes(config: ModelConfig, tokens: int, dtype: torch.dtype, recompute: bool,
                     cuda: bool = False, compiled: bool = False) -> int:
    """What a forward pass over so many tokens keeps for the backward pass, computing in dtype; without the
    loss, and with recomputation without the layer that is being recomputed. compiled: whether torch.compile
    decides what a layer keeps."""
    heads, key_heads, stream = config.num_attention_heads, config.num_key_value_heads, 4 * config.hidden_size
    flash = cuda and dtype == torch.bfloat16
    # A varlen_attn without enable_gqa gets, and keeps, keys and values repeated for each query head.
    expanded = flash and "enable_gqa" not in VARLEN_KEYWORDS
    used_heads = heads if expanded else key_heads
    # q, k, v and what attention returns; gate and up
    numbers = (2 * heads + 2 * used_heads) * config.head_dim + 2 * config.intermediate_size
    # and in fp32 each row's scale of both norms, and flash attention's log of the sum for each head
    layer = 2 * 4 + 4 * heads * flash
    if compiled:
        # The layer's input in fp32 and what attention adds to that; on CUDA the output of both norms, and
        # SwiGLU's, too.
        layer += stream + dtype.itemsize * (numbers + config.hidden_size)
        layer += cuda * dtype.itemsize * (2 * config.hidden_size + config.intermediate_size)
    else:
        # The input of both norms in fp32. linears() recomputes the outputs.
        layer += 2 * stream + dtype.itemsize * numbers
    if compiled and flash and not expanded and not config.qk_norm:
        # v is a view of the product that holds q and k before RoPE, too.
        layer += (heads + key_heads) * dtype.itemsize * config.head_dim
    if config.qk_norm:
        layer += (heads + key_heads) * (dtype.itemsize * config.head_dim + 4)
    layers = config.num_hidden_layers * (stream if recompute else layer)
    return tokens * (layers + stream + 4 + 4 * config.head_dim)     # + the last norm, cos and sin


def memory(config: ModelConfig, packed: dict[str, int], dtype: torch.dtype, ranks: int, shard: bool,
           recompute: bool, reference: bool, cuda: bool = False, compiled: bool = False) -> dict[str, float]:
    """Bytes of a rank by purpose, at the moment that needs most. packed: packing(); dtype: to compute in;
    reference: whether there is a second model for KL; cuda: the loss is computed in larger chunks there, and
    with torch.compile; compiled: whether the layers are."""
    count, layers, tokens = parameter_count(config), config.num_hidden_layers, packed["largest"]
    width, vocabulary = config.hidden_size, config.vocab_size
    head, gate = vocabulary * width, config.intermediate_size * width       # numbers of these weights
    outer = head * (1 if config.tie_word_embeddings else 2) + width         # of all that is not in a layer
    layer = (count - outer) // layers
    size, cast = dtype.itemsize, dtype.itemsize if dtype != torch.float32 else 0    # cast: of a copy in dtype

    # The loss: a chunk of logits at a time.
    def logits(targets: int, large: bool = cuda) -> int:
        return vocabulary * max((x.stop - x.start for x in chunks(targets, vocabulary, large)), default=0)

    of_trained, of_other = logits(packed["trained"]), logits(packed["other"])
    # On CUDA nothing as large as the logits is in fp32, and the head's gradient is added to in place.
    on_cpu = 0 if cuda else 1
    exact, exact_other = (on_cpu * 4 * min(n, CACHED_LOGITS) for n in (of_trained, of_other))
    # KL, in the backward pass of a chunk: five numbers a logit; two when the chunk's gradient of the head is
    # made. From the second chunk on, there is the sum of those before, too, and adding makes another one.
    of_kl = logits(packed["trained"], large=False)
    summed = 4 * head * (of_kl < vocabulary * packed["trained"])
    kl = max(5 * 4 * of_kl + cast * head + summed, 2 * 4 * of_kl + 4 * head + 2 * summed)
    loss = max(
        size * (of_trained + on_cpu * min(HEAD_ROWS, vocabulary) * width) + (exact if cast else 0),
        size * of_other + 2 * exact_other,                          # the NLL of other spans
        reference * kl)

    # A layer's backward pass. FSDP has the layer as received and as used, its whole gradient, and what it
    # sends of that. Without FSDP autograd keeps the copies that linear layers compute with.
    if shard:
        weights, at_work = 4 * outer * (1 + reference), layer * (3 * size + 2 * 4)
        down, gate_and_up = 0, 0
    else:
        weights, at_work = (cast * layer * layers, 0)
        if recompute or compiled and not cuda:
            weights, at_work = 0, cast * layer
        # The gradients of down_proj, and of gate_proj and up_proj, before they are added up.
        down, gate_and_up = (4 + cast) * gate, (2 * 4 + cast) * gate
    forward = activation_bytes(config, tokens, dtype, recompute, cuda, compiled)
    recomputed = activation_bytes(config, tokens, dtype, False, cuda, compiled) // layers if recompute else 0
    backward = forward + recomputed + 4 * width * tokens        # and the gradient of the layer's output
    inner = size * config.intermediate_size * tokens            # SwiGLU's output, or a gradient like it

    at_embeddings = 2 if shard or config.tie_word_embeddings else 1     # gradients as large as the head
    weights, activations, at_head = max(
        (weights, forward, (4 + cast) * head + loss),
        (weights + at_work + down, backward + 2 * inner, 4 * head),      # down_proj
        (weights + at_work, backward + 3 * inner, 4 * head),            # SwiGLU
        (weights + at_work + gate_and_up, backward, 4 * head),                 # gate_proj and up_proj
        (weights, 4 * width * tokens, 4 * head * at_embeddings), key=sum)
    own = count / (ranks if shard else 1)
    return {"parameters": 4 * own, "gradients": 4 * own, "AdamW's averages": 8 * own,
            "reference model": 4 * own * reference, "weights gathered or cast": weights,
            f"activations of {tokens:,} tokens": activations, "head: gradient, copy, logits": at_head}


def table(columns: dict[str, dict[str, float]], program: float) -> str:
    """Memory by purpose, a line each, in 78 columns. columns: memory() by heading, of which the last word is
    printed; program: bytes of the process itself."""
    columns = {heading: {**parts, "the program itself": program} for heading, parts in columns.items()}
    lines = {name: [parts[name] for parts in columns.values()] for name in next(iter(columns.values()))}
    lines = {name: values for name, values in lines.items() if any(values)}
    lines["sum"] = [sum(parts.values()) for parts in columns.values()]
    unit, scale, digits = ("GB", 1e9, 2) if max(lines["sum"]) >= 1e9 else ("MB", 1e6, 1)
    heading = f"{f'peak memory of a rank, {unit}':<34}" + "".join(f"{x.split()[-1]:>11}" for x in columns)
    return "\n".join([heading, *(f"  {name:<32}" + "".join(f"{x / scale:>11.{digits}f}" for x in values)
                                 for name, values in lines.items())])
