"""The NLP suite of arXiv 2405.14394 as tasks of lm-evaluation-harness, and its means: `eval.harness --tasks
paper`.

Tasks, metrics and the rule of the mean are those of the paper and of the results script in its released code:
a score for each task, the mean of a category's tasks, and the mean of the category means, unweighted. A task
that is a group or a tag of the harness has its subtasks' mean, weighted by their number of documents.

Two means are given. The paper's averages the translation error rate TER as if higher were better. The other
leaves TER out, and it is reported apart: an error rate that can pass 100 % has no counterpart among
accuracies, so turning it into 1 - TER would only hide the choice of scale. Both are over what was run; what
was not is named.
"""
import math
import textwrap
from typing import NamedTuple


class Entry(NamedTuple):
    task: str                   # a task, group or tag of the harness
    metric: str                 # "metric,filter", as in the harness's results
    shots: int | None = None    # None: as the harness has it
    error_rate: bool = False    # in percent, and lower is better


SUITE: dict[str, list[Entry]] = {
    "knowledge": [Entry("mmlu", "acc,none"), Entry("piqa", "acc_norm,none", 10),
                  Entry("openbookqa", "acc_norm,none"), Entry("hellaswag", "acc_norm,none", 10),
                  Entry("lambada", "acc,none")],
    "multilingual": [Entry("lambada_multilingual", "acc,none"),
                     Entry("gpt3_translation_benchmarks", "ter,none", error_rate=True)],    # WMT14 and WMT16
    "commonsense": [Entry("wsc273", "acc,none"), Entry("winogrande", "acc,none", 5),
                    Entry("ai2_arc", "acc_norm,none", 25), Entry("coqa", "f1,none", 0)],
    "maths and code": [Entry("gsm8k_cot", "exact_match,strict-match", 8)],                  # and HumanEval
    "BBH": [Entry("bbh_cot_fewshot", "exact_match,get-answer")],
    # TruthfulQA's six examples are part of the task's own prompt.
    "safety": [Entry("truthfulqa_mc2", "acc,none", 0), Entry("toxigen", "acc,none"),
               Entry("hendrycks_ethics", "acc,none")],
}
ENTRIES = [entry for entries in SUITE.values() for entry in entries]
# The paper takes the better of two temperatures.
ELSEWHERE = {"HumanEval": "run by eval.humaneval, with --samples 20 at --temperature 0.1 and 0.7"}
HUMANEVAL_IN = "maths and code"


def score(entry: Entry, results: dict, members: list[str]) -> tuple[float, float | None] | None:
    """(value, standard error) from the harness's results, weighted by documents over the members of a tag;
    error rates as fractions, like the others. None if any is missing; the error is None where the
    harness gives none."""
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
    """results: of the harness; members: the subtasks of each of ENTRIES that is a tag; why_not: of tasks that
    could not be loaded. Returns {"tasks": {task: {...}}, "categories": {name: {...}}, "mean_as_in_paper",
    "mean_accuracies", "not_run": {task: why}}; the means are None if nothing is in them."""
    tasks, categories, not_run = {}, {}, dict(ELSEWHERE)
    for category, entries in SUITE.items():
        as_in_paper, accuracies = [], []
        for entry in entries:
            found = score(entry, results, members.get(entry.task, [entry.task]))
            if found is None:
                not_run[entry.task] = why_not.get(entry.task, "not run")
                continue
            tasks[entry.task] = {"category": category, "metric": entry.metric, "value": found[0],
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
