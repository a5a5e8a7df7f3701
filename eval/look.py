"""What a run will do, before it starts: what is trained, what is left out, steps, packing, memory.

    python -m eval.look                                                     the embedded default
    python -m eval.look --model DIR --train-data FILE ... --show 2          any run: the flags of train.py
    python -m eval.look --config RUN/run_config.json --ranks 8              a run of before, on eight ranks
    python -m eval.look ... --export FILE                                   ids and labels for other trainers

It takes the steps of train.main() up to where the weights would be loaded, by the same functions, so what a
run would refuse is refused here in the same words. The token cache that is written is the run's own.
--output-dir is not touched; where a run could not use it, that is said with the rest. Not checked: the
weights' values, and free space on the disk.

Shapes: E examples, K kinds of span.
"""
from dataclasses import dataclass

from eval.flags import check_paths
from config import PRESETS, Config, check_files, span_weights
from config import parse_args as parse_flags
from runtime.flags import flag
from runtime.start import answer_flags, fit


@dataclass
class LookConfig(Config):
    """The flags of a run, and these."""
    ranks: int = flag(0, "how many ranks to say it for; 0: those of this launch", least=0, below=10**4,
                      in_file=False)
    show: int = flag(0, "examples to print, coloured by span", least=0, in_file=False, metavar="N")
    json: str = flag("", "write the numbers there too", in_file=False, metavar="FILE")
    export: str = flag("", "write ids, labels and span kinds there, an example a line", in_file=False,
                       metavar="FILE.jsonl")


def parse_args(argv: list[str]) -> LookConfig:
    config = parse_flags(argv, LookConfig, "python -m eval.look", __doc__.split("\n\n")[0])
    check_paths(config, "json", "export")
    return config


answer_flags(__name__, lambda argv: check_files(parse_args(argv)))

import json
import os
import re
import shutil
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import train
from chat import COMPLETION, INSTRUCTION, KINDS
from runtime.tokenizer import Tokenizer
from data import Dataset, Steps
from eval import estimate
from eval.advice import advice
from eval.common import run, write_json
from model import parameter_count
from runtime.distributed import is_main, join_ranks, world_size
from runtime.files import writing
from runtime.folder import choose_start
from runtime.foreign import printable
from runtime.machine import peak_memory_mb
from runtime.report import counted, describe_data, say, ending

COLOURS = {"template": 90, "system": 35, "instruction": 36, "completion": 32, "context": 33}     # ANSI
COLOUR = re.compile(r"\x1b\[\d+m")
# What choose_start() finds, in words.
FOLDER = {"start": "the run would start", "resume": "the run would resume",
          "delete": "the run that is there would be deleted, and the new one start",
          "finished": "the run has finished, and would not start"}


# ---------------------------------------------------------------- numbers


def span_statistics(counts: np.ndarray) -> dict[str, dict[str, float]]:
    """counts: (E, K) targets by kind. Of each kind that occurs: examples that have it and its tokens, and of
    those examples mean, median, 95th percentile and most."""
    spans = {}
    for name, column in zip(KINDS, counts.T):
        column = column[column > 0]
        if len(column):
            spans[name] = {"examples": len(column), "tokens": int(column.sum()), "mean": float(column.mean()),
                           "median": float(np.median(column)), "p95": float(np.percentile(column, 95)),
                           "max": int(column.max())}
    return spans


def measure(config: LookConfig, source: train.Source, dataset: Dataset, usable: np.ndarray, steps: Steps,
            cuda: bool) -> dict[str, object]:
    """All that --json gets but the folder and the held-out data. steps: as of rank 0 of all ranks; usable:
    (examples,) what is trained on."""
    ranks, weights = steps.world_size, config.span_weights
    counts, lengths = dataset.counts[usable], dataset.lengths[usable]
    drawn = dataset.counts[steps.first_epoch]       # with --mix, not each example once
    totals, total = drawn.sum(0), train.count_steps(config, steps.per_epoch)
    packed = estimate.packing(steps.plan, lengths, counts, weights != 0)
    memory = {}
    for shard in (False, True) if ranks > 1 else (False,):
        for recompute in (False, True):
            heading = ("--shard" if shard else "DDP" if ranks > 1 else "plain") + " +recompute" * recompute
            memory[heading] = estimate.memory(source.model_config, packed, config.compute_dtype, ranks, shard,
                                              recompute, config.kl_weight > 0, cuda,
                                              train.compiles(config, source.model_config, cuda))
    return {
        "model": str(source.folder), "parameters": parameter_count(source.model_config),
        "dtype": config.dtype, **dataset.report,
        "left_out": len(dataset) - len(usable), "examples": len(usable),
        "tokens": int(lengths.sum()), "longest": int(lengths.max()) + 1, "spans": span_statistics(drawn),
        "instruction_completion_ratio": float(totals[INSTRUCTION] / totals[COMPLETION])
        if totals[COMPLETION] else None,
        # the part of the targets that has weight
        "trained": {loss: float(totals[of_loss != 0].sum() / totals.sum()) for loss, of_loss in
                    [*((loss, span_weights(loss)) for loss in PRESETS), ("this run", weights)]},
        "steps": total, "steps_per_epoch": steps.per_epoch, "epochs": total / steps.per_epoch,
        "warmup_steps": train.warmup_steps(config, total), "ranks": ranks, "packing": packed,
        "packing_efficiency": packed["tokens"] / (packed["micro_batches"] * config.micro_batch_tokens),
        "padded_efficiency": float(lengths.mean() / lengths.max()), "memory": memory,
        # with the tokenizer and the data; a GPU's memory holds none of it
        "program": 0 if cuda else peak_memory_mb(torch.device("cpu")) * 2**20}


def print_numbers(config: LookConfig, numbers: dict) -> None:
    """measure()'s numbers, but for those that describe_data() says, in 79 columns."""
    packed, capacity = numbers["packing"], config.micro_batch_tokens
    say("  not counting each example's first token, which nothing predicts; with it the\n  longest has "
        f"{numbers['longest']:,}, of --max-length {config.max_length:,}")
    for name, held_out in numbers["held_out"].items():
        say(f"held out: {ending(name, 32)}: {counted(held_out['examples'], 'example')}, "
            f"{counted(held_out['tokens'], 'token')}")
    say(f"\n{'targets':<12}{'weight':>8}{'examples':>10}{'tokens':>12}{'mean':>9}{'median':>8}{'95 %':>8}"
        f"{'max':>8}")
    for name, span in numbers["spans"].items():
        say(f"{name:<12}{config.span_weights[KINDS.index(name)]:>8.3g}{span['examples']:>10,}"
            f"{span['tokens']:>12,}{span['mean']:>9.1f}{span['median']:>8.0f}{span['p95']:>8.0f}"
            f"{span['max']:>8,}")
    *presets, this_run = numbers["trained"].values()
    say("\ntargets trained: " + ", ".join(f"{loss} {x:.1%}" for loss, x in zip(PRESETS, presets))
        + f"; this run {this_run:.1%}")
    say(f"\n{counted(numbers['steps'], 'step')}, {numbers['epochs']:.3g} epochs: {numbers['warmup_steps']:,} "
        f"of warm-up, then --schedule {config.schedule}\n"
        f"packed on {numbers['ranks']} rank(s): {counted(packed['micro_batches'], 'micro-batch')} an epoch, "
        f"{numbers['packing_efficiency']:.1%} of {capacity:,} tokens\n  used; padded to the longest example "
        f"it would be {numbers['padded_efficiency']:.1%} of them. The largest\n  micro-batch has "
        f"{packed['largest']:,} tokens, at most {packed['trained']:,} targets have weight, "
        f"{packed['other']:,} none")
    say(f"\n{estimate.table(numbers['memory'], numbers['program'])}\n")


def folder_state(config: LookConfig, identity: dict, source: train.Source, per_epoch: int) -> tuple[str, str]:
    """What a run would find in --output-dir, in a word (choose_start()'s, or "refused") and in a sentence."""
    out = Path(config.output_dir)
    try:
        state, checkpoint, step = choose_start(out, identity, asdict(config), source.folder, partial(
            train.why_not_extendable, config, per_epoch), say)
    except ValueError as error:
        return "refused", f"a run would refuse: {error}"
    start = f"after step {step} from {checkpoint}" if checkpoint else "from scratch"
    return state, f"{out}: {FOLDER[state]} {start}"


# ---------------------------------------------------------------- examples


def coloured(dataset: Dataset, example: int, tokenizer: Tokenizer, colour: bool) -> str:
    """An example's text with its spans coloured, or in marks like [instruction|...] without colour
    support."""
    a, b = dataset.offsets[example:example + 2]
    ids, kinds = dataset.ids[a:b].tolist(), dataset.kinds[a:b]
    edges = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(ids)]
    spans = []
    for start, end in zip(edges, edges[1:]):
        # Decode up to here rather than this alone: a tokenizer may drop the first space of what it decodes.
        before, text = (tokenizer.decode(ids[:i], skip_special_tokens=False) for i in (start, end))
        name, text = KINDS[kinds[start]], printable(text[len(before):])
        spans.append(f"\x1b[{COLOURS[name]}m{text}\x1b[0m" if colour else f"[{name}|{text}]")
    return "".join(spans)


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most so many columns, which break between words; a longer word stays whole.
    Colours take no columns, and nothing is left out."""
    lines = []
    for line in text.split("\n"):
        lines.append("")
        column = 0
        for word in re.findall(r"\S+\s*|\s+", line):
            shown = COLOUR.sub("", word)
            if column and column + len(shown.rstrip()) > width:
                lines.append("")
                column = 0
            lines[-1] += word
            column += len(shown)
    return "\n".join(lines)


def export(dataset: Dataset, usable: np.ndarray, weights: np.ndarray, file: str | Path) -> None:
    """Write one JSON object an example, {"input_ids", "labels", "span_kinds"}; labels are unshifted, as
    transformers wants them, -100 where the target's weight is zero. usable: (examples,) which ones;
    weights: (K,)."""
    part = Path(f"{file}.part")
    with writing(part), open(part, "w", encoding="utf-8") as out:
        for example in usable:
            a, b = dataset.offsets[example:example + 2]
            ids, kinds = dataset.ids[a:b], dataset.kinds[a:b]
            labels = np.where(weights[kinds] != 0, ids, -100)
            labels[0] = -100    # nothing predicts the first token
            out.write(json.dumps({"input_ids": ids.tolist(), "labels": labels.tolist(),
                                  "span_kinds": [KINDS[kind] for kind in kinds]}) + "\n")
    os.replace(part, file)


# ---------------------------------------------------------------- the program


def main(argv: list[str]) -> None:
    config = parse_args(argv)
    given = replace(config)      # the next lines settle what these leave open
    device = join_ranks(config.device)

    # As in train.main(), but for the folder, which does not end this.
    source = train.open_source(config)
    train.settle(config, source)
    ranks = config.ranks or world_size()
    config.micro_batch_tokens = train.micro_batch_tokens(config, source.model_config, device, ranks)
    identity = train.run_identity(config, source)
    dataset, usable, eval_sets = train.load_data(config, source)
    train.warn_of_known(dataset, usable, eval_sets)
    steps = train.make_steps(config, dataset, usable, 0, ranks)
    identity["tokens"] = dataset.content
    state, sentence = folder_state(config, identity, source, steps.per_epoch)

    numbers = measure(config, source, dataset, usable, steps, device.type == "cuda") | {
        "held_out": {name: {"examples": len(held_out), "tokens": int(held_out.lengths.sum())}
                     for name, held_out in eval_sets.items()},
        "output_dir": state}
    say(f"model: {source.folder}: {numbers['parameters']:,} parameters; template {source.template.name}; "
        f"{config.dtype}")
    held_out = eval_sets[train.HELD_OUT] if config.eval_fraction else None
    say(describe_data(config, dataset, usable, held_out, steps, train.count_steps(config, steps.per_epoch),
                      source.model_config.max_position_embeddings))
    print_numbers(config, numbers)
    say(fit(printable(sentence)))

    terminal = sys.stdout.isatty()
    colour = terminal and not os.environ.get("NO_COLOR")
    if config.show and colour:
        say("\n" + " ".join(f"\x1b[{code}m{kind}\x1b[0m" for kind, code in COLOURS.items()))
    for example in usable[:config.show]:
        say(f"\n--- {dataset.where(example)}")
        text = coloured(dataset, example, source.tokenizer, colour)
        # In a file, a line break must be one of the record.
        say(wrapped(text, shutil.get_terminal_size().columns) if terminal else text)
    if config.export and is_main():
        export(dataset, usable, config.span_weights, config.export)
        say(f"{counted(len(usable), 'example')} written to {config.export}")
    if ratio := numbers["instruction_completion_ratio"]:
        say("\n" + advice(ratio, len(usable), given))
    write_json(config.json, numbers)


if __name__ == "__main__":
    run(main)
