"""What train.py and the evaluation commands wrote, as tables with a column a run; printed in 80 columns.

Differences are to the first run. They have an interval where the runs were compared example by example, as
eval.spans does; else they are one number less the other.
"""
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

WIDTH = 80
SPANS = ["completion", "instruction", "system", "template", "context"]      # in the order of interest


@dataclass
class Run:
    """An output folder of train.py; what it has not (yet) is empty."""
    letter: str
    folder: Path
    config: dict
    metrics: list[dict]         # metrics.jsonl, a step each
    evaluations: list[dict]     # eval.jsonl

    @property
    def final(self) -> Path | None:
        return self.folder / "final" if (self.folder / "final").is_dir() else None


class Cell(NamedTuple):
    value: float | str
    interval: list[float] | None = None     # [low, high]
    error: float | None = None              # standard error of value


@dataclass
class Row:
    label: str
    cells: dict[str, Cell]                                          # by run's letter
    differences: dict[str, Cell] = field(default_factory=dict)      # to the first run, likewise


@dataclass
class Table:
    title: str
    rows: list[Row]
    caption: str = ""


# ---------------------------------------------------------------- runs


def read_run(letter: str, name: str, notes: list[str]) -> Run:
    """ValueError if the folder is no run's; notes: gets what is missing or broken in it."""
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(f"{name}: no such folder; give output folders of train.py")
    if not (folder / "run_config.json").is_file():
        above = (folder.absolute().parent / "run_config.json").is_file()
        raise ValueError(f"{name}: is no output folder of train.py, it has no run_config.json"
                         + (f"; {folder.parent} has" if above else ""))
    try:
        config = json.loads((folder / "run_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'run_config.json'}: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'run_config.json'}: is no JSON object of flags")
    run = Run(letter, folder, config, read_lines(folder / "metrics.jsonl", notes),
              read_lines(folder / "eval.jsonl", notes))
    if not run.metrics:
        notes.append(f"{letter} has no metrics.jsonl, or an empty one: no training curves")
    if not run.evaluations:
        notes.append(f"{letter} was not evaluated while it trained (no eval.jsonl)")
    if not run.final:
        notes.append(f"{letter} has no final/: it was interrupted, or still trains")
    return run


def read_lines(file: Path, notes: list[str]) -> list[dict]:
    """The JSON objects of a .jsonl file; the last may be cut short: a run was killed or is writing."""
    lines, broken = [], 0
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            lines.append({**json.loads(line)})
        except (ValueError, TypeError):
            broken += 1
    if broken:
        notes.append(f"{file}: {broken} line(s) that are no JSON objects were left out")
    return lines


# ---------------------------------------------------------------- tables of the runs themselves


def configuration(runs: list[Run]) -> Table:
    """Model, data and what differs, but for where things are kept."""
    always, own = ("model", "train_data", "eval_data"), ("output_dir", "cache_dir", "overwrite", "resume")
    rows = []
    for name in dict.fromkeys([*always, *(name for run in runs for name in run.config)]):
        values = [run.config.get(name) for run in runs]
        if name in always or (name not in own and any(value != values[0] for value in values)):
            rows.append(Row(name, {run.letter: Cell(words(value)) for run, value in zip(runs, values)
                                   if value not in (None, "", [])}))
    return Table("configuration", rows, "the model, the data, and every other flag in which the runs differ")


def training(runs: list[Run]) -> Table:
    """How far each run came, what it took, and the NLL at which it trained."""
    rows: dict[str, Row] = {}
    for run in (run for run in runs if run.metrics):
        last, tokens = run.metrics[-1], sum(line["tokens"] for line in run.metrics)
        done, epochs = last["step"], run.config.get("epochs", 0)
        total = run.config.get("max_steps") or round(epochs * done / last["epoch"])
        values = {"steps": f"{done:,} of {total:,}" if done < total else done,
                  "epochs": last["epoch"], "tokens": tokens,
                  "trained tokens": sum(line["trained_tokens"] for line in run.metrics),
                  "tokens/s": tokens / sum(line["seconds"] for line in run.metrics),
                  "peak memory, MB": round(last["peak_memory_mb"])}
        for kind in SPANS:
            if known := [y for x, y in series(run.metrics, f"nll_{kind}", "epoch") if x > last["epoch"] - 1]:
                values[f"NLL, {kind}"] = sum(known) / len(known)
        for name, value in values.items():
            rows.setdefault(name, Row(name, {})).cells[run.letter] = Cell(value)
    losses = [rows.pop(f"NLL, {kind}") for kind in SPANS if f"NLL, {kind}" in rows]
    add_differences(runs, losses)
    return Table("training", [*rows.values(), *losses],
                 "NLL in nats a token: mean of those steps of the last epoch in which the span was looked at")


def series(lines: list[dict], name: str, against: str = "step") -> list[tuple[float, float]]:
    """[(x, y)] of the lines of metrics.jsonl that have the number."""
    return [(line[against], line[name]) for line in lines
            if line.get(name) is not None and math.isfinite(line[name])]


def last_evaluations(runs: list[Run]) -> Table:
    """What the last line of each eval.jsonl says: NLL by file and span, exact matches."""
    nll, answers = {}, Row("exact match, %", {})
    for run in (run for run in runs if run.evaluations):
        last = run.evaluations[-1]
        for data, kinds in last["data"].items():
            for kind in (kind for kind in SPANS if kind in kinds):
                row = nll.setdefault((data, kind), Row(f"{data}: {kind}", {}))
                row.cells[run.letter] = Cell(kinds[kind]["nll_token_mean"])
        if "exact_match" in last:
            answers.cells[run.letter] = Cell(100 * last["exact_match"])
    rows = [*nll.values(), *([answers] if answers.cells else [])]
    add_differences(runs, rows)
    return Table("held out, when training ended", rows,
                 "NLL in nats a token, mean over tokens; from the last line of eval.jsonl")


def add_differences(runs: list[Run], rows: list[Row]) -> None:
    """To the first run, where there are two numbers and no difference is given yet."""
    first, *others = (run.letter for run in runs)
    for row in rows:
        for letter in others:
            values = [row.cells[x].value for x in (first, letter) if x in row.cells]
            if len(values) == 2 and not any(isinstance(value, str) for value in values):
                row.differences.setdefault(letter, Cell(values[1] - values[0]))


# ---------------------------------------------------------------- as JSON, as text


def as_json(table: Table) -> dict:
    def cells(of: dict[str, Cell]) -> dict[str, dict]:
        return {letter: {name: x for name, x in cell._asdict().items() if x is not None}
                for letter, cell in of.items()}

    return {"title": table.title, "caption": table.caption,
            "rows": [{"label": row.label, "runs": cells(row.cells), "minus_first": cells(row.differences)}
                     for row in table.rows]}


def words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def text(value: int | float | str, digits: int = 4, decimals: int = 4) -> str:
    """A float with so many digits, but no more decimals than that."""
    if isinstance(value, str) or not math.isfinite(value):
        return str(value)
    if value == int(value):
        return f"{value:,.0f}"
    before = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:,.{max(0, min(decimals, digits - before))}f}"


def cell_text(cell: Cell | None, sign: str = "") -> str:
    """sign: "+" shows that of a number above 0, as differences have it."""
    if cell is None:
        return "-"
    shown = text(cell.value, decimals=3 if cell.interval else 4)
    if sign and not isinstance(cell.value, str) and cell.value > 0:
        shown = sign + shown
    if cell.interval:
        shown += f" [{', '.join(text(float(bound), 3) for bound in cell.interval)}]"
    return shown + (f" ± {text(float(cell.error), 3)}" if cell.error is not None else "")


def shorten(words: str, width: int) -> str:
    """The end is what tells paths apart."""
    return words if len(words) <= width else "..." + words[3 - width:]


def print_table(table: Table, runs: list[Run]) -> None:
    """In WIDTH columns: runs side by side if that fits, else one below the other. Words are cut to fit."""
    letters = [run.letter for run in runs]
    others = [letter for letter in letters if any(letter in row.differences for row in table.rows)]
    heads = [*letters, *(f"{letter} - {letters[0]}" for letter in others)]
    lines = [[cell_text(row.cells.get(letter)) for letter in letters]
             + [cell_text(row.differences.get(letter), "+") if row.differences else "" for letter in others]
             for row in table.rows]
    widths = [max(map(len, column)) for column in zip(heads, *lines)]
    if not others:
        widths = [min(width, max(16, (WIDTH - 20) // len(runs) - 2)) for width in widths]
    left = WIDTH - sum(widths) - 2 * len(widths)
    left = min(left, max(18, *(len(row.label) + 1 for row in table.rows)))
    print(f"\n{table.title}")
    if left >= 12:
        print(" " * left + "".join(f"  {head:>{width}}" for head, width in zip(heads, widths)))
    for row, line in zip(table.rows, lines):
        label = f" {row.label}"
        if left < 12:
            print(label)
            for head, cell in zip(heads, line):
                print(f"    {head:<7}{shorten(cell, WIDTH - 11)}")
            continue
        if len(label) > left:
            print(label)
            label = ""
        cells = "".join(f"  {shorten(cell, width):>{width}}" for cell, width in zip(line, widths))
        print(f"{label:<{left}}{cells}".rstrip())
