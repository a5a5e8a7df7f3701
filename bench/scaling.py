"""Our speed and memory against sequence length, micro-batch tokens, model size and ranks.

    python -m bench.scaling --output scaling.png            about an hour on two cores; --quick: a few minutes
    python -m bench.scaling --only sequence,tokens --steps 3

Each point is a process of its own (two under torchrun) that builds a Llama of random weights and runs the
step of train.py on documents of random tokens, all of one length; two thirds of the targets are trained on.
tokens/s is over all ranks and steps after the warm-up; memory is the sum of the ranks' ru_maxrss. One sweep
varies one thing and keeps the others at 135M, documents of 512 tokens, 4,096 tokens a micro-batch, one rank.
--output needs matplotlib. The last line printed is one JSON object.
"""
import argparse
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path

from bench.common import cores, hardware, json_child, print_table

# layers, width, heads, key/value heads, feed-forward width, vocabulary; the larger two are SmolLM2's
MODELS = {"15M": (6, 288, 6, 2, 768, 32000), "135M": (30, 576, 9, 3, 1536, 49152),
          "360M": (32, 960, 15, 5, 2560, 49152)}
BASE = {"model": "135M", "sequence": 512, "tokens": 4096, "ranks": 1}
SWEEPS = {"sequence": [256, 512, 1024, 2048, 4096, 8192], "tokens": [1024, 2048, 4096, 8192, 16384],
          "model": list(MODELS), "ranks": [1, 2]}
QUICK = {"sequence": [256, 1024], "tokens": [512, 1024], "model": ["15M"], "ranks": [1, 2]}
QUICK_BASE = {"model": "15M", "sequence": 256, "tokens": 1024, "ranks": 1}


def point(args: argparse.Namespace) -> None:
    """One measurement; rank 0 writes the result."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    import train
    from kernels.head import weighted_nll
    from runtime.machine import keep_freed_memory
    from model import Llama, ModelConfig, init_weights

    keep_freed_memory()
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world > 1:
        dist.init_process_group("gloo")
    layers, width, heads, key_heads, feed_forward, vocabulary = MODELS[args.size]
    raw = Llama(ModelConfig.from_dict({
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": width,
        "num_attention_heads": heads, "num_key_value_heads": key_heads, "intermediate_size": feed_forward,
        "vocab_size": vocabulary, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}))
    init_weights(raw, 0)
    model = raw if world == 1 else DistributedDataParallel(raw, gradient_as_bucket_view=True)
    optimizer = train.make_optimizer(raw, train.Config(train_data=["none"]))
    documents = max(1, args.tokens // args.sequence)
    n = documents * args.sequence
    make = torch.Generator().manual_seed(rank)
    ids = torch.randint(vocabulary, (n + 1,), generator=make)
    ids, targets = ids[:-1], ids[1:]
    positions = torch.arange(args.sequence).repeat(documents)
    cu_seqlens = torch.arange(0, n + 1, args.sequence, dtype=torch.int32)
    rows = (torch.rand(n, generator=make) < 2 / 3).nonzero().squeeze(1)
    scale = torch.full((len(rows),), 1.0 / len(rows))
    times = []
    for _ in range(args.warmup + args.steps):
        began = time.monotonic()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(ids, positions, cu_seqlens)
            loss, _ = weighted_nll(hidden[rows], raw.head_weight, targets[rows], scale)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(raw.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.monotonic() - began)
    memory = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                           / (2**20 if sys.platform == "linux" else 2**30)])
    if world > 1:
        dist.all_reduce(memory)
    later = times[args.warmup:]
    if rank == 0:
        Path(args.result).write_text(json.dumps({
            "parameters": sum(p.numel() for p in raw.parameters()), "tokens_of_step": n * world,
            "tokens_per_second": n * world * len(later) / sum(later),
            "step_seconds": statistics.median(later), "first_step_seconds": times[0],
            "peak_memory_gb": memory.item()}))
    if world > 1:   # as train.py ends: gloo's own end can hang
        dist.barrier()
        os._exit(0)


def measure(setting: dict, args: argparse.Namespace) -> dict:
    """A point in a new process; threads are shared out among the ranks."""
    ranks = setting["ranks"]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    start = start if ranks > 1 else []
    return json_child([*start, "-m", "bench.scaling", "--point", "--size", setting["model"], "--sequence",
                       str(setting["sequence"]), "--tokens", str(max(setting["tokens"], setting["sequence"])),
                       "--steps", str(args.steps), "--warmup", str(args.warmup)],
                      max(1, args.threads // ranks), timeout=args.timeout)


def plot(sweeps: dict[str, list[dict]], file: str) -> None:
    try:
        import matplotlib
    except ImportError:
        sys.exit("error: --output needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, len(sweeps), figsize=(3.2 * len(sweeps), 5), squeeze=False)
    titles = {"sequence": "document length", "tokens": "micro-batch tokens", "model": "parameters",
              "ranks": "ranks"}
    labels = {"tokens_per_second": "tokens/s", "peak_memory_gb": "peak memory, GB"}
    for column, (name, points) in enumerate(sweeps.items()):
        done = [p for p in points if "error" not in p]
        x = [p["parameters"] if name == "model" else p["setting"][name] for p in done]
        for row, (key, label) in enumerate(labels.items()):
            ax = axes[row, column]
            ax.plot(x, [p[key] for p in done], "o-")
            ax.set_xscale("log", base=2)
            ax.set_xticks(x, [p["setting"][name] for p in done], fontsize=7)    # what was measured
            ax.minorticks_off()
            ax.set_ylim(0, 1.1 * max((p[key] for p in done), default=1))
            ax.set_xlabel(titles[name])
            ax.set_ylabel(label if column == 0 else "")
            ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--only", default=",".join(SWEEPS), help=f"sweeps, of {', '.join(SWEEPS)}")
    parser.add_argument("--steps", type=int, default=3, help="steps measured")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=cores(), help="of all ranks together")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds a point may take")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller points, one step each")
    parser.add_argument("--output", metavar="FILE.png", help="plot")
    parser.add_argument("--point", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=tuple(MODELS), default="135M", help=argparse.SUPPRESS)
    parser.add_argument("--sequence", type=int, default=512, help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=4096, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        return point(args)
    names = [name for name in args.only.split(",") if name]
    if unknown := set(names) - set(SWEEPS):
        sys.exit(f"error: --only {', '.join(sorted(unknown))}: choose of {', '.join(SWEEPS)}")
    if args.quick:
        args.steps, args.warmup = 1, 1
    known: dict[str, dict] = {}  # the base point belongs to every sweep and is measured once
    sweeps: dict[str, list[dict]] = {}
    machine = hardware()
    print(f"{machine['cpu']}, {args.threads} threads, torch {machine['versions'].get('torch')}")
    widths = [10, 9, 10, 9, 7, 11, 9, 11]
    heads = ["sweep", "model", "document", "tokens", "ranks", "tokens/s", "step s", "peak GB"]
    print_table(heads, [], widths)
    for name in names:
        sweeps[name] = []
        for value in (QUICK if args.quick else SWEEPS)[name]:
            setting = {**(QUICK_BASE if args.quick else BASE), name: value}
            key = json.dumps(setting)
            if key not in known:
                try:
                    known[key] = measure(setting, args)
                except RuntimeError as error:
                    known[key] = {"error": str(error)}
            result = known[key]
            shown = ["failed", "", ""] if "error" in result else [
                f"{result['tokens_per_second']:,.0f}", f"{result['step_seconds']:.2f}",
                f"{result['peak_memory_gb']:.2f}"]
            described = [str(setting[k]) for k in ("model", "sequence", "tokens", "ranks")]
            print_table([name, *described, *shown], [], widths)
            if "error" in result:
                print(result["error"], file=sys.stderr)
            sweeps[name].append({"setting": setting, **result})
    if args.output:
        plot(sweeps, args.output)
    print(json.dumps({"hardware": machine, "steps": args.steps, "warmup": args.warmup, "sweeps": sweeps}))


if __name__ == "__main__":
    main()
