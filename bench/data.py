"""How fast data is read, planned and packed.

    python -m bench.data --model DIR --train-data FILE... [--large]

Three questions, each answered in processes of their own: records and tokens a second from files into a fresh
token cache (data.load_dataset); time and peak memory of data.plan for 10^5 and 10^6 random lengths, 10^7 with
--large; and for the given files how many micro-batches a step takes beside the fewest that could hold its
tokens, and how full they are, by capacity. The last line printed is one JSON object.
"""
import argparse
import contextlib
import json
import math
import re
import resource
import sys
import tempfile
import time
from pathlib import Path

from bench.common import cores, hardware, json_child, print_table


def peak_mb() -> float:
    if (status := Path("/proc/self/status")).is_file():  # unlike ru_maxrss it can be started anew
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**10 if sys.platform == "linux" else 2**20)


def restart_peak() -> float:
    """Where Linux allows, let the peak count from now; returns the memory in use, in MB."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_mb()


def tokenise(args: argparse.Namespace) -> dict:
    """Into a fresh cache, and again from it; loading the tokenizer and the template is not counted."""
    from chat import Tokenizer, load_template
    from data import load_dataset
    from runtime.weights import resolve_model
    tokenizer = Tokenizer(resolve_model(args.model))
    template = load_template(args.template, tokenizer)
    with tempfile.TemporaryDirectory() as cache:
        times = []
        for _ in range(2):
            began = time.monotonic()
            dataset = load_dataset(args.train_data, tokenizer, template, args.max_length, "truncate", cache)
            times.append(time.monotonic() - began)
        records, tokens = dataset.report["records"], int(dataset.offsets[-1])
    return {"records": records, "tokens": tokens, "seconds": times[0], "from_cache_seconds": times[1],
            "records_per_second": records / times[0], "tokens_per_second": tokens / times[0],
            "peak_memory_mb": peak_mb()}


def time_plan(args: argparse.Namespace) -> dict:
    """Lengths spread as real ones are: log-normal, median 150 tokens, at most 2,048."""
    import numpy as np

    from data import plan
    lengths = np.random.default_rng(0).lognormal(math.log(150), 0.9, args.count)
    lengths = lengths.clip(4, 2048).astype(np.int64)
    before = restart_peak()
    began = time.monotonic()
    steps = plan(lengths, 0, 0, args.batch_size, 4096, 1)
    seconds, after = time.monotonic() - began, peak_mb()
    return {"examples": args.count, "steps": len(steps), "seconds": seconds, "examples_per_second":
            args.count / seconds, "added_memory_mb": after - before, "peak_memory_mb": after}


def packing(args: argparse.Namespace) -> dict:
    """Of an epoch of each file: micro-batches a step, the fewest that its tokens could fit, and how full they
    are. Rows are as long as their tokens, so what is not filled is not computed either: there is no
    padding."""
    from chat import Tokenizer, load_template
    from data import load_dataset, plan
    from runtime.weights import resolve_model
    tokenizer = Tokenizer(resolve_model(args.model))
    template = load_template(args.template, tokenizer)
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for file in args.train_data:
            lengths = load_dataset([file], tokenizer, template, args.max_length, "truncate", cache).lengths
            for capacity in args.capacities:
                if lengths.max() > capacity:
                    continue
                steps = plan(lengths, 0, 0, args.batch_size, capacity, 1)
                micro = [int(lengths[m].sum()) for step in steps for m in step[0]]
                fewest = sum(-(-sum(int(lengths[m].sum()) for m in step[0]) // capacity) for step in steps)
                rows.append({"file": Path(file).name, "examples": len(lengths), "longest": int(lengths.max()),
                             "mean_length": float(lengths.mean()), "capacity": capacity,
                             "batch_size": args.batch_size,
                             "micro_batches_per_step": len(micro) / len(steps),
                             "fewest_per_step": fewest / len(steps),
                             "packing_efficiency": fewest / len(micro),
                             "filled": sum(micro) / (len(micro) * capacity)})
    return {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="checkpoint folder, for its tokenizer")
    parser.add_argument("--train-data", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--template", default="auto")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=128, help="examples a step")
    parser.add_argument("--capacities", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--large", action="store_true", help="plan 10^7 lengths too")
    parser.add_argument("--part", choices=("tokenise", "plan", "packing"), help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        run = {"tokenise": tokenise, "plan": time_plan, "packing": packing}[args.part]
        Path(args.result).write_text(json.dumps(run(args)))
        return
    if Path(args.model).is_dir():
        args.model = str(Path(args.model).resolve())
    common = ["-m", "bench.data", "--model", args.model, "--train-data", *args.train_data,
              "--template", args.template, "--max-length", str(args.max_length), "--batch-size",
              str(args.batch_size), "--capacities", *map(str, args.capacities)]
    machine = hardware("tokenizers", "numpy")
    try:
        read = json_child([*common, "--part", "tokenise"], cores())
        plans = [json_child([*common, "--part", "plan", "--count", str(count)], cores())
                 for count in (10**5, 10**6, 10**7)[:3 if args.large else 2]]
        packed = json_child([*common, "--part", "packing"], cores())["rows"]
    except RuntimeError as error:
        sys.exit(f"error: {str(error).splitlines()[-1]}")
    print(f"{machine['cpu']}, {machine['cores']} cores\n\n"
          f"tokenised {read['records']:,} records, {read['tokens']:,} tokens in {read['seconds']:.2f} s: "
          f"{read['records_per_second']:,.0f} records/s,\n{read['tokens_per_second']:,.0f} tokens/s; "
          f"from the cache {read['from_cache_seconds'] * 1000:.0f} ms\n")
    print_table(["plan of examples", "steps", "seconds", "examples/s", "added MB"], [
        [f"{p['examples']:,}", f"{p['steps']:,}", f"{p['seconds']:.2f}", f"{p['examples_per_second']:,.0f}",
         f"{p['added_memory_mb']:,.0f}"] for p in plans], [20, 12, 12, 14, 12])
    print(f"\npacking of steps of {args.batch_size} examples")
    print_table(["file", "mean", "longest", "capacity", "micro", "fewest", "efficient", "filled"], [
        [p["file"][:24], f"{p['mean_length']:.0f}", str(p["longest"]), str(p["capacity"]),
         f"{p['micro_batches_per_step']:.2f}", f"{p['fewest_per_step']:.2f}",
         f"{p['packing_efficiency']:.1%}", f"{p['filled']:.1%}"] for p in packed],
        [25, 6, 9, 10, 7, 8, 11, 8])
    print(json.dumps({"hardware": machine, "tokenise": read, "plan": plans, "packing": packed}))


if __name__ == "__main__":
    main()
