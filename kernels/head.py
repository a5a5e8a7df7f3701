"""The loss over the output head, a chunk of rows at a time: the logits of a micro-batch never exist at once.

    nll_reference       the definition, from all logits
    nll                 the same in chunks, without a gradient
    weighted_nll        sum(coefficients * NLL), with the gradients made while a chunk's logits exist

Shapes: R rows (targets), C width, V vocabulary.
"""
import warnings
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from kernels.layers import compute_dtype, multiplies_to_fp32, padded_rows

CHUNK_LOGITS = 2**25    # logits held at once: 64 MB in bf16
CHUNK_ROWS = 64         # all chunks but the last have the same multiple of this, if so many fit
CACHED_LOGITS = 2**19   # of these, in fp32 at once on a CPU: 2 MB stay in its cache
HEAD_ROWS = 2**13       # rows of the head's gradient that are added to at once, for the same reason
# Rows of the logits' gradient that a CPU multiplies with the head at once. With AMX, oneDNN takes half as
# long for each of them as when there are 400 or more.
MULTIPLIED_ROWS = 320

# CUDA's matrix products want thousands of rows, in whole tiles. There a chunk has a multiple of TILE rows, at
# most CUDA_ROWS of them and at most CUDA_LOGITS logits, 1 GB in bf16.
CUDA_ROWS, TILE, CUDA_LOGITS = 2**12, 128, 2**29
# Chunks of fewer rows are not compiled: torch.compile tunes for the number of rows that it sees first, and
# divides the work on few rows in a way that is slow for many.
LEAST_COMPILED = 512


def nll_reference(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """(R,) NLL of each target in nats, from all logits at once: the definition that the chunked paths are
    tested against."""
    logits = (hidden @ head_weight.T).float()                                   # (R, V)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def chunks(rows: int, vocabulary: int, large: bool = False) -> list[slice]:
    """Slices of at most CHUNK_LOGITS logits, all but the last of the same size, which only depends on the
    vocabulary. large: as CUDA wants them, of about equal size, where only the last may not be a multiple of
    TILE."""
    if large:
        most = max(1, min(CUDA_ROWS, CUDA_LOGITS // vocabulary) // TILE) * TILE
        size = -(-rows // max(1, -(-rows // most) * TILE)) * TILE
    else:
        size = max(1, CHUNK_LOGITS // vocabulary)
        size -= size % CHUNK_ROWS if size > CHUNK_ROWS else 0
    return [slice(i, min(i + size, rows)) for i in range(0, rows, max(1, size))]


# ---------------------------------------------------------------- from logits to NLL and gradient


def _log_total(logits: Tensor) -> Tensor:
    """logits.logsumexp(1), (rows, 1), for fp32 logits, spelled so that torch.compile reads them once for the
    maximum and the sum."""
    highest = logits.amax(1, keepdim=True)
    return highest + (logits - highest).exp().sum(1, keepdim=True).log()


def _nll_of_logits(logits: Tensor, at_target: Tensor) -> Tensor:
    """(rows,) NLL. logits: (rows, V); at_target: (rows,) fp32, each target's logit."""
    return _log_total(logits.float()).squeeze(1) - at_target


def _nll_and_gradient(logits: Tensor, at_target: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """_nll_of_logits(); the logits are overwritten with the gradient of sum(scale * NLL). Compiled, it reads
    them twice and writes them once: 6 bytes for each in bf16. Otherwise each operation makes tensors of its
    own, 45 bytes. (at_target is given because a logit elsewhere in the row may be overwritten already.)"""
    exact = logits.float()
    log_total = _log_total(exact)
    probability = (exact - log_total).exp()
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    logits.copy_(torch.where(is_target, probability - 1, probability) * scale[:, None])
    return log_total.squeeze(1) - at_target


def _blocks(logits: Tensor, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of rows: what is made of one in fp32 is small, and stays in a CPU's cache."""
    rows = (CACHED_LOGITS if logits.device.type == "cpu" else CHUNK_LOGITS) // logits.shape[1]
    return zip(*(x.split(max(1, rows)) for x in (logits, *more)))


def _nll_and_gradient_in_blocks(logits: Tensor, targets: Tensor, scales: Tensor, out: Tensor) -> None:
    """_nll_and_gradient() where it is not compiled; writes the NLL to out."""
    for block, target, scale, nll_of_block in _blocks(logits, targets, scales, out):
        target, scale = target[:, None], scale[:, None]
        logits32 = block.float()
        highest, at_target = logits32.amax(1, keepdim=True), logits32.gather(1, target)
        # In place: from here on the memory of logits32 holds exp.
        exp = logits32.sub_(highest).exp_()
        total = exp.sum(1, keepdim=True)
        nll_of_block.copy_((highest + total.log() - at_target).squeeze(1))
        # The logits are not needed any more: their memory takes their gradient.
        block.copy_(exp.mul_(scale / total).scatter_add_(1, target, -scale))


class Compiled:
    """A function as torch.compile makes it, if that works on this machine, which its first call shows.

        result = compiled(*args)        None if it does not work, or if args[0] has too few rows
    """

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.compiled, self.works = function, None, True

    def __call__(self, *args: Tensor) -> Tensor | None:
        if not self.works or len(args[0]) < LEAST_COMPILED:
            return None
        if self.compiled is None:
            try:
                compiled = torch.compile(self.function, fullgraph=True)
                result = compiled(*args)
                self.compiled = compiled
                return result
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # no Triton, no C compiler, or a fault of theirs: of any type
                self.works = False
                warnings.warn(f"the loss is computed without torch.compile, which takes longer: "
                              f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
                              stacklevel=2)
                return None
        return self.compiled(*args)


nll_of_logits, nll_and_gradient = Compiled(_nll_of_logits), Compiled(_nll_and_gradient)


def _at_target(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(1, targets[:, None]).squeeze(1).float()


# ---------------------------------------------------------------- over the chunks


def on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


@cache
def adds_in_fp32(device: torch.device) -> bool:
    """Whether addmm adds a product of bf16 matrices to an fp32 matrix on this device: on CUDA, but not in
    PyTorch before 2.10."""
    sums = torch.zeros(16, 16, device=device)
    try:
        torch.addmm(sums, sums.bfloat16(), sums.bfloat16(), out_dtype=torch.float32, out=sums)
        return True
    except (TypeError, RuntimeError):
        return False


def _add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """sums += a @ b; sums in fp32. On CUDA the product is not rounded to bf16 first."""
    if multiplies_to_fp32(a) and adds_in_fp32(a.device):
        torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)
        return
    for rows_of_a, rows_of_sums in zip(a.split(HEAD_ROWS), sums.split(HEAD_ROWS)):
        rows_of_sums += rows_of_a @ b


def _to_gradient(logits: Tensor, targets: Tensor, scale: Tensor, out: Tensor, compiled: bool) -> None:
    """Overwrites logits with the gradient of sum(scale * NLL), and out, (rows,), with the NLL."""
    fused = None
    if compiled and on_gpu(logits):
        fused = nll_and_gradient(logits, _at_target(logits, targets), targets, scale)
    if fused is None:
        _nll_and_gradient_in_blocks(logits, targets, scale, out)
    else:
        out.copy_(fused)


@torch.no_grad()
def nll(hidden: Tensor, head_weight: Tensor, targets: Tensor, compiled: bool = True) -> Tensor:
    """nll_reference() in chunks, without a gradient: hidden (R, C), head_weight (V, C), targets (R,) ->
    (R,) fp32. compiled: whether torch.compile may fuse what is done to each logit, on CUDA."""
    dtype = compute_dtype(hidden)
    hidden, head_weight = hidden.to(dtype), head_weight.to(dtype)
    out = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for chunk in chunks(len(hidden), len(head_weight), large=on_gpu(hidden)):
        logits, target = hidden[chunk] @ head_weight.T, targets[chunk]
        fused = nll_of_logits(logits, _at_target(logits, target)) if compiled and on_gpu(logits) else None
        if fused is not None:
            out[chunk] = fused
            continue
        for block, wanted, nll_of_block in _blocks(logits, target, out[chunk]):
            nll_of_block.copy_(torch.nn.functional.cross_entropy(block.float(), wanted, reduction="none"))
    return out


class _WeightedNLL(torch.autograd.Function):
    """sum(coefficients * NLL), with the gradients computed in the forward pass.

    The logits of a chunk are needed in both passes but are too large to keep. Recomputing them would add a
    fourth matrix product to the three, so the gradients are computed right away. The gradient of the logits
    is coefficient * (softmax - one-hot).
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head_weight: Tensor, targets: Tensor, coefficients: Tensor,
                compiled: bool) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(hidden)
        x, weight = hidden.to(dtype), head_weight.to(dtype)
        out = torch.empty(len(targets), dtype=torch.float32, device=x.device)
        grad_hidden = torch.empty_like(x)
        grad_weight = torch.zeros_like(head_weight, dtype=torch.float32)        # summed over chunks
        for chunk in chunks(len(targets), len(weight), large=on_gpu(x)):
            logits = x[chunk] @ weight.T                                        # (rows, V)
            _to_gradient(logits, targets[chunk], coefficients[chunk], out[chunk], compiled)
            most = len(logits) if on_gpu(x) else MULTIPLIED_ROWS
            for rows, grad_of_rows in zip(logits.split(most), grad_hidden[chunk].split(most)):
                torch.mm(rows, weight, out=grad_of_rows)
            _add_product(grad_weight, logits.T, x[chunk])
            # Freed before the next chunk's are made.
            del logits
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_weight)
        ctx.mark_non_differentiable(out)
        return (coefficients * out).sum(), out

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight.mul_(grad_loss), None, None, None


def weighted_nll(hidden: Tensor, head_weight: Tensor, targets: Tensor, coefficients: Tensor,
                 compiled: bool = True) -> tuple[Tensor, Tensor]:
    """hidden: (R, C) rows with weight; head_weight: (V, C); targets, coefficients: (R,); compiled: as for
    nll(). Returns the loss, a scalar with a graph (0 for no rows), and the (R,) NLL in nats without one. One
    backward pass only."""
    loss, out = _WeightedNLL.apply(padded_rows(hidden), head_weight, padded_rows(targets),
                                   padded_rows(coefficients), compiled)
    return loss, out[:len(targets)]
