"""The steps of a decoder layer, each next to its plain definition.

    rms_norm(x, weight, eps)            x / rms(x) * weight
    rotate(x, cos, sin)                 RoPE
    swiglu(gate, up)                    silu(gate) * up
    linears(x, q_proj, k_proj, ...)     [q_proj(x), k_proj(x), ...]

Left to autograd, each step would keep all its intermediates for the backward pass, much of it in fp32. The
fast paths keep what they were given and recompute the rest. The output of rms_norm and swiglu carries a
recipe, so that linears() need not keep it either. Whatever else a linear is given, from another norm or
activation, has no recipe and is kept as usual: nothing here has to know which modules a model is made of.

torch.compile gets the definitions: it fuses them by itself. Only linear layers keep a backward pass of their
own on CUDA, whose products give a weight's gradient in fp32.

Shapes: N packed tokens, C width, D head size, F feed-forward width.
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of x are computed: autocast's choice, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def multiplies_to_fp32(x: Tensor) -> bool:
    """Whether torch.mm can return products of x in fp32, as they were summed: of bf16 matrices on CUDA."""
    return x.dtype == torch.bfloat16 and x.device.type == "cuda" and torch.version.hip is None


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in dtype; in fp32 it is not rounded to bf16 first, if that can be avoided."""
    if dtype == torch.float32 and multiplies_to_fp32(a):
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


# On a CPU, products have few shapes. oneDNN compiles one for each and keeps it. If shapes are always new,
# these objects end up between the large blocks of memory, which fit less and less from step to step.
ROWS, LEAST_PADDED = 128, 1024


def padding(rows: int, device: torch.device) -> int:
    """How many rows padded_rows() adds to so many: on a CPU up to a multiple of ROWS; none if there are few,
    and on CUDA, where they would only take time."""
    return -rows % ROWS if device.type == "cpu" and rows >= LEAST_PADDED else 0


def padded_rows(x: Tensor) -> Tensor:
    """x, (N, ...), followed by padding() rows of zeros."""
    more = padding(len(x), x.device)
    return nn.functional.pad(x, (*[0, 0] * (x.dim() - 1), 0, more)) if more else x


class Recipe(NamedTuple):
    """How to recompute an activation: function(*inputs); valid while the activation's version is unchanged,
    that is, while nobody has modified it in place."""
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    version: int


def _with_recipe(out: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    out.recipe = Recipe(function, inputs, out._version)
    return out


# ---------------------------------------------------------------- norm


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in fp32, in the dtype that products of x have."""
    exact = x.float()
    scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return (exact * scale * weight).to(compute_dtype(x))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm_reference(), keeping x and 1 / rms(x) for the backward pass. x: (..., C); weight: (C,)."""
    if torch.compiler.is_compiling():
        return rms_norm_reference(x, weight, eps)
    if not torch.is_grad_enabled():
        return _normed(x, _inverse_rms(x, eps), weight)
    out, scale = _RMSNorm.apply(x, weight, eps)
    return _with_recipe(out, _normed, x, scale, weight)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    # The norm of a vector needs no tensor of squares.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _normed(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """x: (..., C); scale: (..., 1) fp32, 1 / rms(x)."""
    return (x * scale).mul_(weight).to(compute_dtype(x))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        scale = _inverse_rms(x, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.mark_non_differentiable(scale)
        # scale has no gradient; do not allocate zeros for it.
        ctx.set_materialize_grads(False)
        return _normed(x, scale, weight), scale

    @staticmethod
    def backward(ctx, grad: Tensor, _: None) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, grad = x * scale, grad.float()
        product = grad * normed
        # A gradient along x only rescales x, and the norm undoes that: remove it.
        along = (product @ weight.float()).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = (grad * weight).addcmul_(normed, along, value=-1).mul_(scale)
        return grad_x.to(x.dtype), product.flatten(0, -2).sum(0), None


# ---------------------------------------------------------------- position


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x (N, heads, D) by the angles of its positions, cos and sin (N, 1, D / 2), computed in fp32.
    Dimension i pairs with i + D / 2 (Su et al. 2021, as Hugging Face's checkpoints have it)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """rotate_reference(), keeping only cos and sin for the backward pass, which turns back."""
    if torch.compiler.is_compiling():
        return rotate_reference(x, cos, sin)
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _turned(x, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    exact = x.float()
    out = exact * torch.cat([cos, cos], -1)
    (a, b), (out_a, out_b) = exact.chunk(2, dim=-1), out.chunk(2, dim=-1)
    out_a.addcmul_(b, sin, value=-1)
    out_b.addcmul_(a, sin)
    return out.to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


# ---------------------------------------------------------------- activation


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020); gate, up: (N, F)."""
    return nn.functional.silu(gate) * up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """swiglu_reference(), keeping only gate and up for the backward pass."""
    if torch.compiler.is_compiling():
        return swiglu_reference(gate, up)
    if not torch.is_grad_enabled():
        return _gated(gate, up)
    return _with_recipe(_SwiGLU.apply(gate, up), _gated, gate, up)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), nn.functional.silu(gate).mul_(grad)


# ---------------------------------------------------------------- linear layers


def linears_reference(x: Tensor, *modules: nn.Module) -> list[Tensor]:
    """What each of the modules makes of x."""
    return [module(x) for module in modules]


def linears(x: Tensor, *modules: nn.Module) -> list[Tensor]:
    """linears_reference(): x (N, C) -> (N, width of the module) each. Instead of an x that has a recipe, the
    recipe's inputs are kept, and x's gradient adds up over the modules in one tensor. Steps aside for
    anything but a plain nn.Linear, such as an adapter, or one with hooks or another forward()."""
    if not all(map(_is_plain, modules)):
        return linears_reference(x, *modules)
    if torch.compiler.is_compiling():
        cast = x.to(compute_dtype(x))
        if not multiplies_to_fp32(cast):
            return linears_reference(x, *modules)
        # One wide product instead of several: a GPU is better used, and the host has less to start.
        out = _ProductForCompile.apply(cast, torch.cat([module.weight for module in modules]))
        outputs = out.split([len(module.weight) for module in modules], -1)
        return [y if module.bias is None else y + module.bias.to(y.dtype)
                for y, module in zip(outputs, modules)]
    parameters = [p for module in modules for p in (module.weight, module.bias)]
    if not torch.is_grad_enabled():
        dtype = compute_dtype(x)
        return [_linear(x.to(dtype), w, b) for w, b in zip(parameters[::2], parameters[1::2])]
    recipe = getattr(x, "recipe", None)
    if recipe is None or recipe.version != x._version:
        recipe = Recipe(lambda x: x, (x,), 0)
    return list(_Linears.apply(x, recipe.function, len(recipe.inputs), *recipe.inputs, *parameters))


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Linear and "forward" not in vars(module) and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        or module._backward_pre_hooks)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In x's dtype."""
    return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class _Linears(torch.autograd.Function):
    """x is kept as function(*inputs); parameters: weight and bias of each module."""

    @staticmethod
    def forward(ctx, x: Tensor, function: Callable[..., Tensor], count: int, *tensors: Tensor | None
                ) -> tuple[Tensor, ...]:
        inputs, parameters = tensors[:count], tensors[count:]
        x = x.to(compute_dtype(x))
        weights = [weight.to(x.dtype) for weight in parameters[::2]]
        ctx.function, ctx.count, ctx.has_bias = function, count, [b is not None for b in parameters[1::2]]
        ctx.dtypes = [weight.dtype for weight in parameters[::2]]
        ctx.save_for_backward(*inputs, *weights)
        return tuple(_linear(x, weight, bias) for weight, bias in zip(weights, parameters[1::2]))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Read saved_tensors once: under --recompute, reading it runs the layer again.
        saved = ctx.saved_tensors
        inputs, weights = saved[:ctx.count], saved[ctx.count:]
        x = ctx.function(*inputs).to(weights[0].dtype)
        grad_x = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:]):
            grad_x.addmm_(grad, weight)
        grad_parameters = []
        for grad, dtype, has_bias in zip(grads, ctx.dtypes, ctx.has_bias):
            grad_parameters += [product(grad.T, x, dtype), grad.sum(0) if has_bias else None]
        return grad_x, None, None, *[None] * ctx.count, *grad_parameters


class _ProductForCompile(torch.autograd.Function):
    """x @ weight.T, in x's dtype. torch.compile decides what is kept for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        ctx.dtype = weight.dtype
        return x @ cast.T

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, product(grad.T, x, ctx.dtype)
