"""Causal attention within the documents of a packed row, fast on a CPU and on CUDA.

    attention_reference     the definition
    attention               the same on any device, in tiles of plain matrix products backward
    varlen_attention        the same by PyTorch's flash attention, bf16 on CUDA

Shapes: N packed tokens, H query heads, G key/value heads, D head size.
"""
import inspect
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    raise ImportError(f"PyTorch {torch.__version__} is too old: 2.10 or newer is needed, and the tests run "
                      "with the version in requirements.txt") from None


def attention_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal attention within documents, spelled out: the definition that faster paths are tested against.

    q: (N, H, D); k, v: (N, G, D); cu_seqlens: (documents + 1,), where documents begin and end. Returns
    (N, H, D). Makes an N x N matrix for each head.
    """
    n, heads = q.shape[:2]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))    # (N, H, D)
    document = torch.bucketize(torch.arange(n, device=q.device), cu_seqlens[1:], right=True)
    past = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    allowed = past & (document[:, None] == document)                            # (N, N)
    scores = torch.einsum("nhd,mhd->hnm", q, k).float() / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~allowed, -math.inf).softmax(-1).to(v.dtype)
    return torch.einsum("hnm,mhd->nhd", weights, v)


# Queries that are multiplied at once, and the most scores they may have: 16 MB in bf16, about a CPU's cache.
TILE, TILE_SCORES = 128, 2**23
# The lengths of tiles are multiples of this: AMX multiplies so many numbers at once.
ALIGNED = 32


class _Indices(NamedTuple):
    """Where the vectors of a bucket, by (document, head, place), are in (N * heads, D). Documents shorter
    than the bucket's longest are padded with their last vector."""
    source: Tensor          # (B * heads * L,) indices
    real: Tensor | None     # those of them that are not padding; None: all
    padding: Tensor | None

    def gather(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1]).index_select(0, self.source)          # (B * heads * L, D)

    def scatter(self, x: Tensor, out: Tensor) -> None:
        """Write x, (B * heads * L, D), to its places in out, (N, heads, D), without the padding."""
        x, places = x.reshape(-1, x.shape[-1]).to(out.dtype), self.source
        if self.real is not None:
            x, places = x.index_select(0, self.real), places.index_select(0, self.real)
        out.view(-1, out.shape[-1]).index_copy_(0, places, x)


def _padded(length: int) -> int:
    """The length to which a document is padded, one of few (kernels.layers.ROWS says why), at most a quarter
    or ALIGNED tokens more: 5 -> 32, 100 -> 128, 150 -> 160, 257 -> 320."""
    step = max(ALIGNED, 2 ** ((length - 1).bit_length() - 3))
    return -(-length // step) * step


# Every layer asks for the same, forward and backward.
@lru_cache(maxsize=4)
def _length_buckets(lengths: tuple[int, ...], heads: int, key_heads: int, device: torch.device
                    ) -> list[tuple[int, int, _Indices, _Indices]]:
    """Documents of similar length: how many, the longest, the indices of their queries and of their keys."""
    starts, out = torch.tensor([0, *lengths]).cumsum(0), []
    for longest in sorted(set(map(_padded, lengths))):
        similar = [i for i, length in enumerate(lengths) if _padded(length) == longest]
        most = max(1, TILE_SCORES // (heads * min(TILE, longest) * longest))
        for bucket in (similar[i:i + most] for i in range(0, len(similar), most)):
            places = torch.arange(longest)                                      # (L,)
            ends = torch.tensor([lengths[i] for i in bucket])[:, None]          # (B, 1)
            is_real = places < ends                                             # (B, L)
            tokens = starts[bucket][:, None] + torch.minimum(places, ends - 1)  # (B, L)
            indices = []
            for n in (heads, key_heads):
                source = tokens[:, None] * n + torch.arange(n)[:, None]         # (B, n, L)
                real = is_real[:, None].expand_as(source).flatten()
                real_and_padding = (None, None)
                if not real.all():
                    real_and_padding = (x.nonzero().squeeze(1).to(device) for x in (real, ~real))
                indices.append(_Indices(source.flatten().to(device), *real_and_padding))
            out.append((len(bucket), longest, *indices))
    return out


def _bucket_tensors(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Iterator[tuple]:
    """Each bucket's queries (B * G, R, L, D), scaled, keys and values (B * G, L, D), the bounds of its tiles,
    and the indices of its queries and keys."""
    key_heads, size = k.shape[1:]
    for bucket in _length_buckets(lengths, q.shape[1], key_heads, q.device):
        documents, longest, query_indices, key_indices = bucket
        queries = query_indices.gather(q).mul_(size ** -0.5).view(documents * key_heads, -1, longest, size)
        keys, values = (key_indices.gather(x).view(-1, longest, size) for x in (k, v))
        # As few tiles as there can be, of about equal size.
        tile_size = -(-longest // (-(-longest // TILE) * ALIGNED)) * ALIGNED
        tiles = [(i, min(i + tile_size, longest)) for i in range(0, longest, tile_size)]
        yield queries, keys, values, tiles, query_indices, key_indices


def _causal_weights(queries: Tensor, keys: Tensor, start: int) -> Tensor:
    """queries: (B * G, R, T, D), scaled, at places from start; keys: (B * G, start + T, D).
    Returns the softmax of their scores, (B * G, R * T, start + T)."""
    tile, end = queries.shape[2], keys.shape[1]
    scores = torch.bmm(queries.flatten(1, 2), keys.transpose(1, 2))
    scores.view(-1, tile, end)[..., start:].add_(_future(tile, scores.dtype, scores.device))
    return torch.softmax(scores, -1)


@lru_cache(maxsize=TILE)
def _future(tile: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to the scores of a tile's queries with its own keys: -inf where the key is later."""
    return torch.full((tile, tile), -math.inf, dtype=dtype, device=device).triu_(1)


# Attention within documents, documents of similar length together. Forward it is PyTorch's fused kernel. Its
# backward pass is slow on a CPU; ours is plain matrix products, a tile of queries at a time with the keys up
# to its end, and recomputes the weights.
#
# Padding follows a document's end, where no causal query of the document looks, so it needs no mask; what the
# padding itself attends to is thrown away, and its gradient is zero. Shapes: B documents of a bucket, L the
# longest, T queries of a tile, R = H / G query heads for each key head. bench.attention measures it.
#
# torch.compile cannot trace what lengths decide, so these are operators, which it calls as they are.

@torch.library.custom_op("spantune::tiled_attention", mutates_args=())
def _tiled_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    out = _like(q)
    for queries, *keys_and_values, _, indices, _ in _bucket_tensors(q, k, v, _lengths(cu_seqlens)):
        queries, *keys_and_values = (x.unflatten(0, (-1, k.shape[1])) for x in (queries, *keys_and_values))
        if q.device.type == "cuda":
            # There the kernel for fp32 wants as many key heads as query heads.
            keys_and_values = [x.repeat_interleave(queries.shape[2], dim=1) for x in keys_and_values]
        results = scaled_dot_product_attention(queries.flatten(1, 2), *keys_and_values, is_causal=True,
                                               scale=1.0, enable_gqa=True)      # (B, H, L, D)
        indices.scatter(results, out)
    return out


@torch.library.custom_op("spantune::tiled_attention_backward", mutates_args=())
def _tiled_attention_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor
                              ) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (_like(x) for x in (q, k, v))
    for bucket in _bucket_tensors(q, k, v, _lengths(cu_seqlens)):
        queries, keys, values, tiles, query_indices, key_indices = bucket
        if keys.dtype == torch.bfloat16:
            # What all keys of a document add to its scores changes no weight, and may be so large (with a
            # bias in k_proj, say) that in bf16, in which scores are made here, little else would be left.
            keys = keys - keys.mean(1, keepdim=True)
        grads = query_indices.gather(grad_out)
        if query_indices.padding is not None:
            grads.index_fill_(0, query_indices.padding, 0)
        grads = grads.view_as(queries)
        grad_queries, of_keys = torch.empty_like(queries), []
        # The last tile has all keys. What other tiles add to their gradients is summed in fp32.
        for start, end in reversed(tiles):
            tile, grad = queries[:, :, start:end], grads[:, :, start:end].flatten(1, 2)
            weights = _causal_weights(tile, keys[:, :end], start)
            grad_weights = torch.bmm(grad, values[:, :end].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_queries[:, :, start:end] = torch.bmm(grad_scores, keys[:, :end]).view_as(tile)
            products = (torch.bmm(grad_scores.transpose(1, 2), tile.flatten(1, 2)),
                        torch.bmm(weights.transpose(1, 2), grad))
            if of_keys:
                for sums, product in zip(of_keys, products):
                    sums[:, :end] += product
            else:
                of_keys = [product.float() if start else product for product in products]
        query_indices.scatter(grad_queries.mul_(q.shape[-1] ** -0.5), grad_q)
        for sums, out in zip(of_keys, (grad_k, grad_v)):
            key_indices.scatter(sums, out)
    return grad_q, grad_k, grad_v


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _lengths(cu_seqlens: Tensor) -> tuple[int, ...]:
    return tuple(cu_seqlens.diff().tolist())


def _save_inputs(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


# What torch.compile has to know: the shapes of the outputs, and which is the backward pass.
_tiled_attention.register_fake(lambda q, k, v, cu_seqlens: _like(q))
_tiled_attention_backward.register_fake(lambda grad_out, q, k, v, cu_seqlens: (_like(q), _like(k), _like(v)))
_tiled_attention.register_autograd(
    lambda ctx, grad_out: (*_tiled_attention_backward(grad_out, *ctx.saved_tensors), None),
    setup_context=_save_inputs)


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """attention_reference() without its N x N matrices. cu_seqlens on the CPU: lengths decide what is run."""
    if not len(q):
        # No output, but k and v stay in the graph: DDP waits for a gradient of every parameter.
        return q * (k.sum() + v.sum())
    return _tiled_attention(q, k, v, cu_seqlens)


def varlen_keywords(function: Callable[..., Tensor]) -> dict[str, object]:
    """How this release's varlen_attn is told to be causal and, if it knows of them, that k and v may have
    fewer heads than q: PyTorch 2.10 has is_causal, 2.11 window_size, 2.12 enable_gqa, too."""
    known = inspect.signature(function).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    return causal | ({"enable_gqa": True} if "enable_gqa" in known else {})


VARLEN_KEYWORDS = varlen_keywords(varlen_attn)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """attention() by PyTorch's flash attention over packed documents, bf16 on CUDA. cu_seqlens on the device;
    longest: at least the tokens of the longest document."""
    if "enable_gqa" not in VARLEN_KEYWORDS:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))       # (N, H, D)
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **VARLEN_KEYWORDS)


def varlen_fault(heads: int, key_heads: int, size: int, device: torch.device) -> str:
    """Why varlen_attention() cannot be trusted here, tried on a small random case with its gradients; "" if
    it can. heads, key_heads, size: H, G, D."""
    generator = torch.Generator().manual_seed(0)
    cu_seqlens = torch.tensor([0, 5, 6, 150], dtype=torch.int32, device=device)
    inputs = [torch.randn(150, n, size, generator=generator).to(device, torch.bfloat16).requires_grad_()
              for n in (heads, key_heads, key_heads)]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    try:
        got, expected = varlen_attention(*inputs, cu_seqlens, 144), attention_reference(*exact, cu_seqlens)
        grad = torch.randn(got.shape, generator=generator).to(device, torch.bfloat16)
        pairs = [(got, expected), *zip(torch.autograd.grad(got, inputs, grad),
                                       torch.autograd.grad(expected, exact, grad.float()))]
        worst = max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)
    except Exception as error:
        return f"varlen_attn raised {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    # Rounding to bf16 alone makes 0.2 to 0.6 %.
    return "" if worst < 0.02 else f"varlen_attn is {worst:.1%} off the reference"

