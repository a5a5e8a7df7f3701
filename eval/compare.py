"""Two or more training runs side by side, as one HTML page and as tables in the terminal.

    python -m eval.compare runs/it runs/im --output page.html                   what the runs' files say
    python -m eval.compare runs/it runs/im --output page.html --data test.jsonl         and their checkpoints
    torchrun --nproc-per-node 2 -m eval.compare ...                             the same, on two ranks

A run is an output folder of train.py. The page shows the flags in which the runs differ, NLL by span while
training, and results of the evaluation commands. --data adds held-out NLL with intervals, as in eval.spans.
--data or --prompts adds each run's answers to a few records, and the tokens of these records, coloured by how
much their NLL differs from the first run's. The page is one file without scripts.

Results are read from RUN/eval/*.json and from --results: files that evaluation commands write with --json. A
result belongs to the run whose folder, or final/ in it, is its "model". The page says what is missing.
"""
import argparse
import importlib.util
import io
import json
import re
import textwrap
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from string import ascii_uppercase

import jinja2
import numpy as np
import torch
from markupsafe import Markup

from data import KINDS
from eval import spans
from eval.bootstrap import check_flags
from eval.common import Parser, load, run, start_ranks, write_json
from eval.examples import Example, Response, read_examples, respond
from eval.results import (SPANS, Run, Table, configuration, held_out_points, last_evaluations,
                          make_tables, read_result, read_results, read_run, training, training_points)
from runtime.distributed import is_main
from runtime.files import write_text

WIDTH = 80                  # columns of the terminal
POINTS = 100                # of a curve: more cannot be told apart
EDGES = (0.1, 0.3, 1, 3)    # nats at which a token's colour changes
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (2, 1)))
INK = "#fe0000"             # replaced in pictures by the page's own colour; #ffNNNN by that of run NNNN


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("compare", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="output folders of train.py; the others are compared with the first")
    parser.add_argument("--output", required=True, metavar="FILE.html", help="the page")
    parser.add_argument("--results", nargs="+", default=[], metavar="FILE.json",
                        help="results of evaluation commands, in addition to RUN/eval/*.json")
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE",
                        help="held-out records, each file reported on its own")
    parser.add_argument("--prompts", metavar="FILE",
                        help="records to answer and to show by token; default: the first file of --data")
    parser.add_argument("--answers", type=int, default=4, metavar="N", help="how many of these records")
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
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib is not installed, and the page's pictures need it: "
                         "pip install -r requirements-eval.txt")
    return args


def ask_checkpoints(runs: list[Run], examples: list[Example], args: argparse.Namespace, device: torch.device,
                    notes: list[str]) -> tuple[dict, dict[str, list[Response]]]:
    """Everything that needs the models. Each is loaded once. Returns the result of eval.spans on --data and,
    by letter, the runs' responses to the examples. A run that tokenizes the data differently from the first
    one is left out of the result, with a note."""
    args.model = [str(run.final) for run in runs]
    data = spans.load_data(args)
    sums, responses = {}, {}
    for one, name, datasets in zip(runs, args.model, data):
        loaded = load(name, args, device)
        try:
            spans.check_tokens(args.data, (args.model[0], name), data[0], datasets)
        except ValueError as error:
            notes.append(f"{one.letter} is left out of the NLL on --data. {error}")
        else:
            sums[name] = spans.evaluate(loaded, datasets, args)
        if examples:
            responses[one.letter] = respond(loaded, examples, args)
        # Free this model before the next one is loaded.
        del loaded
    rows = []
    for i, (file, dataset) in enumerate(zip(args.data, data[0])):
        compared = spans.compare(np.stack([of_run[i] for of_run in sums.values()]), dataset.counts,
                                 args.bootstrap, args.confidence, args.seed)
        rows += spans.result_rows(file, list(sums), compared)
    flags = ("template", "dtype", "max_length", "overlong", "bootstrap", "confidence", "seed")
    return {**{name: getattr(args, name) for name in flags}, "results": rows}, responses


# ---------------------------------------------------------------- numbers and the terminal


def number(value: float | str, digits: int = 4, decimals: int = 4) -> str:
    """With at most so many digits and decimals: 12345.6 -> "12,346", 1.23456 -> "1.235", 2.0 -> "2"."""
    if isinstance(value, str) or value != value or abs(value) == float("inf"):
        return str(value)
    if value == int(value):
        return f"{value:,.0f}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:,.{max(0, min(decimals, digits - whole))}f}"


def cell_texts(cell: dict | None, sign: str = "") -> tuple[str, str]:
    """{"value": 0.5, "interval": [0.25, 1]} -> ("0.500", "[0.250, 1]"). sign: "+" for differences."""
    if cell is None:
        return "" if sign else "\u2013", ""
    value = number(cell["value"], decimals=3 if "interval" in cell else 4)
    if sign and not isinstance(cell["value"], str) and cell["value"] > 0:
        value = sign + value
    spread = [f"[{', '.join(number(bound, 3) for bound in cell['interval'])}]"] if "interval" in cell else []
    spread += [f"\u00b1 {number(cell['error'], 3)}"] if "error" in cell else []
    return value, " ".join(spread)


def shorten(text: str, width: int) -> str:
    """One printable line. A long one loses its beginning, since paths differ at the end."""
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= width else "..." + text[3 - width:]


def print_table(table: Table, letters: list[str]) -> None:
    """Columns, if they fit; otherwise the cells of each row below its label."""
    heads = letters + [f"{letter} - {letters[0]}" for letter in table.compared]
    lines = [("", heads)]
    for row in table.rows:
        cells = [cell_texts(row["runs"].get(letter)) for letter in letters]
        cells += [cell_texts(row["minus_first"].get(letter), "+") for letter in table.compared]
        lines.append((shorten(row["label"], WIDTH - 1),
                      [shorten(" ".join(cell).strip(), WIDTH - 11) for cell in cells]))
    widths = [max(map(len, column)) for column in zip(*(cells for _, cells in lines))]
    left = min(WIDTH - sum(widths) - 2 * len(widths), max(18, *(len(label) + 1 for label, _ in lines)))
    print(f"\n{shorten(table.title, WIDTH)}")
    for label, cells in lines if left >= 12 else ():
        if len(label) >= left:
            print(f" {label}")
            label = ""
        columns = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths))
        print(f" {label:<{left - 1}}{columns}".rstrip())
    for label, cells in lines[1:] if left < 12 else ():
        print(f" {label}", *(f"    {head:<7}{cell}" for head, cell in zip(heads, cells)), sep="\n")


# ---------------------------------------------------------------- pictures


def picture(curves: dict[str, list[tuple[float, float]]]) -> tuple[Markup, bool]:
    """NLL over steps as inline SVG, a curve for each run's letter, and whether the axis is logarithmic. It is
    where values differ more than tenfold: the first steps would else flatten all later ones. A curve of more
    than POINTS points is drawn as means of neighbours with a band from the lowest to the highest. The page's
    style sheet sets the colours, so they follow light and dark mode. Only numbers of the runs get in."""
    import matplotlib
    from matplotlib.figure import Figure
    style = {"svg.fonttype": "none", "svg.hashsalt": "compare", "font.sans-serif": ["DejaVu Sans"],
             "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
             "grid.alpha": 0.2, **{f"{name}.color": INK for name in ("text", "xtick", "ytick", "grid")},
             "axes.edgecolor": INK}
    values = [y for points in curves.values() for _, y in points]
    logarithmic = min(values) > 0 and max(values) > 10 * min(values)
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.6, 2.3), layout="constrained")
        axes = figure.subplots()
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
        if logarithmic:
            axes.set_yscale("log")
            subs = (1, 2, 5) if max(values) < 1000 * min(values) else (1,)
            axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        ends = []
        for i, (letter, points) in enumerate(curves.items()):
            if not points:
                continue
            groups = np.array_split(np.array(points, float), min(POINTS, len(points)))
            x, y = np.stack([group.mean(0) for group in groups]).T
            low, high = ([bound(group[:, 1]) for group in groups] for bound in (min, max))
            colour = f"#ff{ord(letter):04x}"
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(x, y, color=colour, linestyle=DASHES[i % len(DASHES)], linewidth=1.4,
                      marker="o" if len(points) <= 20 else "", markersize=3)
            ends.append(((x[-1], y[-1]), letter, colour))
        # Each run's letter stands at the right, where its curve ends. Letters too close are pushed apart.
        axes.autoscale_view()
        to_axes = axes.transData - axes.transAxes
        ends = sorted((to_axes.transform(end)[1], letter, colour) for end, letter, colour in ends)
        height = -np.inf
        for end, letter, colour in ends:
            height = max(end, height + 0.08)
            axes.text(1.02, height, letter, color=colour, weight="bold", va="center",
                      transform=axes.transAxes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True,
                       metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue().replace(INK, "currentColor")
    svg = re.sub("#ff00(..)", lambda match: f"var(--{chr(int(match[1], 16))})", svg)
    return Markup(svg[svg.index("<svg"):].strip()), logarithmic


def pictures(runs: list[Run]) -> dict[str, dict[str, tuple[Markup, bool]]]:
    """By heading and name: NLL while training of each kind of span, and of each file of --eval-data."""
    held_out = {run.letter: held_out_points(run) for run in runs}
    names = dict.fromkeys(name for points in held_out.values() for name in points)
    sections = {
        "NLL while training":
            {kind: {run.letter: training_points(run, kind) for run in runs} for kind in SPANS},
        "Held-out NLL while training":
            {": ".join(name): {letter: points.get(name, []) for letter, points in held_out.items()}
             for name in names}}
    return {title: {name: picture(curves) for name, curves in section.items() if any(curves.values())}
            for title, section in sections.items()}


# ---------------------------------------------------------------- the page


def shade(difference: float) -> str:
    """The class of a token by its NLL minus the first run's: shade(-0.5) -> "better2"."""
    level = sum(abs(difference) >= edge for edge in EDGES)
    return f"{'better' if difference < 0 else 'worse'}{level}" if level else ""


def visible(text: str) -> str:
    """With marks for what cannot be seen: line breaks, tabs, lone spaces, parts of a character."""
    if not text.strip(" "):
        return "\u2423" * len(text) or "\u25cc"
    return text.replace("\n", "\u21b5\n").replace("\t", "\u21e5\t").replace("\r", "\u240d")


def token_spans(first: Response, other: Response) -> list[dict]:
    """The spans of an example, each with both runs' mean NLL and its tokens as (text, both NLL or None)."""
    pairs = [None, *zip(first.nll, other.nll)]      # nothing predicts the first token
    out = []
    for kind, group in groupby(zip(first.kinds, first.texts, pairs), key=lambda token: token[0]):
        tokens = [(text, pair) for _, text, pair in group]
        known = [pair for _, pair in tokens if pair]
        out.append({"kind": KINDS[kind], "tokens": tokens, "means": np.mean(known, 0) if known else None})
    return out


def make_page(**content: object) -> str:
    """The template filled in. It escapes all text."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"texts": cell_texts, "visible": visible, "shade": shade}
    return environment.get_template("compare.html.jinja").render(
        **content, token_spans=token_spans, edges=EDGES)


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    notes: list[str] = []
    runs = [read_run(letter, name, notes) for letter, name in zip(ascii_uppercase, args.runs)]
    facts = read_results(runs, args.results, notes)
    responses, examples = {}, []
    if args.prompts or args.data:
        examples = read_examples(args.prompts or args.data[0], args.answers)
        if finished := [run for run in runs if run.final]:
            result, responses = ask_checkpoints(finished, examples, args, start_ranks(args), notes)
            facts = read_result(result, Path("--data"), runs) + facts
    if not is_main():
        return
    facts = [*configuration(runs), *training(runs), *last_evaluations(runs), *facts]
    tables = make_tables(runs, facts, notes)
    page = make_page(runs=runs, notes=notes, tables=tables, pictures=pictures(runs), examples=examples,
                     responses=responses)
    # Half a surrogate pair, which JSON can hold, cannot be written.
    write_text(args.output, page.encode("utf-8", "replace").decode())
    for one in runs:
        print(f"{one.letter}  {shorten(str(one.folder), WIDTH - 4)}")
    for table in tables:
        print_table(table, [one.letter for one in runs])
    print()
    for note in notes:
        print(textwrap.fill(f"note: {shorten(note, len(note))}", WIDTH, subsequent_indent="  ",
                            break_on_hyphens=False, break_long_words=False))
    print(f"{args.output} is the page")
    result = {"runs": {one.letter: str(one.folder) for one in runs},
              "tables": [asdict(table) for table in tables], "notes": notes}
    write_json(args.json, json.loads(json.dumps(result, ensure_ascii=False).encode("utf-8", "replace")))


if __name__ == "__main__":
    run(main)
