"""Figures and tables of docs/findings.md from the runs in docs/findings/.

    python -m studies.report

Reads analyses.json, which says before any run what each analysis compares, its primary measure and the sign
that the paper lets one expect. Writes docs/findings/ANALYSIS.png, and replaces what stands in
docs/findings.md between <!-- ANALYSIS --> and <!-- end --> (`summary` is the table of all). An analysis whose
runs are missing says so. The kinds of analysis:

    differences     contenders minus the first one, for every file (eval.study's verdict)
    trend           IM minus IT in one study for each x; the slope of that gain against ln(x)
    epochs          IM minus IT after every epoch; how much more IT changes between two of them
    frontier        NLL far from the training data at the same NLL near it, whatever rate and epoch that takes
"""
from argparse import Namespace

from runtime.flags import Parser
from runtime.start import answer_flags, run_program


def parse_args(argv: list[str]) -> Namespace:
    """There are no flags but --help."""
    return Parser(prog="python -m studies.report", description=__doc__.split("\n\n")[0]).parse_args(argv)


answer_flags(__name__, parse_args)

import gzip
import json
import math
import re
import statistics
from pathlib import Path

import numpy as np

from eval.advice import EVIDENCE
from eval.study_report import MEASURES
from eval.study_statistics import (by_example, by_file, by_measure, difference, digits_of, nll_values,
                                   t_quantile, verdict)

HERE = Path(__file__).resolve().parent
FINDINGS = HERE.parent / "docs/findings"
PAGE = HERE.parent / "docs/findings.md"
Table = list[list[str]]
Found = list[tuple[str, list[dict], dict]]      # study, its lines, eval.study's verdict


class Missing(Exception):
    """An analysis cannot be made yet. args: what is missing."""


def load_lines(study: str, contenders: list[str], folder: Path) -> list[dict]:
    """The lines of these contenders' runs, in the order of `contenders`. Raises Missing."""
    file = folder / f"{study}.jsonl.gz"
    if not file.is_file():
        raise Missing(f"no run of {study}")
    with gzip.open(file, "rt") as lines:
        lines = [line for line in map(json.loads, lines) if line["contender"] in contenders]
    if absent := [name for name in contenders if name not in {line["contender"] for line in lines}]:
        raise Missing(f"no run of {', '.join(absent)} in {study}")
    return sorted(lines, key=lambda line: contenders.index(line["contender"]))


def compared(lines: list[dict], baseline: str) -> dict:
    """eval.study's verdict. Raises Missing if no seed is finished for every contender."""
    try:
        return verdict(lines, baseline)
    except ValueError as error:
        raise Missing(str(error)) from None


def measured(analysis: dict, folder: Path) -> Found:
    """The studies of an analysis that are far enough. Raises Missing if the one of the primary measure is
    not, or fewer than three of a trend are."""
    found, missing = [], {}
    for study in analysis["studies"]:
        try:
            lines = load_lines(study, analysis["contenders"], folder)
            found.append((study, lines, compared(lines, analysis["contenders"][0])))
        except Missing as error:
            missing[study] = str(error)
    primary = analysis["primary"].get("study")
    if primary in missing or len(found) < (3 if analysis["kind"] == "trend" else 1):
        raise Missing("; ".join(missing.values()))
    return found


def best_on_validation(result: dict, names: list[str]) -> str:
    """The contender of the lowest validation NLL at its chosen rate and epoch."""
    def nll(name: str) -> float:
        choice = result["choices"][name]
        return next(point["mean"] for point in choice["curve"][f"{choice['lr']:g}"]
                    if point["step"] == choice["step"])
    return min(names, key=nll)


def interval(row: dict, digits: int) -> str:
    """'-0.10 [-0.13, -0.07], 5 of 5 seeds'"""
    if row["interval"] is None:
        return f"{row['value']:+.{digits}f}"
    low, high = row["interval"]
    text = f"{row['value']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return text + (f", {row['seeds_agree']} of {row['seeds']} seeds" if "seeds" in row else "")


# ---------------------------------------------------------------- the kinds
# Each takes an analysis and what measured() found for it. It returns the primary difference, the tables, and
# a function that draws on a matplotlib figure.


def differences(analysis: dict, found: Found) -> tuple[dict, dict[str, Table], object]:
    primary, tables, shown = None, {}, []
    for study, _, result in found:
        rows = [row for row in result["differences"] if row["measure"] in analysis["measures"]
                and row["file"] in analysis.get("files", [row["file"]])]
        of_contender = [["", *(f"{name}: lr, epochs" for name in result["contenders"])],
                        [study, *(f"{choice['lr']:g}, {choice['epoch']:g}"
                                  for choice in (result["choices"][name] for name in result["contenders"]))]]
        table = [["after " + study, "measure", result["baseline"], *result["contenders"][1:]]]
        for (file, measure), cells in by_measure(rows).items():
            digits = digits_of(measure)
            table.append([file, MEASURES[measure], f"{cells[0]['baseline_value']:.{digits}f}",
                          *(interval(row, digits) for row in cells)])
        tables[study] = table
        tables[f"{study}, chosen"] = of_contender
        if analysis.get("from_start"):
            tables[f"{study}, from the start"] = changes(result, analysis["files"])
        if study == analysis["primary"].get("study"):
            primary = primary_row(analysis["primary"], result, rows)
        shown += [(f"{study}: {row['file']}", row) for row in rows
                  if row["measure"] == analysis["primary"]["measure"]]

    def draw(figure: object) -> None:
        forest(figure, shown, analysis)
    return primary, tables, draw


def primary_row(wanted: dict, result: dict, rows: list[dict]) -> dict:
    """The difference that an analysis is judged by. Contender may be 'best of A, B on validation data'."""
    name = wanted["contender"]
    if name.startswith("best of "):
        name = best_on_validation(result, name[len("best of "):-len(" on validation data")].split(", "))
    of_file = by_measure(rows)[wanted["file"], wanted["measure"]]
    return next(row for row in of_file if row["contender"] == name)


def changes(result: dict, files: list[str]) -> Table:
    """NLL a token before training and after it, for each file and contender; the mean over seeds."""
    table = [["NLL a token", "before", *result["contenders"]]]
    for file in files:
        rows = by_measure(result["differences"])[file, "nll_token_mean"]
        after = [rows[0]["baseline_value"], *(row["contender_value"] for row in rows)]
        table.append([file, *(f"{value:.3f}" for value in (rows[0]["start_value"], *after))])
    return table


def trend(analysis: dict, found: Found) -> tuple[dict, dict[str, Table], object]:
    """The slope is that of a straight line through one mean gain for each x, its interval that of ordinary
    least squares: every x has records of its own, whose accidents the seeds of one study do not show."""
    wanted, points = analysis["primary"], []
    it, im = analysis["contenders"]
    for study, _, result in found:
        [row] = by_measure(result["differences"])[wanted["file"], wanted["measure"]]
        points.append((analysis["studies"][study], row))
    # Python's own sums: numpy's last bits depend on the CPU, and with them the picture's bytes.
    logs, gains = [math.log(x) for x, _ in points], [row["value"] for _, row in points]
    slope, intercept = statistics.linear_regression(logs, gains)
    squares = math.fsum((gain - slope * log - intercept)**2 for log, gain in zip(logs, gains))
    error = math.sqrt(squares / (len(gains) - 2) / (len(gains) * statistics.pvariance(logs)))
    half = t_quantile(len(gains) - 2) * error
    primary = {"value": slope, "interval": [slope - half, slope + half], "measure": wanted["measure"]}
    table = [[analysis["x"], f"{it}, %", f"{im}, %", f"{im} - {it}, points"]]
    table += [[f"{x:g}", f"{row['baseline_value']:.1f}", f"{row['contender_value']:.1f}", interval(row, 1)]
              for x, row in points]

    def draw(figure: object) -> None:
        axes = figure.subplots()
        for x, row in points:
            axes.plot([x] * row["seeds"], row["per_seed"], ".", color="0.6")
            axes.vlines(x, *(row["interval"] or [row["value"]] * 2), color="C0")
            axes.plot(x, row["value"], "o", color="C0")
        ends = min(logs), max(logs)
        axes.plot([math.exp(x) for x in ends], [slope * x + intercept for x in ends], color="C1",
                  label=f"{slope:+.1f} [{slope - half:+.1f}, {slope + half:+.1f}] ln(x) {intercept:+.1f}")
        axes.axhline(0, color="0.5", linewidth=0.8)
        axes.set_xscale("log", base=2 if max(logs) < 4 else 10)
        axes.set_xlabel(analysis["x"])
        axes.set_ylabel(f"exact match, {im} - {it}, points")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    return primary, {"": table}, draw


def epochs(analysis: dict, found: Found) -> tuple[dict, dict[str, Table], object]:
    wanted, primary, tables, curves = analysis["primary"], None, {}, {}
    first, last = wanted["between"]
    names = analysis["contenders"]
    for study, lines, result in found:
        by_name = {name: sorted((line for line in lines if line["contender"] == name
                                 and line["lr"] == result["choices"][name]["lr"]
                                 and line["seed"] in result["seeds"]), key=lambda line: line["seed"])
                   for name in names}
        steps = {round(e["epoch"]): e["step"] for e in lines[0]["evaluations"] if e["step"]}
        values = {epoch: {name: nll_values(by_name[name], step) for name in names}
                  for epoch, step in steps.items()}
        files = [file for measure, file in values[first][names[0]] if measure == wanted["measure"]]

        def gain(file: str, epoch: int) -> np.ndarray:
            """(S, E) differences of examples' means, IM - IT"""
            key = wanted["measure"], file
            sums = values[epoch][names[1]][key] - values[epoch][names[0]][key]
            return by_example(sums, np.array(by_file(lines[0]["tokens"])[file]), wanted["measure"])

        every = tables[study] = [["IM - IT after", *map(str, steps)]]
        two = tables[f"{study}, more"] = [["file", f"after {first}", f"after {last}", "change"]]
        for file in files:
            curve = curves[study, file] = {epoch: difference(gain(file, epoch)) for epoch in steps}
            change = difference(gain(file, last) - gain(file, first))
            every.append([file, *(f"{row['value']:+.3f}" for row in curve.values())])
            two.append([file, *(interval(row, 3) for row in (curve[first], curve[last], change))])
            if (study, file) == (wanted["study"], wanted["file"]):
                primary = change | {"measure": wanted["measure"]}

    def draw(figure: object) -> None:
        studies = [*dict.fromkeys(study for study, _ in curves)]
        panels = figure.subplots(1, len(studies), sharey=True, squeeze=False)[0]
        for axes, study in zip(panels, studies):
            for i, file in enumerate(file for of, file in curves if of == study):
                of_file = curves[study, file]
                low, high = zip(*(row["interval"] or [row["value"]] * 2 for row in of_file.values()))
                axes.plot([*of_file], [row["value"] for row in of_file.values()], color=f"C{i}", label=file)
                axes.fill_between([*of_file], low, high, color=f"C{i}", alpha=0.15, linewidth=0)
            axes.axhline(0, color="0.5", linewidth=0.8)
            axes.set_title(study)
            axes.set_xlabel("epoch")
        panels[0].set_ylabel("NLL (mean over examples), IM - IT")
        panels[0].legend(fontsize="small")
    return primary, tables, draw


def frontier(analysis: dict, found: Found) -> tuple[dict, dict[str, Table], object]:
    """Each learning rate and epoch is a point (near, far) of NLL. IT's best ones make a line, from what is
    lowest near to what is lowest far; a contender's best ones are compared with that line at the same near,
    where it has one, and the mean difference is taken. Intervals are over seeds."""
    wanted, tables, shown = analysis["primary"], {}, {}
    base, *others = analysis["contenders"]
    far_file, primary = wanted["file"], None

    def points(lines: list[dict], near_file: str) -> np.ndarray:
        """(points, 2) NLL near and far, means over examples, of one seed's runs, by rate and epoch."""
        tokens = lines[0]["tokens"]["test"]
        values = [[np.mean(np.array(e["test"][file]) / tokens[file]) for file in (near_file, far_file)]
                  for line in sorted(lines, key=lambda line: line["lr"])
                  for e in line["evaluations"] if e["step"]]
        return np.array(values)

    def best(values: np.ndarray) -> np.ndarray:
        """The points to which no other is better on both files, sorted by the NLL near."""
        values = values[values[:, 0].argsort()]
        return values[values[:, 1] <= np.minimum.accumulate(values[:, 1])]

    for study, lines, result in found:
        # Only rates that every seed has.
        by_run = {(name, seed): points([line for line in lines
                                        if f"{line['lr']:g}" in result["choices"][name]["curve"]
                                        and (line["contender"], line["seed"]) == (name, seed)],
                                       analysis["near"][study])
                  for name in analysis["contenders"] for seed in result["seeds"]}
        table = [[f"after {study}", f"NLL on {far_file} at the same NLL on {analysis['near'][study]}"]]
        for name in others:
            gaps = []
            for seed in result["seeds"]:
                line, own = best(by_run[base, seed]), best(by_run[name, seed])
                own = own[(own[:, 0] >= line[0, 0]) & (own[:, 0] <= line[-1, 0])]
                gaps.append((own[:, 1] - np.interp(own[:, 0], *line.T)).mean() if len(own) else math.nan)
            if any(map(math.isnan, gaps)):
                table.append([f"{name} - {base}", "no point of it is as low near"])
                continue
            row = difference(np.array(gaps)) | {"measure": wanted["measure"]}
            table.append([f"{name} - {base}", interval(row, 3)])
            if (study, name) == (wanted["study"], wanted["contender"]):
                primary = row
        tables[study] = table
        shown[study] = {name: np.mean([by_run[name, seed] for seed in result["seeds"]], 0)
                        for name in analysis["contenders"]}

    if primary is None:
        raise Missing(f"{wanted['contender']} in {wanted['study']}: no point of it is as low near")

    def draw(figure: object) -> None:
        for axes, (study, of_study) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items()):
            for name, values in of_study.items():
                axes.plot(*values.T, "o", markersize=4, label=name)
                axes.plot(*best(values).T, color=axes.lines[-1].get_color(), linewidth=1)
            axes.set_xlabel(f"NLL on {analysis['near'][study]}")
            axes.set_ylabel(f"NLL on {far_file}")
            axes.set_title(f"after {study}")
        axes.legend(fontsize="small")
        figure.supxlabel("A point: one learning rate after one epoch, mean over seeds; left and down is "
                         "better.\nA line joins a loss's best points: no other point of that loss is better "
                         "on both files.", fontsize="small")
    return primary, tables, draw


def forest(figure: object, shown: list[tuple[str, dict]], analysis: dict) -> None:
    """Differences with their intervals, those of one file together. shown: [(label of the file, row)]."""
    axes, y, ticks, colours = figure.subplots(), 0.0, {}, {}
    for label in dict.fromkeys(label for label, _ in shown):
        rows = [row for of, row in shown if of == label]
        ticks[label] = y + (len(rows) - 1) / 2
        for row in rows:
            colour = colours.setdefault(row["contender"], f"C{len(colours)}")
            axes.plot(row["interval"] or [], [y, y] if row["interval"] else [], color=colour)
            axes.plot(row["value"], y, "o", color=colour, markersize=4)
            y += 1
        y += 1
    figure.set_figheight(max(2.5, 0.16 * y + 1))
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set_yticks(list(ticks.values()), list(ticks))
    axes.invert_yaxis()
    axes.set_xlabel(f"{MEASURES[analysis['primary']['measure']]}: difference from "
                    f"{analysis['contenders'][0]}, 95 % intervals")
    axes.legend([axes.plot([], [], "o-", color=colour)[0] for colour in colours.values()], list(colours),
                loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")


# ---------------------------------------------------------------- the page


def runs_read(analysis: dict, found: Found) -> str:
    """A sentence: how many of the analysis' runs there are, and which seeds its differences are over."""
    parts, total = [], 0
    for study, lines, result in found:
        total += len(lines)
        parts.append(f"{study}: seeds {', '.join(map(str, result['seeds']))}")
    same = {part.split(": ")[1] for part in parts}
    seeds = same.pop() if len(same) == 1 else "; ".join(parts)
    return f"{total} of {analysis['runs']} runs; {seeds}."


def markdown(table: Table) -> str:
    head, *rows = ("| " + " | ".join(row) + " |" for row in table)
    return "\n".join([head, "|---" * len(table[0]) + "|", *rows])


def judgement(row: dict, expected: int | None) -> str:
    """Whether the primary difference has the expected sign; None: no sign was expected."""
    if expected is None:
        return "exploratory"
    low, high = row["interval"] or (-math.inf, math.inf)
    if low <= 0 <= high:
        return "not shown: the interval contains 0"
    return "agrees" if (row["value"] > 0) == (expected > 0) else "contradicts"


def save_figure(draw: object, file: Path) -> None:
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4), layout="constrained")
    draw(figure)
    # No date or version in the file: the same runs give the same bytes.
    figure.savefig(file, dpi=110, metadata={"Software": None})


def primary_name(analysis: dict) -> str:
    """'im - it, NLL (mean over examples) on user-oriented, after t0'"""
    wanted = analysis["primary"]
    base = analysis["contenders"][0]
    text = f"{wanted['contender']} - {base}, {MEASURES[wanted['measure']]} on {wanted['file']}"
    if analysis["kind"] == "trend":
        return f"slope against ln({analysis['x']}) of {text}"
    if analysis["kind"] == "epochs":
        text += ", change from epoch {} to {}".format(*wanted["between"])
    return text + f", after {wanted['study']}"


def report(analyses: list[dict], page: str, folder: Path) -> str:
    """The page with its tables replaced. folder: of the runs; the figures are written there."""
    kinds = {"differences": differences, "trend": trend, "epochs": epochs, "frontier": frontier}
    summary = [["analysis", "claim", "paper", "primary measure", "ours", "the claim"]]
    blocks = {}
    for analysis in analyses:
        name, ours, verdict_text = analysis["name"], "", "not measured yet"
        try:
            found = measured(analysis, folder)
            primary, tables, draw = kinds[analysis["kind"]](analysis, found)
            save_figure(draw, folder / f"{name}.png")
            blocks[name] = (f"![{name}](findings/{name}.png)\n\n{runs_read(analysis, found)}\n\n"
                            + "\n\n".join(map(markdown, tables.values())))
            ours = interval(primary, digits_of(primary["measure"]))
            verdict_text = judgement(primary, analysis["expected"])
        except Missing as error:
            blocks[name] = f"Not measured yet: {error}."
        summary.append([f"[{name}](#{name})", analysis["claim"], analysis["paper"], primary_name(analysis),
                        ours, verdict_text])
    blocks["summary"] = markdown(summary)
    for name, text in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(page):
            raise ValueError(f"{PAGE}: has no <!-- {name} --> ... <!-- end -->; add them where it belongs")
        page = pattern.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", page)
    return page


def evidence(settings: list[dict], folder: Path) -> list[dict]:
    """eval/evidence.json's settings with the results of the studies that they name, "" for none."""
    for setting in settings:
        if "study" not in setting:
            continue
        try:
            result = compared(load_lines(setting["study"], ["it", "im"], folder), "it")
        except Missing:
            setting["result"] = ""
            continue
        # Exact matches where answers were checked, NLL elsewhere.
        found, parts = by_measure(result["differences"]), []
        for file, words in setting["files"].items():
            if (file, "exact_match") in found:
                parts.append(f"exact match, %, on {words} {interval(found[file, 'exact_match'][0], 1)}")
            else:
                parts.append(f"NLL on {words} {interval(found[file, 'nll_example_mean'][0], 3)}")
        setting["result"] = "; ".join(parts)
    return settings


def main(argv: list[str]) -> None:
    parse_args(argv)
    analyses = json.loads((HERE / "analyses.json").read_text())
    FINDINGS.mkdir(exist_ok=True)
    PAGE.write_text(report(analyses, PAGE.read_text(), FINDINGS))
    settings = evidence(json.loads(EVIDENCE.read_text()), FINDINGS)
    EVIDENCE.write_text("[\n" + ",\n".join(map(json.dumps, settings)) + "\n]\n")


if __name__ == "__main__":
    run_program(main)
