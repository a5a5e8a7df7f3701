"""The NLP suite of arXiv 2405.14394 as tasks of lm-evaluation-harness, and its means: `eval.harness --tasks
paper`.

Tasks, metrics and means are those of the paper and of the results script in its released code: a score for
each task, the mean of each category's tasks, and the unweighted mean of the categories. A group or a tag of
the harness counts as one task; a tag's score is the mean over its tasks, weighted by documents.

There are two means. The paper's averages the translation error rate TER as if higher were better. The other
leaves TER out. TER can pass 100 %, so there is no accuracy 1 - TER to average instead. Both means cover the
tasks that were run, and the others are named.
"""
import math
import textwrap
from typing import NamedTuple

from eval.common import gather


class Entry(NamedTuple):
    # "metric,filter", as in the harness's results.
    metric: str
    # Examples in front of each question; None: the harness's own number.
    shots: int | None = None
    # In percent, and lower is better.
    error_rate: bool = False


SUITE: dict[str, dict[str, Entry]] = {
    "knowledge": {"mmlu": Entry("acc,none"), "piqa": Entry("acc_norm,none", 10),
                  "openbookqa": Entry("acc_norm,none"), "hellaswag": Entry("acc_norm,none", 10),
                  "lambada": Entry("acc,none")},
    # WMT14 and WMT16.
    "multilingual": {"lambada_multilingual": Entry("acc,none"),
                     "gpt3_translation_benchmarks": Entry("ter,none", error_rate=True)},
    "commonsense": {"wsc273": Entry("acc,none"), "winogrande": Entry("acc,none", 5),
                    "ai2_arc": Entry("acc_norm,none", 25), "coqa": Entry("f1,none", 0)},
    # And HumanEval.
    "maths and code": {"gsm8k_cot": Entry("exact_match,strict-match", 8)},
    "BBH": {"bbh_cot_fewshot": Entry("exact_match,get-answer")},
    # TruthfulQA's six examples are part of the task's own prompt.
    "safety": {"truthfulqa_mc2": Entry("acc,none", 0), "toxigen": Entry("acc,none"),
               "hendrycks_ethics": Entry("acc,none")},
}
ENTRIES = {task: entry for entries in SUITE.values() for task, entry in entries.items()}
# The paper takes the better of two temperatures.
ELSEWHERE = {"HumanEval": "run by eval.humaneval, with --samples 20 at --temperature 0.1 and 0.7"}
HUMANEVAL_IN = "maths and code"


# ---------------------------------------------------------------- tasks


def shots_by_task(manager: object) -> dict[str, int | None]:
    """How many examples each task of the suite gets, tags taken apart. manager: the harness's TaskManager."""
    index = manager.task_index
    return {name: entry.shots for task, entry in ENTRIES.items() if task in index
            for name in (index[task].tags if task in manager.all_tags else [task])}


def load_tasks(manager: object) -> tuple[list, dict[str, list[str]], dict[str, str]]:
    """Returns the suite's tasks and groups that every rank can load; for each entry the names of its results;
    and why others cannot be loaded. ValueError if no task can. manager: the harness's TaskManager."""
    loaded, why_not = {}, {}
    for name in ENTRIES:
        try:
            loaded[name] = manager.load([name])
        except Exception as error:
            # No network, a missing package or a fault of the task: run the others all the same.
            first_line = next(iter(str(error).strip().splitlines()), "")
            why_not[name] = f"{type(error).__name__}: {first_line}"[:150]
    why_not = dict(gather(list(why_not.items())))
    if len(why_not) == len(ENTRIES):
        name, why = next(iter(why_not.items()))
        raise ValueError(f"--tasks paper: none of its tasks can be loaded; for one, {name}: {why}")
    tasks, members = [], {}
    for name, found in loaded.items():
        if name in why_not:
            continue
        for task in found["tasks"].values():
            if ENTRIES[name].shots is not None:
                task.set_config("num_fewshot", ENTRIES[name].shots)
        is_group = name in found["groups"]
        tasks += [found["groups"][name]] if is_group else found["tasks"].values()
        members[name] = [name] if is_group else list(found["tasks"])
    return tasks, members, why_not


# ---------------------------------------------------------------- means


def score(entry: Entry, results: dict, members: list[str]) -> tuple[float, float | None] | None:
    """(value, standard error): the mean over `members` in the harness's results, weighted by documents. Error
    rates become fractions. None if a member has no result; the error is None if the harness gives none."""
    metric, _, name = entry.metric.partition(",")
    rows = [results["results"].get(task, {}) for task in members]
    if not all(entry.metric in row for row in rows):
        return None
    sizes = [results.get("n-samples", {}).get(task, {}).get("effective", 1) for task in members]
    values, errors = ([row.get(key) for row in rows] for key in (entry.metric, f"{metric}_stderr,{name}"))
    known = all(isinstance(error, (int, float)) for error in errors)
    scale = (100 if entry.error_rate else 1) * sum(sizes)
    return (sum(size * value for size, value in zip(sizes, values)) / scale,
            math.hypot(*(size * error for size, error in zip(sizes, errors))) / scale if known else None)


def summary(results: dict, members: dict[str, list[str]], why_not: dict[str, str]) -> dict:
    """results: of the harness; members, why_not: as load_tasks() returns them. A mean over nothing is None.

    Returns {"tasks": {task: {...}}, "categories": {name: {...}}, "mean_as_in_paper", "mean_accuracies",
    "not_run": {task: why}}."""
    tasks, categories, not_run = {}, {}, dict(ELSEWHERE)
    for category, entries in SUITE.items():
        as_in_paper, accuracies = [], []
        for task, entry in entries.items():
            found = score(entry, results, members.get(task, [task]))
            if found is None:
                not_run[task] = why_not.get(task, "not run")
                continue
            tasks[task] = {"category": category, "metric": entry.metric, "value": found[0],
                           "stderr": found[1], "higher_is_better": not entry.error_rate}
            as_in_paper.append(found[0])
            accuracies += [] if entry.error_rate else [found[0]]
        categories[category] = {"mean_as_in_paper": mean(as_in_paper), "mean_accuracies": mean(accuracies),
                                "tasks": len(as_in_paper), "of": len(entries) + (category == HUMANEVAL_IN)}
    return {"tasks": tasks, "categories": categories, "not_run": not_run,
            **{name: mean([x[name] for x in categories.values() if x[name] is not None])
               for name in ("mean_as_in_paper", "mean_accuracies")}}


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def table(found: dict) -> str:
    """A summary() in lines of at most 80 columns, in percent."""
    def percent(value: float | None) -> str:
        return f"{'-' if value is None else f'{100 * value:.2f}':>8}"

    lines = [f"{'task':<28} {'metric':<25}{'%':>8}{'stderr':>8}"]
    for task, row in found["tasks"].items():
        lines.append(f"{task:<28} {row['metric']:<25}{percent(row['value'])}{percent(row['stderr'])}"
                     + ("" if row["higher_is_better"] else " (error)"))
    lines += ["", f"{'category':<28} {'tasks run':<9}{'as in the paper':>16}{'without TER':>16}"]
    for name, row in found["categories"].items():
        lines.append(f"{name:<28} {row['tasks']} of {row['of']:<4}{percent(row['mean_as_in_paper']):>16}"
                     f"{percent(row['mean_accuracies']):>16}")
    lines.append(f"{'mean of the categories':<28} {'':<9}{percent(found['mean_as_in_paper']):>16}"
                 f"{percent(found['mean_accuracies']):>16}")
    lines.append("as in the paper: TER, an error, is averaged as if higher were better")
    if found["not_run"]:
        lines += ["", "not in these means:"]
        for task, why in found["not_run"].items():
            lines += textwrap.wrap(f"{task}: {why}", 80, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)
