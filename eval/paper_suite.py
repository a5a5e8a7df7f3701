"""The NLP suite of arXiv 2405.14394 as tasks of lm-evaluation-harness, and its means: `eval.harness --tasks
paper`.

Tasks, metrics and means are those of the paper and of the results script in its released code: a score for
each task, the mean of each category's tasks, and the unweighted mean of the categories. A group or a tag of
the harness counts as one task; its score is the mean over its documents.

There are two means. The paper's averages the translation error rate TER as if higher were better. The other
leaves TER out: TER can pass 100 %, so 1 - TER is not an accuracy. Both cover the tasks that were run, and the
others are named.
"""
import textwrap
from collections.abc import Iterable
from typing import NamedTuple

from eval.common import gather
from runtime.start import WIDTH


class Entry(NamedTuple):
    category: str
    task: str
    # "metric,filter", as in the harness's results.
    metric: str
    # Examples in front of each question; None: the harness's own number.
    shots: int | None = None


# In percent, and lower is better.
TER = "ter,none"
SUITE = [
    Entry("knowledge", "mmlu", "acc,none"),
    Entry("knowledge", "piqa", "acc_norm,none", 10),
    Entry("knowledge", "openbookqa", "acc_norm,none"),
    Entry("knowledge", "hellaswag", "acc_norm,none", 10),
    Entry("knowledge", "lambada", "acc,none"),
    Entry("multilingual", "lambada_multilingual", "acc,none"),
    # WMT14 and WMT16.
    Entry("multilingual", "gpt3_translation_benchmarks", TER),
    Entry("commonsense", "wsc273", "acc,none"),
    Entry("commonsense", "winogrande", "acc,none", 5),
    Entry("commonsense", "ai2_arc", "acc_norm,none", 25),
    Entry("commonsense", "coqa", "f1,none", 0),
    Entry("maths and code", "gsm8k_cot", "exact_match,strict-match", 8),
    Entry("maths and code", "HumanEval", "pass@1"),
    Entry("BBH", "bbh_cot_fewshot", "exact_match,get-answer"),
    # TruthfulQA's six examples are part of the task's own prompt.
    Entry("safety", "truthfulqa_mc2", "acc,none", 0),
    Entry("safety", "toxigen", "acc,none"),
    Entry("safety", "hendrycks_ethics", "acc,none"),
]
# Not a task of the harness here. The paper takes the better of two temperatures.
HUMANEVAL = {"HumanEval": "run by eval.humaneval, with --samples 20 at --temperature 0.1 and 0.7"}


def load_tasks(manager: object) -> tuple[list, dict[str, str]]:
    """Returns the suite's tasks and groups that every rank can load, and why others cannot be loaded.
    ValueError if no task can. manager: the harness's TaskManager."""
    from lm_eval.api.group import Group
    loaded, why_not = {}, {}
    for _, name, metric, shots in SUITE:
        if name in HUMANEVAL:
            continue
        try:
            found = manager.load([name])
        except Exception as error:
            # No network, a missing package or a fault of the task: run the others all the same.
            first_line = next(iter(str(error).strip().splitlines()), "")
            why_not[name] = f"{type(error).__name__}: {first_line}"[:150]
            continue
        # The harness has a mean for a group, but none for a tag.
        mean_of = [{"metric": metric.split(",")[0], "weight_by_size": True}]
        tag = Group.from_config({"group": name, "aggregate_metric_list": mean_of})
        for task in found["tasks"].values():
            tag.add(task)
            if shots is not None:
                task.set_config("num_fewshot", shots)
        loaded[name] = {name: tag, **found["tasks"], **found["groups"]}[name]
    why_not = dict(gather(list(why_not.items())))
    tasks = [task for name, task in loaded.items() if name not in why_not]
    if not tasks:
        name, why = next(iter(why_not.items()))
        raise ValueError(f"--tasks paper: none of its tasks can be loaded; for one, {name}: {why}")
    return tasks, why_not


def summary(results: dict, why_not: dict[str, str]) -> dict:
    """results: the harness's, by task; why_not: as load_tasks() returns it. A mean over nothing is None.

    Returns {"tasks": {task: {...}}, "categories": {name: {...}}, "mean_as_in_paper", "mean_accuracies",
    "not_run": {task: why}}. TER is a fraction there."""
    tasks, not_run = {}, {}
    for category, task, metric, _ in SUITE:
        row = results.get(task, {})
        if metric not in row:
            not_run[task] = (HUMANEVAL | why_not).get(task, "not run")
            continue
        scale, stderr = 100 if metric == TER else 1, row.get(metric.replace(",", "_stderr,"))
        tasks[task] = {"category": category, "metric": metric, "value": row[metric] / scale,
                       "stderr": stderr / scale if isinstance(stderr, float) else None,
                       "higher_is_better": metric != TER}
    categories = {}
    for category in dict.fromkeys(entry.category for entry in SUITE):
        rows = [row for row in tasks.values() if row["category"] == category]
        categories[category] = {
            "mean_as_in_paper": mean(row["value"] for row in rows),
            "mean_accuracies": mean(row["value"] for row in rows if row["higher_is_better"])}
    means = {name: mean(row[name] for row in categories.values()) for name in categories["BBH"]}
    return {"tasks": tasks, "categories": categories, "not_run": not_run, **means}


def mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def table(found: dict) -> str:
    """A summary() in lines of at most 79 columns, in percent."""
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    lines = [f"{'task':<28} {'metric':<25}{'%':>8}{'stderr':>8}"]
    for task, row in found["tasks"].items():
        lines.append(f"{task:<28} {row['metric']:<25}{percent(row['value']):>8}{percent(row['stderr']):>8}"
                     + ("" if row["higher_is_better"] else " (error)"))
    lines += ["", f"{'category':<28} {'as in the paper':>16}{'without TER':>16}"]
    for name, row in {**found["categories"], "mean of the categories": found}.items():
        lines.append(f"{name:<28} {percent(row['mean_as_in_paper']):>16}"
                     f"{percent(row['mean_accuracies']):>16}")
    lines.append("as in the paper: TER, an error, is averaged as if higher were better")
    if found["not_run"]:
        lines += ["", "not in these means:"]
        for task, why in found["not_run"].items():
            lines += textwrap.wrap(f"{task}: {why}", WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)
