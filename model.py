"""A Llama-style decoder over packed documents, from a Hugging Face checkpoint folder and back.

    folder = resolve_model("HuggingFaceTB/SmolLM2-135M")      # or a folder
    model = load_model(folder)
    hidden = model(ids, positions, cu_seqlens)                # (N, C), before the head
    save_model(model, "out")

Covers Llama 1 to 3.2, TinyLlama, SmolLM2, Mistral without a sliding window, Qwen2, Qwen2.5 and dense Qwen3.
What a config.json asks for beyond that is refused by name. Two things differ from the usual way: there is no
batch dimension, a micro-batch is one row of documents laid end to end; and the model stops at the last hidden
states, because the loss needs the head for some rows only. Parameters bear Hugging Face's names, so loading
needs no map.

Shapes: N packed tokens, C width, H query heads, G key/value heads, D head size, V vocabulary,
F feed-forward width.
"""
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from files import read_json
from ranks import is_main
from shard import DTYPE_NAMES, Stored, equal, fill, first_above, stored_tensors, write_tensors

# (layer, q (N, H, D), k (N, G, D), v (N, G, D)) -> (N, H, D);
# generation brings its own, with a key/value cache
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

# ---------------------------------------------------------------- config.json

# What a field absent from config.json means, where families differ (transformers' config classes). A null is
# not the same for these: no grouping of heads, a head size of hidden_size / num_attention_heads, no window.
FAMILIES = {
    "llama": dict(),
    "mistral": dict(num_key_value_heads=8, sliding_window=4096),
    "qwen2": dict(num_key_value_heads=32, sliding_window=4096),
    "qwen3": dict(num_key_value_heads=32, head_dim=128, sliding_window=4096),
}
# Fields that change what the model computes and are implemented for these values only.
ONLY = {
    "hidden_act": ("silu",), "quantization_config": (None,), "attention_dropout": (0,),
    "partial_rotary_factor": (1,), "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,),
    "dual_chunk_attention_config": (None,), "add_cross_attention": (None, False),
    "rope_interleaved": (None, False), "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1), "auto_map": (None,), "transformers_weights": (None,),
}

# What a field must be: in words, and the check. In Python true is a number, too, and JSON may hold NaN.
COUNT = "a whole number above 0", lambda x: type(x) is int and x > 0
WHOLE = "a whole number, 0 or more", lambda x: type(x) is int and x >= 0
POSITIVE = "a finite number above 0", lambda x: type(x) in (int, float) and 0 < x < math.inf
FLAG = "true or false", lambda x: type(x) is bool
TEXT = "text", lambda x: type(x) is str
TEXTS = "a list of text", lambda x: type(x) is list and all(type(each) is str for each in x)
OBJECT = "an object", lambda x: type(x) is dict


class _Fields:
    """Fields of a JSON object; null means absent. Called with a field's name and what it must be, it returns
    the value, or default if it is absent. ValueError names the field, its value and what it must be."""

    def __init__(self, values: dict, inside: str = ""):
        self.values = {name: value for name, value in values.items() if value is not None}
        self.inside = inside    # "rope_scaling." for the fields of that object

    def __call__(self, name: str, must_be: tuple[str, Callable[[object], bool]], default: object = None
                 ) -> object:
        if name not in self.values:
            return default
        words, fits = must_be
        if not fits(self.values[name]):
            raise ValueError(f"config.json: {self.inside}{name} is {self.values[name]!r}; it must be {words}")
        return self.values[name]

    def need(self, names: Sequence[str], why: str = "") -> None:
        """ValueError that lists which of these fields are absent."""
        if missing := [name for name in names if name not in self.values]:
            raise ValueError(f"config.json: {why}{', '.join(self.inside + name for name in missing)} missing")

    def refuse(self, only: dict[str, tuple]) -> None:
        """ValueError for a field that has another value than those that are implemented."""
        for name, allowed in only.items():
            value = self.values.get(name, allowed[0])
            # True == 1 in Python
            if not any(value == each and isinstance(value, bool) == isinstance(each, bool)
                       for each in allowed):
                raise ValueError(f"config.json: {self.inside}{name} = {value!r} is not implemented, "
                                 f"only {allowed[0]!r}")


@dataclass
class ModelConfig:
    """The part of config.json that the model needs; `raw` is the whole, written back when saving."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: dict              # rope_type, rope_theta and what the type needs
    max_position_embeddings: int | None     # tokens; None: config.json does not say
    initializer_range: float                # of weights for training from scratch
    raw: dict = field(repr=False)

    @classmethod
    def from_dict(cls, raw: dict) -> "ModelConfig":
        """config.json's content -> ModelConfig.
        ValueError names a field that is missing, of a wrong kind, or asks for what is not implemented."""
        if not isinstance(raw, dict):
            raise ValueError(f"config.json: must be a JSON object, not {type(raw).__name__}")
        family = _Fields(raw)("model_type", TEXT)
        if family not in FAMILIES:
            raise ValueError(f"config.json: model_type {family!r} is not implemented; those that are: "
                             f"{', '.join(FAMILIES)}")
        get = _Fields({**FAMILIES[family], **raw})
        get.refuse(ONLY)
        get.need(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                  "num_attention_heads"))
        hidden, layers = get("hidden_size", COUNT), get("num_hidden_layers", COUNT)
        heads, longest = get("num_attention_heads", COUNT), get("max_position_embeddings", COUNT)
        _refuse_sliding_window(get, family, layers, longest)
        kv_heads = get("num_key_value_heads", COUNT, heads)
        head_dim = get("head_dim", COUNT, hidden // heads)
        if heads % kv_heads or head_dim % 2 or not head_dim:
            raise ValueError(f"config.json: num_attention_heads {heads} must be a multiple of "
                             f"num_key_value_heads {kv_heads}, and head_dim {head_dim} even")
        attention_bias = get("attention_bias", FLAG, False)
        return cls(
            vocab_size=get("vocab_size", COUNT), hidden_size=hidden,
            intermediate_size=get("intermediate_size", COUNT), num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
            rms_norm_eps=float(get("rms_norm_eps", POSITIVE, 1e-6)),
            tie_word_embeddings=get("tie_word_embeddings", FLAG, False),
            qkv_bias={"mistral": False, "qwen2": True}.get(family, attention_bias),
            o_bias=attention_bias and family in ("llama", "qwen3"),
            mlp_bias=get("mlp_bias", FLAG, False) and family == "llama", qk_norm=family == "qwen3",
            rope=_rope(get), max_position_embeddings=longest,
            initializer_range=float(get("initializer_range", POSITIVE, 0.02)), raw=raw)


def _refuse_sliding_window(get: _Fields, family: str, layers: int, longest: int | None) -> None:
    """ValueError if a layer's attention has a window shorter than the model's context."""
    window = get("sliding_window", COUNT) if get("use_sliding_window", FLAG, family == "mistral") else None
    # In Qwen's models the window starts at this layer, which may not exist.
    if family in ("qwen2", "qwen3") and get("max_window_layers", WHOLE, 28) >= layers:
        window = None
    others = sorted(set(get("layer_types", TEXTS, [])) - {"full_attention"})
    if (window and window < (longest or math.inf)) or others:
        raise ValueError(f"config.json: sliding_window = {window}, layer_types {others}: a sliding window is "
                         "not implemented; if no document is longer than the window, set sliding_window to "
                         "null")


def _rope(get: _Fields) -> dict:
    """The old fields (rope_theta, rope_scaling with `type` or `rope_type`)
    and the new one (rope_parameters) -> one. Of both objects transformers takes rope_scaling."""
    objects = {name: get(name, OBJECT) for name in ("rope_scaling", "rope_parameters")}
    name = next((name for name in objects if objects[name]), "rope_parameters")
    values = objects[name] or {}
    inner = _Fields(values, f"{name}.")
    inner.refuse({"partial_rotary_factor": (1,)})
    if nested := [key for key, value in values.items() if isinstance(value, dict)]:
        raise ValueError(f"config.json: {name}.{nested[0]}: RoPE by kind of layer is not implemented")
    rope = {"rope_type": inner("rope_type", TEXT, inner("type", TEXT, "default")),
            "rope_theta": inner("rope_theta", POSITIVE, get("rope_theta", POSITIVE, 10000.0))}
    kinds = {"default": {}, "linear": dict(factor=POSITIVE),
             "llama3": dict(factor=POSITIVE, low_freq_factor=POSITIVE, high_freq_factor=POSITIVE,
                            original_max_position_embeddings=COUNT)}
    if rope["rope_type"] not in kinds:
        raise ValueError(f"config.json: RoPE type {rope['rope_type']!r} is not implemented; those that are: "
                         f"{', '.join(kinds)}")
    needs = kinds[rope["rope_type"]]
    inner.need(tuple(needs), f"RoPE type {rope['rope_type']!r}: ")
    rope.update({key: inner(key, must_be) for key, must_be in needs.items()})
    if rope["rope_type"] == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(f"config.json: {name}.low_freq_factor is {rope['low_freq_factor']}; it must be less "
                         f"than high_freq_factor, {rope['high_freq_factor']}")
    return rope


def rope_frequencies(config: ModelConfig) -> Tensor:
    """(D / 2,) fp32, radians a position. Su et al. 2021, eq. 15; `linear` is position interpolation
    (Chen et al. 2023); `llama3` slows the low frequencies down and blends towards the high ones
    (Llama 3.1's release)."""
    rope = config.rope
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, config.head_dim, 2, dtype=torch.int64).float()
                                               / config.head_dim)
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        # within the original context
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        blend = ((turns - low) / (high - low)).clamp(0, 1)  # 0: low frequency, slowed; 1: high, kept
        return (1 - blend) * frequencies / rope["factor"] + blend * frequencies
    return frequencies


# ---------------------------------------------------------------- attention


def attention_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal attention within documents, spelled out: the definition that faster paths are tested against.

    q: (N, H, D); k, v: (N, G, D); cu_seqlens: (documents + 1,). Returns (N, H, D).
    Makes an N x N matrix a head.
    """
    n, heads = q.shape[:2]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))    # (N, H, D)
    document = torch.bucketize(torch.arange(n, device=q.device), cu_seqlens[1:], right=True)
    past = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    allowed = past & (document[:, None] == document)                            # (N, N)
    scores = torch.einsum("nhd,mhd->hnm", q, k).float() / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1).to(v.dtype)
    return torch.einsum("hnm,mhd->nhd", weights, v)


# Queries multiplied out at once, and the most scores that they may have: 16 MB in bf16, about a CPU's cache.
TILE, TILE_SCORES = 128, 2**23


class _Rows(NamedTuple):
    """Where a group's (document, head, place) rows are in (N * heads, D).
    Documents shorter than the group's longest are padded with row 0."""
    take: Tensor            # (B * heads * L,)
    real: Tensor | None     # which of these are not padding; None: all
    padding: Tensor | None

    def gather(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1]).index_select(0, self.take)            # (B * heads * L, D)

    def scatter(self, x: Tensor, into: Tensor) -> None:
        x, rows = x.reshape(-1, x.shape[-1]).to(into.dtype), self.take
        if self.real is not None:
            x, rows = x.index_select(0, self.real), rows.index_select(0, self.real)
        into.view(-1, into.shape[-1]).index_copy_(0, rows, x)


def _like_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Group documents so that padding each group to its longest makes no document more than a quarter longer,
    or 16 tokens. [100, 20, 90, 28] -> [[1, 3], [2, 0]]"""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and lengths[i] <= max(1.25 * lengths[groups[-1][0]], lengths[groups[-1][0]] + 16):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


@lru_cache(maxsize=4)   # every layer asks, forward and backward
def _groups(lengths: tuple[int, ...], heads: int, key_heads: int, device: torch.device
            ) -> list[tuple[int, int, _Rows, _Rows]]:
    """Documents of like length: how many, the longest, rows of their queries and of their keys."""
    starts, out = torch.tensor([0, *lengths]).cumsum(0), []
    for like in _like_lengths(lengths):
        longest = lengths[like[-1]]
        most = max(1, TILE_SCORES // (heads * min(TILE, longest) * longest))
        for group in (like[i:i + most] for i in range(0, len(like), most)):
            places = torch.arange(longest)                                      # (L,)
            is_real = places < torch.tensor([lengths[i] for i in group])[:, None]           # (B, L)
            tokens = torch.where(is_real, starts[group][:, None] + places, 0)   # (B, L)
            rows = []
            for n in (heads, key_heads):
                take = tokens[:, None] * n + torch.arange(n)[:, None]           # (B, n, L)
                real = is_real[:, None].expand_as(take).flatten()
                some = (None, None) if real.all() else (x.nonzero().squeeze(1).to(device)
                                                        for x in (real, ~real))
                rows.append(_Rows(take.flatten().to(device), *some))
            out.append((len(group), longest, *rows))
    return out


def _causal_weights(queries: Tensor, keys: Tensor, start: int) -> Tensor:
    """queries: (B * G, R, T, D), scaled, at places from start; keys: (B * G, start + T, D).
    Returns the softmax of their scores, (B * G, R * T, start + T)."""
    tile, end = queries.shape[2], keys.shape[1]
    scores = torch.bmm(queries.flatten(1, 2), keys.transpose(1, 2))
    future = torch.full((tile, tile), -math.inf, dtype=scores.dtype, device=scores.device).triu_(1)
    scores.view(-1, tile, end)[..., start:].add_(future)
    return torch.softmax(scores, -1)


class _TiledAttention(torch.autograd.Function):
    """Attention within documents by plain matrix products: a tile of queries at a time with the keys up to
    its end, documents of like length at once.

    Padding goes behind a document's end, where no causal query of the document looks, so it needs no mask;
    what the padding itself sees is thrown away, and its gradient is zero. The weights are made again in the
    backward pass. Shapes: B documents of a group, L its longest, T queries of a tile, R = H / G query heads a
    key head.

    Forward and backward of 8 documents of 512 tokens (9 heads of 64, bf16, two cores) take 36 ms so, 121 ms
    through PyTorch's fused kernel one by one; 31 of 128 tokens 18 against 86 ms, 2 of 2,048 tokens 98 against
    225 ms (bench.attention).
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.lengths = lengths
        out = torch.empty_like(q)
        for queries, keys, values, tiles, query_rows, _ in _TiledAttention.groups(q, k, v, lengths):
            results = torch.empty_like(queries)
            for start, end in tiles:
                mine = queries[:, :, start:end]
                weights = _causal_weights(mine, keys[:, :end], start)
                results[:, :, start:end] = torch.bmm(weights, values[:, :end]).view_as(mine)
            query_rows.scatter(results, out)
        return out

    @staticmethod
    def groups(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Iterator[tuple]:
        """Each group's queries (B * G, R, L, D), scaled, keys and values (B * G, L, D), the bounds of its
        tiles and its rows."""
        key_heads, size = k.shape[1:]
        for documents, longest, query_rows, key_rows in _groups(lengths, q.shape[1], key_heads, q.device):
            queries = query_rows.gather(q).mul_(size ** -0.5).view(documents * key_heads, -1, longest, size)
            keys, values = (key_rows.gather(x).view(-1, longest, size) for x in (k, v))
            tile = -(-longest // -(-longest // TILE))   # equal ones
            tiles = [(i, min(i + tile, longest)) for i in range(0, longest, tile)]
            yield queries, keys, values, tiles, query_rows, key_rows

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        for group in _TiledAttention.groups(q, k, v, ctx.lengths):
            queries, keys, values, tiles, query_rows, key_rows = group
            grads = query_rows.gather(grad_out)
            if query_rows.padding is not None:
                grads.index_fill_(0, query_rows.padding, 0)
            grads = grads.view_as(queries)
            grad_queries = torch.empty_like(queries)
            # several tiles add to a key's gradient: in fp32
            grad_keys, grad_values = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
            for start, end in tiles:
                mine, grad = queries[:, :, start:end], grads[:, :, start:end].flatten(1, 2)
                weights = _causal_weights(mine, keys[:, :end], start)
                grad_weights = torch.bmm(grad, values[:, :end].transpose(1, 2))
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
                grad_queries[:, :, start:end] = torch.bmm(grad_scores, keys[:, :end]).view_as(mine)
                grad_keys[:, :end] += torch.bmm(grad_scores.transpose(1, 2), mine.flatten(1, 2))
                grad_values[:, :end] += torch.bmm(weights.transpose(1, 2), grad)
            query_rows.scatter(grad_queries.mul_(q.shape[-1] ** -0.5), grad_q)
            key_rows.scatter(grad_keys, grad_k)
            key_rows.scatter(grad_values, grad_v)
        return grad_q, grad_k, grad_v, None


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """attention_reference() without its N x N matrices.
    cu_seqlens on the CPU: the lengths decide what is run."""
    if not len(q):  # no output, but k and v must stay in the graph: DDP waits for every parameter's gradient
        return q * (k.sum() + v.sum())
    return _TiledAttention.apply(q, k, v, tuple(cu_seqlens.diff().tolist()))


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """attention() by PyTorch's flash attention over packed documents, bf16 on CUDA. cu_seqlens on the device;
    longest: of the documents, in tokens."""
    from torch.nn.attention.varlen import varlen_attn
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0),
                       enable_gqa=True)


def varlen_fault(config: "ModelConfig", device: torch.device) -> str:
    """Why varlen_attention() cannot be trusted here, by a small random case with its gradients;
    "" if it can."""
    make = torch.Generator().manual_seed(0)
    cu_seqlens = torch.tensor([0, 5, 6, 150], dtype=torch.int32, device=device)
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    inputs = [torch.randn(150, n, config.head_dim, generator=make).to(device, torch.bfloat16).requires_grad_()
              for n in heads]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    try:
        got, expected = varlen_attention(*inputs, cu_seqlens, 144), attention_reference(*exact, cu_seqlens)
        grad = torch.randn(got.shape, generator=make).to(device, torch.bfloat16)
        pairs = [(got, expected), *zip(torch.autograd.grad(got, inputs, grad),
                                       torch.autograd.grad(expected, exact, grad.float()))]
        worst = max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)
    except Exception as error:
        return f"it raised {type(error).__name__}: {str(error).splitlines()[0]}"
    return "" if worst < 0.02 else f"it is {worst:.1%} off the reference"  # bf16 rounds by 0.2 to 0.6 %


# ---------------------------------------------------------------- modules


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products of x are computed in: autocast's choice, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# The steps of a layer are autograd functions of their own. Left to autograd each would keep every
# intermediate for the backward pass, much of it in fp32. They keep their inputs, and make the rest again.


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the norm of x (..., C) in the dtype to compute in, and 1 / rms(x) (..., 1), fp32."""
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # no x * x made
    scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight).to(compute_dtype(x)), scale


def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and weight from that of the norm."""
    normed, grad = x * scale, grad.float()
    product = grad * normed
    along = (product @ weight.float()).div_(x.shape[-1]).unsqueeze(-1)          # what rms(x) takes away
    grad_x = (grad * weight).addcmul_(normed, along, value=-1).mul_(scale)
    return grad_x.to(x.dtype), product.flatten(0, -2).sum(0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_rms_norm_backward(grad, *ctx.saved_tensors), None


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In x's dtype."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class _NormLinears(torch.autograd.Function):
    """[linear(norm(x), weight, bias) for each pair of `parameters`], without keeping norm(x)."""

    @staticmethod
    def forward(ctx, x: Tensor, norm_weight: Tensor, eps: float, *parameters: Tensor | None
                ) -> tuple[Tensor, ...]:
        normed, scale = rms_norm(x, norm_weight, eps)
        weights = [weight.to(normed.dtype) for weight in parameters[::2]]
        ctx.has_bias = [bias is not None for bias in parameters[1::2]]
        ctx.save_for_backward(x, norm_weight, scale, *weights)
        return tuple(_linear(normed, weight, bias) for weight, bias in zip(weights, parameters[1::2]))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, scale, *weights = ctx.saved_tensors
        normed = (x * scale).mul_(norm_weight).to(weights[0].dtype)
        grad_normed = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:]):
            grad_normed.addmm_(grad, weight)
        out = []
        for grad, has_bias in zip(grads, ctx.has_bias):
            out += [(grad.T @ normed).float(), grad.sum(0) if has_bias else None]
        return *_rms_norm_backward(grad_normed, x, norm_weight, scale), None, *out


def norm_linears(x: Tensor, norm: "RMSNorm", *linears: nn.Linear) -> tuple[Tensor, ...]:
    """[linear(norm(x)) for linear in linears]; x: (N, C)."""
    parameters = [p for linear in linears for p in (linear.weight, linear.bias)]
    return _NormLinears.apply(x, norm.weight, norm.eps, *parameters)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension, computed in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        exact = x.float()
        out = exact * torch.cat([cos, cos], -1)
        (a, b), (into_a, into_b) = exact.chunk(2, dim=-1), out.chunk(2, dim=-1)
        into_a.addcmul_(b, sin, value=-1)
        into_b.addcmul_(a, sin)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (N, heads, D) by its positions' angles, cos and sin (N, 1, D / 2).
    Dimension i pairs with i + D / 2."""
    return _Rotate.apply(x, cos, sin)


class _SwiGLUDown(torch.autograd.Function):
    """linear(silu(gate) * up, weight, bias), the product made again in the backward pass."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.has_bias = bias is not None
        return _linear(F.silu(gate).mul_(up), weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        activated = F.silu(gate)
        grad_weight = grad.T @ (activated * up)
        grad_product = grad @ weight.to(grad.dtype)
        grad_gate = torch.ops.aten.silu_backward(grad_product * up, gate)
        return (grad_gate, activated.mul_(grad_product), grad_weight.float(),
                grad.sum(0) if ctx.has_bias else None)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, config.o_bias)
        norm = (lambda: RMSNorm(self.head_dim, config.rms_norm_eps)) if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x: Tensor, norm: RMSNorm, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim))                         # (N, H or G, D)
                   for y in norm_linears(x, norm, self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return self.o_proj(self.attend(attend, q, k, v).flatten(1))             # (N, C)

    # Documents change with every batch, so there is nothing to compile once. And code that is compiled must
    # not read the layer's number: it would be compiled for each layer, and after eight no longer.
    @torch.compiler.disable
    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(self.layer, q, k, v)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: Tensor, norm: RMSNorm) -> Tensor:
        gate, up = norm_linears(x, norm, self.gate_proj, self.up_proj)
        return _SwiGLUDown.apply(gate, up, self.down_proj.weight, self.down_proj.bias)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(x, self.input_layernorm, cos, sin, attend)
        return x + self.mlp(x, self.post_attention_layernorm)


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """model(ids, positions, cu_seqlens) -> hidden states (N, C),
    to be multiplied with `head_weight` (V, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(
            config.hidden_size, config.vocab_size, False)
        self.recompute = False              # trade a second forward pass for the layers' activations
        self.varlen = False                 # attention by varlen_attention()
        self.source_dtype = torch.float32   # what the weights were loaded from
        # A plain attribute: building on the meta device must not lose it, and no state dict should hold it.
        with torch.device("cpu"):
            self.frequencies = rope_frequencies(config)

    @property
    def head_weight(self) -> Tensor:
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def choose_attention(self, dtype: torch.dtype) -> str:
        """The one switch: varlen_attention() on CUDA in bf16, if a check passes; else attention(). Returns a
        warning if it does not."""
        device = self.head_weight.device
        if device.type != "cuda" or dtype != torch.bfloat16:
            return ""
        fault = varlen_fault(self.config, device)
        self.varlen = not fault
        return fault and f"varlen_attn is not used: {fault}; the slower plain attention is"

    def attention_over(self, cu_seqlens: Tensor, device: torch.device) -> Attend:
        """What layers attend with, over a row of these documents."""
        if not self.varlen or len(cu_seqlens) < 2:
            return lambda layer, q, k, v: attention(q, k, v, cu_seqlens)
        longest, there = int(cu_seqlens.diff().max()), cu_seqlens.to(device, non_blocking=True)
        return lambda layer, q, k, v: varlen_attention(q, k, v, there, longest)

    def forward(self, ids: Tensor, positions: Tensor, cu_seqlens: Tensor | None, noise: Tensor | None = None,
                attend: Attend | None = None) -> Tensor:
        """ids, positions: (N,) int64; cu_seqlens: (documents + 1,) int32 on the CPU, where documents begin
        and end in the row; noise: (N, C), added to the embeddings; attend: replaces the attention over
        cu_seqlens. Returns (N, C)."""
        attend = attend or self.attention_over(cu_seqlens, ids.device)
        if self.frequencies.device != ids.device:
            self.frequencies = self.frequencies.to(ids.device)
        angles = positions[:, None, None].float() * self.frequencies            # (N, 1, D / 2)
        cos, sin = angles.cos(), angles.sin()
        x = self.model.embed_tokens(ids)                                        # (N, C)
        if noise is not None:
            x = x + noise
        for layer in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, attend, use_reentrant=False)
            else:
                x = layer(x, cos, sin, attend)
        return self.model.norm(x)


def parameter_count(config: ModelConfig) -> int:
    """How many numbers Llama(config) has; a tied head counts once."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).parameters())


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


def init_weights(model: Llama, seed: int) -> None:
    """Fill a new model for training from scratch: normal with config.json's initializer_range (0.02),
    norms 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, 0.0, model.config.initializer_range, generator)


# ---------------------------------------------------------------- checkpoint folders

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD_BYTES = 5 * 10**9
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


# What is downloaded of a hub repository besides weights. Its other files (weights for other programs, lower
# precision, pictures) can be many times larger.
HUB_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
             "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
             "chat_template.json", "adapter_config.json"]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@cache
def _warn(text: str) -> None:
    """Once a run: a folder is read several times."""
    if is_main():
        print(f"warning: {text}", file=sys.stderr)


def resolve_model(model: str | Path) -> Path:
    """A checkpoint folder as it is; a hub id, `owner/name` or `owner/name@revision`, is downloaded (once)
    first: tokenizer, config and template, and the weights that load_model() reads.
    ValueError if it is neither."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(model)):
        raise ValueError(f"--model {model}: no such folder, nor a hub id like "
                         "owner/name or owner/name@revision")
    from huggingface_hub import snapshot_download
    repository, _, revision = str(model).partition("@")

    def download(patterns: list[str], revision: str | None) -> Path:
        try:
            return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
        except Exception as error:  # the hub's many errors all mean that the download failed
            raise ValueError(f"--model {model}: no such folder, and the download failed: {error}") from None

    folder = download([*HUB_FILES, SINGLE, INDEX], revision or None)
    if not (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        # The folder is called after the commit. A branch may have moved on since.
        download(sorted(set(_weight_map(folder).values())), folder.name)
    return folder


def _what_else(folder: Path) -> str:
    """What to do about a folder without a model that can be loaded."""
    if (folder / "adapter_config.json").is_file():
        return ("it holds an adapter; merge it into its base model (peft's merge_and_unload and "
                "save_pretrained) and give the folder of the result")
    return ("a checkpoint folder needs config.json, tokenizer.json and *.safetensors; weights in another "
            "format, like pytorch_model.bin, can be converted with transformers' "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)")


def read_config(folder: str | Path) -> ModelConfig:
    """config.json of a checkpoint folder; ValueError if it is missing, broken or not implemented.

    tie_word_embeddings is what the weights say: a head that was trained on its own is kept, whatever
    config.json says, as transformers does.
    """
    folder = Path(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{file}: no such file; {_what_else(folder)}")
    raw = read_json(file)
    try:
        config = ModelConfig.from_dict(raw)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if config.tie_word_embeddings:
        stored = checkpoint_tensors(folder)
        embedding, head = stored.get(EMBEDDING), stored.get(HEAD)
        if embedding and head and not equal(embedding, head):
            _warn(f"{folder}: config.json says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}: the "
                  "head is trained and saved on its own, with tie_word_embeddings false")
            config = replace(config, tie_word_embeddings=False, raw={**raw, "tie_word_embeddings": False})
    return config


def check_ids(config: ModelConfig, sequences: Iterable[Sequence[int]]) -> None:
    """ValueError unless all token ids of the sequences, such as prompts, have a row in the embedding."""
    largest = max(map(max, filter(len, sequences)), default=0)
    if largest >= config.vocab_size:
        raise ValueError(f"a text holds token {largest}, the embedding has only {config.vocab_size} rows; "
                         "tokenizer and model do not belong together, or tokens were added without resizing "
                         "the model")


def _weight_map(folder: Path) -> dict[str, str]:
    """The index of a checkpoint folder: tensor name -> file name, of a file in the folder.
    ValueError if it is broken."""
    index = folder / INDEX
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: weight_map must be an object of tensor names and their files")
    for tensor, name in names.items():
        if not isinstance(name, str) or {"..", ""} & {*name.split("/")}:     # "" comes before a leading /
            raise ValueError(f"{index}: {tensor} is in {name!r}; that must be a file in this folder")
    return names


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, from its index where there is one, sorted. As in
    transformers, model.safetensors comes before an index. ValueError if any is missing."""
    folder = Path(folder)
    if (folder / SINGLE).is_file():
        if (folder / INDEX).is_file():
            _warn(f"{folder}: holds {SINGLE} and {INDEX}; {SINGLE} is read, as transformers does")
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder}: holds neither {SINGLE} nor {INDEX}; {_what_else(folder)}")
    files = sorted({folder / name for name in _weight_map(folder).values()})
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{folder}: {INDEX} names files that are not there: {', '.join(missing)}")
    return files


def checkpoint_tensors(folder: str | Path) -> dict[str, Stored]:
    """What the weight files of a checkpoint folder hold, by name, from their headers. A tensor that several
    files hold is the one of the file that the index names. ValueError for files and indexes that are missing,
    broken or do not agree."""
    files = weight_files(folder)
    if files == [Path(folder) / SINGLE]:
        return stored_tensors(files)
    return stored_tensors(files, {name: Path(folder) / file for name, file in
                                  _weight_map(Path(folder)).items()})


def stored_weights(folder: str | Path, config: ModelConfig) -> dict[str, Stored]:
    """Where each parameter of Llama(config) is in a checkpoint folder, from the files' headers alone;
    config: read_config()'s. ValueError lists tensors that are missing, surplus or of another shape."""
    with torch.device("meta"):
        wanted = {name: list(parameter.shape) for name, parameter in Llama(config).named_parameters()}
    # Old files carry RoPE's table. transformers computes it from config.json too, and their copy may be
    # rounded, or lack the scaling that config.json asks for: it is no evidence against config.json.
    found = {name: stored for name, stored in checkpoint_tensors(folder).items()
             if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and HEAD in found:
        # The same values twice (read_config), or under the head's name only.
        found.setdefault(EMBEDDING, found.pop(HEAD))
    problems: list[str] = []
    for name, stored in found.items():
        if name not in wanted:
            problems.append(f"surplus {name}")
        elif stored.shape != wanted[name]:
            problems.append(f"{name} is {stored.shape}, should be {wanted[name]}")
        elif stored.dtype not in DTYPE_NAMES:
            problems.append(f"{name} is {stored.dtype}")
    problems += [f"missing {name}" for name in wanted if name not in found]
    if HEAD in wanted and HEAD not in found:
        problems[-1] += " (if the head is the embedding, config.json must say tie_word_embeddings: true)"
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise ValueError(f"{folder}: the weights do not fit config.json:\n  " + "\n  ".join(shown))
    return found


def load_model(folder: str | Path, device: torch.device | str = "cpu",
               divide: Callable[["Llama"], None] | None = None) -> Llama:
    """Build the model that config.json describes and fill it with the folder's weights, as fp32 parameters.

    divide: shard.shard, to be given the model before it has weights; each rank then reads its rows only. They
    are read a piece at a time, so memory stays near what the parameters need. ValueError as stored_weights(),
    and for a tensor that holds NaN or Inf.
    """
    config = read_config(folder)
    stored = stored_weights(folder, config)
    with torch.device("meta"):
        model = Llama(config)
    if divide:
        divide(model)
    model.to_empty(device=device)
    model.source_dtype = DTYPE_NAMES[stored[EMBEDDING].dtype]
    for name, parameter in model.named_parameters():
        fill(parameter, stored[name])
    return model


def save_model(model: Llama, folder: str | Path, dtype: torch.dtype | None = None,
               shard_bytes: int = SHARD_BYTES) -> dict[str, int]:
    """Write config.json and the weights into an existing folder, in Hugging Face's layout; dtype: of the
    file, default what the weights were loaded from; shard_bytes: the most that one file holds. fp32 instead
    of fp16, with a warning, if fp16 would make a weight infinite. Every rank calls, rank 0 writes; there,
    returns the CRC-32 of each weight file."""
    folder, dtype = Path(folder), dtype or model.source_dtype
    shards: list[list[str]] = [[]]
    total = used = 0
    tensors = dict(model.named_parameters())
    if dtype == torch.float16 and (name := first_above(tensors, torch.finfo(dtype).max)):
        _warn(f"{folder}: {name} holds values beyond float16's range; the weights are saved as float32")
        dtype = torch.float32
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used, total = used + size, total + size
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    sums = {file: write_tensors(folder / file, {name: tensors[name] for name in shard}, dtype)
            for file, shard in zip(names, shards)}
    if not is_main():
        return {}
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
    # transformers 5 reads dtype, 4 and much else torch_dtype.
    raw = {**model.config.raw, **dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))}
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    return sums
