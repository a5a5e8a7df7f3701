"""A Llama-style decoder over packed documents, from a Hugging Face checkpoint folder.

    model = load_model(resolve_model("HuggingFaceTB/SmolLM2-135M"))     # or a folder
    hidden = model(ids, positions, cu_seqlens)                          # (N, C), before the head

Covers Llama 1 to 3.2, TinyLlama, SmolLM2, Mistral without a sliding window, Qwen2, Qwen2.5 and dense Qwen3.
runtime/model_config.py refuses by name what a config.json asks for beyond that. Two things differ from the
usual way: there is no batch dimension, a micro-batch is one row of documents laid end to end; and the model
stops at the last hidden states, because the loss needs the head for some rows only. Parameters have Hugging
Face's names, so loading needs no map. Training, evaluation and generation all run these modules: whoever
changes one changes it everywhere.

Shapes: N packed tokens, C width, H query heads, G key/value heads, D head size, V vocabulary,
F feed-forward width.
"""
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import attention, varlen_attention, varlen_fault
from kernels.layers import linears, padded_rows, rms_norm, rotate, swiglu
from runtime.machine import to_device
from runtime.model_config import ModelConfig, read_config
from runtime.weights import DTYPE_BY_NAME, EMBEDDING, Stored, fill, match

# What a layer attends with: q (N, H, D), k (N, G, D), v (N, G, D) -> (N, H, D).
AttendInLayer = Callable[[Tensor, Tensor, Tensor], Tensor]
# Generation brings its own, with a cache: (number of the layer, q, k, v) -> (N, H, D).
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]

# Shorter rows are not compiled. PyTorch would compile sizes 0 and 1 separately, and tune for the first row.
LEAST_COMPILED = 16

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
    """Causal self-attention within documents. x: (N, C); cos, sin: (N, 1, D / 2) -> (N, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, config.o_bias)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: AttendInLayer) -> Tensor:
        # linears(x, a, b) is [a(x), b(x)], without keeping the output of a norm for the backward pass.
        q, k, v = (y.unflatten(-1, (-1, self.head_dim))                         # (N, H or G, D)
                   for y in linears(x, self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return linears(attend(q, k, v).flatten(1), self.o_proj)[0]              # (N, C)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), SwiGLU (Shazeer 2020). x: (N, C) -> (N, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linears(x, self.gate_proj, self.up_proj)                     # (N, F) each
        # linears() even for one module, so that swiglu's output is not kept for the backward pass.
        return linears(swiglu(gate, up), self.down_proj)[0]


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). x: (N, C); cos, sin: (N, 1, D / 2) -> (N, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: AttendInLayer,
                compute: Callable[..., Tensor]) -> Tensor:
        """compute: Layer.compute, or what was compiled from it. FSDP's hooks run around this call: they are
        not compiled."""
        return compute(self, x, cos, sin, attend)

    # Compiled once for all layers: nothing in it, nor in what it calls, may differ from layer to layer.
    def compute(self, x: Tensor, cos: Tensor, sin: Tensor, attend: AttendInLayer) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and last norm under the names of Hugging Face's files; Llama.forward() runs them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """model(ids, positions, cu_seqlens) -> hidden states (N, C), to be multiplied with head_weight (V, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(
            config.hidden_size, config.vocab_size, False)
        self.recompute = False              # whether layers recompute activations: less memory, more time
        self.varlen = False                 # whether attention is varlen_attention()
        self.attention = "tiled products"   # what a run says of that
        self.compiled: Callable[..., Tensor] | None = None  # Layer.compute as compile_layers() compiled it
        self.source_dtype = torch.float32   # of the files that the weights were loaded from
        # Not a buffer: building on the meta device must not lose it, and no state dict should hold it.
        with torch.device("cpu"):
            self.frequencies = rope_frequencies(config)

    @property
    def head_weight(self) -> Tensor:
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def choose_attention(self, dtype: torch.dtype) -> None:
        """Choose varlen_attention() on CUDA in bf16 if it passes a check, else attention(), and say in
        self.attention which and why. dtype: to compute in."""
        device, config = self.head_weight.device, self.config
        fault = "varlen_attn needs CUDA and bf16"
        if device.type == "cuda" and dtype == torch.bfloat16:
            fault = varlen_fault(config.num_attention_heads, config.num_key_value_heads, config.head_dim,
                                 device)
        self.varlen = not fault
        self.attention = f"tiled products: {fault}" if fault else "varlen_attn (flash)"

    def compile_layers(self) -> None:
        """Compile one graph for all layers and for rows of any length and any documents, and a second one for
        passes without gradients. Generation does not use them."""
        # Otherwise sizes that happen to be equal in the first row are assumed to be equal in all rows.
        torch.fx.experimental._config.use_duck_shape = False
        # Otherwise a layer of more than 1 MB is cut into several graphs under DDP, between which more has to
        # be kept. DDP sums a layer's gradients during the next layer's backward pass all the same.
        torch._dynamo.config.optimize_ddp = False
        # On a CPU it takes less time to recompute the outputs of norms and SwiGLU, and the copies of weights
        # in bf16, than to keep them.
        if self.head_weight.device.type == "cpu":
            torch._functorch.config.ban_recompute_materialized_backward = False
        self.compiled = torch.compile(Layer.compute, fullgraph=True, dynamic=True)

    def attention_over(self, cu_seqlens: Tensor, device: torch.device) -> AttendInLayer:
        """The attention of a packed row with these documents, the same for every layer."""
        if not self.varlen or len(cu_seqlens) < 2:
            return lambda q, k, v: attention(q, k, v, cu_seqlens)
        longest, on_device = int(cu_seqlens.diff().max()), to_device(cu_seqlens, device)
        return lambda q, k, v: varlen_attention(q, k, v, on_device, longest)

    def forward(self, ids: Tensor, positions: Tensor, cu_seqlens: Tensor | None, noise: Tensor | None = None,
                attend: Attend | None = None) -> Tensor:
        """Hidden states, (N, C). ids, positions: (N,) int64; cu_seqlens: (documents + 1,) int32 on the CPU,
        where documents begin and end in the row; noise: (N, C), added to the embeddings; attend: replaces
        the attention over cu_seqlens."""
        compute, over_row, tokens = Layer.compute, None, len(ids)
        if attend is None:
            ids, positions = padded_rows(ids), padded_rows(positions)
            noise = None if noise is None else padded_rows(noise)
            if len(ids) > tokens:
                # One more document, of which nothing is returned.
                cu_seqlens = nn.functional.pad(cu_seqlens, (0, 1), value=len(ids))
            over_row = self.attention_over(cu_seqlens, ids.device)
            if self.compiled and len(ids) >= LEAST_COMPILED:
                compute = self.compiled
        if self.frequencies.device != ids.device:
            self.frequencies = self.frequencies.to(ids.device)
        angles = positions[:, None, None].float() * self.frequencies            # (N, 1, D / 2)
        cos, sin = angles.cos(), angles.sin()
        x = self.model.embed_tokens(ids)                                        # (N, C)
        if noise is not None:
            x = x + noise
        for number, layer in enumerate(self.model.layers):
            arguments = x, cos, sin, over_row or partial(attend, number), compute
            if self.recompute and torch.is_grad_enabled():
                # Nothing in a layer is random, so there is no state of generators to store and set.
                x = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(*arguments)
        return self.model.norm(x[:tokens])


def rope_frequencies(config: ModelConfig) -> Tensor:
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


def parameter_count(config: ModelConfig) -> int:
    """The number of weights of Llama(config); a tied head counts once."""
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).parameters())


def init_weights(model: Llama, seed: int) -> None:
    """Fill a new model for training from scratch: normal with config.json's initializer_range (0.02),
    norms 1, biases 0."""
    generator = torch.Generator(model.head_weight.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, 0.0, model.config.initializer_range, generator)


# ---------------------------------------------------------------- checkpoint folders


def stored_weights(folder: str | Path, config: ModelConfig) -> dict[str, Stored]:
    """Where each parameter of Llama(config) is in a checkpoint folder, from the files' headers alone;
    config: read_config()'s. ValueError lists tensors that are missing, surplus or of another shape."""
    with torch.device("meta"):
        wanted = {name: list(parameter.shape) for name, parameter in Llama(config).named_parameters()}
    return match(folder, wanted, config.tie_word_embeddings)


def load_model(folder: str | Path, device: torch.device | str = "cpu",
               divide: Callable[[Llama], None] | None = None) -> Llama:
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
    model.source_dtype = DTYPE_BY_NAME[stored[EMBEDDING].dtype]
    for name, parameter in model.named_parameters():
        fill(parameter, stored[name])
    return model

