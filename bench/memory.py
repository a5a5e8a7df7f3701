"""What train.py's settings of the allocator are worth: the same run with and without them.

    python -m bench.memory --model DIR --train-data FILE

  none     memory as the system hands it out and takes it back
  keep     glibc told to keep what is freed
  shapes   and oneDNN to remember the primitives of 256 shapes, not 1,024
  reserve  and memory for the first steps taken while data and model are read: train.py as it is

Each in a process of its own, in turn. faults: how often the steps after the first had to be given a page.
"""
import argparse
import contextlib
import json
import os
import resource
import statistics
import sys
import tempfile
from pathlib import Path

from bench.common import cores, hardware, json_child, print_table

VARIANTS = ("none", "keep", "shapes", "reserve")


def one(args: argparse.Namespace) -> None:
    """A run of train.py without what the variant leaves out."""
    from runtime import folder
    from runtime import machine
    import train
    if args.variant == "none":
        machine.keep_freed_memory = lambda: None
    if args.variant in ("none", "keep"):
        os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "1024"
    if args.variant != "reserve":
        train.Reserve.__init__ = lambda self, size: setattr(self, "thread", None)
    faults: list[int] = []
    append_line = folder.append_line

    def counting(path: Path, record: dict) -> None:
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        append_line(path, record)

    folder.append_line = counting
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        status = train.run(["--model", args.model, "--train-data", *args.train_data, "--max-length", "1024",
                            "--batch-size", str(args.batch_size), "--max-steps", str(args.steps),
                            "--log-every", str(10**9), "--device", "cpu", "--cache-dir", args.cache_dir,
                            "--output-dir", folder + "/run"])
        assert status == 0
        lines = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    Path(args.result).write_text(json.dumps({
        "seconds": [line["seconds"] for line in lines], "tokens": [line["tokens"] for line in lines],
        "peak_memory_gb": lines[-1]["peak_memory_mb"] / 1024, "faults": faults}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train-data", required=True, nargs="+", metavar="FILE")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--cache-dir", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        return one(args)
    machine = hardware()
    print(f"{machine['cpu']}, {args.threads} threads, torch {machine['versions'].get('torch')}")
    widths = [9, 7, 13, 13, 16, 14, 9]
    heads = ["settings", "round", "1st step s", "2nd step s", "later tokens/s", "faults later", "peak GB"]
    print_table(heads, [], widths)
    runs = []
    with tempfile.TemporaryDirectory(prefix="bench-") as cache:
        for number in range(args.rounds):
            for variant in VARIANTS:
                run = json_child(["-m", "bench.memory", "--variant", variant, "--model", args.model,
                                  "--train-data", *args.train_data, "--batch-size", str(args.batch_size),
                                  "--steps", str(args.steps), "--cache-dir", cache], args.threads)
                seconds, tokens = run["seconds"], run["tokens"]
                speed = sum(tokens[2:]) / sum(seconds[2:])
                print_table([variant, str(number + 1), f"{seconds[0]:.2f}", f"{seconds[1]:.2f}",
                             f"{speed:,.0f}", f"{(run['faults'][-1] - run['faults'][0]) / 1000:,.0f}k",
                             f"{run['peak_memory_gb']:.2f}"], [], widths)
                runs.append({"variant": variant, "round": number + 1, "later_tokens_per_second": speed,
                             "first_over_later": seconds[0] / statistics.median(seconds[2:]), **run})
    print(json.dumps({"hardware": machine, "runs": runs}))


if __name__ == "__main__":
    main()
