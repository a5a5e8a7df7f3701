"""From the lines of a study's runs.jsonl to its verdict: which learning rate and epoch, which differences.

Everything here is a pure function of numbers: no model, no file. eval/study.py says what a line holds.

Shapes: S seeds, E examples.
"""
import math
from collections import Counter

import numpy as np

from eval.results import MEANS

CONFIDENCE = 0.95
# What the verdict calls the data that is not in a test file. eval.study refuses such a name for one.
TRAINING, VALIDATION = "training records", "validation records"
# What is said in words: its name and unit.
SENTENCES = {"nll_token_mean": ("NLL", "nats a token"), "exact_match": ("exact match", "points")}
Line = dict
# {lr: {step: validation NLL by seed}} of one contender
Curves = dict[float, dict[int, list[float]]]


# ---------------------------------------------------------------- intervals


def t_quantile(df: float) -> float:
    """The t for which a Student-t variable with df degrees of freedom is in [-t, t] with probability
    CONFIDENCE."""
    from scipy import stats
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, df))


def half_width(d: np.ndarray) -> np.ndarray:
    """Half the width of the interval for the mean of differences d[..., seed, example] over other seeds and
    other examples than these, for each of the leading dimensions. d: (..., S, E). NaN where there is one
    example only; with one seed, the interval is over examples only.

    The differences are a mean plus an effect of the seed (shared by all examples), one of the example (shared
    by all seeds) and a remainder. Of their mean squares A, B and C, (A - C) / SE estimates the seeds' part of
    the mean's variance and B / SE all the rest. Each part is widened by its own t quantile, as in Howe's
    interval for the mean of a sum (JASA 69, 1974, 789-794); of C, t_seeds t_examples instead of t_seeds^2 is
    subtracted, because C is known much better than A:

        half^2 = (max(t_S^2 A - t_S t_E C, 0) + t_E^2 B) / SE

    Simulated coverage of 95 % intervals, with 20 to 1,000 examples and effects whose standard deviation is 0
    to 1 (seeds) and 0 to 3 (examples) times the remainder's: 93.9 to 98.0 % with three seeds, 94.2 to 97.3 %
    with five, 94.3 to 96.9 % with ten. A + B - C with Satterthwaite's degrees of freedom comes down to 92 %
    with three seeds.
    """
    seeds, examples = d.shape[-2:]
    if examples < 2:
        return np.full(d.shape[:-2], np.nan)
    mean = d.mean((-2, -1), keepdims=True)
    of_seed, of_example = d.mean(-1, keepdims=True), d.mean(-2, keepdims=True)
    t_examples = t_quantile(examples - 1)
    b = seeds * ((of_example - mean) ** 2).sum((-2, -1)) / (examples - 1)
    square = t_examples**2 * b
    if seeds > 1:
        t_seeds = t_quantile(seeds - 1)
        a = examples * ((of_seed - mean) ** 2).sum((-2, -1)) / (seeds - 1)
        c = ((d - of_seed - of_example + mean) ** 2).sum((-2, -1)) / ((seeds - 1) * (examples - 1))
        square = square + np.maximum(t_seeds**2 * a - t_seeds * t_examples * c, 0)
    return np.sqrt(square / (seeds * examples))


def difference(d: np.ndarray) -> dict:
    """The mean of d, (S, E) or, for numbers of a whole run, (S,), with its interval and how many seeds agree
    with its sign; none does where it is zero. interval: None where d says nothing of it, because it has one
    number or the same ones."""
    value, per_seed = float(d.mean()), d.reshape(len(d), -1).mean(1)
    if d.ndim == 2:
        half = float(half_width(d))
    elif len(d) > 1:
        half = t_quantile(len(d) - 1) * float(d.std(ddof=1)) / math.sqrt(len(d))
    else:
        half = math.nan
    known = math.isfinite(half) and half > 0
    return {"value": value, "interval": [value - half, value + half] if known else None,
            "per_seed": per_seed.tolist(), "seeds_agree": int((per_seed * value > 0).sum()),
            "seeds": len(d), "examples": d.shape[1] if d.ndim == 2 else None}


def by_example(sums: np.ndarray, tokens: np.ndarray, mean: str) -> np.ndarray:
    """(S, E) values whose mean over all is the difference of a mean NLL. sums: (S, E) differences of the
    examples' NLL sums; tokens: (E,).

    nll_token_mean is a ratio of sums, D / N. Its linearisation at the observed ratio r has the value
    r + (sum - r tokens) / mean tokens for an example, so that the ratio's error is the mean's error."""
    if mean == "nll_example_mean":
        return sums / tokens
    ratio = sums.sum() / (len(sums) * tokens.sum())
    return ratio + (sums - ratio * tokens) / tokens.mean()


# ---------------------------------------------------------------- selection


def token_mean(sums: list[float], tokens: list[int]) -> float:
    return float(np.sum(sums) / np.sum(tokens))


def validation_curves(lines: list[Line]) -> dict[str, Curves]:
    """{contender: {lr: {step: NLL by seed}}} on the validation data after training has begun: all that
    selection gets to see."""
    curves: dict[str, Curves] = {}
    for line in sorted(lines, key=lambda line: line["seed"]):
        of_lr = curves.setdefault(line["contender"], {}).setdefault(line["lr"], {})
        for evaluation in line["evaluations"]:
            if evaluation["step"] > 0:
                nll = token_mean(evaluation["validation"], line["tokens"]["validation"])
                of_lr.setdefault(evaluation["step"], []).append(nll)
    return curves


def select(curves: Curves) -> tuple[float, int]:
    """The learning rate and the step with the lowest validation NLL, in the mean over seeds; among equals the
    lower rate and the earlier step. ValueError if none is finite."""
    means = [(float(np.mean(values)), lr, step) for lr, of_lr in curves.items()
             for step, values in of_lr.items()]
    finite = [triple for triple in means if math.isfinite(triple[0])]
    if not finite:
        raise ValueError("no learning rate gives a finite NLL on the validation data; give lower --lrs")
    _, lr, step = min(finite)
    return lr, step


def complete(lines: list[Line]) -> tuple[list[Line], list[str]]:
    """The lines to judge by, and notes on the others. All contenders need the same seeds. What is left out
    are seeds and learning rates that are not finished, so that as many of the runs as possible stay, and then
    as many of the rates."""
    cells: dict[str, dict[float, set[int]]] = {}
    for line in lines:
        cells.setdefault(line["contender"], {}).setdefault(line["lr"], set()).add(line["seed"])
    finished = [have for of_lr in cells.values() for have in of_lr.values()]
    every = sorted(set().union(*finished))
    candidates, seeds = [], set(every)
    # Without the seed that is missing most often, and so on; among equals without the latest.
    while seeds:
        if all(any(seeds <= have for have in of_lr.values()) for of_lr in cells.values()):
            whole = sum(seeds <= have for have in finished)
            candidates.append((len(seeds) * whole, whole, seeds))
        seeds = seeds - {min(seeds, key=lambda seed: (sum(seed in have for have in finished), -seed))}
    if not candidates:
        raise ValueError("no seed is finished for every contender, so there is nothing to compare yet: run "
                         "the study to its end")
    _, _, seeds = max(candidates, key=lambda candidate: candidate[:2])
    notes = [f"seed {seed} is left out: not every contender has finished it" for seed in every
             if seed not in seeds]
    notes += [f"{name} with lr {lr:g} is left out: it has not finished every seed"
              for name, of_lr in cells.items() for lr, have in sorted(of_lr.items()) if not seeds <= have]
    return [line for line in lines if line["seed"] in seeds
            and seeds <= cells[line["contender"]][line["lr"]]], notes


def choose(lines: list[Line]) -> tuple[dict[str, dict], list[str]]:
    """{contender: {"lr", "step", "epoch", "curve": {lr: [{"step", "epoch", "mean", "per_seed"}]}}}, and notes
    where a wider grid might do better. Without validation data there must be one learning rate, and the last
    step is taken. ValueError otherwise."""
    choices, notes = {}, []
    if not lines[0]["tokens"]["validation"]:
        for line in lines:
            last = line["evaluations"][-1]
            chosen = choices.setdefault(line["contender"], {
                "lr": line["lr"], "step": last["step"], "epoch": last["epoch"], "curve": {}})
            if chosen["lr"] != line["lr"]:
                raise ValueError("several learning rates and no validation data to choose by; give one of "
                                 "them, or run with --validation-fraction 0.1")
        return choices, notes
    epochs = {evaluation["step"]: evaluation["epoch"] for line in lines for evaluation in line["evaluations"]}
    for name, curves in validation_curves(lines).items():
        lr, step = select(curves)
        choices[name] = {"lr": lr, "step": step, "epoch": epochs[step], "curve": {
            f"{each:g}": [{"step": s, "epoch": epochs[s], "mean": float(np.mean(values)), "per_seed": values}
                          for s, values in sorted(of_lr.items())] for each, of_lr in sorted(curves.items())}}
        if len(curves) > 1 and lr in (min(curves), max(curves)):
            word = "lowest" if lr == min(curves) else "highest"
            notes.append(f"{name}: lr {lr:g} is the {word} that was tried; a {word[:-3]}er one may be better")
        if step == max(curves[lr]) and len(curves[lr]) > 1:
            notes.append(f"{name}: validation NLL was lowest at the last evaluation; more --epochs may be "
                         "better")
    return choices, notes


# ---------------------------------------------------------------- the verdict


def verdict(lines: list[Line], baseline: str = "") -> dict:
    """What a study found, as study.json holds it (eval/study.py). lines: of runs.jsonl, in any order;
    baseline: the contender that the others are compared with, "": that of the first line. ValueError if the
    lines do not belong together, or nothing can be compared."""
    starting_model = [line for line in lines if line["contender"] is None]
    lines = [line for line in lines if line["contender"] is not None]
    if not lines:
        raise ValueError("no run is finished, so there is nothing to compare yet")
    runs = Counter((line["contender"], line["lr"], line["seed"]) for line in lines)
    for (name, lr, seed), count in runs.items():
        if count > 1:
            raise ValueError(f"{count} lines are of one run ({name}, lr {lr:g}, seed {seed}), which would "
                             "count as several seeds; keep one of them")
    names = list(dict.fromkeys(line["contender"] for line in lines))
    if baseline and baseline not in names:
        raise ValueError(f"--baseline {baseline}: is not a contender; these are {', '.join(names)}")
    baseline = baseline or names[0]
    tokens = lines[0]["tokens"]
    if other := next((line for line in lines if line["tokens"] != tokens), None):
        raise ValueError(f"{other['contender']}, lr {other['lr']:g}, seed {other['seed']}: was evaluated on "
                         f"other data than {lines[0]['contender']}; give the lines of one study")
    lines, notes = complete(lines)
    choices, more = choose(lines)
    # {contender: its lines with the chosen learning rate, by seed}
    chosen = {name: sorted((line for line in lines if line["contender"] == name
                            and line["lr"] == choices[name]["lr"]), key=lambda line: line["seed"])
              for name in names}
    values = {name: {**nll_values(chosen[name], choices[name]["step"]), **end_values(chosen[name])}
              for name in names}
    seeds = [line["seed"] for line in chosen[baseline]]
    if len(seeds) == 1:
        more.append("one seed: intervals are over examples only, and say nothing of other seeds")
    first = chosen[baseline][0]
    start = {**nll_values([first], 0), **(end_values(starting_model) if starting_model else {})}
    differences = []
    for name in (name for name in names if name != baseline):
        for (measure, file), own in values[name].items():
            base = values[baseline][measure, file]
            d = own - base
            if measure in MEANS:
                d = by_example(d, np.array(by_file(tokens)[file]), measure)
            row = {"contender": name, "measure": measure, "file": file, **difference(d)}
            if measure not in (*MEANS, "task") and row["interval"]:
                row["interval"] = np.clip(row["interval"], -100, 100).tolist()      # percent
            row["contender_value"], row["baseline_value"], row["start_value"] = (
                None if x is None else mean_value(x, measure, tokens, file)
                for x in (own, base, start.get((measure, file))))
            differences.append(row)
    return {"baseline": baseline, "contenders": names, "seeds": seeds, "confidence": CONFIDENCE,
            "choices": choices, "differences": differences,
            "sentences": [sentence(row, baseline) for row in differences if row["measure"] in SENTENCES],
            "curves": learning_curves(chosen), "notes": notes + more}


def by_file(of_line: dict) -> dict[str, list]:
    """An evaluation of a line, or its tokens: {file: numbers of its examples}. Files: the test files,
    VALIDATION and TRAINING."""
    return {**of_line["test"], VALIDATION: of_line["validation"], TRAINING: of_line["train"]}


def mean_value(x: np.ndarray, measure: str, tokens: dict, file: str) -> float:
    """What the values of nll_values() or end_values() are on average."""
    if measure not in MEANS:
        return float(x.mean())
    counts = np.array(by_file(tokens)[file])
    return float((x / counts).mean() if measure == "nll_example_mean" else x.sum() / (len(x) * counts.sum()))


def nll_values(lines: list[Line], step: int) -> dict[tuple[str, str], np.ndarray]:
    """{(mean, file): (S, E) NLL sums after `step` steps} of each test file and of training
    completions; the same sums for both of MEANS. lines: one a seed."""
    at = [by_file(next(e for e in line["evaluations"] if e["step"] == step)) for line in lines]
    return {(mean, file): np.array([sums[file] for sums in at]) for file in at[0]
            if file != VALIDATION and at[0][file] for mean in MEANS}


def end_values(lines: list[Line]) -> dict[tuple[str, str], np.ndarray]:
    """{(measure, file): values} of the trained models in percent: (S, E) of single answers, (S,) where a run
    has one number. lines: one a seed."""
    ends, out = [line["end"] for line in lines], {}
    if "memorization" in ends[0]:
        for name in ("exact", "prefix", "bleu"):
            values = np.array([end["memorization"][name] for end in ends], float)
            out[f"memorized_{name}", TRAINING] = values if name == "bleu" else 100 * values
    for file in ends[0].get("generate", ()):
        out["exact_match", file] = 100 * np.array([end["generate"][file] for end in ends], float)
    for task in ends[0].get("tasks", ()):
        out["task", task] = np.array([end["tasks"][task] for end in ends], float)
    return out


def by_measure(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """A verdict's differences, or some of them: {(file, measure): one a contender}."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["file"], row["measure"]), []).append(row)
    return groups


def digits_of(measure: str) -> int:
    """The decimals that are shown: more of nats and of tasks' scores than of percentages."""
    return 3 if measure in (*MEANS, "task") else 1


def sentence(row: dict, baseline: str) -> str:
    """A difference of one of SENTENCES in words.

        im against it: lowers NLL on far by 0.100 [0.070, 0.130] nats a token
        im against it: no difference in NLL on far is shown: -0.010 [-0.030, 0.020] nats a token
        im against it: does not change NLL on far
    """
    value, interval, digits = row["value"], row["interval"], digits_of(row["measure"])
    noun, unit = SENTENCES[row["measure"]]
    what, who = f"{noun} on {row['file']}", f"{row['contender']} against {baseline}:"
    if interval is None and value == 0:
        return f"{who} does not change {what}"
    if interval is None:
        return f"{who} changes {what} by {value:+.{digits}f} {unit}; there is no interval from so few numbers"
    low, high = interval
    if low <= 0 <= high:
        return (f"{who} no difference in {what} is shown: {value:.{digits}f} [{low:.{digits}f}, "
                f"{high:.{digits}f}] {unit}")
    verb = "lowers" if value < 0 else "raises"
    low, high = sorted((abs(low), abs(high)))
    return f"{who} {verb} {what} by {abs(value):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}] {unit}"


def learning_curves(chosen: dict[str, list[Line]]) -> dict[str, dict[str, list[dict]]]:
    """{file: {contender: [{"step", "epoch", "mean", "low", "high"}]}}: NLL a token with the chosen learning
    rate, mean and range over seeds. Files: those of by_file()."""
    curves: dict[str, dict[str, list[dict]]] = {}
    for name, lines in chosen.items():
        files = {file: tokens for file, tokens in by_file(lines[0]["tokens"]).items() if tokens}
        for of_seeds in zip(*(line["evaluations"] for line in lines)):
            for file, tokens in files.items():
                values = [token_mean(by_file(evaluation)[file], tokens) for evaluation in of_seeds]
                curves.setdefault(file, {}).setdefault(name, []).append(
                    {"step": of_seeds[0]["step"], "epoch": of_seeds[0]["epoch"],
                     "mean": float(np.mean(values)), "low": min(values), "high": max(values)})
    return curves
