"""Weights, denominators and regularizers against hand-made numbers and plain PyTorch."""
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chat import COMPLETION, CONTEXT, INSTRUCTION, SYSTEM, TEMPLATE
from data import Batch
from kernels import head as head_kernels
from config import span_weights
from loss import _hash, coefficients, kl_divergence, neftune_noise, sums_by_kind


# One document, tokens:  <u> name a plum </u> <a> red </a>      targets are all but the first
KINDS_OF_TARGETS = [INSTRUCTION, INSTRUCTION, INSTRUCTION, TEMPLATE, TEMPLATE, COMPLETION, COMPLETION]
NLL = [4.0, 2.0, 3.0, 9.0, 7.0, 1.0, 0.5]
# A second one: a system message, no instruction, an answer of one token, an answer with weight 0.
KINDS_OF_SECOND = [SYSTEM, TEMPLATE, COMPLETION, CONTEXT, CONTEXT]
NLL_OF_SECOND = [5.0, 8.0, 2.5, 6.0, 6.5]


def by_hand(loss: str, normalize: str) -> float:
    """Written out from the definitions."""
    return {
        ("it", "token"): (1.0 + 0.5 + 2.5) / 3,
        ("im", "token"): (4 + 2 + 3 + 1 + 0.5 + 5 + 2.5) / 7,
        ("lm", "token"): (4 + 2 + 3 + 9 + 7 + 1 + 0.5 + 5 + 8 + 2.5) / 10,
        ("it", "example"): ((1 + 0.5) / 2 + 2.5 / 1) / 2,
        ("im", "example"): ((4 + 2 + 3 + 1 + 0.5) / 5 + (5 + 2.5) / 2) / 2,
        ("lm", "example"): ((4 + 2 + 3 + 9 + 7 + 1 + 0.5) / 7 + (5 + 8 + 2.5) / 3) / 2,
        ("it", "span"): (1 + 0.5 + 2.5) / 3,
        ("im", "span"): (4 + 2 + 3) / 3 + (1 + 0.5 + 2.5) / 3 + 5 / 1,
        ("lm", "span"): (4 + 2 + 3) / 3 + (1 + 0.5 + 2.5) / 3 + 5 / 1 + (9 + 7 + 8) / 3,
    }[loss, normalize]


@pytest.mark.parametrize("loss", ["it", "im", "lm"])
@pytest.mark.parametrize("normalize", ["token", "example", "span"])
def test_hand_computed_example(loss, normalize):
    counts = np.array([np.bincount(kinds, minlength=5) for kinds in (KINDS_OF_TARGETS, KINDS_OF_SECOND)])
    table = coefficients(counts, span_weights(loss), normalize)
    total = sum(table[0, kind] * value for kind, value in zip(KINDS_OF_TARGETS, NLL))
    total += sum(table[1, kind] * value for kind, value in zip(KINDS_OF_SECOND, NLL_OF_SECOND))
    assert total == pytest.approx(by_hand(loss, normalize), abs=1e-12)


def test_weights_scale_targets_and_the_denominators_are_as_said():
    counts = np.array([[2, 0, 3, 2, 0], [1, 1, 0, 1, 2]])
    weights = span_weights("it", instruction=0.25)
    table = coefficients(counts, weights, "token")     # 3 + 2 + 1 targets with weight
    assert table[0, INSTRUCTION] == pytest.approx(0.25 / 6) and table[1, COMPLETION] == pytest.approx(1 / 6)
    table = coefficients(counts, weights, "example")   # each example's coefficients sum to 1 / 2
    np.testing.assert_allclose((table * counts).sum(1), [0.5, 0.5])
    assert table[0, COMPLETION] == pytest.approx(4 * table[0, INSTRUCTION])
    table = coefficients(counts, weights, "span")      # a kind's coefficients sum to its weight
    np.testing.assert_allclose((table * counts).sum(0), [0, 0, 0.25, 1, 0])
    # An example with nothing to train on is none of those that the mean is over.
    table = coefficients(np.vstack([counts, [[3, 0, 0, 0, 1]]]), weights, "example")
    np.testing.assert_allclose((table * np.vstack([counts, [[3, 0, 0, 0, 1]]])).sum(1), [0.5, 0.5, 0])


def test_presets_and_overrides():
    assert span_weights("it").tolist() == [0, 0, 0, 1, 0]
    assert span_weights("im").tolist() == [0, 1, 1, 1, 0]
    assert span_weights("lm").tolist() == [1, 1, 1, 1, 0]
    assert span_weights("im", 0.1, 0, None, 2).tolist() == [0.1, 0, 1, 2, 0]
    with pytest.raises(ValueError, match="--instruction-weight -1"):
        span_weights("it", instruction=-1)
    with pytest.raises(ValueError, match="nothing to train"):
        span_weights("it", completion=0)


def test_sums_by_kind():
    got = sums_by_kind(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([COMPLETION, TEMPLATE, COMPLETION]))
    assert got.dtype == torch.float64 and got.tolist() == [2, 0, 0, 5, 0]
    # One that is not finite is its kind's alone.
    got = sums_by_kind(torch.tensor([math.nan, 2.0]), torch.tensor([COMPLETION, TEMPLATE]))
    assert math.isnan(got[COMPLETION]) and got.nan_to_num().tolist() == [2, 0, 0, 0, 0]


@pytest.mark.parametrize("chunk_logits", [2**25, 7 * 31])
def test_kl_is_zero_at_the_start_positive_later_and_has_the_full_gradient(chunk_logits, monkeypatch):
    monkeypatch.setattr(head_kernels, "CHUNK_LOGITS", chunk_logits)
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 12, generator=generator).requires_grad_() for n in (40, 31))
    scale = torch.rand(40, generator=generator)
    start_hidden, start_head = hidden.detach().clone(), head.detach().clone()
    same = kl_divergence(hidden, head, start_hidden, start_head, scale)
    assert same.item() == 0
    assert max(g.abs().max().item() for g in torch.autograd.grad(same, (hidden, head))) < 1e-5
    with torch.no_grad():
        hidden += 0.3 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    kl = kl_divergence(hidden, head, start_hidden, start_head, scale)
    p = torch.softmax(hidden @ head.T, -1)                       # the definition, sum over the vocabulary
    q = torch.softmax(start_hidden @ start_head.T, -1)
    full = (scale * (p * (p.log() - q.log())).sum(-1)).sum()
    assert full.item() > 0.1
    torch.testing.assert_close(kl, full)
    for a, b in zip(torch.autograd.grad(kl, (hidden, head)), torch.autograd.grad(full, (hidden, head))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert kl_divergence(hidden[:0], head, start_hidden[:0], start_head, scale[:0]).requires_grad


class Casts(TorchDispatchMode):
    """Counts the tensors of a shape that are cast."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default and args[0].shape == self.shape
        return function(*args, **(kwargs or {}))


def test_kl_casts_the_starting_models_head_once_for_all_chunks_and_both_passes(monkeypatch):
    monkeypatch.setattr(head_kernels, "CHUNK_LOGITS", 7 * 31)
    hidden, head = torch.randn(40, 12).requires_grad_(), torch.randn(31, 12).requires_grad_()
    results = []
    for start_head in (head.detach(), head.detach().bfloat16()):
        with torch.autocast("cpu", torch.bfloat16), Casts((31, 12)) as casts:
            kl_divergence(hidden, head, hidden.detach(), start_head, torch.rand(40)).backward()
        results.append(casts.count)
    assert len(head_kernels.chunks(40, 31)) > 2 and results[0] == results[1] + 1


def batch_of(lengths: list[int], examples: list[int]) -> Batch:
    n, cu_seqlens = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    unused = ("ids", "targets", "kinds", "coefficients", "trained", "untrained")
    fields = dict.fromkeys(unused, torch.zeros(n))
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return Batch(**fields, documents=documents, positions=torch.arange(n) - cu_seqlens[documents],
                 cu_seqlens=cu_seqlens.int(), examples=np.array(examples))


def test_neftune_noise_depends_on_seed_step_and_example_only_and_scales_with_the_documents_length():
    width, alpha = 64, 5.0
    packed = neftune_noise(batch_of([10, 90], [3, 8]), width, alpha, seed=1, step=2)
    for rows, length, example in ((packed[:10], 10, 3), (packed[10:], 90, 8)):
        bound = alpha / math.sqrt(length * width)               # the paper's formula
        assert 0.95 * bound < rows.abs().max() <= bound and abs(rows.mean()) < bound / 10
        assert torch.equal(rows, neftune_noise(batch_of([length], [example]), width, alpha, 1, 2))
        for seed, step, other in ((2, 2, example), (1, 3, example), (2, 1, example), (1, 2, example + 1),
                                  (1 + 2**70, 2, example)):
            another = neftune_noise(batch_of([length], [other]), width, alpha, seed, step)
            assert not torch.equal(rows, another)


def test_the_hash_of_the_noise_is_its_formula_on_unsigned_numbers():
    numbers = np.random.default_rng(0).integers(0, 2**32, 10_001, dtype=np.uint32)
    expected = numbers.copy()
    for shift, factor in ((16, 0x7feb352d), (15, 0x846ca68b)):
        expected ^= expected >> np.uint32(shift)
        expected *= np.uint32(factor)
    expected ^= expected >> np.uint32(16)
    got = _hash(torch.from_numpy(numbers.view(np.int32).copy()))
    np.testing.assert_array_equal(got.numpy().view(np.uint32), expected)


def test_neftune_noise_is_uniform_and_its_numbers_have_nothing_to_do_with_each_other():
    """In standard deviations of what independent uniform numbers would give, of which 5 are a fault."""
    length, width = 1024, 256

    def uniform(seed: int, step: int) -> torch.Tensor:
        batch, alpha = batch_of([length] * 3, [0, 1, 70_000]), math.sqrt(length * width)
        return neftune_noise(batch, width, alpha, seed, step).double().view(-1, length, width)

    x = uniform(0, 0)
    n = x.numel()
    assert -1 <= x.min() < -0.999 and 0.999 < x.max() < 1
    # Variance 1 / 3, and of the square 4 / 45.
    assert abs(x.mean()) * math.sqrt(3 * n) < 5 and abs(x.square().mean() - 1 / 3) * math.sqrt(n * 45 / 4) < 5
    counts = torch.histc(x, 256, -1, 1)
    chi_squared = ((counts - n / 256).square() / (n / 256)).sum()
    assert abs(chi_squared - 255) < 5 * math.sqrt(2 * 255)

    def related(a: torch.Tensor, b: torch.Tensor) -> float:
        return abs(float((a * b).mean())) * 3 * math.sqrt(a.numel())

    for lag in (1, 2, 16, 128):
        assert related(x[..., lag:], x[..., :-lag]) < 5 and related(x[:, lag:], x[:, :-lag]) < 5
    assert related(x[1:], x[:-1]) < 5                                           # examples
    assert related(x[:, 1:, 1:], x[:, :-1, :-1]) < 5
    for seed, step in ((0, 1), (1, 0), (1, 1), (0, 65_536)):
        assert related(x, uniform(seed, step)) < 5
    # Sums over a token's numbers and over a column's vary as sums of independent numbers do.
    for sums, count in ((x.sum(2), width), (x.sum(1), length)):
        assert abs(sums.square().mean() * 3 / count - 1) * math.sqrt(sums.numel() / 2) < 5
    bits = ((x * 2**23).round().long() + 2**23).flatten()
    for bit in range(24):
        assert abs((bits >> bit & 1).double().mean() - 0.5) * 2 * math.sqrt(n) < 5
