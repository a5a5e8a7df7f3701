"""What ranks load of two checkpoints in parts: one JSON line.

    torchrun --nproc-per-node 2 tests/sharded_loading.py FOLDER

FOLDER/untied's head is not its embedding, though config.json says so; FOLDER/broken has a NaN in the last row
of its embedding, which only the last rank reads.
"""
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import load_model  # noqa: E402
from runtime import weights  # noqa: E402
from runtime.distributed import from_all, is_main, shard, whole  # noqa: E402

weights.PIECE = 1000      # bytes, so that tiny tensors are read in several pieces
folder = Path(sys.argv[1])
divide = partial(shard, device=torch.device("cpu"), dtype=torch.float32)
dist.init_process_group("gloo")
model = load_model(folder / "untied", "cpu", divide)
head, embedding = (whole(x).tolist() for x in (model.head_weight, model.model.embed_tokens.weight))
try:
    load_model(folder / "broken", "cpu", divide)
    fault = ""
except ValueError as error:
    fault = str(error)
faults = from_all(fault)
if is_main():
    print(json.dumps({"head": head, "embedding": embedding, "faults": faults}), flush=True)
dist.barrier()
os._exit(0)
