"""Training speed of train.py, next to another checkout of it, to itself with other flags, to other trainers,
and to the matrix products of its step alone.

    python -m bench.training --model DIR --train-data FILE --compare /path/to/another/checkout
    python -m bench.training --model DIR --train-data FILE --ranks 1 2 --variant=--shard -- --dtype fp32
    pip install -r bench/requirements.txt
    python -m bench.training --model DIR --train-data FILE --peers trl transformers --limit --profile

Each contender runs in processes of its own, and contenders take turns, because the speed of a machine drifts:
a ratio compares two runs of one round. What follows `--` is given to every train.py. A batch size whose
records fit into --micro-batch-tokens makes one micro-batch a step; a larger one makes several. --peers are
described in bench/peers.py, --limit and --profile in bench/step.py.

tokens/s counts real tokens, never padding; trained/s counts those that the loss is on. first/later: the first
step's time over the median of the measured ones. peak: memory of rank 0. limit: share of the step's time that
its matrix products alone take. Of several rounds medians are shown, with ranges in brackets. The last line
printed is one JSON object with all of it. A failure or Ctrl-C loses nothing of what was measured before.
"""
import contextlib
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.common import (PEERS, REPOSITORY, child, cores, hardware, in_turn, json_child, make_parser,
                          print_machine, print_table, read_lines, split_flags, spread)
from runtime.start import run_program

THIS = "train.py"
SET_HERE = "--output-dir", "--overwrite", "--max-steps", "--epochs", "--log-every", "--cache-dir"


def run_train(checkout: Path, flags: list[str], args: Namespace, ranks: int, folder: Path) -> dict:
    """Run a checkout's train.py and read its metrics.jsonl."""
    # The first and the last step also compute the NLL of spans that are not trained. So there is one step
    # more than is measured, and the last is left out.
    steps = args.warmup + args.steps + 1
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    child([*(launcher if ranks > 1 else []), str(checkout / "train.py"), "--max-steps", str(steps),
           "--log-every", str(10**9), "--output-dir", str(folder / "run"), "--overwrite", *flags],
          max(1, args.threads // ranks), checkout)
    lines = read_lines(folder / "run/metrics.jsonl")[:-1]
    columns = ([line[key] for line in lines] for key in ("seconds", "tokens", "trained_tokens"))
    return summary(*columns, max(line["peak_memory_mb"] for line in lines) / 1024, args.warmup)


def run_peer(name: str, flags: list[str], args: Namespace) -> dict:
    run = json_child(["-m", "bench.peers", name, "--steps", str(args.warmup + args.steps), "--padded-rows",
                      str(args.padded_rows)], args.threads, flags)
    columns = (run[key] for key in ("seconds", "tokens", "trained", "peak_memory_gib"))
    return {**summary(*columns, args.warmup), "note": run["note"]}


def add_limit(run: dict, flags: list[str], args: Namespace) -> None:
    """Time the matrix products of a step like that of `run`, and add their share of its time to it."""
    micro_batches = math.ceil(run["tokens_per_step"] / args.micro_batch_tokens)
    tokens, trained = (round(run[key] / micro_batches) for key in ("tokens_per_step", "trained_per_step"))
    limit = json_child(["-m", "bench.step", "limit", "--tokens", str(tokens), "--trained", str(trained),
                        "--repeats", str(args.steps)], args.threads, flags)
    mean_step = run["tokens_per_step"] / run["tokens_per_second"]
    run.update(limit=limit, limit_share=micro_batches * limit["seconds"] / mean_step)


def summary(seconds: list[float], tokens: list[int], trained: list[int], peak: float, warmup: int) -> dict:
    """What a run is judged by: its steps after the first `warmup` ones. peak: GiB."""
    later = seconds[warmup:]
    return {"tokens_per_second": sum(tokens[warmup:]) / sum(later),
            "trained_tokens_per_second": sum(trained[warmup:]) / sum(later),
            "tokens_per_step": statistics.mean(tokens[warmup:]),
            "trained_per_step": statistics.mean(trained[warmup:]), "step_seconds": statistics.median(later),
            "first_over_later": seconds[0] / statistics.median(later), "peak_memory_gib": peak,
            "all_seconds": seconds}


def commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown commit"


def measure(contenders: dict[str, Callable[[], dict]], runs: dict[str, list[dict]], rounds: int, setting: str
            ) -> None:
    """Run all contenders once a round, adding to `runs`. One that fails is left out from then on; if train.py
    fails, this ends."""
    for number in range(rounds):
        for name in in_turn(list(contenders), number):
            try:
                run = contenders[name]()
            except ValueError as error:
                if name == THIS:
                    raise
                print(f"{name} failed and is left out: {error}", file=sys.stderr)
                del contenders[name], runs[name]
                continue
            runs[name].append(run)
            note = f" ({run['note']})" if "note" in run else ""
            print(f"{setting}, round {number + 1}: {name}: {run['tokens_per_second']:,.1f} tokens/s, "
                  f"{run['peak_memory_gib']:.2f} GiB{note}", flush=True)


def table_rows(runs: dict[str, list[dict]], setting: list[str]) -> list[list[str]]:
    rows = []
    for name, of_name in runs.items():
        if not of_name:     # it was stopped before
            continue
        speeds = {who: [run["tokens_per_second"] for run in runs[who]] for who in (THIS, name)}
        ratios = [a / b for a, b in zip(*speeds.values())] if name != THIS else []
        shown = [("tokens_per_step", 0), ("trained_tokens_per_second", 1), ("step_seconds", 2),
                 ("first_over_later", 2), ("peak_memory_gib", 2)]
        cells = [f"{statistics.median(run[key] for run in of_name):,.{digits}f}" for key, digits in shown]
        limits = [100 * run["limit_share"] for run in of_name if "limit_share" in run]
        rows.append([name, *setting, spread(speeds[name], 1), *cells, spread(limits, 0) if limits else "",
                     spread(ratios, 2) if ratios else ""])
    return rows


def print_profile(result: dict) -> None:
    profiled = result["profiled"]
    print(f"\na step of {profiled['tokens']:,} tokens, {profiled['trained_tokens']:,} of them trained: "
          f"{result['seconds']:.2f} s, {profiled['seconds']:.2f} s under the profiler")
    total = {key: sum(part[key] for part in result["parts"]) for key in ("forward", "backward", "share")}
    rows = [[part["name"], f"{part['forward']:.3f}", f"{part['backward']:.3f}", f"{part['share']:.1%}"]
            for part in [*result["parts"], {"name": "sum", **total}]]
    print_table(["part", "forward s", "backward s", "share"], rows, [28, 12, 12, 9])


def print_results(found: dict) -> None:
    """The tables, and all of it as JSON; nothing where nothing was measured."""
    rows = [row for each in found["results"]
            for row in table_rows(each["runs"], [str(each["ranks"]), str(each["batch_size"])])]
    if not rows:
        return
    print()
    width = 2 + max(len(row[0]) for row in rows)
    print_table(["", "ranks", "batch", "tokens/s", "tokens/step", "trained/s", "step s", "first/later",
                 "peak GiB", "limit %", f"{THIS} / this"], rows, [width, 6, 7, 28, 13, 11, 9, 13, 9, 12, 19])
    for each in found["profiles"]:
        print_profile(each)
    print(json.dumps(found))


def main(argv: list[str]) -> None:
    parser = make_parser("training", __doc__, "[flags] [-- flags of train.py]")
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--train-data", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--loss", choices=("it", "im", "lm"), default="im")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a record; more are cut off")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[16, 64], help="records a step")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="of torchrun")
    parser.add_argument("--steps", type=int, default=4, help="steps measured")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cores(), help="of all ranks together")
    parser.add_argument("--compare", type=Path, action="append", default=[], metavar="CHECKOUT",
                        help="another checkout of this repository; may be repeated")
    parser.add_argument("--variant", action="append", default=[], metavar="FLAGS",
                        help="train.py again with more flags, as --variant=--recompute; may be repeated")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[], help="on one rank")
    parser.add_argument("--padded-rows", type=int, default=8, help="records of a micro-batch of trainer")
    parser.add_argument("--limit", action="store_true", help="time the matrix products of a step alone")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    own, passed = split_flags(argv)
    args = parser.parse_args(own)
    for flag in passed:
        if flag.partition("=")[0] in parser.flags:
            raise ValueError(f"{flag}: is a flag of this program, too; give it in front of --")
    for flag in itertools.chain(passed, *map(str.split, args.variant)):
        if flag.partition("=")[0] in SET_HERE:
            raise ValueError(f"{flag}: is set for every run by this program; leave it out")
    for checkout in args.compare:
        if not (checkout / "train.py").is_file():
            parser.error(f"--compare {checkout}: has no train.py; name the root of a checkout")

    checkouts = {THIS: (REPOSITORY, [])}
    checkouts |= {str(checkout): (checkout.resolve(), []) for checkout in args.compare}
    checkouts |= {variant: (REPOSITORY, variant.split()) for variant in args.variant}
    machine = hardware("numpy", "tokenizers", *(("transformers", "trl", "accelerate") if args.peers else ()))
    print_machine(machine, args.threads)
    commits = {str(checkout): commit(checkout) for checkout in (REPOSITORY, *args.compare)}
    print(", ".join(f"{checkout}: {name}" for checkout, name in commits.items()))
    settings = {name: str(value) for name, value in vars(args).items()}
    found: dict = {"hardware": machine, "commits": commits, "settings": settings, "passed": passed,
                   "results": [], "profiles": []}
    with contextlib.ExitStack() as at_end:
        at_end.callback(print_results, found)
        folder = Path(at_end.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        for ranks, batch_size in itertools.product(args.ranks, args.batch_size):
            flags = ["--model", args.model, "--train-data", *args.train_data, "--loss", args.loss,
                     "--max-length", str(args.max_length), "--micro-batch-tokens",
                     str(args.micro_batch_tokens), "--batch-size", str(batch_size), "--cache-dir",
                     str(folder / "cache"), *passed]

            def ours(checkout: Path, more: list[str]) -> dict:
                run = run_train(checkout, flags + more, args, ranks, folder)
                if args.limit and ranks == 1 and checkout == REPOSITORY and not more:
                    add_limit(run, flags, args)
                return run

            contenders = {name: partial(ours, *of_name) for name, of_name in checkouts.items()}
            if ranks == 1:
                contenders |= {name: partial(run_peer, name, flags, args) for name in args.peers}
            runs: dict[str, list[dict]] = {name: [] for name in contenders}
            found["results"].append({"ranks": ranks, "batch_size": batch_size, "runs": runs})
            measure(contenders, runs, args.rounds, f"ranks {ranks}, batch {batch_size}")
            if args.profile and ranks == 1:
                found["profiles"].append(json_child(
                    ["-m", "bench.step", "profile", "--warmup", str(args.warmup), "--repeats",
                     str(args.steps)], args.threads, flags))


if __name__ == "__main__":
    run_program(main)
