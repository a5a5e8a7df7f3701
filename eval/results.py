"""Results that the evaluation commands wrote with --json, as tables with a column a run.

Every number is taken, whatever the command; known are only the forms in which they come,

    {"results": [{"model", "data", "span", "nll_token_mean", ...}, ...]}            eval.spans
    {"results": [{"model", "bleu", "bleu_interval", ...}, ...]}                     eval.memorization
    {"results": {task: {"acc,none", "acc_stderr,none", ...}}, "config", "paper"}    eval.harness
    {"model", "pass@1", "pass@1_standard_error", ...}                               all others

and names by which a table gets a title.
"""
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from eval.tables import SPANS, Cell, Row, Run, Table, add_differences, words

TITLES = {"bleu": "memorisation of training targets", "pass@": "HumanEval"}
BENCHMARKS = {"alpaca": "answers to AlpacaEval", "mt-bench": "answers to MT-Bench"}     # of eval.open_ended
MEANS = {"nll_token_mean": "mean over tokens", "nll_example_mean": "mean over examples"}
SETTINGS = ("temperature", "top_p")
ENDS = ("_interval", "_standard_error", "_stderr")  # of the names that stand beside a score's own


@dataclass
class Part:
    """What one file says of one run, to go into one table."""
    letter: str
    title: str
    file: Path
    cells: dict[str, Cell]                                          # by label
    differences: dict[str, Cell] = field(default_factory=dict)      # to the first run, by label


def read_results(runs: list[Run], given: list[str], notes: list[str]) -> list[Part]:
    """What all RUN/eval/*.json and the given files say; notes: gets which of them say nothing of the runs.
    ValueError if a given file is not there."""
    for file in given:
        if not Path(file).is_file():
            raise ValueError(f"--results {file}: no such file")
    files = [file for run in runs for file in sorted((run.folder / "eval").glob("*.json"))]
    parts = []
    for file in {file.resolve(): file for file in [*files, *map(Path, given)]}.values():
        if file.name.endswith(".settings.json"):    # belongs to a file of answers
            continue
        try:
            found = parts_of(json.loads(file.read_text(encoding="utf-8")), file, runs)
        except ValueError as error:
            notes.append(f"{file}: {error}")
            continue
        except (TypeError, LookupError, AttributeError) as error:
            notes.append(f"{file}: is no result of an evaluation command ({error!r})")
            continue
        if not found:
            notes.append(f"{file}: names none of these runs as \"model\"")
        parts += found
    return parts


def parts_of(result: dict, file: Path, runs: list[Run]) -> list[Part]:
    """A result taken apart into runs and tables; of other models than the runs' nothing is taken."""
    if not isinstance(result, dict):
        raise ValueError(f"it holds a JSON {type(result).__name__}, not an object")
    letters = {place.resolve(): run.letter for run in runs for place in (run.folder, run.folder / "final")}

    def letter(of: dict) -> str | None:
        settings = of.get("config") if isinstance(of.get("config"), dict) else {}
        arguments = settings.get("model_args") if isinstance(settings.get("model_args"), dict) else {}
        model = of.get("model") or arguments.get("pretrained")      # the harness's name of it
        return letters.get(Path(model).expanduser().resolve()) if isinstance(model, str) else None

    rows = result.get("results")
    if isinstance(rows, dict):
        mine = letter(result)
        return [Part(mine, "tasks of lm-evaluation-harness", file, harness_scores(result))] if mine else []
    if not isinstance(rows, list):
        rows, result = [result], {}
    flags = {f"--{name.replace('_', '-')}": cell for name, cell in scores(result).items()}
    if rows and "span" in rows[0]:
        return span_parts(rows, flags, file, letter, runs[0].letter)
    of_runs = [(letter(row), {**scores(row), **flags}) for row in rows]
    return [Part(mine, title_of(cells) or file.stem, file, cells) for mine, cells in of_runs if mine]


def title_of(cells: dict[str, Cell]) -> str:
    """Of a result that is known by its benchmark or the beginning of one of its names; else ""."""
    if "benchmark" in cells:
        return BENCHMARKS.get(cells["benchmark"].value, "")
    return next((title for start, title in TITLES.items() for name in cells if name.startswith(start)), "")


def harness_scores(result: dict) -> dict[str, Cell]:
    """Of each task; and where the paper's suite was run, the means over its categories."""
    cells = {}
    for task, values in result["results"].items():
        for name, cell in scores(values).items():
            metric, _, filtered = name.partition(",")
            cells[f"{task} {metric}" + (f" ({filtered})" if filtered not in ("", "none") else "")] = cell
    if paper := result.get("paper"):
        for category, means in {**paper["categories"], "all categories": paper}.items():
            cells.update({f"{category}: {name}": cell for name, cell in scores(means).items()
                          if name.startswith("mean_")})
    return cells


def span_parts(rows: list[dict], settings: dict[str, Cell], file: Path,
               letter: Callable[[dict], str | None], first: str) -> list[Part]:
    """eval.spans' rows; its differences are taken where they are to the first run."""
    parts: dict[tuple, Part] = {}
    paired = letter(rows[0]) == first
    for row in sorted(rows, key=lambda row: (SPANS + [row["span"]]).index(row["span"])):
        for mean, title in MEANS.items():
            if (mine := letter(row)) is None:
                continue
            part = parts.setdefault((mine, row["data"], mean), Part(
                mine, f"held-out NLL, {title}: {Path(row['data']).name}", file, dict(settings)))
            part.cells[row["span"]] = Cell(row[mean], row[f"{mean}_interval"])
            if paired and f"{mean}_minus_first" in row:
                part.differences[row["span"]] = Cell(row[f"{mean}_minus_first"],
                                                     row[f"{mean}_minus_first_interval"])
    return list(parts.values())


def scores(values: dict) -> dict[str, Cell]:
    """Numbers and words by name, with what stands beside them as X_interval, X_standard_error or, as the
    harness writes it, "X_stderr,FILTER"; what dictionaries hold as "NAME X"; of lists only those of words."""
    cells = {}
    for name, value in values.items():
        score, comma, filtered = name.partition(",")
        beside = [values.get(score + end + comma + filtered) for end in ENDS]
        if name in ("model", "name", "alias", "output") or score.endswith(ENDS) or isinstance(value, bool):
            continue
        if isinstance(value, dict):
            cells.update({f"{name} {inner}": cell for inner, cell in scores(value).items()})
        elif isinstance(value, str | int | float):
            bounds = beside[0] if isinstance(beside[0], list) and len(beside[0]) == 2 else None
            error = next((x for x in beside[1:] if isinstance(x, int | float)), None)
            cells[name] = Cell(value, bounds, error)
        elif isinstance(value, list) and all(isinstance(x, str) for x in value):
            cells[name] = Cell(words(value))
    return cells


def make_tables(runs: list[Run], parts: list[Part], notes: list[str]) -> list[Table]:
    """Parts of one title go into one table; where a run has several, one for each file's name."""
    several = Counter((part.title, part.letter) for part in parts)
    crowded = {title for (title, _), count in several.items() if count > 1}
    tables: dict[str, Table] = {}
    for part in parts:
        title = f"{part.title} ({part.file.stem})" if part.title in crowded else part.title
        table = tables.setdefault(title, Table(title, []))
        rows = {row.label: row for row in table.rows}
        if any(part.letter in row.cells for row in table.rows):
            notes.append(f"{part.file}: {part.letter} has another {title}; this one is left out")
            continue
        for label, cell in part.cells.items():
            if label not in rows:
                table.rows.append(rows.setdefault(label, Row(label, {})))
            rows[label].cells[part.letter] = cell
        for label, cell in part.differences.items():
            rows[label].differences[part.letter] = cell
    for table in tables.values():
        move_settings(table)
        add_differences(runs, table.rows)
    return list(tables.values())


def move_settings(table: Table) -> None:
    """What is the same in all runs and most likely no score goes into the caption: words, whole numbers,
    flags; unless nothing has an interval or an error, so that scores cannot be told at all."""
    def setting(row: Row) -> bool:
        cells = list(row.cells.values())
        return len({cell.value for cell in cells}) == 1 and not any(map(scored, cells)) and (
            row.label.startswith("--") or row.label in SETTINGS or not isinstance(cells[0].value, float))

    def scored(cell: Cell) -> bool:
        return cell.interval is not None or cell.error is not None

    if any(scored(cell) for row in table.rows for cell in row.cells.values()):
        same = [row for row in table.rows if setting(row)]
        table.rows = [row for row in table.rows if row not in same]
        table.caption = "; ".join(f"{row.label} {next(iter(row.cells.values())).value}" for row in same)
