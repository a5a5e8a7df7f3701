"""Memory and speed of --shard beside DDP: what a rank holds, its peaks while loading, training and saving.

    python -m bench.sharding --model DIR [--ranks 2] [--micro-batches 4] [--tokens 1024]

  ddp         every rank holds everything
  shard       as train.py --shard: a gradient is added up over the ranks after every micro-batch
  shard late  after the step's last micro-batch only, gradients kept whole until then

Each in processes of its own, as train.py does it but for data: random tokens in documents of 256, two thirds
of them trained on. state: parameters, gradients and AdamW's averages of rank 0, counted. load, steps, save
(of a checkpoint) and resume (from it, in the same process): rank 0's peak of resident memory up to then, less
what it had before the model, so a figure that is not larger than the one before it means no new peak. All in
GB. The last line printed is one JSON object.
"""
import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bench.common import cores, hardware, json_child, print_table

MODES = ("ddp", "shard", "shard late")
PHASES = ("load", "steps", "save", "resume")


def peak_bytes() -> int:
    """The most resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)


def point(args: argparse.Namespace) -> None:
    """One mode, on every rank; rank 0 writes the result."""
    from contextlib import nullcontext
    from functools import partial

    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from runtime import checkpoint
    import train
    from kernels.head import weighted_nll
    from runtime.machine import keep_freed_memory
    from model import load_model
    from runtime.distributed import shard, whole
    from runtime.weights import local_rows

    keep_freed_memory()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    before, peaks = peak_bytes(), {}

    divide = partial(shard, device=torch.device("cpu"), dtype=dtype) if args.mode != "ddp" else None
    raw = load_model(args.model, "cpu", divide)
    raw.recompute = args.recompute
    peaks["load"] = peak_bytes()
    model = raw if divide else DistributedDataParallel(raw, gradient_as_bucket_view=True)
    if not divide:
        train.settle_buckets(model, torch.device("cpu"))
    optimizer = train.make_optimizer(raw, train.Config(train_data=["none"]))
    documents = max(1, args.tokens // 256)
    n = documents * 256
    make = torch.Generator().manual_seed(rank)
    ids = torch.randint(raw.config.vocab_size, (n + 1,), generator=make)
    ids, targets = ids[:-1], ids[1:]
    positions = torch.arange(256).repeat(documents)
    cu_seqlens = torch.arange(0, n + 1, 256, dtype=torch.int32)
    rows = (torch.rand(n, generator=make) < 2 / 3).nonzero().squeeze(1)
    scale = torch.full((len(rows),), 1.0 / len(rows) / args.micro_batches)
    seconds = []
    for step in range(args.warmup + args.steps):
        began = time.monotonic()
        for i in range(args.micro_batches):
            last = i + 1 == args.micro_batches
            if args.mode == "shard late":
                raw.set_requires_gradient_sync(last)
            with nullcontext() if last or divide else model.no_sync():
                with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bf16"):
                    hidden = model(ids, positions, cu_seqlens)
                    loss, _ = weighted_nll(hidden[rows], raw.head_weight, targets[rows], scale)
                loss.backward()
        norm = whole(torch.nn.utils.clip_grad_norm_(raw.parameters(), 1.0)).item()
        optimizer.step()
        if step + 1 == args.warmup + args.steps:
            state = sum(local_rows(x).numel() * x.itemsize for p in raw.parameters()
                        for x in (p, p.grad, *optimizer.state[p].values()))
        optimizer.zero_grad(set_to_none=model is raw)
        seconds.append(time.monotonic() - began)
    peaks["steps"] = peak_bytes()
    shared = [tempfile.mkdtemp(dir=args.folder)]
    dist.broadcast_object_list(shared)
    began = time.monotonic()
    saved = checkpoint.save_checkpoint(shared[0], 1, raw, optimizer, {}, 1)
    dist.barrier()
    save_seconds = time.monotonic() - began
    peaks["save"] = peak_bytes()
    optimizer.state.clear()
    checkpoint.load_checkpoint(saved, raw, optimizer)
    peaks["resume"] = peak_bytes()
    if rank == 0:
        Path(args.result).write_text(json.dumps({
            "parameters": sum(p.numel() for p in raw.parameters()), "state_gb": state / 1e9,
            "grad_norm": norm, "step_seconds": statistics.median(seconds[args.warmup:]),
            "save_seconds": save_seconds, "before_gb": before / 1e9,
            "peak_gb": {phase: (peak - before) / 1e9 for phase, peak in peaks.items()}}))
    dist.barrier()
    os._exit(0)     # as train.py ends: gloo's own end can hang


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, metavar="DIR", help="a checkpoint folder")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step, on each rank")
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro-batch")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--steps", type=int, default=3, help="steps measured")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=cores(), help="of all ranks together")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode:
        return point(args)
    machine = hardware()
    print(f"{machine['cpu']}, {args.ranks} ranks, {args.threads} threads, torch "
          f"{machine['versions'].get('torch')}")
    widths = [12, 7, 10, 9, 9, 9, 9, 9, 9]
    print_table(["mode", "round", "state GB", *PHASES, "step s", "save s"], [], widths)
    runs = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for number in range(args.rounds):
            for mode in MODES:
                run = json_child(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                                  str(args.ranks), "-m", "bench.sharding", "--mode", mode, "--model",
                                  args.model, "--micro-batches", str(args.micro_batches), "--tokens",
                                  str(args.tokens), "--dtype", args.dtype, "--steps", str(args.steps),
                                  "--warmup", str(args.warmup), "--folder", folder,
                                  *(["--recompute"] if args.recompute else [])],
                                 max(1, args.threads // args.ranks))
                shown = [run["state_gb"], *(run["peak_gb"][phase] for phase in PHASES), run["step_seconds"],
                         run["save_seconds"]]
                print_table([mode, str(number + 1), *(f"{x:.2f}" for x in shown)], [], widths)
                runs.append({"mode": mode, "round": number + 1, **run})
    print(json.dumps({"hardware": machine, "runs": runs}))


if __name__ == "__main__":
    main()
