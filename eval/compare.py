"""Training runs side by side, or one alone, as one HTML page and as tables in the terminal.

    python -m eval.compare runs/im                                              one run's own page
    python -m eval.compare runs/it runs/im --output page.html                   what the runs' files say
    python -m eval.compare runs/it runs/im --output page.html --data test.jsonl         and their checkpoints
    torchrun --nproc-per-node 2 -m eval.compare ...                             the same, on two ranks

A run is an output folder of train.py. The page shows the flags in which the runs differ (those of one run
that are not the defaults), NLL by span while training, and results of the evaluation commands (results.py).
--data adds held-out NLL with intervals, as in eval.spans. --data or --prompts adds each run's answers to a
few records, and the tokens of these records, coloured by how much their NLL differs from the first run's. The
page is one file without scripts, and says what is missing.
"""
import argparse
from pathlib import Path
from string import ascii_uppercase

from eval.flags import Parser, answer_command, check_paths, need
from config import Config
from runtime.flags import number


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser("compare", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="output folders of train.py; the others are compared with the first")
    parser.add_argument("--output", metavar="FILE.html", help="the page; default: page.html in the first RUN")
    parser.add_argument("--results", nargs="+", default=[], metavar="FILE.json",
                        help="results of evaluation commands, in addition to RUN/eval/*.json")
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE",
                        help="held-out records, each file reported on its own")
    parser.add_argument("--prompts", metavar="FILE",
                        help="records to answer and to show by token; default: the first file of --data")
    parser.add_argument("--answers", type=number(int, 0, 10**4), default=4, metavar="N",
                        help="how many of these records")
    parser.add_argument("--max-new-tokens", type=number(int, 1, 10**6), default=256,
                        help="the most tokens of an answer")
    parser.add_common_flags()
    parser.add_data_flags()
    parser.set_defaults(max_length=0, overlong="")      # the first run's
    args = parser.parse_args(argv)
    check_paths(args, "output", "json")
    if len(args.runs) > len(ascii_uppercase):
        raise ValueError(f"{len(args.runs)} runs: give at most {len(ascii_uppercase)}")
    if len({Path(name).resolve() for name in args.runs}) < len(args.runs):
        raise ValueError(f"{' '.join(args.runs)}: a run is given twice; give each run once")
    need("matplotlib", "the page")
    return args


answer_command(__name__, parse_args)

import io
import json
import math

import jinja2
import numpy as np
import torch
from markupsafe import Markup

from eval import spans
from eval.common import load, run, start_ranks, write_json
from eval.examples import Example, Response, read_examples, respond
from eval.results import Run, curves, make_tables, read_results, read_run, result_cells, run_cells
from runtime.distributed import is_main
from runtime.files import check_writable, write_text
from runtime.report import ending, say
from runtime.start import WIDTH

POINTS = 100    # of a curve: more cannot be told apart
# Of the runs' letters and curves, legible on white and on black. Dashes help those who see no colours.
COLOURS = ("#2a78c0", "#c75b12", "#178a5e", "#b5479c", "#8a7410", "#6b7785")
DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
GREY = "#808080"
# matplotlib's settings for all pictures of eval/.
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.alpha": 0.3, "legend.frameon": False, "axes.edgecolor": GREY}
FULL = 3        # nats of difference at which a token has its full colour


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
        # First, because it takes less time: the template may refuse a record of --prompts.
        if examples:
            responses[one.letter] = respond(loaded, examples, args)
        try:
            spans.check_tokens(args.data, (args.model[0], name), data[0], datasets)
        except ValueError as error:
            notes.append(f"{one.letter} is left out of the NLL on --data. {error}")
        else:
            sums[name] = spans.evaluate(loaded, datasets, args)
        # Free this model before the next one is loaded.
        del loaded
    rows = []
    for i, (file, dataset) in enumerate(zip(args.data, data[0])):
        compared = spans.compare(np.stack([of_run[i] for of_run in sums.values()]), dataset.counts,
                                 args.bootstrap, args.confidence, args.seed)
        rows += spans.result_rows(file, list(sums), compared)
    return {"results": rows}, responses


# ---------------------------------------------------------------- tables, in the terminal and on the page


def used_columns(rows: dict[str, dict], letters: list[str]) -> list[str]:
    """The columns in which a table has cells: runs, then differences."""
    columns = [*letters, *(f"{letter} - {letters[0]}" for letter in letters[1:])]
    return [column for column in columns if any(column in row for row in rows.values())]


def cell_texts(cell: dict, column: str) -> tuple[str, str]:
    """{"value": 0.5, "interval": [0.25, 1.0]} -> ("0.500", "[0.25, 1.00]"). A difference has a sign, and one
    more decimal in its interval."""
    value, spread = cell["value"], ""
    sign, decimals = ("+", 3) if " - " in column else ("", 2)
    if "interval" in cell:
        spread = f"[{', '.join(f'{bound:,.{decimals}f}' for bound in cell['interval'])}]"
    elif "error" in cell:
        spread = f"± {cell['error']:,.3f}"
    if isinstance(value, float):
        return f"{value:{sign},.3f}", spread
    return f"{value:,}" if isinstance(value, int) else value, spread


def table_text(title: str, rows: dict[str, dict], letters: list[str]) -> str:
    """In columns, if they fit; otherwise the cells of each row below its label."""
    columns = used_columns(rows, letters)
    lines = [["", *columns]]
    for label, row in rows.items():
        texts = [" ".join(cell_texts(row.get(column, {"value": ""}), column)).strip() for column in columns]
        lines.append([ending(label, WIDTH - 1), *(ending(text, WIDTH - 11) for text in texts)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    shown = [ending(title, WIDTH)]
    if sum(widths) + 2 * len(columns) < WIDTH:
        for label, *texts in lines:
            aligned = "".join(f"  {text:>{width}}" for text, width in zip(texts, widths[1:]))
            shown.append(f" {label:<{widths[0]}}{aligned}".rstrip())
    else:
        for label, *texts in lines[1:]:
            shown += [f" {label}", *(f"    {column:<7}{text}" for column, text in zip(columns, texts))]
    return "\n".join(shown)


# ---------------------------------------------------------------- the page


def picture(points: dict[str, list[tuple[int, float]]]) -> Markup:
    """NLL by step as inline SVG, a curve for each run's letter. A long curve is drawn as means of neighbours.
    The page's style sheet sets the colour of the text. Only numbers of the runs and letters are drawn."""
    import matplotlib
    from matplotlib.figure import Figure
    colours = {f"{part}.color": GREY for part in ("xtick", "ytick", "grid")}
    with matplotlib.rc_context({"svg.fonttype": "none", **STYLE, **colours}):
        figure = Figure(figsize=(3.6, 2.3), layout="constrained")
        axes = figure.subplots()
        for letter, of_run in points.items():
            i = ascii_uppercase.index(letter)
            every = math.ceil(len(of_run) / POINTS)
            groups = [of_run[start:start + every] for start in range(0, len(of_run), every)]
            steps, nats = np.array([np.mean(group, 0) for group in groups]).T
            axes.plot(steps, nats, label=letter, color=COLOURS[i % len(COLOURS)],
                      linestyle=DASHES[i % len(DASHES)], marker="." if len(of_run) <= 20 else "")
        axes.legend()
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True,
                       metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    return Markup(svg[svg.index("<svg"):])


def shade(difference: float) -> str:
    """The background of a token by its NLL minus the first run's: blue for less, orange for more."""
    colour = "30 120 190" if difference < 0 else "225 120 20"
    return f"rgb({colour} / {min(abs(difference) / FULL, 1) * 65:.0f}%)"


def visible(text: str) -> str:
    """With marks for a line break and for a token that only starts a character."""
    return text.replace("\n", "↵\n") or "◌"


def make_page(**content: object) -> str:
    """The template filled in. It escapes all text."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"visible": visible, "shade": shade}
    page = environment.get_template("compare.html.jinja").render(
        **content, cell_texts=cell_texts, used_columns=used_columns, colours=COLOURS, full=FULL, zip=zip)
    # Half a surrogate pair, which JSON can hold, cannot be written.
    return page.encode("utf-8", "replace").decode()


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    notes: list[str] = []
    runs = [read_run(letter, name, notes) for letter, name in zip(ascii_uppercase, args.runs)]
    output = args.output or runs[0].folder / "page.html"
    if is_main() and not args.output:      # one that is given is checked with the flags
        check_writable("--output", output)
    args.max_length = args.max_length or runs[0].config.get("max_length", Config.max_length)
    args.overlong = args.overlong or runs[0].config.get("overlong", Config.overlong)
    cells, results = run_cells(runs), read_results(runs, args.results, notes)
    responses, examples = {}, []
    if args.prompts or args.data:
        examples = read_examples(args.prompts or args.data[0], args.answers, args.columns)
        if finished := [run for run in runs if run.final]:
            result, responses = ask_checkpoints(finished, examples, args, start_ranks(args), notes)
            cells |= result_cells(result, "--data", runs)[0]
    if not is_main():
        return
    letters = [one.letter for one in runs]
    tables = make_tables(cells | results, letters)
    for one in runs:
        say(f"{one.letter}  {ending(str(one.folder), WIDTH - 4)}")
    for title, rows in tables.items():
        say(f"\n{table_text(title, rows, letters)}")
    say()
    for note in notes:
        say(f"note: {ending(note, len(note))}")
    result = {"runs": {one.letter: str(one.folder) for one in runs}, "tables": tables, "notes": notes}
    write_json(args.json, json.loads(json.dumps(result, ensure_ascii=False).encode("utf-8", "replace")))
    pictures = {name: picture(points) for name, points in curves(runs).items()}
    write_text(output, make_page(runs=runs, letters=letters, notes=notes, tables=tables, pictures=pictures,
                                 examples=examples, responses=responses))
    say(f"{output} is the page")


if __name__ == "__main__":
    run(main)
