"""Training speed of train.py, next to another checkout of it or to itself with other flags.

    python -m bench.training --model DIR --train-data FILE --compare /path/to/another/checkout
    python -m bench.training --model DIR --train-data FILE --ranks 1 2 --variant=--shard -- --dtype fp32

Each contender runs in processes of its own, and contenders take turns, because the speed of a machine drifts:
a ratio compares two runs of one round. What follows `--` is given to every train.py. A batch size whose
records fit into --micro-batch-tokens makes one micro-batch a step; a larger one makes several.

tokens/s counts real tokens, never padding; trained/s counts those that the loss is on. first/later: the first
step's time over the median of the measured ones. peak: memory of rank 0, in GB. Of several rounds medians are
shown, with ranges in brackets. The last line printed is one JSON object with all of it.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench.common import REPOSITORY, child, cores, hardware, in_turn, print_machine, print_table, spread

THIS = "train.py"


def run_train(checkout: Path, flags: list[str], args: argparse.Namespace, ranks: int, batch_size: int,
              folder: Path) -> dict:
    """Run a checkout's train.py and read its metrics.jsonl."""
    # The first and the last step also compute the NLL of spans that are not trained: one step more than is
    # measured, and the last is left out.
    steps = args.warmup + args.steps + 1
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    child([*(launcher if ranks > 1 else []), str(checkout / "train.py"), "--model", args.model,
           "--train-data", *args.train_data, "--loss", args.loss, "--max-length", str(args.max_length),
           "--micro-batch-tokens", str(args.micro_batch_tokens), "--batch-size", str(batch_size),
           "--max-steps", str(steps), "--log-every", str(10**9), "--cache-dir", str(folder / "cache"),
           "--output-dir", str(folder / "run"), "--overwrite", *flags],
          max(1, args.threads // ranks), checkout)
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()][:-1]
    columns = ([line[key] for line in lines] for key in ("seconds", "tokens", "trained_tokens"))
    return summary(*columns, lines[-1]["peak_memory_mb"] / 1024, args.warmup)


def summary(seconds: list[float], tokens: list[int], trained: list[int], peak_gb: float, warmup: int) -> dict:
    """What a run is judged by: its steps after the first `warmup` ones."""
    later = seconds[warmup:]
    return {"tokens_per_second": sum(tokens[warmup:]) / sum(later),
            "trained_tokens_per_second": sum(trained[warmup:]) / sum(later),
            "tokens_per_step": statistics.mean(tokens[warmup:]), "step_seconds": statistics.median(later),
            "first_over_later": seconds[0] / statistics.median(later), "peak_memory_gb": peak_gb,
            "all_seconds": seconds}


def commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown commit"


def measure(contenders: dict[str, Callable[[], dict]], rounds: int, setting: str) -> dict[str, list[dict]]:
    """Run all contenders once a round. One that fails is left out from then on, but train.py ends it all."""
    runs: dict[str, list[dict]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in in_turn(list(contenders), number):
            try:
                run = contenders[name]()
            except RuntimeError as error:
                if name == THIS:
                    sys.exit(f"error: {error}")
                print(f"{name} does not run and is left out: {error}", file=sys.stderr)
                del contenders[name], runs[name]
                continue
            runs[name].append(run)
            print(f"{setting}, round {number + 1}: {name}: {run['tokens_per_second']:,.1f} tokens/s, "
                  f"{run['peak_memory_gb']:.2f} GB", flush=True)
    return runs


def table_rows(runs: dict[str, list[dict]], setting: list[str]) -> list[list[str]]:
    rows = []
    for name, of_name in runs.items():
        speeds = {who: [run["tokens_per_second"] for run in runs[who]] for who in (THIS, name)}
        ratios = [a / b for a, b in zip(*speeds.values())] if name != THIS else []
        shown = [("tokens_per_step", 0), ("trained_tokens_per_second", 1), ("step_seconds", 2),
                 ("first_over_later", 2), ("peak_memory_gb", 2)]
        cells = [f"{statistics.median(run[key] for run in of_name):,.{digits}f}" for key, digits in shown]
        rows.append([name, *setting, spread(speeds[name], 1), *cells, spread(ratios, 2) if ratios else ""])
    return rows


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     usage="python -m bench.training [flags] [-- flags of train.py]")
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
                        help="train.py again with more flags, as --variant='--recompute'; may be repeated")
    split = argv.index("--") if "--" in argv else len(argv)
    args, passed = parser.parse_args(argv[:split]), argv[split + 1:]
    if min(args.steps, args.warmup, args.rounds, *args.ranks, *args.batch_size) < 1:
        parser.error("--steps, --warmup, --rounds, --ranks and --batch-size must be 1 or more")
    for checkout in args.compare:
        if not (checkout / "train.py").is_file():
            parser.error(f"--compare {checkout}: has no train.py; name the root of a checkout")

    checkouts = {THIS: (REPOSITORY, passed)}
    checkouts |= {f"{checkout}": (checkout.resolve(), passed) for checkout in args.compare}
    checkouts |= {variant: (REPOSITORY, passed + variant.split()) for variant in args.variant}
    machine, results, rows = hardware("numpy", "tokenizers"), [], []
    print_machine(machine, args.threads)
    commits = {name: commit(checkout) for name, (checkout, _) in checkouts.items()}
    print(", ".join(f"{name}: {commits[name]}" for name in commits if name not in args.variant))
    for ranks in args.ranks:
        for batch_size in args.batch_size:
            with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
                contenders: dict[str, Callable[[], dict]] = {}
                for number, (name, (checkout, flags)) in enumerate(checkouts.items()):
                    folder = Path(temporary) / str(number)
                    contenders[name] = lambda checkout=checkout, flags=flags, folder=folder: run_train(
                        checkout, flags, args, ranks, batch_size, folder)
                runs = measure(contenders, args.rounds, f"{ranks} ranks, batch {batch_size}")
            rows += table_rows(runs, [str(ranks), str(batch_size)])
            results.append({"ranks": ranks, "batch_size": batch_size, "runs": runs})
    print()
    width = 2 + max(len(name) for name in checkouts)
    print_table(["", "ranks", "batch", "tokens/s", "tokens/step", "trained/s", "step s", "first/later",
                 "peak GB", f"{THIS} / this"], rows, [width, 6, 7, 24, 13, 11, 9, 13, 9, 19])
    settings = {name: str(value) for name, value in vars(args).items()}
    print(json.dumps({"hardware": machine, "commits": commits, "settings": settings, "passed": passed,
                      "results": results}))


if __name__ == "__main__":
    main(sys.argv[1:])
