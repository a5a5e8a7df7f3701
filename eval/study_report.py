"""A study's verdict (study_statistics.verdict()) as text of 79 columns and as two pictures."""
import textwrap
from pathlib import Path

from eval.compare import COLOURS, DASHES, GREY, STYLE
from eval.results import MEANS
from eval.study_statistics import by_measure, digits_of
from runtime.report import counted, ending
from runtime.start import WIDTH

# As a table names what was measured.
MEASURES = {**{mean: f"NLL, {words}" for mean, words in MEANS.items()},
            "memorized_exact": "exact match, %", "memorized_prefix": "shared prefix, %",
            "memorized_bleu": "BLEU-4", "exact_match": "exact match, %", "task": "score"}


def report_text(result: dict) -> str:
    """The choices, the table of differences, and a sentence for each file."""
    seeds, baseline = len(result["seeds"]), result["baseline"]
    lines = [f"chosen on validation data, by the mean over {counted(seeds, 'seed')}:" if any(
        choice["curve"] for choice in result["choices"].values()) else "no choice was made:"]
    for name, choice in result["choices"].items():
        lines.append(f"  {ending(name, 24):<24} lr {choice['lr']:g}, epoch {choice['epoch']:g} (step "
                     f"{choice['step']:,})")
        for lr, curve in choice["curve"].items():
            values = " ".join(f"{point['mean']:.4f}" + "*" * (
                lr == f"{choice['lr']:g}" and point["step"] == choice["step"]) for point in curve)
            lines.append(textwrap.fill(values, WIDTH, initial_indent=f"    {lr:>8}: ",
                                       subsequent_indent=" " * 14))
    if not result["differences"]:
        return "\n".join([*lines, "", "one contender, so there is nothing to compare"])
    over = "seeds and examples" if seeds > 1 else "examples"
    lines += ["", f"minus {ending(baseline, 24)}, paired by seed and example, with "
              f"{100 * result['confidence']:g} % intervals",
              f"over {over}; agree: seeds whose own difference has the same sign;",
              "equal: no seed differs"]
    for (file, measure), rows in by_measure(result["differences"]).items():
        digits = digits_of(measure) + 1     # one more than in words
        ends = f": {MEASURES[measure]}; {ending(baseline, 16)} has {rows[0]['baseline_value']:.{digits}f}"
        if rows[0]["start_value"] is not None:
            ends += f", the start {rows[0]['start_value']:.{digits}f}"
        lines += ["", ending(file, WIDTH - len(ends)) + ends]
        for row in rows:
            interval = "no interval"
            if row["interval"]:
                interval = "[{:+.{digits}f}, {:+.{digits}f}]".format(*row["interval"], digits=digits)
            # Where every seed has the same value under both, there is no sign to agree on.
            agree = f"{row['seeds_agree']} of {row['seeds']} agree" if any(row["per_seed"]) else "equal"
            lines.append(f"  {ending(row['contender'], 24):<24}{row['value']:>+10.{digits}f} {interval:>22}"
                         f"     {agree}")
    lines.append("")
    for text in [*result["sentences"], *(f"note: {note}" for note in result["notes"])]:
        lines.append(textwrap.fill(text, WIDTH, subsequent_indent="  "))
    return "\n".join(lines)


def pictures(result: dict, folder: Path) -> list[str]:
    """Write FOLDER/curves.png and, if there are differences, FOLDER/differences.png. Returns their names."""
    import matplotlib
    draw = {"curves.png": draw_curves, "differences.png": draw_differences}
    if not result["differences"]:
        del draw["differences.png"]
        # Of an earlier verdict.
        (folder / "differences.png").unlink(missing_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, of_name in draw.items():
            of_name(result).savefig(folder / name, dpi=150)
    return [*draw]


def line_styles(result: dict) -> dict[str, dict]:
    """Colour and line style of each contender."""
    return {name: {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}
            for i, name in enumerate(result["contenders"])}


def draw_curves(result: dict) -> object:
    """NLL over epochs, a panel for each file: the mean over seeds with a mark at each evaluation, their range
    as a band, the chosen epoch as a larger dot. Where there are several evaluations after the start, the
    scale is fitted to them, and the start may lie above."""
    from matplotlib.figure import Figure
    curves = result["curves"]
    # Two panels next to each other can still be read on a phone.
    columns = min(2, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.7 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(curves):]:
        axes.remove()
    for axes, (file, of_file) in zip(panels, curves.items()):
        later = [point[end] for points in of_file.values() for point in points[1:] for end in ("low", "high")]
        start = next(iter(of_file.values()))[0]["mean"]
        for name, points in of_file.items():
            style = line_styles(result)[name]
            epochs = [point["epoch"] for point in points]
            axes.plot(epochs, [point["mean"] for point in points], label=ending(name, 24), marker=".",
                      **style)
            axes.fill_between(epochs, [point["low"] for point in points], [point["high"] for point in points],
                              color=style["color"], alpha=0.2, linewidth=0)
            chosen = next(point for point in points if point["step"] == result["choices"][name]["step"])
            axes.plot(chosen["epoch"], chosen["mean"], "o", color=style["color"], markersize=7)
        if max(map(len, of_file.values())) > 2:
            room = 0.08 * (max(later) - min(later)) or 0.1
            axes.set_ylim(min(*later, start) - room, max(later) + room)
        axes.set_title(ending(file, 34))
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.supylabel("NLL of completions, nats a token")
    handles, labels = panels[0].get_legend_handles_labels()
    # An inch has about 14 letters, and a label's line and the space around it take 0.7 inches.
    beside = figure.get_figwidth() / (max(map(len, labels)) / 14 + 0.7)
    figure.legend(handles, labels, loc="outside upper center", ncols=max(1, min(len(labels), int(beside))))
    return figure


def draw_differences(result: dict) -> object:
    """A forest plot: the differences in NLL and, where there are any, those in percent, with intervals."""
    from matplotlib.figure import Figure
    nll = [row for row in result["differences"] if row["measure"] in MEANS]
    others = [row for row in result["differences"] if row["measure"] not in MEANS]
    panels = [rows for rows in (nll, others) if rows]
    heights = [len(rows) for rows in panels]
    figure = Figure(figsize=(7.5, 0.27 * sum(heights) + 0.9 * len(panels) + 0.4), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axes, rows in zip(grid.ravel(), panels):
        # Grouped by file and measure, so that contenders stand under each other.
        ordered = [row for group in by_measure(rows).values() for row in group]
        for place, row in enumerate(ordered):
            colour = line_styles(result)[row["contender"]]["color"]
            if row["interval"]:
                axes.plot(row["interval"], [place, place], color=colour, linewidth=1.5)
            axes.plot(row["value"], place, "o", color=colour, markersize=5)
        axes.axvline(0, color=GREY, linewidth=1)
        axes.set_yticks(range(len(ordered)), [
            f"{ending(row['contender'], 16)}   {ending(row['file'], 24)}: {MEASURES[row['measure']]}"
            for row in ordered])
        axes.set_ylim(len(ordered) - 0.4, -0.6)
        in_nats = rows[0]["measure"] in MEANS
        axes.set_xlabel(f"minus {ending(result['baseline'], 12)}, " + (
            "nats a token (left: lower NLL)" if in_nats else "percentage points or score"))
    return figure
