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
WORDS = 2**13           # rows of the head's gradient that are added to at once, for the same reason


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
    for chunk in chunks(*hidden.shape[:1], len(head_weight)):
        out[chunk] = nll_reference(hidden[chunk], head_weight, targets[chunk])
    return out


class _WeightedNLL(torch.autograd.Function):
    """sum(coefficients * NLL), with the gradients computed in the forward pass.

    A chunk's logits are needed forward and backward, and are too many to keep. Recomputing them would cost a
    fourth matrix product where three do. The gradient of the logits is coefficient * (softmax - one-hot).
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head_weight: Tensor, targets: Tensor, coefficients: Tensor
                ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(hidden)
        x, weight = hidden.to(dtype), head_weight.to(dtype)
        out = torch.empty(len(targets), dtype=torch.float32, device=x.device)
        grad_hidden = torch.empty_like(x)
        block = max(1, (CACHED_LOGITS if x.device.type == "cpu" else CHUNK_LOGITS) // len(weight))
        grad_weight = torch.zeros_like(head_weight)                             # fp32: summed over chunks
        for chunk in chunks(len(targets), len(weight)):
            logits = x[chunk] @ weight.T                                        # (rows, V)
            parts = (y.split(block) for y in (logits, targets[chunk], coefficients[chunk], out[chunk]))
            for part, target, scale, nll_of_part in zip(*parts):
                target, scale = target[:, None], scale[:, None]
                exp = part.float()
                highest, at_target = exp.amax(1, keepdim=True), exp.gather(1, target)
                total = exp.sub_(highest).exp_().sum(1, keepdim=True)
                nll_of_part.copy_((highest + total.log() - at_target).squeeze(1))
                # The logits are not needed any more: their memory takes their gradient.
                part.copy_(exp.mul_(scale / total).scatter_add_(1, target, -scale))
            torch.mm(logits, weight, out=grad_hidden[chunk])
            for part, grad_of_words in zip(logits.split(WORDS, 1), grad_weight.split(WORDS)):
                grad_of_words += part.T @ x[chunk]
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

