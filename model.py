"""A Llama-style decoder over packed documents, from a Hugging Face checkpoint folder.

    model = load_model(resolve_model("HuggingFaceTB/SmolLM2-135M"))     # or a folder
    hidden = model(ids, positions, cu_seqlens)                          # (N, C), before the head

Covers Llama 1 to 3.2, TinyLlama, SmolLM2, Mistral without a sliding window, Qwen2, Qwen2.5 and dense Qwen3.
What a config.json asks for beyond that is refused by name. Two things differ from the usual way: there is no
batch dimension, a micro-batch is one row of documents laid end to end; and the model stops at the last hidden
states, because the loss needs the head for some rows only. Parameters have Hugging Face's names, so loading
needs no map. Training, evaluation and generation all run these modules: whoever changes one changes it
everywhere.

Shapes: N packed tokens, C width, H query heads, G key/value heads, D head size, V vocabulary,
F feed-forward width.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import attention, varlen_attention, varlen_fault
from kernels.layers import linears, rms_norm, rotate, swiglu
from runtime.files import read_json
from runtime.weights import (DTYPE_NAMES, EMBEDDING, HEAD, Stored, checkpoint_tensors, equal, fill, match,
                             warn_once, what_else)

# (layer, q (N, H, D), k (N, G, D), v (N, G, D)) -> (N, H, D). Generation brings its own, with a cache.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

# ---------------------------------------------------------------- modules


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension, computed in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: "ModelConfig", layer: int):
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
        # linears(x, a, b) is [a(x), b(x)], without keeping the output of a norm for the backward pass.
        q, k, v = (y.unflatten(-1, (-1, self.head_dim))                         # (N, H or G, D)
                   for y in linears(x, self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return self.o_proj(self.attend(attend, q, k, v).flatten(1))             # (N, C)

    # Documents change with every batch, so there is nothing to compile once. And compiled code must not read
    # the layer's number: it would be compiled once for each layer, and no longer after the eighth.
    @torch.compiler.disable
    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(self.layer, q, k, v)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): SwiGLU (Shazeer 2020)."""

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linears(x, self.gate_proj, self.up_proj)                     # (N, F) each
        return linears(swiglu(gate, up), self.down_proj)[0]


class Layer(nn.Module):
    def __init__(self, config: "ModelConfig", layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: "ModelConfig"):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """model(ids, positions, cu_seqlens) -> hidden states (N, C), to be multiplied with head_weight (V, C)."""

    def __init__(self, config: "ModelConfig"):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(
            config.hidden_size, config.vocab_size, False)
        self.recompute = False              # whether layers recompute activations: less memory, more time
        self.varlen = False                 # whether attention is varlen_attention()
        self.source_dtype = torch.float32   # of the files that the weights were loaded from
        # Not a buffer: building on the meta device must not lose it, and no state dict should hold it.
        with torch.device("cpu"):
            self.frequencies = rope_frequencies(config)

    @property
    def head_weight(self) -> Tensor:
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def choose_attention(self, dtype: torch.dtype) -> str:
        """Choose varlen_attention() on CUDA in bf16 if it passes a check, else attention(). Returns a warning
        if the check fails, or ""."""
        device = self.head_weight.device
        if device.type != "cuda" or dtype != torch.bfloat16:
            return ""
        config = self.config
        fault = varlen_fault(config.num_attention_heads, config.num_key_value_heads, config.head_dim, device)
        self.varlen = not fault
        return fault and f"varlen_attn is not used: {fault}; the slower plain attention is"

    def attention_over(self, cu_seqlens: Tensor, device: torch.device) -> Attend:
        """The attention of a packed row with these documents, as layers call it."""
        if not self.varlen or len(cu_seqlens) < 2:
            return lambda layer, q, k, v: attention(q, k, v, cu_seqlens)
        longest, on_device = int(cu_seqlens.diff().max()), cu_seqlens.to(device, non_blocking=True)
        return lambda layer, q, k, v: varlen_attention(q, k, v, on_device, longest)

    def forward(self, ids: Tensor, positions: Tensor, cu_seqlens: Tensor | None, noise: Tensor | None = None,
                attend: Attend | None = None) -> Tensor:
        """Hidden states, (N, C). ids, positions: (N,) int64; cu_seqlens: (documents + 1,) int32 on the CPU,
        where documents begin and end in the row; noise: (N, C), added to the embeddings; attend: replaces
        the attention over cu_seqlens."""
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


def rope_frequencies(config: "ModelConfig") -> Tensor:
    """(D / 2,) fp32 angles in radians per position (Su et al. 2021, eq. 15). `linear` is position
    interpolation (Chen et al. 2023); `llama3` slows the low frequencies down and blends towards the high ones
    (Llama 3.1's release)."""
    rope = config.rope
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, config.head_dim, 2, dtype=torch.int64).float()
                                               / config.head_dim)
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        # Full turns within the original context; 0 slows a frequency down, 1 leaves it as it is.
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        blend = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - blend) * frequencies / rope["factor"] + blend * frequencies
    return frequencies


def parameter_count(config: "ModelConfig") -> int:
    """The number of weights of Llama(config); a tied head counts once."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).parameters())


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


# ---------------------------------------------------------------- config.json

# What it means if a field is absent from config.json, where families differ (transformers' config classes).
# null is different: no grouping of heads, a head size of hidden_size / num_attention_heads, no window.
FAMILIES = {
    "llama": dict(),
    "mistral": dict(num_key_value_heads=8, sliding_window=4096),
    "qwen2": dict(num_key_value_heads=32, sliding_window=4096),
    "qwen3": dict(num_key_value_heads=32, head_dim=128, sliding_window=4096),
}
# Fields that change what the model computes, with the only values that are implemented.
ONLY = {
    "hidden_act": ("silu",), "quantization_config": (None,), "attention_dropout": (0,),
    "partial_rotary_factor": (1,), "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,),
    "dual_chunk_attention_config": (None,), "add_cross_attention": (None, False),
    "rope_interleaved": (None, False), "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1), "auto_map": (None,), "transformers_weights": (None,),
}
# What a field must be, in words and as a check. In Python true is a number, and JSON may hold NaN.
COUNT = "a whole number above 0", lambda x: type(x) is int and x > 0
WHOLE = "a whole number, 0 or more", lambda x: type(x) is int and x >= 0
POSITIVE = "a finite number above 0", lambda x: type(x) in (int, float) and 0 < x < math.inf
FLAG = "true or false", lambda x: type(x) is bool
TEXT = "text", lambda x: type(x) is str
TEXTS = "a list of text", lambda x: type(x) is list and all(type(each) is str for each in x)
OBJECT = "an object", lambda x: type(x) is dict


class _Fields:
    """The fields of a JSON object; null means absent. Called with a field's name and what it must be, returns
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
        """ValueError for a field with a value that is not implemented."""
        for name, allowed in only.items():
            value = self.values.get(name, allowed[0])
            # In Python True == 1.
            if not any(value == each and isinstance(value, bool) == isinstance(each, bool)
                       for each in allowed):
                raise ValueError(f"config.json: {self.inside}{name} = {value!r} is not implemented, "
                                 f"only {allowed[0]!r}")


@dataclass
class ModelConfig:
    """The fields of config.json that the model needs; raw: all of it, written back when saving."""
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
        """From config.json's content. ValueError names a field that is missing, of a wrong kind, or asks for
        something that is not implemented."""
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
    """RoPE's type and parameters, from the old fields (rope_theta, rope_scaling with `type` or `rope_type`)
    or the new one (rope_parameters). If there are both, rope_scaling counts, as in transformers."""
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


# ---------------------------------------------------------------- checkpoint folders


def read_config(folder: str | Path) -> ModelConfig:
    """config.json of a checkpoint folder. A head that differs from the embedding stays untied, whatever
    config.json says, as in transformers. ValueError if the file is missing, broken or not implemented."""
    folder = Path(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{file}: no such file; {what_else(folder)}")
    raw = read_json(file)
    try:
        config = ModelConfig.from_dict(raw)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if config.tie_word_embeddings:
        stored = checkpoint_tensors(folder)
        embedding, head = stored.get(EMBEDDING), stored.get(HEAD)
        if embedding and head and not equal(embedding, head):
            warn_once(f"{folder}: config.json says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}: "
                      "the head is trained and saved on its own, with tie_word_embeddings false")
            config = replace(config, tie_word_embeddings=False, raw={**raw, "tie_word_embeddings": False})
    return config


def stored_weights(folder: str | Path, config: ModelConfig) -> dict[str, Stored]:
    """Where each parameter of Llama(config) is in a checkpoint folder, from the files' headers alone;
    config: read_config()'s. ValueError lists tensors that are missing, surplus or of another shape."""
    with torch.device("meta"):
        wanted = {name: list(parameter.shape) for name, parameter in Llama(config).named_parameters()}
    return match(folder, wanted, config.tie_word_embeddings)


def load_model(folder: str | Path, device: torch.device | str = "cpu",
               divide: Callable[["Llama"], None] | None = None) -> Llama:
    """The model that config.json describes, with the folder's weights as fp32 parameters. divide: called with
    the model before it has weights, to divide it among ranks (distributed.shard); each rank then reads its
    rows only. Weights are read a piece at a time, so memory stays near what the parameters need. ValueError
    as stored_weights(), and for a tensor that holds NaN or Inf."""
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

