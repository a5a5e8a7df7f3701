"""What a rank holds of a sharded model between forward and backward pass, and after a step, and whether the
layers' gradients are more exact than bf16: one JSON line.

    torchrun --nproc-per-node 2 tests/sharded_memory.py MODEL
"""
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels.head import weighted_nll  # noqa: E402
from model import load_model  # noqa: E402
from runtime.distributed import shard  # noqa: E402
from runtime.weights import local_rows  # noqa: E402


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Of what is on this rank; a storage that several share counts once."""
    storages = [local_rows(x).untyped_storage() for x in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def facts(folder: str, dtype: torch.dtype, recompute: bool) -> dict:
    model = load_model(folder, "cpu", partial(shard, device=torch.device("cpu"), dtype=dtype))
    model.recompute = recompute
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    shapes = {tuple(p.shape) for p in model.model.layers.parameters() if p.dim() == 2}
    shapes |= {shape[::-1] for shape in shapes}
    n, kept = 50, []
    ids, rows = torch.arange(n) + dist.get_rank(), torch.arange(n)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = model(ids, rows, torch.tensor([0, n], dtype=torch.int32))
            loss, _ = weighted_nll(hidden, model.head_weight, ids, torch.full((n,), 1 / n))
    like_weights = [x for x in kept if tuple(x.shape) in shapes]
    kept_bytes = storage_bytes(like_weights)
    loss.backward()
    optimizer.step()
    grads = [local_rows(p.grad) for p in model.model.layers.parameters()]
    held = [x for p in model.parameters() for x in (p, p.grad, *optimizer.state[p].values())]
    return {"kept": len(like_weights), "kept_bytes": kept_bytes, "recompute": recompute,
            "exact": all(bool((grad != grad.bfloat16()).any()) for grad in grads),
            "state": storage_bytes(held), "whole": 16 * sum(p.numel() for p in model.parameters())}


dist.init_process_group("gloo")
result = [facts(sys.argv[1], dtype, recompute) for dtype in (torch.float32, torch.bfloat16)
          for recompute in (False, True)]
if dist.get_rank() == 0:
    print(json.dumps(result), flush=True)
dist.barrier()
os._exit(0)
