"""Which targets count and how much: span weights, denominators, NEFTune, KL.

The whole of IT, IM, LM and weighted losses is one sum over a step's targets t,

    loss = sum_t coefficient_t * NLL_t,

whose coefficients are known from the step's plan before anything is computed. So micro-batches and ranks just
add up, and nothing is ever a mean of means. The sum itself is kernels.head.weighted_nll.

Shapes: E examples of a step, K kinds of span, N targets of a micro-batch, R of them with weight,
C width, V vocabulary.
"""
import math

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from chat import KINDS
from config import NORMALIZE
from data import Batch, Dataset
from kernels.head import chunks
from kernels.layers import compute_dtype
from runtime.distributed import from_all
from runtime.machine import to_device


def coefficients(counts: np.ndarray, weights: np.ndarray, normalize: str) -> np.ndarray:
    """(E, K) the coefficient of one target's NLL in the step's loss, by its example and kind. counts: (E, K)
    the step's targets; weights: (K,). ValueError for an unknown normalize:

    token    weight / number of targets in the step with non-zero weight
    example  mean over examples of each one's weighted mean, sum(weight * NLL) / sum(weight)
             (the paper's code)
    span     weight / number of targets of this kind in the step: all kinds count the same, whatever their
             length

    For one example with 6 instruction and 2 completion targets under IM, a target of each counts
        token 1/8, 1/8     example 1/8, 1/8     span 1/6, 1/2
    and with a second example of 2 completion targets alone (E = 2)
        token 1/10, 1/10   example 1/16, 1/16; 1/4 in the second   span 1/6, 1/4
    """
    counts = np.asarray(counts, np.float64)
    if normalize == "token":
        denominator = np.full_like(counts, counts[:, weights != 0].sum())
    elif normalize == "example":
        own = counts @ weights                                                  # (E,)
        denominator = np.broadcast_to((own * np.count_nonzero(own))[:, None], counts.shape)
    elif normalize == "span":
        denominator = np.broadcast_to(counts.sum(0), counts.shape)
    else:
        raise ValueError(f"--normalize {normalize}: choose one of {', '.join(NORMALIZE)}")
    return np.divide(np.broadcast_to(weights, counts.shape), denominator, out=np.zeros_like(counts),
                     where=denominator > 0)


def sums_by_kind(values: Tensor, kinds: Tensor) -> Tensor:
    """(K,) float64 sums of values, (R,) fp32, by the kinds of their targets, (R,). The same bits every time,
    on CUDA too."""
    of_kind = kinds == torch.arange(len(KINDS), device=kinds.device)[:, None]   # (K, R)
    return torch.where(of_kind, values.double(), 0.0).sum(1)


# ---------------------------------------------------------------- regularizers


def kl_divergence(hidden: Tensor, head_weight: Tensor, reference_hidden: Tensor, reference_head: Tensor,
                  coefficients: Tensor) -> Tensor:
    """sum(coefficients * KL(p || p_reference)), over the whole vocabulary at each row, in nats, with a
    gradient to hidden and head_weight. hidden, reference_hidden: (R, C); coefficients: (R,). Logits are
    recomputed in the backward pass.

    The paper's code takes log p - log p_reference at the given token instead, whose gradient is that of the
    loss itself.
    """
    def chunk_kl(hidden: Tensor, head_weight: Tensor, reference_hidden: Tensor, scale: Tensor) -> Tensor:
        log_p = (hidden @ head_weight.T).float().log_softmax(-1)                # (rows, V)
        log_q = (reference_hidden @ reference_head.T).float().log_softmax(-1)
        return (scale * (log_p.exp() * (log_p - log_q)).sum(-1)).sum()

    # Cast once. Autocast would cast it again for every chunk, in both passes.
    reference_head = reference_head.to(compute_dtype(hidden))
    # Zero with a graph, for a rank without targets.
    total = hidden.sum() * 0.0
    for chunk in chunks(len(hidden), len(head_weight)):
        total = total + checkpoint(chunk_kl, hidden[chunk], head_weight, reference_hidden[chunk].detach(),
                                   coefficients[chunk], use_reentrant=False, preserve_rng_state=False)
    return total


def _hash(x: Tensor) -> Tensor:
    """Replaces each number of x, int32, by a random-looking one; different ones stay different. With these
    shifts and factors half of the bits change, on average, if one bit of x does (lowbias32: Chris Wellons,
    "Prospecting for Hash Functions", 2018). Products wrap around, as int32 does on any device."""
    for shift, factor in ((16, 0x7feb352d), (15, 0x846ca68b - 2**32)):
        # The mask clears copies of the sign, which a shift of int32 fills in.
        x ^= (x >> shift) & (2**(32 - shift) - 1)
        x *= factor
    x ^= (x >> 16) & 0xffff
    return x


def neftune_noise(batch: Batch, width: int, alpha: float, seed: int, step: int) -> Tensor:
    """(N, width) noise for the embeddings, uniform in +-alpha / sqrt(length * width) with each document's own
    length (arXiv 2310.05914, algorithm 1). Each number is a hash of (seed, step, example, place in the
    document, column), made on the batch's device. Packing, ranks, device and resuming do not change it."""
    device, lengths = batch.ids.device, batch.cu_seqlens.diff()
    scales = alpha / (lengths * width).double().sqrt()                          # (documents,)
    scale = to_device((scales * 2.0**-23).float(), device)[batch.documents]     # (N,)
    examples = to_device(torch.from_numpy(batch.examples), device).int()
    # Two words for each token. One alone would be the same for two tokens of some step sooner or later.
    words = np.random.SeedSequence([seed, step]).generate_state(2).view(np.int32).tolist()
    first, second = (_hash(_hash(examples ^ word)[batch.documents] + batch.positions.int()) for word in words)
    columns = torch.arange(width, dtype=torch.int32, device=device)
    noise = torch.empty(len(scale), width, device=device)
    # A block of rows at a time: on a CPU it stays in the cache, elsewhere its memory stays small.
    block_rows = max(1, (2**15 if device.type == "cpu" else 2**25) // width)
    blocks = (x.split(block_rows) for x in (noise, first[:, None], second[:, None], scale[:, None]))
    for block, word, other_word, block_scale in zip(*blocks):
        # An odd factor maps no two columns to the same number.
        hashed = _hash((word ^ columns).mul_(other_word | 1))
        # The upper 24 bits with the sign, which fp32 holds exactly: -2^23 to 2^23 - 1.
        torch.mul(hashed >> 8, block_scale, out=block)
    return noise


# ---------------------------------------------------------------- what a step's sums say


def check_finite(step: int, totals: dict, grad_norm: float, nll_by_batch: list[tuple[Batch, Tensor]],
                 dataset: Dataset, lr: float) -> None:
    """ValueError, on every rank, if a sum of the step or its gradient norm is not finite; it names the
    records concerned and, after the first step, the likely cause. step: its number, from 1; nll_by_batch:
    this rank's micro-batches with the NLL of their trained targets; lr: --lr. All ranks call."""
    numbers = {name: value for name, value in totals.items() if isinstance(value, float)}
    if all(map(math.isfinite, [*numbers.values(), grad_norm])):
        return
    places: list[str] = []
    for batch, values in nll_by_batch:
        bad = batch.documents[batch.trained][~values.isfinite()].unique().tolist()
        places += [dataset.where(batch.examples[document]) for document in bad]
    places = sorted(sum(from_all(places), []))
    reason = ("Every record's loss is finite, so something else overflowed: lower --lr, --kl-weight and the "
              "weights of spans, or try --dtype fp32.")
    if places:
        more = f" and {len(places) - 8} more" if len(places) > 8 else ""
        reason = f"Its loss is not finite for {', '.join(places[:8])}{more}."
        if step > 1:
            reason += f" The steps before it were finite, so the likely cause is --lr {lr:g}: lower it."
    shown = ", ".join(f"{name} {value}" for name, value in numbers.items())
    raise ValueError(f"step {step}: {shown}, gradient norm {grad_norm}: the run stops before this step "
                     f"changes the weights. {reason}")


def step_record(step: int, epoch: float, totals: dict, counts: np.ndarray, weights: np.ndarray,
                log_untrained: bool, *, lr: float, grad_norm: float, padding: int, seconds: float,
                **more: float | str | None) -> dict[str, float | str | None]:
    """A line of metrics.jsonl. loss is sum(coefficient * NLL), without KL; the NLLs are token means in nats,
    null for kinds that were not computed or have no target. totals: the step's sums by name; counts: (E, K)
    its targets; weights: (K,); padding: positions beside them that the layers computed; more: what else
    the line has."""
    of_kind = counts.sum(0)
    numbers, tokens = dict(totals), int(of_kind.sum())
    nll_sums = numbers.pop("nll")
    record = {"step": step, "epoch": epoch, "loss": numbers.pop("loss"), "lr": lr, "grad_norm": grad_norm}
    for kind in ("completion", "instruction", "system", "template"):
        k = KINDS.index(kind)
        known = of_kind[k] > 0 and (log_untrained or weights[k] != 0)
        record[f"nll_{kind}"] = nll_sums[k] / int(of_kind[k]) if known else None
    return record | numbers | {
        "tokens": tokens, "trained_tokens": int(of_kind[weights != 0].sum()), "padding_tokens": padding,
        "tokens_per_second": tokens / seconds, **more, "seconds": seconds}
