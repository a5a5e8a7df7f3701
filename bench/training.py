"""Training speed of train.py beside other trainers, on the same records, model, threads and precision.

    pip install -r bench/requirements.txt && pip install --no-deps litgpt==0.5.9
    python -m bench.training --model DIR --train-data FILE --peers trl,transformers,litgpt --floor --profile

Ours is train.py itself, with a batch size for which every step is one nearly full micro-batch. Each trainer
runs in a process of its own, in turn (ours, peer, peer, ours, ...), because a machine's speed drifts: ratios
are between runs of one round. All fine-tune all weights with AdamW, one micro-batch a step, under bf16
autocast over fp32 parameters.

  trl-packed    TRL's SFTTrainer with packing, micro-batch-tokens / max-length rows; what its guide advises
  trl-padded    the same, --padded-batch records a step, padded to the longest
  transformers  a plain loop; records sorted by length and padded, up to micro-batch-tokens a step
  litgpt        litgpt's own full fine-tuning; --padded-batch records, no clipping, head not tied
  recompute, compile    train.py again, with that flag

tokens/s counts real tokens (targets: an example's tokens less one), never padding; trained/s those that the
loss is on. 1st/later: the first step's time over the median of those after the warm-up. peak: ru_maxrss after
the last step. --floor times the matrix products of our step alone, in the same rounds; --profile takes a step
apart. The last line printed is one JSON object with all of it.
"""
import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from bench.common import REPOSITORY, child, cores, hardware, json_child, print_table, version

PEERS = {  # name: the package it needs
    "trl-packed": "trl", "trl-padded": "trl", "transformers": "transformers", "litgpt": "litgpt",
    "recompute": "torch", "compile": "torch",
}

INSTALL = "pip install -r bench/requirements.txt && pip install --no-deps litgpt==0.5.9"


def prepare(args: argparse.Namespace, folder: Path) -> dict:
    """Tokenise with data.py, write ids and labels for the peers, choose train.py's batch size and seed. In a
    child, since it needs torch."""
    json_child(["-m", "bench.training", "--prepare", str(folder), "--model", args.model, "--train-data",
                *args.train_data, "--loss", args.loss, "--template", args.template, "--max-length",
                str(args.max_length), "--micro-batch-tokens", str(args.micro_batch_tokens), "--steps",
                str(args.steps), "--warmup", str(args.warmup)], args.threads)
    return json.loads((folder / "prepared.json").read_text())


def prepare_here(args: argparse.Namespace, folder: Path) -> None:
    from chat import Tokenizer, load_template
    from data import load_dataset
    from train import export
    from loss import span_weights
    from runtime.weights import resolve_model
    tokenizer = Tokenizer(resolve_model(args.model))
    template = load_template(args.template, tokenizer)
    cache = folder / "cache"
    dataset = load_dataset(args.train_data, tokenizer, template, args.max_length, "truncate", cache)
    weights = span_weights(args.loss)
    usable = dataset.trainable(weights)
    export(dataset, usable, weights, folder / "records.jsonl")
    batch_size, seed, sums = choose_steps(dataset.lengths[usable], args.micro_batch_tokens,
                                          args.warmup + args.steps + 1)
    trained = dataset.counts[usable][:, weights != 0].sum() / dataset.lengths[usable].sum()
    (folder / "prepared.json").write_text(json.dumps({
        "records": len(usable), "mean_tokens": float(dataset.lengths[usable].mean()),
        "trained_share": float(trained), "batch_size": batch_size, "seed": seed, "tokens_of_steps": sums}))
    Path(args.result).write_text("{}")


def choose_steps(lengths: np.ndarray, capacity: int, steps: int) -> tuple[int, int, list[int]]:
    """A batch size and a seed of train.py with which each of the first steps fits one micro-batch and they
    are as full as can be. Returns them and the tokens of each step."""
    best: tuple[float, int, int, list[int]] = (-1.0, 0, 0, [])
    most = max(1, min(int(capacity / lengths.mean()) + 1, len(lengths) // steps))
    for seed in range(2000):
        ordered = lengths[np.random.default_rng([seed, 0]).permutation(len(lengths))]  # data.plan's order
        for batch_size in range(max(1, most - max(2, most // 3)), most + 1):
            sums = ordered[:batch_size * steps].reshape(steps, batch_size).sum(1)
            if sums.max() <= capacity and sums.mean() > best[0]:
                best = (float(sums.mean()), batch_size, seed, sums.tolist())
    if best[0] < 0:
        raise ValueError(f"--micro-batch-tokens {capacity}: no steps of these records fit, whose mean is "
                         f"{lengths.mean():.0f} and longest {lengths.max()} tokens; raise it")
    return best[1:]


# ---------------------------------------------------------------- one run


def run_ours(args: argparse.Namespace, folder: Path, prepared: dict, *flags: str) -> dict:
    """train.py, one step more than is measured: the last also looks at spans that are not trained on."""
    out = folder / "ours"
    child([str(REPOSITORY / "train.py"), "--model", args.model, "--train-data",
           *args.train_data, "--template", args.template, "--max-length", str(args.max_length),
           "--loss", args.loss, "--batch-size", str(prepared["batch_size"]),
           "--micro-batch-tokens", str(args.micro_batch_tokens), "--seed", str(prepared["seed"]),
           "--max-steps", str(args.warmup + args.steps + 1), "--log-every", str(10**9),
           "--cache-dir", str(folder / "cache"), "--output-dir", str(out), "--overwrite",
           "--device", "cpu", *flags], args.threads, args.allocator)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][:-1]
    columns = ([line[key] for line in lines] for key in ("seconds", "tokens", "trained_tokens"))
    return summarise(*columns, lines[-1]["peak_memory_mb"] / 1024, args.warmup, lines[-1]["loss"])


def run_peer(name: str, args: argparse.Namespace, folder: Path, prepared: dict) -> dict:
    if PEERS[name] == "torch":
        return run_ours(args, folder, prepared, f"--{name}")
    raw = json_child(["-m", "bench.peers", name, "--model", args.model,
                      "--records", str(folder / "records.jsonl"), "--max-length", str(args.max_length),
                      "--micro-batch-tokens", str(args.micro_batch_tokens),
                      "--padded-batch", str(args.padded_batch), "--steps", str(args.warmup + args.steps),
                      "--folder", str(folder / name)], args.threads, args.allocator)
    result = summarise(raw["seconds"], raw["tokens"], raw["trained"], raw["peak_memory_gb"], args.warmup,
                       raw["loss"])
    return {**result, "computed_tokens": raw["computed"][args.warmup:], "note": raw["note"]}


def summarise(seconds: list[float], tokens: list[int], trained: list[int], peak: float, warmup: int,
              loss: float | None) -> dict:
    later = seconds[warmup:]
    return {"tokens_per_second": sum(tokens[warmup:]) / sum(later),
            "trained_tokens_per_second": sum(trained[warmup:]) / sum(later),
            "step_seconds": statistics.median(later), "peak_memory_gb": peak,
            "first_over_later": seconds[0] / statistics.median(later), "all_seconds": seconds,
            "tokens": tokens[warmup:], "trained_tokens": trained[warmup:], "last_loss": loss}


def run_floor(args: argparse.Namespace, ours: dict) -> dict:
    """The matrix products of a step of ours, and what share of the step's time they are."""
    tokens, rows = (round(statistics.mean(ours[name])) for name in ("tokens", "trained_tokens"))
    floor = json_child(["-m", "bench.step", "floor", "--model", args.model, "--tokens", str(tokens), "--rows",
                        str(rows), "--repeats", str(args.steps)], args.threads, args.allocator)
    mean_step = sum(ours["tokens"]) / len(ours["tokens"]) / ours["tokens_per_second"]
    return {**floor, "share_of_step": floor["seconds"] / mean_step,
            "tokens_per_second": tokens / floor["seconds"]}


# ---------------------------------------------------------------- the whole


def middle(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def report(runs: dict[str, list[dict]], ratios: dict[str, list[float]], missing: dict[str, str]) -> None:
    rows = []
    for name, done in runs.items():
        if not done:
            continue
        values = ratios.get(name)
        ratio = f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})" if values else ""
        rows.append([name, *(f"{middle(done, key):,.{digits}f}" for key, digits in (
            ("tokens_per_second", 1), ("trained_tokens_per_second", 1), ("step_seconds", 2),
            ("first_over_later", 2), ("peak_memory_gb", 2))), ratio])
    print()
    print_table(["trainer", "tokens/s", "trained/s", "step s", "1st/later", "peak GB", "ours / peer"], rows,
                [13, 10, 11, 9, 11, 9, 17])
    for name, done in runs.items():
        if done and done[0].get("note"):
            print(f"{name}: {done[0]['note']}")
    for name, why in missing.items():
        print(f"{name}: {why}")


def print_profile(profile: dict) -> None:
    print(f"\na step of {profile['tokens']:,} tokens, {profile['rows']:,} of them trained on: "
          f"{profile['seconds']:.2f} s, {profile['profiled_seconds']:.2f} s under the profiler")
    rows = [[part["name"], f"{part['forward']:.3f}", f"{part['backward']:.3f}", f"{part['share']:.1%}"]
            for part in profile["parts"]]
    total = [sum(part[key] for part in profile["parts"]) for key in ("forward", "backward", "share")]
    print_table(["part", "forward s", "backward s", "share"], [
        *rows, ["sum", f"{total[0]:.3f}", f"{total[1]:.3f}", f"{total[2]:.1%}"]], [28, 12, 12, 9])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--train-data", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--loss", choices=("it", "im", "lm"), default="im")
    parser.add_argument("--template", default="auto")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a record; more are cut")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--padded-batch", type=int, default=8, help="records a step of trl-padded and litgpt")
    parser.add_argument("--steps", type=int, default=4, help="steps measured")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers", default="", help=f"of {','.join(PEERS)}; trl is both of TRL's")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--allocator", action="store_true", help="tell glibc to keep freed memory, for all")
    parser.add_argument("--floor", action="store_true", help="time the matrix products of a step alone")
    parser.add_argument("--profile", action="store_true", help="where our step's time goes")
    parser.add_argument("--result", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.prepare:
        return prepare_here(args, Path(args.prepare))
    names = [name for part in args.peers.split(",") if part
             for name in (("trl-packed", "trl-padded") if part == "trl" else (part,))]
    if unknown := set(names) - set(PEERS):
        sys.exit(f"error: --peers {', '.join(sorted(unknown))}: choose of trl, {', '.join(PEERS)}")
    if args.steps < 1 or args.warmup < 1 or args.rounds < 1:
        sys.exit("error: --steps, --warmup and --rounds must be 1 or more")
    missing = {name: f"{PEERS[name]} is not installed; {INSTALL}" for name in names
               if version(PEERS[name]) is None}
    names = [name for name in names if name not in missing]
    args.model = str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model
    args.train_data = [str(Path(file).resolve()) for file in args.train_data]
    machine = hardware("transformers", "trl", "accelerate", "litgpt", "lightning", "tokenizers", "numpy")
    runs: dict[str, list[dict]] = {"ours": [], **{name: [] for name in names}}
    floors, ratios, profile = [], {name: [] for name in names}, None
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        try:
            prepared = prepare(args, folder)
        except RuntimeError as error:
            sys.exit(f"error: {str(error).splitlines()[-1]}")
        print(f"{machine['cpu']}, {args.threads} threads, torch {machine['versions'].get('torch')}; "
              f"{prepared['records']:,} records of {prepared['mean_tokens']:.0f} tokens,\n"
              f"{prepared['trained_share']:.0%} trained on under --loss {args.loss}; "
              f"a step of ours: {prepared['batch_size']} records, "
              f"{np.mean(prepared['tokens_of_steps']):,.0f} tokens")
        for number in range(args.rounds):
            for name in list(runs):
                if name in missing:
                    continue
                try:
                    run = (run_ours(args, folder, prepared) if name == "ours"
                           else run_peer(name, args, folder, prepared))
                except RuntimeError as error:
                    if name == "ours":
                        sys.exit(f"error: {error}")
                    missing[name] = f"did not run: {str(error).splitlines()[-1][:300]}"
                    print(f"round {number + 1}: {name}: {error}", file=sys.stderr)
                    continue
                runs[name].append(run)
                line = f"{run['tokens_per_second']:8.1f} tokens/s, {run['peak_memory_gb']:.1f} GB"
                if name == "ours" and args.floor:
                    floors.append(run_floor(args, run))
                    line += f"; the matrix products alone are {floors[-1]['share_of_step']:.1%} of a step"
                elif name != "ours":
                    ratios[name].append(runs["ours"][-1]["tokens_per_second"] / run["tokens_per_second"])
                print(f"round {number + 1}: {name:<13}{line}", flush=True)
        if args.profile:
            profile = json_child(
                ["-m", "bench.step", "profile", "--model", args.model, "--train-data", *args.train_data,
                 "--template", args.template, "--loss", args.loss, "--max-length", str(args.max_length),
                 "--micro-batch-tokens", str(args.micro_batch_tokens), "--warmup", str(args.warmup),
                 "--batch-size", str(prepared["batch_size"]), "--seed", str(prepared["seed"]),
                 "--repeats", str(args.steps), "--cache-dir", str(folder / "cache")],
                args.threads, args.allocator)
    report(runs, ratios, missing)
    if floors:
        print(f"\nmatrix products alone: {middle(floors, 'seconds'):.2f} s, "
              f"{middle(floors, 'gflops'):,.0f} GFLOP/s, "
              f"{middle(floors, 'tokens_per_second'):,.0f} tokens/s;\n"
              f"that is {middle(floors, 'share_of_step'):.1%} of our mean step")
    if profile:
        print_profile(profile)
    settings = {name: value for name, value in vars(args).items() if name not in ("result", "prepare")}
    print(json.dumps({"hardware": machine, "settings": settings, "data": prepared, "runs": runs,
                      "ours_over_peer": ratios, "floor": floors, "profile": profile, "missing": missing}))


if __name__ == "__main__":
    main()
