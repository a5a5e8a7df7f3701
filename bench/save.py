"""How fast checkpoints are written beside the disk itself, and what that costs beside a training step.

    python -m bench.save --model DIR [--folder DIR] [--tokens 4096] [--rounds 3]

In turn, each right after a training step: the disk (a file as large as the checkpoint, one 64 MB piece of
random bytes written over and over, then fsync), and checkpoint.save_checkpoint() of the model with AdamW's
averages, in fp32, by one process. After a step, since that is when a run saves: files need memory which the
system has to find first, and that can take longer than the disk. A round before the first is not counted.
--folder: on the disk to be measured. crc: the checksums alone, over the same bytes. copy: weights and
averages into memory that is there already, which is what the loop would wait for if a thread did the rest.
step: forward and backward pass and optimizer step over --tokens random tokens in documents of 256. The last
line printed is one JSON object.
"""
import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import zlib
from pathlib import Path

import torch

from runtime import checkpoint
import train
from bench.common import cores, hardware, print_table
from kernels.head import weighted_nll
from runtime.machine import keep_freed_memory
from model import Llama, load_model
from runtime.weights import resolve_model

PIECE = 2**26
DOCUMENT = 256


def write_plain(file: Path, size: int) -> float:
    """Seconds for so many bytes in pieces, and onto the disk."""
    piece = memoryview(os.urandom(PIECE))   # not zeros: some disks and file systems shorten them
    began = time.monotonic()
    with open(file, "wb", buffering=0) as out:
        for start in range(0, size, PIECE):
            out.write(piece[:size - start])
        os.fsync(out.fileno())
    seconds = time.monotonic() - began
    file.unlink()
    return seconds


def step_seconds(model: Llama, optimizer: torch.optim.Optimizer, tokens: int) -> float:
    documents = tokens // DOCUMENT
    n = documents * DOCUMENT
    ids = torch.randint(model.config.vocab_size, (n + 1,), generator=torch.Generator().manual_seed(0))
    began = time.monotonic()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(ids[:-1], torch.arange(DOCUMENT).repeat(documents),
                       torch.arange(0, n + 1, DOCUMENT, dtype=torch.int32))
        loss, _ = weighted_nll(hidden, model.head_weight, ids[1:], torch.full((n,), 1 / n))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.monotonic() - began


def save_seconds(folder: str, model: Llama, optimizer: torch.optim.Optimizer) -> float:
    began = time.monotonic()
    saved = checkpoint.save_checkpoint(folder, 1, model, optimizer, {}, 1)
    seconds = time.monotonic() - began
    shutil.rmtree(saved)
    return seconds


def crc_seconds(tensors: list[torch.Tensor]) -> float:
    began = time.monotonic()
    for x in tensors:
        zlib.crc32(x.view(torch.uint8).numpy().data)
    return time.monotonic() - began


def copy_seconds(tensors: list[torch.Tensor], into: list[torch.Tensor]) -> float:
    began = time.monotonic()
    for x, y in zip(tensors, into):
        y.copy_(x)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint folder")
    parser.add_argument("--folder", metavar="DIR", help="where to write; default the system's temporary one")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(cores())
    machine = hardware()
    model = load_model(resolve_model(args.model))
    optimizer = train.make_optimizer(model, train.Config(train_data=["none"]))
    step_seconds(model, optimizer, args.tokens)
    state = [x for p in model.parameters() for x in (p.detach(), *(
        optimizer.state[p][key] for key in checkpoint.AVERAGES))]
    size = sum(x.numel() * x.itemsize for x in state)
    into = [torch.zeros_like(x) for x in state]
    print(f"{machine['cpu']}, {cores()} threads, torch {torch.__version__}, {size / 1e9:.2f} GB a checkpoint")
    widths = [6, 11, 11, 8, 9, 9, 9]
    print_table(["round", "disk MB/s", "save MB/s", "ratio", "crc s", "copy s", "step s"], [], widths)
    rounds = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.folder) as folder:
        ways = {"disk_seconds": lambda: write_plain(Path(folder) / "plain", size),
                "save_seconds": lambda: save_seconds(folder, model, optimizer)}
        for number in range(args.rounds + 1):
            run, steps = {}, []
            for name in sorted(ways, reverse=number % 2 == 0):
                steps.append(step_seconds(model, optimizer, args.tokens))
                run[name] = ways[name]()
            run.update(crc_seconds=crc_seconds(state), copy_seconds=copy_seconds(state, into),
                       step_seconds=statistics.mean(steps))
            if not number:
                continue
            rounds.append(run)
            seconds = [f"{run[name]:.2f}" for name in ("crc_seconds", "copy_seconds", "step_seconds")]
            print_table([str(number), *(f"{size / run[name] / 1e6:,.0f}" for name in ways),
                         f"{run['disk_seconds'] / run['save_seconds']:.2f}", *seconds], [], widths)
    middle = {name: statistics.median(run[name] for run in rounds) for name in rounds[0]}
    print(f"medians: the disk {size / middle['disk_seconds'] / 1e6:,.0f} MB/s, a save "
          f"{middle['disk_seconds'] / middle['save_seconds']:.2f} of that, or "
          f"{middle['save_seconds'] / middle['step_seconds']:.1f} steps of {args.tokens:,} tokens")
    print(json.dumps({"hardware": machine, "bytes": size, "rounds": rounds, "medians": middle}))


if __name__ == "__main__":
    main()
