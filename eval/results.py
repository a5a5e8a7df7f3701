"""The tables of eval.compare: what runs and evaluation commands wrote, with a column for each run.

A table's rows have the form in which --json writes them. L is the letter of a run:

    {"label": str, "runs": {L: cell}, "minus_first": {L: cell}}
    cell: {"value": number or str, "interval": [low, high], "error": standard error of the value}

A cell has an interval or an error if the file has one. "minus_first" is the difference from the first run.
It has an interval if eval.spans compared the runs example by example; else it is one number minus the other.
"""
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SPANS = ["completion", "instruction", "system", "template", "context"]      # as tables list them
MEANS = {"nll_token_mean": "mean over tokens", "nll_example_mean": "mean over examples"}
CAPTIONS = {
    "configuration": "the model, the data, and every other flag in which the runs differ",
    "training": "NLL in nats a token: mean over the steps of the last epoch that measured the span",
    "held out, when training ended": "NLL in nats a token, mean over tokens; last line of eval.jsonl"}
# A result's title, by the benchmark of eval.open_ended or by how the name of one of its scores begins.
TITLES = {"alpaca": "answers to AlpacaEval", "mt-bench": "answers to MT-Bench",
          "bleu": "memorization of training targets", "pass@": "HumanEval"}
# The name of a score's interval or error is the score's name with one of these endings.
ENDS = ("_interval", "_standard_error", "_stderr")


@dataclass
class Run:
    """An output folder of train.py."""
    letter: str
    folder: Path
    config: dict                # run_config.json
    metrics: list[dict]         # metrics.jsonl, one entry a step
    evaluations: list[dict]     # eval.jsonl
    final: Path | None          # None if training has not ended


class Fact(NamedTuple):
    """One cell, and where it belongs."""
    title: str              # of the table
    label: str              # of the row
    letter: str             # of the run
    cell: dict
    column: str = "runs"
    file: Path | None = None


@dataclass
class Table:
    title: str
    caption: str
    rows: list[dict]

    @property
    def compared(self) -> list[str]:
        """Letters of the runs that have a difference from the first one."""
        return sorted({letter for row in self.rows for letter in row["minus_first"]})


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---------------------------------------------------------------- runs


def read_run(letter: str, name: str, notes: list[str]) -> Run:
    """Adds to notes what is missing or damaged. ValueError if the folder is not a run's."""
    folder = Path(name)
    file, final = folder / "run_config.json", folder / "final"
    if not folder.is_dir():
        raise ValueError(f"{name}: no such folder; give output folders of train.py")
    if not file.is_file():
        parent = folder.absolute().parent
        hint = f"; {parent} has one" if (parent / file.name).is_file() else ""
        raise ValueError(f"{name}: not an output folder of train.py, it has no run_config.json{hint}")
    try:
        config = {**json.loads(file.read_text(encoding="utf-8"))}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: not a JSON object of flags ({error})") from None
    run = Run(letter, folder, config, read_lines(folder / "metrics.jsonl", notes),
              read_lines(folder / "eval.jsonl", notes), final if final.is_dir() else None)
    if not run.metrics:
        notes.append(f"{letter} has no metrics.jsonl, or an empty one: no training curves")
    if not run.evaluations:
        notes.append(f"{letter} was not evaluated while it trained (no eval.jsonl)")
    if not run.final:
        notes.append(f"{letter} has no final/: it was interrupted or is still training")
    return run


def read_lines(file: Path, notes: list[str]) -> list[dict]:
    """The JSON objects of a .jsonl file. The last one is cut off if the run was killed or still writes."""
    lines, damaged = [], 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else ():
        try:
            lines.append({**json.loads(line)})
        except (ValueError, TypeError):
            damaged += 1
    if damaged:
        notes.append(f"{file}: {damaged} damaged line(s) were left out")
    return lines


def configuration(runs: list[Run]) -> Iterator[Fact]:
    always, where = ("model", "train_data", "eval_data"), ("output_dir", "cache_dir", "overwrite", "resume")
    for name in dict.fromkeys([*always, *(name for run in runs for name in run.config)]):
        values = [run.config.get(name) for run in runs]
        if name in always or (name not in where and any(value != values[0] for value in values)):
            for run, value in zip(runs, values):
                if value not in (None, "", []):
                    words = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
                    yield Fact("configuration", name, run.letter, {"value": words})


def training(runs: list[Run]) -> Iterator[Fact]:
    """How far each run came, what it cost, and the NLL of its last epoch."""
    for run in (run for run in runs if run.metrics):
        last, epochs = run.metrics[-1], run.config.get("epochs", 0)
        tokens, trained, seconds = (sum(line[name] for line in run.metrics)
                                    for name in ("tokens", "trained_tokens", "seconds"))
        total = run.config.get("max_steps") or round(epochs * last["step"] / last["epoch"])
        values = {"steps": last["step"] if last["step"] >= total else f"{last['step']:,} of {total:,}",
                  "epochs": last["epoch"], "tokens": tokens, "trained tokens": trained,
                  "tokens/s": tokens / seconds, "peak memory, MB": round(last["peak_memory_mb"])}
        for kind in SPANS:
            points = training_points(run, kind, "epoch")
            if known := [nll for epoch, nll in points if epoch > last["epoch"] - 1]:
                values[f"NLL, {kind}"] = sum(known) / len(known)
        for label, value in values.items():
            yield Fact("training", label, run.letter, {"value": value})


def training_points(run: Run, kind: str, x: str = "step") -> list[tuple[float, float]]:
    """[(step, nats a token)] of the steps that measured this kind of span."""
    return [(line[x], line[f"nll_{kind}"]) for line in run.metrics if is_number(line.get(f"nll_{kind}"))]


def held_out_points(run: Run) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(file, kind) -> [(step, nats a token)], from eval.jsonl."""
    points = {}
    for line in run.evaluations:
        for name, kinds in line["data"].items():
            for kind in (kind for kind in SPANS if kind in kinds):
                points.setdefault((name, kind), []).append((line["step"], kinds[kind]["nll_token_mean"]))
    return points


def last_evaluations(runs: list[Run]) -> Iterator[Fact]:
    for run in (run for run in runs if run.evaluations):
        last = run.evaluations[-1]
        values = {f"{name}: {kind}": points[-1][1] for (name, kind), points in held_out_points(run).items()
                  if points[-1][0] == last["step"]}
        if "exact_match" in last:
            values["exact match, %"] = 100 * last["exact_match"]
        for label, value in values.items():
            yield Fact("held out, when training ended", label, run.letter, {"value": value})


# ---------------------------------------------------------------- results of the evaluation commands


def read_results(runs: list[Run], given: list[str], notes: list[str]) -> list[Fact]:
    """What RUN/eval/*.json and the given files say about the runs. Adds to notes the files that say nothing.
    ValueError if a given file is missing."""
    for file in given:
        if not Path(file).is_file():
            raise ValueError(f"--results {file}: no such file")
    files = [file for run in runs for file in sorted((run.folder / "eval").glob("*.json"))]
    facts = []
    for file in {file.resolve(): file for file in [*files, *map(Path, given)]}.values():
        if file.name.endswith(".settings.json"):    # the settings of a file of answers
            continue
        try:
            of_file = read_result(json.loads(file.read_text(encoding="utf-8")), file, runs)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError) as error:
            notes.append(f"{file}: not a result of an evaluation command ({error!r})")
            continue
        if not of_file:
            notes.append(f'{file}: its "model" is not one of these runs')
        facts += of_file
    return facts


def read_result(result: dict, file: Path, runs: list[Run]) -> list[Fact]:
    """What one file says about the runs: all its numbers and texts, in one of these forms.

        {"results": [{"model", "data", "span", "nll_token_mean", ...}, ...]}            eval.spans
        {"results": [{"model", "bleu", "bleu_interval", ...}, ...]}                     eval.memorization
        {"results": {task: {"acc,none", "acc_stderr,none", ...}}, "config", "paper"}    eval.harness
        {"model", "pass@1", "pass@1_standard_error", ...}                               all others
    """
    letters = {folder.resolve(): run.letter for run in runs for folder in (run.folder, run.folder / "final")}

    def letter_of(entry: dict) -> str | None:
        model = entry["config"]["model_args"]["pretrained"] if "config" in entry else entry.get("model")
        return letters.get(Path(model).expanduser().resolve()) if model else None

    entries, flags, facts = [result], {}, []
    if isinstance(result.get("results"), list):
        entries = result["results"]
        flags = {f"--{name.replace('_', '-')}": cell for name, cell in scores(result).items()}
    for entry in entries:
        letter = letter_of(entry)
        if not letter:
            continue
        if "results" in entry:
            title, cells = "tasks of lm-evaluation-harness", harness_scores(entry)
        else:
            cells = {**scores(entry), **flags}
            known = (title for start, title in TITLES.items() for name in [entry.get("benchmark"), *cells]
                     if str(name).startswith(start))
            title = next(known, file.stem)
        if "span" not in entry:
            facts += [Fact(title, label, letter, cell, file=file) for label, cell in cells.items()]
            continue
        for mean, words in MEANS.items():
            title = f"held-out NLL, {words}: {Path(entry['data']).name}"
            of_mean = {**flags, entry["span"]: cells[mean]}
            facts += [Fact(title, label, letter, cell, file=file) for label, cell in of_mean.items()]
            # The difference is from the file's first model, which need not be the first run.
            if f"{mean}_minus_first" in cells and letter_of(entries[0]) == runs[0].letter:
                difference = cells[f"{mean}_minus_first"]
                facts.append(Fact(title, entry["span"], letter, difference, "minus_first", file))
    return facts


def harness_scores(result: dict) -> dict[str, dict]:
    """The scores of each task; after the paper's suite also the means over its categories."""
    cells = {}
    for task, values in result["results"].items():
        for name, cell in scores(values).items():
            metric, _, filtered = name.partition(",")
            cells[f"{task} {metric}" + (f" ({filtered})" if filtered not in ("", "none") else "")] = cell
    paper = result.get("paper") or {"categories": {}}
    for category, means in {**paper["categories"], "all categories": paper}.items():
        cells |= {f"{category}: {name}": cell for name, cell in scores(means).items()
                  if name.startswith("mean_")}
    return cells


def scores(values: dict) -> dict[str, dict]:
    """Cells by name. {"acc,none": 0.5, "acc_stderr,none": 0.1} -> {"acc,none": {"value": 0.5, "error": 0.1}},
    {"parts": {"x": 2}} -> {"parts x": {"value": 2}}, {"data": ["a", "b"]} -> {"data": {"value": "a, b"}}"""
    cells = {}
    for name, value in values.items():
        score, comma, filtered = name.partition(",")
        if name in ("model", "name", "alias", "output") or score.endswith(ENDS) or isinstance(value, bool):
            continue
        if isinstance(value, list) and all(isinstance(word, str) for word in value):
            value = ", ".join(value)
        if isinstance(value, dict):
            cells |= {f"{name} {inner}": cell for inner, cell in scores(value).items()}
        elif isinstance(value, str | int | float):
            cells[name] = {"value": value}
            interval, *errors = (values.get(score + end + comma + filtered) for end in ENDS)
            if isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval)):
                cells[name]["interval"] = interval
            if errors := list(filter(is_number, errors)):
                cells[name]["error"] = errors[0]
    return cells


# ---------------------------------------------------------------- tables


def make_tables(runs: list[Run], facts: list[Fact], notes: list[str]) -> list[Table]:
    """A table for each title, or for each title and file name if several files give it for one run."""
    files = Counter((title, letter) for title, letter, _ in {(f.title, f.letter, f.file) for f in facts})
    crowded = {title for (title, _), count in files.items() if count > 1}
    sources, tables = {}, {}
    for title, label, letter, cell, column, file in facts:
        title = f"{title} ({file.stem})" if title in crowded else title
        if sources.setdefault((title, letter), file) == file:
            rows = tables.setdefault(title, {})
            row = rows.setdefault(label, {"label": label, "runs": {}, "minus_first": {}})
            row[column][letter] = cell
        elif (note := f"{file}: {letter} has another {title}; this one is left out") not in notes:
            notes.append(note)
    for title, rows in tables.items():
        for row in rows.values():
            if title != "training" or row["label"].startswith("NLL"):
                subtract(row, runs)
    return [move_settings(Table(title, CAPTIONS.get(title, ""), sorted(
        rows.values(), key=lambda row: SPANS.index(row["label"]) if row["label"] in SPANS else -1)))
        for title, rows in tables.items()]


def subtract(row: dict, runs: list[Run]) -> None:
    """Add the differences from the first run that no file gives."""
    first, *others = (row["runs"].get(run.letter, {"value": ""})["value"] for run in runs)
    for run, value in zip(runs[1:], others):
        if not isinstance(first, str) and not isinstance(value, str):
            row["minus_first"].setdefault(run.letter, {"value": value - first})


def move_settings(table: Table) -> Table:
    """Move to the caption what is the same in all runs and looks like a setting: text, flags, whole numbers.
    If nothing has an interval or an error, settings and scores look alike, and all of them stay."""
    def is_setting(row: dict) -> bool:
        first, *others = row["runs"].values()
        named = row["label"].startswith("--") or row["label"] in ("temperature", "top_p")
        return (list(first) == ["value"] and all(cell == first for cell in others)
                and (named or not isinstance(first["value"], float)))

    if any(len(cell) > 1 for row in table.rows for cell in row["runs"].values()):
        settings = [row for row in table.rows if is_setting(row)]
        table.rows = [row for row in table.rows if row not in settings]
        table.caption = "; ".join(f"{row['label']} {row['runs'].popitem()[1]['value']}" for row in settings)
    return table
