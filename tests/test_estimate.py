"""The memory that eval.look prints: by hand, and against what PyTorch's profiler sees of a step."""
import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch.profiler import profile

from bench.gpu_speed import shape_of
from eval import estimate
from eval.estimate import activation_bytes
from kernels.attention import VARLEN_KEYWORDS
from kernels import head as head_kernels
from kernels.head import weighted_nll
from loss import kl_divergence
from model import Llama, init_weights
from runtime.model_config import ModelConfig

SMALL = dict(model_type="llama", vocab_size=100, hidden_size=30, intermediate_size=40, num_hidden_layers=2,
             num_attention_heads=3, num_key_value_heads=3, head_dim=10)


def test_packing_counts_every_rank_and_the_largest_micro_batch():
    """Two steps on two ranks; one micro-batch is empty, as where a step has fewer examples than ranks."""
    plan = [[[np.array([0, 2])], [np.array([1])]], [[np.array([3])], [np.array([], np.int64)]]]
    lengths, counts = np.array([5, 9, 3, 8]), np.array([[1, 4], [7, 2], [3, 0], [0, 8]])
    assert estimate.packing(plan, lengths, counts, np.array([False, True])) == {
        "micro_batches": 4, "tokens": 25, "largest": 9, "trained": 8, "other": 7}


def test_memory_adds_up_by_hand():
    """A Llama of 2 layers of 7,260 parameters, 100 x 30 embeddings and a norm of 30, tied; 1,000 tokens."""
    config = ModelConfig.from_dict({**SMALL, "tie_word_embeddings": True})
    layer, count = 4 * 30 * 30 + 3 * 30 * 40 + 2 * 30, 2 * 7260 + 3030
    packed = {"largest": 1000, "trained": 600, "other": 400}
    plain, ddp, shard, again = (
        estimate.memory(config, packed, torch.bfloat16, ranks, shard, recompute, False)
        for ranks, shard, recompute in (
            (1, False, False), (2, False, False), (2, True, False), (2, True, True)))
    assert layer == 7260
    assert [plain[k] for k in ("parameters", "gradients", "AdamW's averages", "reference model")] == [
        4 * count, 4 * count, 8 * count, 0]
    assert ddp == plain
    assert [shard[k] for k in ("parameters", "gradients", "AdamW's averages")] == [
        2 * count, 2 * count, 4 * count]
    # When the loss is computed: bf16 copies of the layers; the head's gradient and copy; the larger of the
    # logits of 600 targets in bf16 and fp32, with a product as large as the head, and of a look at the other
    # 400, once more in fp32.
    kept = "activations of 1,000 tokens"
    assert plain["weights gathered or cast"] == 2 * 2 * 7260
    assert plain["head: gradient, copy, logits"] == (4 + 2) * 3000 + max(
        2 * 3000 + 60_000 * (2 + 4), 40_000 * 10)
    assert plain[kept] == activation_bytes(config, 1000, torch.bfloat16, False)
    # In SwiGLU's backward pass: the layer as gathered and its gradient; the gradient of the layer's output,
    # and three tensors as wide as the MLP.
    on_the_way = 1000 * (4 * 30 + 3 * 2 * 40)
    for sharded, activations in ((shard, plain[kept]), (again, activation_bytes(
            config, 1000, torch.bfloat16, True) + plain[kept] // 2)):
        assert sharded["weights gathered or cast"] == 4 * 3030 + 7260 * (3 * 2 + 2 * 4)
        assert sharded[kept] == activations + on_the_way
        assert sharded["head: gradient, copy, logits"] == 4 * 3000
    # With few tokens, the gradients of gate and up in fp32, and one of them in bf16.
    one = {"largest": 1, "trained": 1, "other": 0}
    broad = ModelConfig.from_dict({**SMALL, "intermediate_size": 400})
    few = estimate.memory(broad, one, torch.bfloat16, 1, False, False, False)
    assert few["weights gathered or cast"] == 2 * 2 * (7260 + 3 * 30 * 360) + (2 * 4 + 2) * 12_000
    # At the embeddings, with few tokens and a large vocabulary: two gradients as large as they are.
    wide = ModelConfig.from_dict({**SMALL, "vocab_size": 50_000})
    end = estimate.memory(wide, one, torch.bfloat16, 2, True, True, False)
    assert end["head: gradient, copy, logits"] == 2 * 4 * 50_000 * 30
    kl = estimate.memory(config, packed, torch.bfloat16, 2, True, False, True)
    assert kl["reference model"] == 2 * count and kl["weights gathered or cast"] == 8 * 3030


def test_a_gpus_chunks_of_the_loss_are_larger_and_nothing_of_them_is_in_fp32():
    """10,000 targets of 10,000 logits: in chunks of 3,328 = 52 * 64 on a CPU, of 3,456 = 27 * 128 on CUDA."""
    config = ModelConfig.from_dict({**SMALL, "vocab_size": 10_000, "tie_word_embeddings": True})
    packed = {"largest": 10_000, "trained": 10_000, "other": 0}
    cpu, cuda = (estimate.memory(config, packed, torch.bfloat16, 1, False, True, False, cuda)
                 ["head: gradient, copy, logits"] for cuda in (False, True))
    head = 6 * 300_000
    assert cpu == head + 2 * 2**13 * 30 + 2 * 3328 * 10_000 + 4 * 2**19 and cuda == head + 2 * 3456 * 10_000


@pytest.mark.parametrize("recompute, compiled", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("family", [dict(model_type="llama"), dict(model_type="qwen3", head_dim=16)],
                         ids=lambda family: family["model_type"])
def test_activation_bytes_are_those_that_autograd_keeps(family, recompute, compiled, monkeypatch):
    model = Llama(ModelConfig.from_dict({**SMALL, **family, "tie_word_embeddings": True}))
    init_weights(model, 0)
    model.recompute = recompute
    if compiled:
        # All that decides what is kept, without the code of the kernels.
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
        model.compile_layers()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def save(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    positions = torch.cat([torch.arange(50), torch.arange(60)])
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        model(positions % 100, positions, torch.tensor([0, 50, 110], dtype=torch.int32))
    expected = sum(x.untyped_storage().nbytes() for place, x in saved.items() if place not in parameters)
    computed = activation_bytes(model.config, 110, torch.float32, recompute, compiled=compiled)
    # Token ids, and what a recomputed layer stores with its input, are not counted.
    assert computed == pytest.approx(expected, rel=0.03)


# The most memory that PyTorch 2.11 allocated in a step on an H100, in GB, in bf16 with compiled layers: as
# bench.gpu measured it, by shape, loss and tokens of a micro-batch. IT trains half of the targets.
ON_H100 = {
    "0.13B": {("im", 4096): 5.440, ("it", 4096): 5.239, ("im", 16384): 12.735, ("it", 16384): 12.610,
              ("im", 32768): 22.463, ("it", 32768): 22.392},
    "0.5B": {("im", 4096): 14.622, ("it", 4096): 14.625, ("im", 16384): 28.485, ("it", 16384): 28.329,
             ("im", 32768): 46.449, ("it", 32768): 46.449},
    "1B": {("im", 4096): 30.131, ("it", 4096): 29.608, ("im", 16384): 47.274, ("it", 16384): 46.946,
           ("im", 32768): 70.131, ("it", 32768): 69.934}}


@pytest.mark.parametrize("name", ON_H100)
def test_a_step_on_a_gpu_takes_the_memory_that_is_estimated(name, monkeypatch):
    # As in PyTorch 2.11.
    monkeypatch.delitem(VARLEN_KEYWORDS, "enable_gqa", raising=False)
    config = shape_of(name, tiny=False)
    for (loss, tokens), measured in ON_H100[name].items():
        trained = tokens if loss == "im" else tokens // 2
        packed = {"largest": tokens, "trained": trained, "other": tokens - trained}
        parts = estimate.memory(config, packed, torch.bfloat16, 1, False, False, False, True, True)
        assert sum(parts.values()) / 1e9 == pytest.approx(measured, rel=0.03), (loss, tokens)


def estimate_of_a_step(config: ModelConfig, tokens: int, dtype: torch.dtype, recompute: bool, kl: bool = False
                       ) -> int:
    """The estimate of what peak_of_a_step() measures."""
    packed = {"largest": tokens, "trained": tokens, "other": 0}
    parts = estimate.memory(config, packed, dtype, 1, False, recompute, kl)
    state = {"parameters", "gradients", "AdamW's averages", "reference model"}
    return sum(size for name, size in parts.items() if name not in state)


def peak_of_a_step(config: ModelConfig, tokens: int, dtype: torch.dtype, recompute: bool, kl: bool = False
                   ) -> int:
    """Bytes that forward and backward pass have at most, without parameters and gradients. The documents have
    a length that attention does not pad."""
    model = Llama(config)
    init_weights(model, 0)
    model.recompute, reference = recompute, copy.deepcopy(model).requires_grad_(False)
    ids, positions = torch.arange(tokens) % config.vocab_size, torch.arange(96).repeat(tokens // 96)

    def passes() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            cu_seqlens = torch.arange(0, tokens + 1, 96, dtype=torch.int32)
            hidden, coefficients = model(ids, positions, cu_seqlens), torch.full((tokens,), 1 / tokens)
            loss, _ = weighted_nll(hidden, model.head_weight, ids, coefficients)
            if kl:
                with torch.no_grad():
                    start = reference(ids, positions, cu_seqlens)
                loss = loss + kl_divergence(hidden, model.head_weight, start, reference.head_weight,
                                            coefficients)
        loss.backward()

    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with profile(profile_memory=True) as profiler:
        passes()
    changes, left = [], profiler.profiler.kineto_results.experimental_event_tree()
    while left:
        event = left.pop()
        left += event.children
        if event.tag.name == "Allocation":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    live = torch.tensor([size for _, size in sorted(changes)]).cumsum(0)
    return int(live.max())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [     # where activations, weights, the head and the MLP are most
    dict(hidden_size=128, intermediate_size=344, num_hidden_layers=6, vocab_size=256),
    dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=2, vocab_size=256),
    dict(hidden_size=128, intermediate_size=344, num_hidden_layers=2, vocab_size=20_000),
    dict(hidden_size=128, intermediate_size=2048, num_hidden_layers=3, vocab_size=256)])
def test_a_step_takes_the_memory_that_is_estimated(shape, dtype, recompute):
    config = ModelConfig.from_dict({**shape, "model_type": "llama", "num_attention_heads": 4,
                                    "num_key_value_heads": 2, "tie_word_embeddings": True})
    step = config, 288, dtype, recompute
    assert estimate_of_a_step(*step) / peak_of_a_step(*step) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width, vocabulary, tokens, rows", [
    (32, 6000, 96, 96), (256, 2000, 288, 24), (256, 2000, 288, 288)])
def test_a_step_with_kl_takes_the_memory_that_is_estimated(width, vocabulary, tokens, rows, dtype,
                                                           monkeypatch):
    """Where the logits are most; and with a larger head, in twelve chunks and in one."""
    monkeypatch.setattr(head_kernels, "CHUNK_LOGITS", rows * vocabulary)
    config = ModelConfig.from_dict(dict(
        model_type="llama", vocab_size=vocabulary, hidden_size=width, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        tie_word_embeddings=True))
    step = config, tokens, dtype, False, True
    assert estimate_of_a_step(*step) / peak_of_a_step(*step) == pytest.approx(1.0, abs=0.1)
