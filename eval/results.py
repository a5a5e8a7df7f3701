"""What the tables of eval.compare hold: the runs' own files and the results of evaluation commands.

All is collected in one flat dictionary, and put into tables at the end. A column is a run's letter, "A", or a
difference from the first run, "B - A":

    cells   {(title of the table, label of the row, column): cell}
    tables  {title: {label: {column: cell}}}, as the page, the terminal and --json show them
    cell    {"value": number or str, "interval": [low, high], "error": standard error of the value}

A cell has an interval or an error if the file has one. A difference has an interval if eval.spans compared
the runs example by example; otherwise it is one number minus the other.
"""
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from config import Config
from runtime.files import distinct_endings, read_json
from runtime.folder import is_evaluation, is_step, read_log
from runtime.foreign import is_number
from runtime.weights import model_fingerprint

SPANS = ["completion", "instruction", "system", "template", "context"]      # as tables list them
MEANS = {"nll_token_mean": "mean over tokens", "nll_example_mean": "mean over examples"}
# The name of a score's interval or error is the score's name with one of these endings.
ENDS = ("_interval", "_standard_error", "_stderr")
Cells = dict[tuple[str, str, str], dict]


@dataclass
class Run:
    """An output folder of train.py."""
    letter: str
    folder: Path
    config: dict                # run_config.json
    metrics: list[dict]         # metrics.jsonl, one entry a step
    evaluations: list[dict]     # eval.jsonl
    final: Path | None          # None if training has not ended

    @cached_property
    def weights(self) -> str | None:
        """A hash of final/'s weights, None without it."""
        return model_fingerprint(self.final) if self.final else None


# ---------------------------------------------------------------- the runs' own files


def read_run(letter: str, name: str, notes: list[str]) -> Run:
    """Adds to notes what is missing or damaged. ValueError if the folder is not a run's."""
    folder = Path(name)
    file, final = folder / "run_config.json", folder / "final"
    if not file.is_file():
        raise ValueError(f"{name}: not an output folder of train.py, it has no run_config.json; give the "
                         "folder that has one, not the final/ in it")
    logs = []
    for log, fits in (folder / "metrics.jsonl", is_step), (folder / "eval.jsonl", is_evaluation):
        # The last line is cut off if the run was killed or still writes.
        lines, damaged = read_log(log, fits)
        logs.append(lines)
        if damaged:
            notes.append(f"{log}: {damaged} damaged line(s) were left out")
    run = Run(letter, folder, read_json(file), *logs, final if final.is_dir() else None)
    if not run.metrics:
        notes.append(f"{letter} has no metrics.jsonl, or an empty one: no training curves")
    if not run.evaluations:
        notes.append(f"{letter} was not evaluated while it trained (no eval.jsonl)")
    if not run.final:
        finished = "finished_after" in read_json(folder / "identity.json")
        notes.append(f"{letter} has no final/: " + (
            "it was deleted" if finished else "it was interrupted or is still training"))
    return run


def run_cells(runs: list[Run]) -> Cells:
    """The flags in which the runs differ, those of a run alone from train.py's defaults; the training with
    its last epoch's NLL; and the last evaluation."""
    always, never = ["model", "train_data", "eval_data"], ["output_dir", "cache_dir", "overwrite", "resume"]
    others = [run.config for run in runs] if len(runs) > 1 else [asdict(Config())]
    differ = [name for run in runs for name in run.config if name not in never
              and any(other.get(name) != run.config[name] for other in others)]
    cells = {}
    for run in runs:
        values = {}
        for name in dict.fromkeys([*always, *differ]):
            value = run.config.get(name)
            if value not in (None, "", []):
                text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
                values["configuration", name] = text
        if run.metrics:
            last = run.metrics[-1]
            tokens, trained, seconds = (sum(line[name] for line in run.metrics)
                                        for name in ("tokens", "trained_tokens", "seconds"))
            numbers = {"steps": last["step"], "epochs": last["epoch"], "tokens": tokens,
                       "trained tokens": trained, "tokens/s": round(tokens / max(seconds, 1e-9)),
                       "peak memory, MiB": round(max(line["peak_memory_mb"] for line in run.metrics))}
            values |= {("training", label): value for label, value in numbers.items()}
            of_epoch = [line for line in run.metrics if line["epoch"] > last["epoch"] - 1]
            for kind in SPANS:
                # Weighted by all of a step's targets: the log does not say how many are of each kind.
                measured = [line for line in of_epoch if line.get(f"nll_{kind}") is not None]
                if targets := sum(line["tokens"] for line in measured):
                    nats = sum(line[f"nll_{kind}"] * line["tokens"] for line in measured) / targets
                    values["training", f"NLL in the last epoch, {kind}"] = nats
        if run.evaluations:
            last, title = run.evaluations[-1], "held-out NLL when training ended"
            values |= {(title, f"{name}: {kind}"): kinds[kind]["nll_token_mean"]
                       for name, kinds in last["data"].items() for kind in SPANS if kind in kinds}
            if "exact_match" in last:
                values[title, "exact match, %"] = 100 * last["exact_match"]
        cells |= {(*place, run.letter): {"value": value} for place, value in values.items()}
    return cells


def points(metrics: list[dict], kind: str) -> list[tuple[int, float]]:
    """[(step, nats a token)] of the steps that measured this kind of span."""
    return [(line["step"], line[f"nll_{kind}"]) for line in metrics if line.get(f"nll_{kind}") is not None]


def curves(runs: list[Run]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{name: {letter: [(step, nats a token)]}}, while training: each kind of span of the training data, and
    of each file of --eval-data."""
    found = {f"training: {kind}": {run.letter: points(run.metrics, kind) for run in runs
                                   if points(run.metrics, kind)} for kind in SPANS}
    for run in runs:
        for line in run.evaluations:
            for name, kinds in line["data"].items():
                for kind in (kind for kind in SPANS if kind in kinds):
                    curve = found.setdefault(f"{name}: {kind}", {}).setdefault(run.letter, [])
                    curve.append((line["step"], kinds[kind]["nll_token_mean"]))
    return {name: of_runs for name, of_runs in found.items() if of_runs}


# ---------------------------------------------------------------- results of the evaluation commands


def read_results(runs: list[Run], given: list[str], notes: list[str]) -> Cells:
    """What RUN/eval/*.json and the given files say about the runs. Adds to notes the files that say nothing.
    ValueError if a given file is missing."""
    for file in given:
        if not Path(file).is_file():
            raise ValueError(f"--results {file}: no such file")
    files = [file for run in runs for file in sorted((run.folder / "eval").glob("*.json"))]
    cells = {}
    for file in {file.resolve(): file for file in [*files, *map(Path, given)]}.values():
        if file.name.endswith(".settings.json"):    # the settings of a file of answers
            continue
        try:
            result = read_json(file)
        except (ValueError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error).removeprefix(f"{file}: ")
            notes.append(f"{file}: not a result of an evaluation command ({reason})")
            continue
        try:
            of_file, changed = result_cells(result, file.name, runs)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else "its fields hold other values"
            notes.append(f"{file}: not a result of an evaluation command ({reason})")
            continue
        notes += [f"{file}: left out, {model} has other weights than were measured" for model in changed]
        if not of_file and not changed:
            notes.append(f'{file}: its "model" is not one of these runs')
        elif cells.keys() & of_file.keys():
            notes.append(f"{file}: left out, another {file.name} has results of the same run; rename one")
        else:
            cells |= of_file
    return cells


def result_cells(result: dict, name: str, runs: list[Run]) -> tuple[Cells, list[str]]:
    """What one file says about the runs: all its numbers and texts; and the runs' models that were trained
    again since, of which it says nothing. The file's name is the title, so files of one name become one
    table. They have one of these forms:

        {"results": [{"model", "data", "span", "nll_token_mean", ...}, ...], "seed", ...}   eval.spans
        {"results": [{"model", "bleu", "bleu_interval", ...}, ...], "seed", ...}            eval.memorization
        {"results": {task: {"acc,none", "acc_stderr,none", ...}}, "config"}                 eval.harness
        {"model", "pass@1", "pass@1_standard_error", ...}                                   all others

    and a hash of every model's "weights".
    """
    owners = {folder.resolve(): run for run in runs for folder in (run.folder, run.folder / "final")}
    result, changed = {**result}, []
    for model, measured in result.pop("weights", {}).items():
        folder = Path(model).expanduser().resolve()
        if folder in owners and measured != owners[folder].weights:
            del owners[folder]
            changed.append(model)

    def letter_of(entry: dict) -> str | None:
        model = entry["config"]["model_args"]["pretrained"] if "config" in entry else entry.get("model")
        owner = owners.get(Path(model).expanduser().resolve()) if model else None
        return owner and owner.letter

    first, cells, settings, entries = runs[0].letter, {}, {}, [result]
    if isinstance(result.get("results"), list):
        entries = result["results"]
        settings = {f"--{flag.replace('_', '-')}": cell for flag, cell in scores(result).items()}
    files = list(dict.fromkeys(entry["data"] for entry in entries if "span" in entry))
    names = dict(zip(files, distinct_endings(files)))
    for entry in sorted(entries, key=lambda entry: SPANS.index(entry.get("span", "completion"))):
        letter = letter_of(entry)
        if not letter:
            continue
        if "span" not in entry:
            rows = scores(entry.get("results", entry)) | settings
            cells |= {(name, label, letter): cell for label, cell in rows.items()}
            continue
        values, span = scores(entry), entry["span"]
        for mean, words in MEANS.items():
            title = f"{name}: NLL of {names[entry['data']]}, {words}"
            rows = {span: values[mean]} | settings
            cells |= {(title, label, letter): cell for label, cell in rows.items()}
            # The difference is from the file's first model, which need not be the first run.
            if f"{mean}_minus_first" in values and letter_of(entries[0]) == first:
                cells[title, span, f"{letter} - {first}"] = values[f"{mean}_minus_first"]
    return cells, changed


def scores(values: dict) -> dict[str, dict]:
    """Cells by name. {"acc,none": 0.5, "acc_stderr,none": 0.1} -> {"acc": {"value": 0.5, "error": 0.1}},
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
        elif isinstance(value, str | float) or is_number(value):
            cell = cells[name.removesuffix(",none")] = {"value": value}
            for end in ENDS:
                match values.get(score + end + comma + filtered):
                    case [int() | float(), int() | float()] as interval if all(map(is_number, interval)):
                        cell["interval"] = interval
                    case int() | float() as error if is_number(error):
                        cell["error"] = error
    return cells


# ---------------------------------------------------------------- tables


def make_tables(cells: Cells, letters: list[str]) -> dict[str, dict[str, dict[str, dict]]]:
    """The tables of the module's docstring, with the differences that no file gives. Whole numbers are
    counts and have none. A setting of a result is left out if it is the same for all runs."""
    tables, first = {}, letters[0]
    for (title, label, column), cell in cells.items():
        same = all(cells.get((title, label, letter), cell) == cell for letter in letters)
        if not (label.startswith("--") and same):
            tables.setdefault(title, {}).setdefault(label, {})[column] = cell
    for row in (row for rows in tables.values() for row in rows.values()):
        for letter in letters[1:]:
            if all(isinstance(row.get(column, {}).get("value"), float) for column in (first, letter)):
                difference = row[letter]["value"] - row[first]["value"]
                row.setdefault(f"{letter} - {first}", {"value": difference})
    return tables
