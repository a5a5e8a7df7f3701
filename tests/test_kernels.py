"""The fast paths against their definitions, forward and backward, and what they keep in between."""
import math
import re
import runpy
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels import attention as attention_kernels
from kernels import head as head_kernels
from kernels import layers
from kernels.attention import attention, attention_reference
from kernels.head import nll, nll_reference, weighted_nll
from references import pad_rows


# ---------------------------------------------------------------- attention

def check_attention(lengths: list[int], heads: tuple[int, int]) -> None:
    """attention() against its definition, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    n, cu_seqlens = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = (torch.randn(n, h, 8, generator=generator, requires_grad=True)
               for h in (heads[0], heads[1], heads[1]))
    grad = torch.randn(n, heads[0], 8, generator=generator)
    expected, got = attention_reference(q, k, v, cu_seqlens), attention(q, k, v, cu_seqlens)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(got, (q, k, v), grad),
                    torch.autograd.grad(expected, (q, k, v), grad)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[1], [40], [7, 1, 30, 8, 9], [600, 5, 520, 40, 41, 513], [64] * 4])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
def test_attention_equals_its_definition_and_gradients(lengths, heads):
    check_attention(lengths, heads)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_a_bucket_of_documents_that_is_too_large_is_cut_and_none_of_it_is_lost(heads, monkeypatch):
    """Five documents of like length, two at a time: the last of them is alone. All are padded to 64."""
    lengths, most = [40, 38, 39, 40, 37], 2
    monkeypatch.setattr(attention_kernels, "TILE_SCORES", most * heads[0] * 64 * 64)
    attention_kernels._length_buckets.cache_clear()      # it may have cut these lengths otherwise
    try:
        buckets = attention_kernels._length_buckets(tuple(lengths), *heads, torch.device("cpu"))
        assert [documents for documents, *_ in buckets] == [2, 2, 1]
        # so that what is never written is NaN, not by chance what stood there before
        torch.use_deterministic_algorithms(True)
        check_attention(lengths, heads)
    finally:
        torch.use_deterministic_algorithms(False)
        attention_kernels._length_buckets.cache_clear()


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None,
                scale=None):
    assert is_causal and max_q == max_k == 144 and query.shape == key.shape
    return attention_reference(query, key, value, cu_seq_q)


def varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                window_size=(-1, -1)):
    assert window_size == (-1, 0)
    return varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, True)


def varlen_2_13(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):
    assert window_size == (-1, 0) and enable_gqa and key.shape[1] == 2
    return attention_reference(query, key, value, cu_seq_q)


@pytest.mark.parametrize("function", [varlen_2_10, varlen_2_11, varlen_2_13])
def test_varlen_attn_is_called_as_each_release_of_pytorch_has_it(function, monkeypatch):
    """Stand-ins with the signatures of PyTorch 2.10, 2.11 and 2.13. Before 2.12 keys need as many heads as
    queries."""
    monkeypatch.setattr(attention_kernels, "varlen_attn", function)
    monkeypatch.setattr(attention_kernels, "VARLEN_KEYWORDS", attention_kernels.varlen_keywords(function))
    assert attention_kernels.varlen_fault(4, 2, 8, torch.device("cpu")) == ""


def test_a_pytorch_without_varlen_attn_is_refused_by_its_version(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    with pytest.raises(ImportError, match=f"PyTorch {re.escape(torch.__version__)} is too old: 2.10 "):
        runpy.run_path(attention_kernels.__file__)


def test_bf16_gradients_of_keys_are_summed_over_tiles_in_fp32():
    """A document of 16 tiles, with a gradient whose mean is not 0: sums in bf16 would stop growing. Rounding
    what each tile gives costs 0.2 % here, rounding their sums too 0.5 %."""
    n, generator = 16 * attention_kernels.TILE, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, 16, generator=generator).bfloat16().requires_grad_() for h in (2, 1, 1))
    grad = (1 + torch.randn(n, 2, 16, generator=generator)).bfloat16()
    cu_seqlens = torch.tensor([0, n])
    got = torch.autograd.grad(attention(q, k, v, cu_seqlens), (q, k, v), grad)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(attention_reference(*exact, cu_seqlens), exact, grad.float())
    assert all(a.dtype == torch.bfloat16 for a in got)
    off_q, off_k, off_v = (((a.float() - b).norm() / b.norm()).item() for a, b in zip(got, expected))
    assert off_q < 0.01 and 0 < off_k < 0.003 and 0 < off_v < 0.003


def test_what_all_keys_of_a_document_share_costs_no_accuracy_in_bf16():
    """As with a bias in k_proj: it adds about 200 to every score of a query, of which bf16 keeps 8 bits. The
    second document is padded to the length of the first."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(250, h, 32, generator=generator) for h in (2, 1, 1))
    q[..., 0], k[..., 0] = q[..., 0] + 30, k[..., 0] + 40
    inputs = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    grad, cu_seqlens = torch.randn(250, 2, 32, generator=generator).bfloat16(), torch.tensor([0, 128, 250])
    got = torch.autograd.grad(attention(*inputs, cu_seqlens), inputs, grad)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(attention_reference(*exact, cu_seqlens), exact, grad.float())
    assert all((a.float() - b).norm() < 0.03 * b.norm() for a, b in zip(got, expected))


def test_attention_definition_is_a_loop_over_documents():
    """Guards the reference itself: plain softmax, document by document, token by token."""
    torch.manual_seed(0)
    lengths = [3, 5]
    q, k, v = torch.randn(8, 2, 4), torch.randn(8, 1, 4), torch.randn(8, 1, 4)
    got = attention_reference(q, k, v, torch.tensor([0, 3, 8]))
    start = 0
    for length in lengths:
        for t in range(start, start + length):
            for head in range(2):
                weight = torch.softmax(k[start:t + 1, 0] @ q[t, head] / 2.0, 0)
                torch.testing.assert_close(got[t, head], weight @ v[start:t + 1, 0])
        start += length



# ---------------------------------------------------------------- head


@pytest.fixture(params=["one chunk", "many chunks", "as on CUDA", "as on CUDA, not compiled"])
def chunk_size(request, monkeypatch):
    """As on CUDA: in its chunks, and with what torch.compile traces; a backend runs that as it is."""
    if request.param != "one chunk":
        for name, size in (("CHUNK_LOGITS", 7 * 31), ("CACHED_LOGITS", 3 * 31), ("HEAD_ROWS", 10),
                           ("MULTIPLIED_ROWS", 3)):
            monkeypatch.setattr(head_kernels, name, size)
        pad_rows(monkeypatch, 4)
    if request.param.startswith("as on CUDA"):
        as_on_cuda(monkeypatch, works=request.param == "as on CUDA")


def as_on_cuda(monkeypatch: pytest.MonkeyPatch, works: bool = True) -> list:
    """Let the head take its way for CUDA, on the CPU. works: whether torch.compile does. Returns a list that
    gets what is compiled."""
    compiled, original = [], torch.compile

    def compile_eagerly(function: Callable, **more: object) -> Callable:
        compiled.append(function)
        if not works:
            raise RuntimeError("no compiler is found")
        return original(function, **more, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    monkeypatch.setattr(head_kernels, "on_gpu", lambda x: True)
    monkeypatch.setattr(head_kernels, "TILE", 4)
    monkeypatch.setattr(head_kernels, "CUDA_LOGITS", 17 * 31)
    monkeypatch.setattr(head_kernels, "LEAST_COMPILED", 1)
    for name in ("nll_of_logits", "nll_and_gradient"):
        monkeypatch.setattr(head_kernels, name, head_kernels.Compiled(getattr(head_kernels, f"_{name}")))
    return compiled


def random_rows(rows: int = 40, width: int = 12, vocabulary: int = 31) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator).requires_grad_()
    head = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    return hidden, head, targets, torch.rand(rows, generator=generator)


@pytest.mark.filterwarnings("ignore:the loss is computed without torch.compile")
@pytest.mark.parametrize("rows", [1, 6, 7, 40])
def test_chunked_loss_equals_plain_loss_with_unequal_weights(rows, chunk_size):
    hidden, head, targets, scale = random_rows(rows)
    loss, values = weighted_nll(hidden, head, targets, scale)
    plain_values = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    plain = (scale * plain_values).sum()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(values, plain_values.detach())
    torch.testing.assert_close(nll(hidden, head, targets), plain_values.detach())
    for got, expected in zip(torch.autograd.grad(3 * loss, (hidden, head)),
                             torch.autograd.grad(3 * plain, (hidden, head))):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:the loss is computed without torch.compile")
def test_chunked_loss_in_bf16_stays_near_fp32(chunk_size):
    hidden, head, targets, scale = random_rows(40)
    plain = (scale * nll_reference(hidden, head, targets)).sum()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = weighted_nll(hidden, head, targets, scale)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=5e-3)
    got, expected = (torch.autograd.grad(x, (hidden, head)) for x in (loss, plain))
    for a, b in zip(got, expected):
        assert a.dtype == torch.float32 and (a - b).norm() / b.norm() < 2e-2


@pytest.mark.filterwarnings("ignore:the loss is computed without torch.compile")
def test_logits_whose_exponential_overflows_have_the_loss_and_gradients_written_here(chunk_size):
    """Of two tokens of 31 the logit is 200. The target is one of them or another in turn."""
    hidden, head = torch.full((8, 1), 200.0).requires_grad_(), torch.zeros(31, 1)
    head[[3, 5]] = 1
    head.requires_grad_()
    targets, expected = torch.tensor([3, 0] * 4), torch.tensor([math.log(2), 200 + math.log(2)] * 4)
    loss, values = weighted_nll(hidden, head, targets, torch.ones(8))
    loss.backward()
    for got in (values, nll(hidden, head, targets)):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert hidden.grad.flatten().tolist() == pytest.approx([0, 1] * 4, abs=1e-4)
    assert head.grad[[0, 3, 5]].flatten().tolist() == pytest.approx([-800, 0, 800], abs=0.1)


@pytest.mark.filterwarnings("ignore:the loss is computed without torch.compile")
def test_no_rows_give_zero_with_a_graph(chunk_size):
    hidden, head, targets, scale = random_rows(3)
    loss, values = weighted_nll(hidden[:0], head, targets[:0], scale[:0])
    assert loss.item() == 0 and loss.requires_grad and len(values) == 0
    loss.backward()
    assert not hidden.grad.any() and not head.grad.any()


def test_a_cpus_chunks_have_the_same_size_however_many_rows_there_are():
    for vocabulary, size in ((49_152, 640), (128_256, 256), (151_936, 192), (10**6, 33)):
        for rows in (1, size, 2701, 4096):
            slices = head_kernels.chunks(rows, vocabulary)
            assert [i for x in slices for i in range(rows)[x]] == list(range(rows))
            assert {x.stop - x.start for x in slices[:-1]} <= {size} and size * vocabulary <= 2**25
    # A row alone is never cut, however large the vocabulary.
    assert head_kernels.chunks(2, 2**26) == [slice(0, 1), slice(1, 2)]


def test_a_cpus_products_have_few_shapes():
    """Of rows of 200 lengths, and of documents of 2,000."""
    rows = {len(layers.padded_rows(torch.zeros(n))) for n in range(2048, 2248)}
    assert rows == {2048, 2176, 2304}
    padded = [attention_kernels._padded(n) for n in range(1, 2001)]
    assert all(n <= p <= max(n + 31, 1.25 * n) and p % 32 == 0 for n, p in enumerate(padded, 1))
    assert len(set(padded)) == 20
    for x in (torch.zeros(1023), torch.zeros(2049, device="meta")):
        assert len(layers.padded_rows(x)) == len(x)


def test_chunks_for_cuda_are_whole_tiles_of_thousands_of_rows_within_a_bound():
    for rows, vocabulary, size in ((13_000, 49_152, 3328), (4096, 49_152, 4096), (4097, 49_152, 2176),
                                   (13_000, 151_936, 3328), (9_000, 262_144, 1920), (50, 10**9, 50)):
        slices = head_kernels.chunks(rows, vocabulary, large=True)
        assert [i for x in slices for i in range(rows)[x]] == list(range(rows)) and slices[0].stop == size
        assert len({x.stop - x.start for x in slices[:-1]}) <= 1
        assert size == rows or size % 128 == 0 and size * vocabulary <= 2**29


def test_what_is_done_to_each_logit_is_compiled_on_cuda_only_and_only_where_it_may_be(monkeypatch):
    hidden, head, targets, scale = random_rows()
    on_cpu = head_kernels.on_gpu
    compiled = as_on_cuda(monkeypatch)
    on_cuda = head_kernels.on_gpu
    for on_gpu, allowed, least in ((on_cpu, True, 1), (on_cuda, False, 1), (on_cuda, True, 17)):
        monkeypatch.setattr(head_kernels, "on_gpu", on_gpu)
        monkeypatch.setattr(head_kernels, "LEAST_COMPILED", least)
        weighted_nll(hidden, head, targets, scale, compiled=allowed)
        nll(hidden, head, targets, compiled=allowed)
    assert not compiled
    monkeypatch.setattr(head_kernels, "LEAST_COMPILED", 16)
    for _ in range(2):
        weighted_nll(hidden, head, targets, scale)
        nll(hidden, head, targets)
    assert compiled == [head_kernels._nll_and_gradient, head_kernels._nll_of_logits]


def test_where_torch_compile_does_not_work_it_is_tried_once_and_the_loss_is_the_same(monkeypatch):
    hidden, head, targets, scale = random_rows()
    expected, _ = weighted_nll(hidden, head, targets, scale)
    compiled = as_on_cuda(monkeypatch, works=False)
    with pytest.warns(UserWarning, match="without torch.compile.*RuntimeError: no compiler is found"):
        loss, _ = weighted_nll(hidden, head, targets, scale)
    assert len(compiled) == 1 and len(head_kernels.chunks(40, 31, large=True)) > 1
    torch.testing.assert_close(loss, expected)


def test_running_out_of_memory_is_not_taken_for_a_compiler_that_does_not_work():
    def run_out(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    function = head_kernels.Compiled(run_out)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        with pytest.raises(torch.OutOfMemoryError):
            function(torch.zeros(head_kernels.LEAST_COMPILED))
    assert function.works


# ---------------------------------------------------------------- layers

PRECISIONS = ["fp32", "bf16"]


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def make(*sizes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]


def make_linears(width: int, *sizes: int) -> list[nn.Linear]:
    """The second and fourth have no bias."""
    torch.manual_seed(0)
    return [nn.Linear(width, size, bias=i % 2 == 0) for i, size in enumerate(sizes)]


def check_same(fast: Callable, reference: Callable, inputs: Sequence[torch.Tensor], precision: str) -> None:
    """A fast path's outputs and gradients, of inputs, against its definition's."""
    near = 1e-5 if precision == "fp32" else 0.01    # bf16 rounds each intermediate by up to 0.4 %
    results = []
    for function in (fast, reference):
        with autocast(precision):
            outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        grads = make(*(out.shape for out in outputs), seed=1)
        grads = torch.autograd.grad(outputs, inputs, [g.to(o.dtype) for g, o in zip(grads, outputs)])
        results.append([*outputs, *grads])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape and expected.norm() > 0
        assert (got.float() - expected.float()).norm() <= near * expected.float().norm()


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE as a product of complex numbers."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)
    return torch.cat([turned.real, turned.imag], -1)


def test_the_definitions_are_their_formulas():
    """Guards the references themselves."""
    x, y, weight = make((7, 3, 8), (7, 3, 8), (8,))
    angles = torch.linspace(0, 3, 28).view(7, 1, 4)
    for got, expected in (
            (layers.rms_norm_reference(x, weight, 1e-2),
             x / (x.square().sum(-1, keepdim=True) / 8 + 1e-2).sqrt() * weight),
            (layers.rotate_reference(x, angles.cos(), angles.sin()), turn(x, angles.cos(), angles.sin())),
            (layers.swiglu_reference(x, y), x / (1 + (-x).exp()) * y)):
        torch.testing.assert_close(got, expected)
    (q,) = make_linears(8, 5)
    torch.testing.assert_close(layers.linears_reference(x, q)[0], x @ q.weight.T + q.bias)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(7, 12), (5, 3, 8)])
def test_rms_norm_equals_its_definition(shape, precision):
    x, weight = make(shape, shape[-1:])
    check_same(lambda *a: layers.rms_norm(*a, 1e-2), lambda *a: layers.rms_norm_reference(*a, 1e-2),
               (x, weight), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rotate_equals_its_definition(precision):
    (x,) = make((5, 3, 8), dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    angles = torch.arange(5.0)[:, None, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    check_same(lambda x: layers.rotate(x, angles.cos(), angles.sin()),
               lambda x: layers.rotate_reference(x, angles.cos(), angles.sin()), (x,), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_swiglu_equals_its_definition(precision):
    inputs = make((7, 12), (7, 12), dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    check_same(layers.swiglu, layers.swiglu_reference, inputs, precision)


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return layers.rms_norm(x, weight, 1e-2)


def normed_reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return layers.rms_norm_reference(x, weight, 1e-2)


# What linears() is given: {name: (fast, definition)}, of a (7, 12) tensor and another one.
ACTIVATIONS = {
    "norm": (normed, normed_reference),
    "swiglu": (lambda x, weight: layers.swiglu(x, x + weight),
               lambda x, weight: layers.swiglu_reference(x, x + weight)),
    "no recipe": (lambda x, weight: (x * weight).tanh(), lambda x, weight: (x * weight).tanh()),
    "norm, changed in place": (lambda x, weight: normed(x, weight).mul_(2).add_(1),
                               lambda x, weight: normed_reference(x, weight) * 2 + 1),
    "norm, copied": (lambda x, weight: normed(x, weight).clone(), normed_reference),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("widths", [(6,), (6, 4, 4)])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_linears_equal_their_definition(name, widths, precision):
    modules = make_linears(12, *widths)
    parameters = [p for module in modules for p in module.parameters()]
    fast, reference = ACTIVATIONS[name]
    check_same(lambda x, weight, *_: layers.linears(fast(x, weight), *modules),
               lambda x, weight, *_: layers.linears_reference(reference(x, weight), *modules),
               (*make((7, 12), (12,)), *parameters), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_linears_without_gradients_equal_their_definition(precision):
    modules, (x,) = make_linears(12, 6, 4), make((7, 12))
    with torch.no_grad(), autocast(precision):
        for got, expected in zip(layers.linears(x, *modules), layers.linears_reference(x, *modules)):
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected)


def kept_bytes(function: Callable, *inputs: torch.Tensor) -> int:
    """What autograd keeps for a backward pass through function(*inputs), without the inputs themselves."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        outputs = function(*inputs)
    own = {x.untyped_storage().data_ptr() for x in inputs}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    assert outputs and own & storages.keys()
    return sum(size for place, size in storages.items() if place not in own)


def test_linears_keep_no_output_of_a_norm_or_swiglu_but_what_has_no_recipe():
    n, width = 50, 12
    x, gate, up, weight = make((n, width), (n, width), (n, width), (width,))
    modules = make_linears(width, 6, 4)
    parameters = [p for module in modules for p in module.parameters()]
    whole, scale = n * width * 4, n * 4     # an activation in fp32; 1 / rms(x)
    assert kept_bytes(lambda x, weight, *_: layers.linears(normed(x, weight), *modules),
                      x, weight, *parameters) == scale
    assert kept_bytes(lambda gate, up, *_: layers.linears(layers.swiglu(gate, up), *modules),
                      gate, up, *parameters) == 0
    assert kept_bytes(lambda x, weight, *_: layers.linears(normed(x, weight).clone(), *modules),
                      x, weight, *parameters) == scale + whole
    assert kept_bytes(lambda x, weight, *_: layers.linears(normed(x, weight).mul_(2), *modules),
                      x, weight, *parameters) == scale + whole


class Doubled(nn.Linear):
    """As an adapter would: a linear layer that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def another_forward(module: nn.Linear) -> None:
    module.forward = lambda x: 2 * nn.Linear.forward(module, x)


@pytest.mark.parametrize("change", [
    lambda module: module.register_forward_hook(lambda module, inputs, output: 2 * output),
    lambda module: module.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
    lambda module: module.register_full_backward_hook(lambda module, grads, _: (2 * grads[0],)),
    lambda module: module.register_full_backward_pre_hook(lambda module, grads: (2 * grads[0],)),
    another_forward, None,
], ids=["forward hook", "forward pre-hook", "backward hook", "backward pre-hook", "forward", "subclass"])
def test_linears_step_aside_for_what_is_not_a_plain_linear_layer(change):
    (plain,), (x, weight) = make_linears(12, 6), make((7, 12), (12,))
    changed = Doubled(12, 6)
    if change:
        changed = nn.Linear(12, 6)
        change(changed)
    changed.load_state_dict(plain.state_dict())
    results = []
    for modules in ([plain, changed], [plain]):
        outputs = layers.linears(normed(x, weight), *modules)
        results.append((outputs[-1], torch.autograd.grad(sum(out.sum() for out in outputs), x)[0]))
    expected = changed(normed(x, weight))
    torch.testing.assert_close(results[0][0], expected)
    expected = torch.autograd.grad((expected + plain(normed(x, weight))).sum(), x)[0]
    torch.testing.assert_close(results[0][1], expected)
    assert not torch.allclose(results[0][1], 2 * results[1][1])     # what two plain ones would give


def multiply_as_cuda_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.mm's and torch.addmm's out_dtype, which no CPU has: bf16 products are summed and returned in
    fp32."""
    def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # Autocast leaves fp64 alone.
        return (a.double() @ b.double()).float()

    def mm(a: torch.Tensor, b: torch.Tensor, **more: object) -> torch.Tensor:
        return exact(a, b) if more == {"out_dtype": torch.float32} else original(a, b, **more)

    def addmm(sums: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, out_dtype: torch.dtype,
              out: torch.Tensor) -> None:
        assert out is sums and out_dtype == sums.dtype == torch.float32
        out += exact(a, b)

    original = torch.mm
    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    for module in (layers, head_kernels):
        monkeypatch.setattr(module, "multiplies_to_fp32", lambda x: x.dtype == torch.bfloat16)
    monkeypatch.setattr(head_kernels, "adds_in_fp32", lambda device: True)


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_gradients_are_the_fp32_products_where_a_gpu_returns_them(compiled, monkeypatch):
    """All of a layer's code is one graph when compiled, and what several modules do with x is one product."""
    multiply_as_cuda_does(monkeypatch)
    modules, (x, weight) = make_linears(12, 6, 4), make((50, 12), (12,))
    grads = [g.bfloat16() for g in make((50, 6), (50, 4), seed=1)]

    def function(x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        return layers.linears(normed(x, weight), *modules)

    products = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        products.extend(node for node in graph.graph.nodes if "autograd_function_apply" in str(node.target))
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    if compiled:
        function = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    with autocast("bf16"):
        outputs, exact = function(x, weight), normed_reference(x, weight).detach().float()
        expected = layers.linears_reference(normed_reference(x, weight), *modules)
    assert len(products) == compiled
    parameters = [p for module in modules for p in module.parameters()]
    got = torch.autograd.grad(outputs, [*parameters, x, weight], grads)
    plain = torch.autograd.grad(expected, [*parameters, x, weight], grads)
    for a, b in zip(got, plain):
        assert a.dtype == b.dtype == torch.float32 and (a - b).norm() <= 0.01 * b.norm()
    for a, b, grad in ((got[0], plain[0], grads[0]), (got[2], plain[2], grads[1])):
        torch.testing.assert_close(a, grad.float().T @ exact, atol=1e-5, rtol=1e-5)
        assert torch.equal(b, b.bfloat16().float()) and not torch.equal(a, a.bfloat16().float())


def test_the_heads_gradient_is_summed_in_fp32_without_rounding_where_a_gpu_adds_so(monkeypatch):
    """Of 100 chunks, each of which rounds its product to bf16 otherwise."""
    hidden, head, targets, scale = random_rows(400)
    off = []
    as_on_cuda(monkeypatch)
    monkeypatch.setattr(head_kernels, "CUDA_LOGITS", 4 * 31)
    for as_cuda_does in (False, True):
        if as_cuda_does:
            multiply_as_cuda_does(monkeypatch)
        with autocast("bf16"):
            got = torch.autograd.grad(weighted_nll(hidden, head, targets, scale)[0], head)[0]
            cast = head.detach().bfloat16().requires_grad_()
            logits = hidden.detach().bfloat16() @ cast.T
        logits = logits.detach().float().requires_grad_()
        (scale * F.cross_entropy(logits, targets, reduction="none")).sum().backward()
        exact = logits.grad.bfloat16().float().T @ hidden.detach().bfloat16().float()
        off.append(((got - exact).norm() / exact.norm()).item())
    assert off[1] < 1e-4 < 5e-4 < off[0]
