"""The loss over the output head, a chunk of rows at a time: the logits of a micro-batch never exist at once.

    nll_reference       the definition, from all logits
    nll                 the same in chunks, without a gradient
    weighted_nll        sum(coefficients * NLL), with the gradients made while a chunk's logits exist

Shapes: R rows (targets), C width, V vocabulary.
"""
import torch
from torch import Tensor

from kernels.layers import compute_dtype

CHUNK_LOGITS = 2**25    # logits held at once: 64 MB in bf16
CACHED_LOGITS = 2**20   # of these, in fp32 at once on a CPU: 4 MB stay in its cache
HEAD_ROWS = 2**13       # rows of the head's gradient that are added to at once, for the same reason


def nll_reference(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """(R,) NLL of each target in nats, from all logits at once: the definition that the chunked paths are
    tested against."""
    logits = (hidden @ head_weight.T).float()                                   # (R, V)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def chunks(rows: int, vocabulary: int) -> list[slice]:
    """Equal slices of at most CHUNK_LOGITS logits."""
    count = -(-rows * vocabulary // CHUNK_LOGITS)
    size = -(-rows // max(1, count))
    return [slice(i, min(i + size, rows)) for i in range(0, rows, max(1, size))]


@torch.no_grad()
def nll(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """nll_reference() in chunks, without a gradient: hidden (R, C), head_weight (V, C), targets (R,) ->
    (R,) fp32."""
    dtype = compute_dtype(hidden)
    hidden, head_weight = hidden.to(dtype), head_weight.to(dtype)
    out = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    for chunk in chunks(len(hidden), len(head_weight)):
        out[chunk] = nll_reference(hidden[chunk], head_weight, targets[chunk])
    return out


class _WeightedNLL(torch.autograd.Function):
    """sum(coefficients * NLL), with the gradients computed in the forward pass.

    The logits of a chunk are needed in both passes but are too large to keep. Recomputing them would add a
    fourth matrix product to the three, so the gradients are computed right away. The gradient of the logits
    is coefficient * (softmax - one-hot).
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head_weight: Tensor, targets: Tensor, coefficients: Tensor
                ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(hidden)
        x, weight = hidden.to(dtype), head_weight.to(dtype)
        out = torch.empty(len(targets), dtype=torch.float32, device=x.device)
        grad_hidden = torch.empty_like(x)
        block_rows = max(1, (CACHED_LOGITS if x.device.type == "cpu" else CHUNK_LOGITS) // len(weight))
        grad_weight = torch.zeros_like(head_weight)                             # fp32: summed over chunks
        for chunk in chunks(len(targets), len(weight)):
            logits = x[chunk] @ weight.T                                        # (rows, V)
            blocks = (y.split(block_rows) for y in (logits, targets[chunk], coefficients[chunk], out[chunk]))
            for block, target, scale, nll_of_block in zip(*blocks):
                target, scale = target[:, None], scale[:, None]
                logits32 = block.float()
                highest, at_target = logits32.amax(1, keepdim=True), logits32.gather(1, target)
                # In place: from here on the memory of logits32 holds exp.
                exp = logits32.sub_(highest).exp_()
                total = exp.sum(1, keepdim=True)
                nll_of_block.copy_((highest + total.log() - at_target).squeeze(1))
                # The logits are not needed any more: their memory takes their gradient.
                block.copy_(exp.mul_(scale / total).scatter_add_(1, target, -scale))
            torch.mm(logits, weight, out=grad_hidden[chunk])
            for block, grad_of_block in zip(logits.split(HEAD_ROWS, 1), grad_weight.split(HEAD_ROWS)):
                grad_of_block += block.T @ x[chunk]
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_weight)
        ctx.mark_non_differentiable(out)
        return (coefficients * out).sum(), out

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_loss, grad_weight.mul_(grad_loss), None, None


def weighted_nll(hidden: Tensor, head_weight: Tensor, targets: Tensor, coefficients: Tensor
                 ) -> tuple[Tensor, Tensor]:
    """hidden: (R, C) rows with weight; head_weight: (V, C); targets, coefficients: (R,). Returns the loss, a
    scalar with a graph (0 for no rows), and the (R,) NLL in nats without one. One backward pass only."""
    return _WeightedNLL.apply(hidden, head_weight, targets, coefficients)

