"""The memory that --dry-run prints: by hand, and against what PyTorch's profiler sees of a step."""
import pytest
import torch
from torch.profiler import profile

from eval import estimate
from bench import fits
from kernels.head import weighted_nll
from model import Llama, ModelConfig, activation_bytes, init_weights

SMALL = dict(model_type="llama", vocab_size=100, hidden_size=30, intermediate_size=40, num_hidden_layers=2,
             num_attention_heads=3, num_key_value_heads=3, head_dim=10)


def test_a_dry_runs_memory_adds_up_by_hand():
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
    # When the loss is computed: bf16 copies, but of down_proj; head's gradient and copy; the larger of the
    # logits of the loss, 600 rows in bf16 and fp32, and of a look at the other 400, once more in fp32.
    kept, logits = "activations of 1,000 tokens", max(60_000 * (2 + 4), 40_000 * 10)
    assert plain["weights gathered or cast"] == 2 * 2 * (7260 - 1200)
    assert plain["head: gradient, copy, logits"] == (4 + 2) * 3000 + logits
    assert plain[kept] == activation_bytes(config, 1000, torch.bfloat16, False)
    # In a layer's backward pass: the layer gathered and its gradient, SwiGLU's ways back.
    ways = 1000 * 4 * 2 * 40
    for sharded, activations in ((shard, plain[kept]), (again, activation_bytes(
            config, 1000, torch.bfloat16, True) + plain[kept] // 2)):
        assert sharded["weights gathered or cast"] == 4 * 3030 + 7260 * (3 * 2 + 2 * 4)
        assert sharded[kept] == activations + ways
        assert sharded["head: gradient, copy, logits"] == 4 * 3000
    one = {"largest": 1, "trained": 1, "other": 0}
    few = estimate.memory(config, one, torch.bfloat16, 1, False, False, False)
    assert few["weights gathered or cast"] == 2 * 2 * (7260 - 1200) + (2 * 4 + 2) * 1200    # gate's and up's
    # At the embeddings, with few tokens and a large vocabulary: two gradients as large as they are.
    wide = ModelConfig.from_dict({**SMALL, "vocab_size": 50_000})
    end = estimate.memory(wide, one, torch.bfloat16, 2, True, True, False)
    assert end["head: gradient, copy, logits"] == 2 * 4 * 50_000 * 30
    kl = estimate.memory(config, packed, torch.bfloat16, 2, True, False, True)
    assert kl["reference model"] == 2 * count and kl["weights gathered or cast"] == 8 * 3030


def test_a_gpus_blocks_of_the_loss_are_as_large_as_its_chunks():
    """10,000 rows of 10,000 logits make 3 chunks of 3,334 rows, two of which are there at once."""
    config = ModelConfig.from_dict({**SMALL, "vocab_size": 10_000, "tie_word_embeddings": True})
    packed = {"largest": 10_000, "trained": 10_000, "other": 0}
    cpu, cuda = (estimate.memory(config, packed, torch.bfloat16, 1, False, True, False, cuda)
                 ["head: gradient, copy, logits"] for cuda in (False, True))
    pair = 2 * 3334 * 10_000
    assert cpu == 6 * 300_000 + 2 * pair + 4 * 2 * 2**20 and cuda == 6 * 300_000 + 6 * pair


def peak_of_a_step(config: ModelConfig, tokens: int, dtype: torch.dtype, recompute: bool) -> int:
    """Bytes that forward and backward pass have at most, beside parameters and gradients."""
    model = Llama(config)
    init_weights(model, 0)
    model.recompute = recompute
    ids, positions = torch.arange(tokens) % config.vocab_size, torch.arange(100).repeat(tokens // 100)

    def passes() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = model(ids, positions, torch.arange(0, tokens + 1, 100, dtype=torch.int32))
            loss, _ = weighted_nll(hidden, model.head_weight, ids, torch.full((tokens,), 1 / tokens))
        loss.backward()

    passes()
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
@pytest.mark.parametrize("shape", [     # where activations, weights and the head are most
    dict(hidden_size=128, intermediate_size=344, num_hidden_layers=6, vocab_size=256),
    dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=6, vocab_size=256),
    dict(hidden_size=128, intermediate_size=344, num_hidden_layers=2, vocab_size=20_000)])
def test_a_step_takes_the_memory_that_is_estimated(shape, dtype, recompute):
    config = ModelConfig.from_dict({**shape, "model_type": "llama", "num_attention_heads": 4,
                                    "num_key_value_heads": 2, "tie_word_embeddings": True})
    packed = {"largest": 600, "trained": 600, "other": 0}
    parts = estimate.memory(config, packed, dtype, 1, False, recompute, False)
    state = {"parameters", "gradients", "AdamW's averages", "reference model"}
    estimated = sum(size for name, size in parts.items() if name not in state)
    assert estimated / peak_of_a_step(config, 600, dtype, recompute) == pytest.approx(1.0, abs=0.1)


def test_what_fits_where():
    """Llama-2-7B: its published 6,738,415,616 parameters at 16 bytes are 108 GB, which divide."""
    config = fits.read_shape("Llama-2-7B")
    one, two, many = (fits.gigabytes(config, gpus, True, True, 1) for gpus in (1, 2, 64))
    state = 16 * 6_738_415_616 / 1e9
    assert state < one == fits.gigabytes(config, 1, False, True, 1) < state + 4
    assert two - many == pytest.approx(state * (1 / 2 - 1 / 64))
    assert fits.fewest([30.0, 24.0, 23.0, 12.0], 24) == "4"     # 24 GiB are 25.8 GB, 23.2 of them for us
    assert fits.fewest([30.0, 24.0], 24) == "never"
