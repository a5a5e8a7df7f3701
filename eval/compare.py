"""Two or more training runs side by side, as one HTML page and as a table in the terminal.

    python -m eval.compare runs/it runs/im --output page.html                   what is written there already
    python -m eval.compare runs/it runs/im --output page.html --data test.jsonl         the checkpoints, too
    torchrun --nproc-per-node 2 -m eval.compare ...                             the same, on two ranks

A run is an output folder of train.py. The page has the flags in which the runs differ, NLL by span while
training, results of the evaluation commands, and with --data or --prompts a few records seen closely: each
run's answers, and every token coloured by how much its NLL differs from the first run's. With --data held-out
NLL is computed too, with intervals (as eval.spans does). The page holds all it needs, and no script.

Results are read from RUN/eval/*.json and from --results: files that evaluation commands write with --json. A
result belongs to the run whose folder, or final/ in it, its "model" is. What is missing is said on the page.
"""
import argparse
import textwrap
from pathlib import Path
from string import ascii_uppercase

import numpy as np
import torch

from data import Dataset
from eval import spans
from eval.bootstrap import check_flags
from eval.common import Parser, load, run, start_ranks, write_json
from eval.examples import Example, Seen, look, read_examples
from eval.page import make_page
from eval.results import make_tables, parts_of, read_results
from eval.tables import (Run, as_json, configuration, last_evaluations, print_table, read_run, shorten,
                         training)
from runtime.files import write_text
from runtime.distributed import is_main


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("compare", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="output folders of train.py; the others are compared with the first")
    parser.add_argument("--output", required=True, metavar="FILE.html", help="the page")
    parser.add_argument("--results", nargs="+", default=[], metavar="FILE.json",
                        help="results of evaluation commands, besides RUN/eval/*.json")
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE",
                        help="held-out records, each file reported on its own")
    parser.add_argument("--prompts", metavar="FILE",
                        help="records to see closely; default: --data's first file")
    parser.add_argument("--answers", type=int, default=4, metavar="N", help="see the first N records closely")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="the most tokens an answer may have")
    parser.add_common_flags()
    spans.add_data_flags(parser)
    args = parser.parse_args(argv)
    check_flags(args, ("output", "json"), answers=0, max_new_tokens=1, max_length=2, micro_batch_tokens=1)
    if not 2 <= len(args.runs) <= len(ascii_uppercase):
        raise ValueError(f"{len(args.runs)} run(s): give two to {len(ascii_uppercase)}")
    folders = [Path(name).resolve() for name in args.runs]
    for name, folder in zip(args.runs, folders):
        if folders.count(folder) > 1:
            raise ValueError(f"{name}: given twice; give each run once")
    return args


def ask_checkpoints(runs: list[Run], examples: list[Example], args: argparse.Namespace, device: torch.device,
                    notes: list[str]) -> tuple[dict, dict[str, list[Seen]]]:
    """Everything that needs the runs' models, each loaded once: the result of eval.spans on --data, of those
    that tokenise it as the first one does, and what each run, by letter, makes of the examples."""
    args.model = [str(run.final) for run in runs]
    data: list[list[Dataset]] = spans.load_data(args)
    sums, seen = {}, {}
    for one, name, datasets in zip(runs, args.model, data):
        loaded = load(name, args, device)
        try:
            spans.check_tokens(args.data, (args.model[0], name), data[0], datasets)
        except ValueError as error:
            notes.append(f"{one.letter} is left out of the NLL on --data. {error}")
        else:
            sums[name] = spans.evaluate(loaded, datasets, args)
        if examples:
            seen[one.letter] = look(loaded, examples, args)
        del loaded      # before the next one
    rows = []
    for i, (file, dataset) in enumerate(zip(args.data, data[0])):
        of_file = spans.compare(np.stack([each[i] for each in sums.values()]), dataset.counts, args.bootstrap,
                                args.confidence, args.seed)
        rows += spans.result_rows(file, list(sums), of_file)
    flags = ("template", "dtype", "max_length", "overlong", "bootstrap", "confidence", "seed")
    return {**{name: getattr(args, name) for name in flags}, "results": rows}, seen


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    notes: list[str] = []
    runs = [read_run(letter, name, notes) for letter, name in zip(ascii_uppercase, args.runs)]
    results = read_results(runs, args.results, notes)
    seen, examples = {}, []
    if args.prompts or args.data:
        examples = read_examples(args.prompts or args.data[0], args.answers)
        if finished := [run for run in runs if run.final]:
            result, seen = ask_checkpoints(finished, examples, args, start_ranks(args), notes)
            results = parts_of(result, Path("--data"), runs) + results
    if not is_main():
        return
    settings = configuration(runs)
    tables = [training(runs), last_evaluations(runs), *make_tables(runs, results, notes)]
    tables = [table for table in tables if table.rows]
    write_text(args.output, make_page(runs, settings, tables, examples, seen, notes))
    for one in runs:
        print(f"{one.letter}  {shorten(str(one.folder), 76)}")
    for table in [settings, *tables]:
        print_table(table, runs)
    print()
    for note in notes:
        print(textwrap.fill(f"note: {note}", 80, subsequent_indent="  ", break_on_hyphens=False,
                            break_long_words=False))
    print(f"{args.output} is the page")
    write_json(args.json, {"runs": {run.letter: str(run.folder) for run in runs},
                           "tables": [as_json(table) for table in [settings, *tables]], "notes": notes})


if __name__ == "__main__":
    run(main)
