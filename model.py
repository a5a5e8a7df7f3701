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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# (layer, q (N, H, D), k (N, G, D), v (N, G, D)) -> (N, H, D);
# generation brings its own, with a key/value cache
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

# ---------------------------------------------------------------- config.json

# What each family's config.json may leave out, where families differ
# (the values of transformers' config classes).
FAMILIES = {
    "llama": dict(num_key_value_heads=None, head_dim=None, qkv_bias="attention_bias",
                  o_bias="attention_bias"),
    "mistral": dict(num_key_value_heads=8, head_dim=None, qkv_bias=False, o_bias=False),
    "qwen2": dict(num_key_value_heads=32, head_dim=None, qkv_bias=True, o_bias=False),
    "qwen3": dict(num_key_value_heads=32, head_dim=128, qkv_bias="attention_bias", o_bias="attention_bias"),
}
# Fields that change what the model computes and are implemented for these values only.
ONLY = {
    "hidden_act": ("silu",), "quantization_config": (None,), "attention_dropout": (0,),
    "partial_rotary_factor": (1,), "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,),
    "dual_chunk_attention_config": (None,), "add_cross_attention": (None, False),
    "rope_interleaved": (None, False), "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1), "auto_map": (None,),
}


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
    raw: dict = field(repr=False)

    @classmethod
    def from_dict(cls, raw: dict) -> "ModelConfig":
        """config.json's content -> ModelConfig.
        ValueError names a field that asks for what is not implemented."""
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"config.json: model_type {family!r} is not implemented; those that are: "
                             f"{', '.join(FAMILIES)}")
        for name, allowed in ONLY.items():
            if raw.get(name, allowed[0]) not in allowed:
                raise ValueError(f"config.json: {name} = {raw[name]!r} is not implemented, "
                                 f"only {allowed[0]!r}")
        sliding = raw.get("sliding_window") if raw.get("use_sliding_window", family == "mistral") else None
        if (family in ("qwen2", "qwen3")
                and raw.get("max_window_layers", 28) >= raw.get("num_hidden_layers", 0)):
            sliding = None  # the window starts at a layer that there is not
        layer_types = set(raw.get("layer_types") or ["full_attention"]) - {"full_attention"}
        if (sliding and sliding < raw.get("max_position_embeddings", math.inf)) or layer_types:
            raise ValueError(f"config.json: sliding_window = {sliding}, layer_types {sorted(layer_types)}: a "
                             "sliding window is not implemented; if no document is longer than the window, "
                             "set sliding_window to null")
        missing = [name for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                     "num_attention_heads") if name not in raw]
        if missing:
            raise ValueError(f"config.json: {', '.join(missing)} missing")
        default = FAMILIES[family]
        heads = raw["num_attention_heads"]
        kv_heads = raw.get("num_key_value_heads", default["num_key_value_heads"]) or heads
        head_dim = raw.get("head_dim", default["head_dim"]) or raw["hidden_size"] // heads
        if heads % kv_heads or head_dim % 2:
            raise ValueError(f"config.json: num_attention_heads {heads} must be a multiple of "
                             f"num_key_value_heads {kv_heads}, and head_dim {head_dim} even")

        def bias(name: str) -> bool:
            return bool(raw.get(default[name], False) if isinstance(default[name], str) else default[name])

        return cls(
            raw["vocab_size"], raw["hidden_size"], raw["intermediate_size"], raw["num_hidden_layers"], heads,
            kv_heads, head_dim, float(raw.get("rms_norm_eps", 1e-6)),
            bool(raw.get("tie_word_embeddings", False)), bias("qkv_bias"), bias("o_bias"),
            bool(raw.get("mlp_bias", False)) and family == "llama", family == "qwen3", _rope(raw), raw)


def _rope(raw: dict) -> dict:
    """The old fields (rope_theta, rope_scaling with `type` or `rope_type`)
    and the new one (rope_parameters) -> one."""
    rope = {"rope_theta": raw.get("rope_theta", 10000.0), **(raw.get("rope_scaling") or {}),
            **(raw.get("rope_parameters") or {})}
    rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
    needs = {"default": (), "linear": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if rope["rope_type"] not in needs:
        raise ValueError(f"config.json: RoPE type {rope['rope_type']!r} is not implemented; those that are: "
                         f"{', '.join(needs)}")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"config.json: partial_rotary_factor = {rope['partial_rotary_factor']} "
                         "is not implemented")
    for name in needs[rope["rope_type"]]:
        if name not in rope:
            raise ValueError(f"config.json: RoPE type {rope['rope_type']!r} needs {name}")
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


# Documents up to this many tokens are attended to in batches of like length: forward and backward of 28
# documents of 128 tokens (9 heads of 64, bf16, one core of an EPYC) take 47 ms so, 108 ms through the fused
# kernel one by one; 10 of 384 tokens 89 against 142 ms; 8 of 512 tokens 200 against 184 ms.
SHORT = 384


@torch.compiler.disable  # the number of documents changes with every batch: nothing here to compile once
def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """attention_reference() without its N x N matrices: long documents one at a time through PyTorch's fused
    kernel; on the CPU, where that kernel is slow on short ones, those in batches."""
    bounds = cu_seqlens.tolist()
    spans = list(zip(bounds, bounds[1:]))
    outs, i = [], 0
    while i < len(spans):
        end = i
        while q.device.type == "cpu" and end < len(spans) and spans[end][1] - spans[end][0] <= SHORT:
            end += 1
        if end > i:  # a run of short documents
            run = slice(spans[i][0], spans[end - 1][1])
            outs.append(_ShortAttention.apply(q[run], k[run], v[run], [b - a for a, b in spans[i:end]]))
            i = end
        else:
            documents = (x[slice(*spans[i])].transpose(0, 1).unsqueeze(0)       # (1, heads, length, D)
                         for x in (q, k, v))
            out = F.scaled_dot_product_attention(*documents, is_causal=True, enable_gqa=True)
            outs.append(out.squeeze(0).transpose(0, 1))
            i += 1
    if not outs:  # no output, but k and v must stay in the graph: DDP waits for every parameter's gradient
        return q * (k.sum() + v.sum())
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _like_lengths(lengths: list[int]) -> list[list[int]]:
    """Group documents so that padding each group to its longest makes no document more than a quarter longer,
    or 16 tokens. [100, 20, 90, 28] -> [[1, 3], [2, 0]]"""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups and lengths[i] <= max(1.25 * lengths[groups[-1][0]], lengths[groups[-1][0]] + 16):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


class _ShortAttention(torch.autograd.Function):
    """Attention over short documents, padded to groups of like length and multiplied out as matrices.

    Padding goes behind a document's end, where no causal query of the document looks, so it needs no mask;
    what the padding itself sees is thrown away, and its gradient is zero. The weights, the square of a
    document's length, are made again in the backward pass. Shapes: B documents of a group, L its longest,
    R = H / G query heads a key head.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        out = torch.empty_like(q)
        starts = torch.tensor([0, *lengths]).cumsum(0)
        ctx.groups = []
        for group in _like_lengths(lengths):
            sizes = torch.tensor([lengths[i] for i in group])[:, None]          # (B, 1)
            places = torch.arange(int(sizes.max()))                             # (L,)
            real = places < sizes                                               # (B, L)
            rows = torch.where(real, starts[group][:, None] + places, 0)        # (B, L), where in q, k, v
            queries, keys, values = _stack(q, rows, k.shape[1]), _stack(k, rows), _stack(v, rows)
            _unstack(torch.bmm(_causal_weights(queries, keys), values), rows, real, out)
            ctx.groups.append((rows, real))
        ctx.save_for_backward(q, k, v)
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (q, k, v)]
        for rows, real in ctx.groups:
            queries, keys, values = _stack(q, rows, k.shape[1]), _stack(k, rows), _stack(v, rows)
            weights = _causal_weights(queries, keys)                            # (B * G, R * L, L)
            grad = _stack(grad_out, rows, k.shape[1], real)                     # padding: 0
            grad_weights = torch.bmm(grad, values.transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_scores.mul_(q.shape[-1] ** -0.5)
            for x, into in zip((torch.bmm(grad_scores, keys), torch.bmm(grad_scores.transpose(1, 2), queries),
                                torch.bmm(weights.transpose(1, 2), grad)), grads):
                _unstack(x, rows, real, into)
        return *grads, None


def _causal_weights(queries: Tensor, keys: Tensor) -> Tensor:
    """queries: (B * G, R * L, D); keys: (B * G, L, D).
    Returns the softmax of their scores, (B * G, R * L, L)."""
    length = keys.shape[1]
    scores = torch.bmm(queries, keys.transpose(1, 2)).view(-1, length, length)
    future = torch.full((length, length), -math.inf, dtype=scores.dtype).triu(1)
    return torch.softmax(scores.mul_(keys.shape[-1] ** -0.5).add_(future), -1).view(len(keys), -1, length)


def _stack(x: Tensor, rows: Tensor, key_heads: int | None = None, real: Tensor | None = None) -> Tensor:
    """x: (n, heads, D) flat -> (B * G, R * L, D), the query heads of one key head below each other."""
    x = x[rows]                                                                 # (B, L, heads, D)
    if real is not None:
        x = x * real[..., None, None]
    b, length, heads, size = x.shape
    key_heads = key_heads or heads
    x = x.view(b, length, key_heads, heads // key_heads, size).permute(0, 2, 3, 1, 4)
    return x.reshape(b * key_heads, heads // key_heads * length, size)


def _unstack(x: Tensor, rows: Tensor, real: Tensor, into: Tensor) -> None:
    """Undo _stack(), writing the real tokens into the flat (n, heads, D) tensor `into`."""
    b, length = rows.shape
    x = x.view(b, into.shape[1], length, into.shape[2]).transpose(1, 2)         # (B, L, heads, D)
    into[rows[real]] = x[real]


# ---------------------------------------------------------------- modules


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products of x are computed in: autocast's choice, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


# The three elementwise steps of a layer are autograd functions of their own. Left to autograd each would
# keep every intermediate for the backward pass, much of it in fp32. They keep their inputs instead.


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True,               # (..., 1), no x * x made
                                         dtype=torch.float32)
        scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(compute_dtype(x))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        grad = grad * weight
        along = torch.linalg.vecdot(grad, normed).div_(x.shape[-1]).unsqueeze(-1)  # what rms(x) takes away
        return grad.addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype), grad_weight, None


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
        out = torch.empty_like(x)
        (a, b), (into_a, into_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
        into_a.copy_((a * cos).addcmul_(b, sin, value=-1))      # cos and sin are fp32, so the arithmetic is
        into_b.copy_((b * cos).addcmul_(a, sin))
        return out

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
        weight = weight.to(gate.dtype)
        ctx.save_for_backward(gate, up, weight)
        ctx.has_bias = bias is not None
        return F.linear(F.silu(gate).mul_(up), weight, bias.to(gate.dtype) if ctx.has_bias else None)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        activated = F.silu(gate)
        grad_weight = grad.T @ (activated * up)
        grad_product = grad @ weight
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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim))                # (N, H or G, D)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return self.o_proj(attend(self.layer, q, k, v).flatten(1))              # (N, C)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return _SwiGLUDown.apply(self.gate_proj(x), self.up_proj(x), self.down_proj.weight,
                                 self.down_proj.bias)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


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
        self.source_dtype = torch.float32   # what the weights were loaded from
        # A plain attribute: building on the meta device must not lose it, and no state dict should hold it.
        with torch.device("cpu"):
            self.frequencies = rope_frequencies(config)

    @property
    def head_weight(self) -> Tensor:
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, ids: Tensor, positions: Tensor, cu_seqlens: Tensor | None, noise: Tensor | None = None,
                attend: Attend | None = None) -> Tensor:
        """ids, positions: (N,) int64; cu_seqlens: (documents + 1,) int32, where documents begin and end in
        the row; noise: (N, C), added to the embeddings; attend: replaces the attention over cu_seqlens.
        Returns (N, C)."""
        attend = attend or (lambda layer, q, k, v: attention(q, k, v, cu_seqlens))
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
            nn.init.normal_(parameter, 0.0, model.config.raw.get("initializer_range", 0.02), generator)


# ---------------------------------------------------------------- checkpoint folders

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD_BYTES = 5 * 10**9


def resolve_model(model: str | Path) -> Path:
    """A checkpoint folder as it is; a hub id, `owner/name` or `owner/name@revision`, is downloaded (once)
    first. ValueError if it is neither."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(model)):
        raise ValueError(f"--model {model}: no such folder, nor a hub id like "
                         "owner/name or owner/name@revision")
    from huggingface_hub import snapshot_download
    repository, _, revision = str(model).partition("@")
    try:
        return Path(snapshot_download(
            repository, revision=revision or None, ignore_patterns=["*/*"],
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]))
    except Exception as error:  # the hub's many errors all mean: it could not be had
        raise ValueError(f"--model {model}: no such folder, and the hub did not give it: {error}") from None


def read_config(folder: str | Path) -> ModelConfig:
    """config.json of a checkpoint folder; ValueError if it is missing, broken or not implemented."""
    file = Path(folder) / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; a checkpoint folder holds config.json, tokenizer.json and "
                         "*.safetensors") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    try:
        return ModelConfig.from_dict(raw)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def check_vocabulary(config: ModelConfig, vocab_size: int) -> None:
    """ValueError unless every id of the tokenizer has a row in the embedding; rows to spare are fine."""
    if vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer has ids up to {vocab_size - 1}, the embedding only "
                         f"{config.vocab_size} rows; they do not belong together, or tokens were added "
                         "without resizing the model")


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, from its index where there is one;
    ValueError if any is missing."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(f"{folder}: holds neither model.safetensors nor model.safetensors.index.json")
    files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{folder}: {index.name} names files that are not there: {', '.join(missing)}")
    return files


def load_model(folder: str | Path, device: torch.device | str = "cpu") -> Llama:
    """Build the model that config.json describes and fill it with the folder's weights, as fp32 parameters.

    Tensors are read one by one from the mapped files, so memory stays near one copy. ValueError lists tensors
    that are missing, surplus or of another shape.
    """
    config = read_config(folder)
    with torch.device("meta"):
        model = Llama(config)
    wanted = dict(model.named_parameters())
    problems: list[str] = []
    for file in weight_files(folder):
        try:
            tensors = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
        with tensors:
            for name in tensors.keys():
                if name.endswith("rotary_emb.inv_freq") or (
                        name == "lm_head.weight" and config.tie_word_embeddings):
                    continue  # old files carry RoPE's table, some a second copy of a tied head
                if name not in wanted:
                    problems.append(f"surplus {name}")
                    continue
                parameter = wanted.pop(name)
                tensor = tensors.get_tensor(name)
                if tensor.shape != parameter.shape:
                    problems.append(f"{name} is {list(tensor.shape)}, should be {list(parameter.shape)}")
                elif tensor.dtype not in DTYPES.values():
                    problems.append(f"{name} is {tensor.dtype}")
                elif not problems:
                    owner, _, leaf = name.rpartition(".")
                    # copy: a mapped fp32 tensor would change with the file
                    value = tensor.to(device, torch.float32, copy=True)
                    setattr(model.get_submodule(owner), leaf, nn.Parameter(value))
                    if name == "model.embed_tokens.weight":
                        model.source_dtype = tensor.dtype
    problems += [f"missing {name}" for name in wanted]
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise ValueError(f"{folder}: the weights do not fit config.json:\n  " + "\n  ".join(shown))
    return model


def save_model(model: Llama, folder: str | Path, dtype: torch.dtype | None = None,
               shard_bytes: int = SHARD_BYTES) -> None:
    """Write config.json and the weights into an existing folder, in Hugging Face's layout; dtype: of the
    file, default what the weights were loaded from; shard_bytes: the most that one file holds."""
    folder, dtype = Path(folder), dtype or model.source_dtype
    shards: list[list[str]] = [[]]
    total = used = 0
    tensors = dict(model.named_parameters())
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used, total = used + size, total + size
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(names, shards):
        save_file({name: tensors[name].detach().to("cpu", dtype).contiguous() for name in shard},
                  folder / file, {"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes files that nobody else can read
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
    raw = {**model.config.raw, "dtype": str(dtype).removeprefix("torch.")}
    raw.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
