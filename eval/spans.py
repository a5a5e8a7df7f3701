"""Held-out NLL and perplexity of each kind of span, with bootstrap intervals; several checkpoints compared.

    python -m eval.spans --model BASE RUN/final --data test.jsonl other.jsonl --json spans.json
    torchrun --nproc-per-node 2 -m eval.spans --model ...               the same numbers, on two ranks

Sums are exact, never means of means, whatever the packing and the number of ranks. Two means are given: over
all tokens of a kind, and the paper's, over examples of each one's token mean. Intervals are percentiles of
bootstrap means, over examples drawn with replacement from those that have the kind. Checkpoints after the
first are compared with it on the same draws, so that what makes an example hard for both cancels. Checkpoints
that tokenize a file differently have no tokens in common, and are refused.

Shapes: E examples, K kinds of span, M checkpoints, R resamples.
"""
import argparse

from eval.flags import Parser, answer_command, check_paths


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("spans", __doc__)
    parser.add_model_flags(several=True)
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE",
                        help="held-out records, each file reported on its own")
    parser.add_data_flags()
    parser.add_argument("--per-example", metavar="FILE.jsonl", help="write each example's sums by kind there")
    args = parser.parse_args(argv)
    check_paths(args, "json", "per_example")
    return args


answer_command(__name__, parse_args)

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from chat import KINDS
from data import Dataset, check_embedding, collate, load_dataset, plan
from eval.bootstrap import interval, resampled_sums
from eval.common import Loaded, load, open_checkpoint, run, start_ranks, write_result
from eval.results import MEANS
from kernels.head import nll
from model import Llama
from runtime.distributed import first_of_machine, is_main, rank, shows_progress, world_size
from runtime.files import write_text
from runtime.report import counted, ending, say


@torch.no_grad()
def example_sums(model: Llama, dataset: Dataset, capacity: int, device: torch.device, rank: int = 0,
                 world_size: int = 1, progress: Callable = iter, compiled: bool = True) -> np.ndarray:
    """(E, K) float64 sums of each example's NLL by kind, in nats. Ranks divide the work, and each gets all
    sums. capacity: tokens of a packed row; progress: wraps the list of rows, as tqdm does;
    compiled: as for nll()."""
    rows = [row for step in plan(dataset.lengths, 0, 0, 1024, capacity, world_size) for row in step[rank]]
    sums = torch.zeros(len(dataset) * len(KINDS), dtype=torch.float64)
    cells, values = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, device=device)]
    # Some rows may be empty, and are run nevertheless: all ranks of a sharded model must do the same.
    for examples in progress(rows):
        on_cpu = collate(dataset, examples, np.zeros((len(examples), len(KINDS))))
        cells.append(torch.from_numpy(examples)[on_cpu.documents] * len(KINDS) + on_cpu.kinds)
        batch = on_cpu.to(device)
        hidden = model(batch.ids, batch.positions, batch.cu_seqlens)
        values.append(nll(hidden, model.head_weight, batch.targets, compiled))
    # The only copy from the device, for which the host waits.
    sums.index_add_(0, torch.cat(cells), torch.cat(values).cpu().double())
    if world_size > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    return sums.view(len(dataset), len(KINDS)).cpu().numpy()


def sums_by_file(model: Llama, datasets: dict[str, Dataset], micro_batch_tokens: int, bar: str,
                 compiled: bool = True) -> dict[str, np.ndarray]:
    """example_sums() of each file by its name. An example may be longer than a micro-batch. bar: label of the
    progress bar; compiled: as for nll(). All ranks call."""
    device, sums = model.head_weight.device, {}
    for name, dataset in datasets.items():
        rows = partial(tqdm, desc=ending(f"{bar} on {name}", 32), leave=False, unit=" rows",
                       dynamic_ncols=True, disable=not shows_progress())
        capacity = max(micro_batch_tokens, int(dataset.lengths.max()))
        sums[name] = example_sums(model, dataset, capacity, device, rank(), world_size(), rows, compiled)
    return sums


def summary(sums: np.ndarray, counts: np.ndarray) -> dict[str, dict]:
    """By kind, nll_token_mean, and nll_example_mean, the paper's mean over examples of each one's token mean
    (nats), with the numbers of tokens and examples. sums, counts: (E, K). Kinds without tokens are left
    out."""
    out = {}
    for kind, name in enumerate(KINDS):
        has = counts[:, kind] > 0
        if has.any():
            nats, tokens = sums[has, kind], counts[has, kind].astype(np.int64)
            out[name] = {"nll_token_mean": float(nats.sum() / tokens.sum()),
                         "nll_example_mean": float((nats / tokens).mean()),
                         "tokens": int(tokens.sum()), "examples": int(has.sum())}
    return out


# ---------------------------------------------------------------- intervals and differences


def resampled_means(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(2, R, M) MEANS of each resample, in nats. sums: (M, E) NLL of one kind; counts: (E,) its targets, all
    above 0."""
    drawn = resampled_sums(np.stack([*sums, *(sums / counts), counts], 1), resamples, seed)
    checkpoints, examples = sums.shape
    return np.stack([drawn[:, :checkpoints] / drawn[:, -1:], drawn[:, checkpoints:-1] / examples])


def compare(sums: np.ndarray, counts: np.ndarray, resamples: int, confidence: float, seed: int
            ) -> list[dict[str, dict]]:
    """summary() of each checkpoint; added by kind: its perplexities; from the second checkpoint on
    X_minus_first for X of MEANS; and X_interval for all but the perplexities, [low, high], or None without
    resamples or with fewer than two examples. sums: (M, E, K); counts: (E, K)."""
    out = [summary(each, counts) for each in sums]
    for kind, name in enumerate(KINDS):
        has = counts[:, kind] > 0
        if not has.any():
            continue
        draws = None
        if resamples and has.sum() > 1:
            draws = resampled_means(sums[:, has, kind], counts[has, kind], resamples, seed)
        for m, row in enumerate(each[name] for each in out):
            for i, mean in enumerate(MEANS):
                row[mean.replace("nll", "perplexity")] = float(np.exp(row[mean]))
                row[f"{mean}_interval"] = None if draws is None else interval(draws[i, :, m], confidence)
                if m:
                    row[f"{mean}_minus_first"] = row[mean] - out[0][name][mean]
                    row[f"{mean}_minus_first_interval"] = (
                        None if draws is None else interval(draws[i, :, m] - draws[i, :, 0], confidence))
    return out


# ---------------------------------------------------------------- command line


def load_data(args: argparse.Namespace) -> list[list[Dataset]]:
    """The data as [checkpoint][file]. One process of each machine tokenizes, the others read its files."""
    data = []
    with first_of_machine():
        for name in args.model:
            _, tokenizer, template = open_checkpoint(name, args)
            data.append([load_dataset([file], tokenizer, template, args.max_length, args.overlong,
                                      args.cache_dir, shows_progress(), args.columns) for file in args.data])
    return data


def check_tokens(files: list[str], names: tuple[str, str], first: list[Dataset], other: list[Dataset]
                 ) -> None:
    """ValueError if the second of two checkpoints tokenizes a file differently from the first. names: of the
    checkpoints."""
    for file, a, b in zip(files, first, other):
        if a.key != b.key and not all(np.array_equal(getattr(a, x), getattr(b, x))
                                      for x in ("offsets", "ids", "kinds")):
            raise ValueError(f"{file}: {names[1]} tokenizes it differently from {names[0]} (another "
                             "tokenizer or template), so their NLL a token cannot be compared; give "
                             "--template if that is the difference, or evaluate each in its own call")


def evaluate(loaded: Loaded, datasets: list[Dataset], args: argparse.Namespace) -> list[np.ndarray]:
    """example_sums() of each file, (E, K)."""
    for dataset in datasets:
        check_embedding(dataset, loaded.model.config.vocab_size, loaded.tokenizer)
    with loaded.autocast:
        sums = sums_by_file(loaded.model, dict(zip(args.data, datasets)), args.micro_batch_tokens,
                            Path(loaded.name).name)
    return list(sums.values())


def table(file: str, dataset: Dataset, checkpoints: list[dict[str, dict]], confidence: float) -> str:
    """One file's results in lines of 79 columns."""
    def cells(row: dict, end: str = "") -> str:
        text = ""
        for mean in MEANS:
            value, bounds = row[mean + end], row[f"{mean}{end}_interval"]
            shown = f"[{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds else "-"
            factor = np.exp(value)
            perplexity = f"x {factor:.3f}" if end else f"{factor:.2f}" if factor < 1e5 else f"{factor:.1e}"
            text += f"{value:>{'+' if end else ''}9.4f} {shown:>18}{perplexity:>9}"
        return text

    report = dataset.report
    lines = [f"{file}: {counted(len(dataset), 'example')} of {counted(report['records'], 'record')}; "
             f"{report['truncated']:,} truncated,\n  {report['dropped_overlong']:,} dropped as too long, "
             f"{report['dropped_empty']:,} as empty",
             f"{'':5}{'mean over tokens':^37}{'mean over examples':^37}".rstrip(),
             f"{'':5}" + 2 * f"{'NLL':>9} {f'{100 * confidence:g}% interval':>18}{'ppl':>9}"]
    for name, row in checkpoints[0].items():
        lines.append(f"{name}: {counted(row['tokens'], 'token')} in {counted(row['examples'], 'example')}")
        for m, result in enumerate(each[name] for each in checkpoints):
            lines.append(f"{m + 1:<5}{cells(result)}")
            if m:
                lines.append(f"{f'{m + 1}-1':<5}{cells(result, '_minus_first')}")
    return "\n".join(lines)


def result_rows(file: str, names: list[str], checkpoints: list[dict[str, dict]]) -> list[dict]:
    """One file's results of compare(), as --json has them."""
    return [{"data": file, "model": name, "span": kind, **row}
            for name, kinds in zip(names, checkpoints) for kind, row in kinds.items()]


def write_examples(output: str, data: list[list[Dataset]], sums: list[list[np.ndarray]],
                   args: argparse.Namespace) -> None:
    """Write a line for each checkpoint, name of --data and example: the file and line of its record, which a
    name may have several of, its NLL sums (nats) and its targets by kind."""
    lines = []
    for m, name in enumerate(args.model):
        for path, dataset, of_file in zip(args.data, data[m], sums[m]):
            for (file, line), nats, counts in zip(dataset.origins.tolist(), of_file.tolist(),
                                                  dataset.counts.tolist()):
                kinds = [k for k in range(len(KINDS)) if counts[k]]
                lines.append(json.dumps({"model": name, "data": path,
                                         "file": dataset.files[file], "line": line,
                                         "nll": {KINDS[k]: nats[k] for k in kinds},
                                         "tokens": {KINDS[k]: counts[k] for k in kinds}}) + "\n")
    write_text(output, "".join(lines))


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    device = start_ranks(args)
    data = load_data(args)
    for name, datasets in zip(args.model, data):
        check_tokens(args.data, (args.model[0], name), data[0], datasets)
    # Each checkpoint is freed before the next is loaded.
    sums = [evaluate(load(name, args, device), datasets, args) for name, datasets in zip(args.model, data)]
    if not is_main():
        return
    compared = [compare(np.stack([each[i] for each in sums]), dataset.counts, args.bootstrap, args.confidence,
                        args.seed) for i, dataset in enumerate(data[0])]
    rows = [row for file, of_file in zip(args.data, compared)
            for row in result_rows(file, args.model, of_file)]
    say(f"held-out NLL in nats a token and perplexity; {args.bootstrap:,} resamples of the examples")
    if len(args.model) > 1:
        say("2-1: checkpoint 2 less 1, on the same resamples; x: ratio of their perplexities")
    for m, name in enumerate(args.model):
        say(f"  {m + 1}  {name}")
    for file, dataset, of_file in zip(args.data, data[0], compared):
        say(f"\n{table(file, dataset, of_file, args.confidence)}")
    flags = ("template", "dtype", "max_length", "overlong", "bootstrap", "confidence", "seed")
    write_result(args.json, {**{name: getattr(args, name) for name in flags}, "results": rows}, args.model)
    if args.per_example:
        write_examples(args.per_example, data, sums, args)


if __name__ == "__main__":
    run(main)
