"""Runs compared, as one HTML page that needs nothing else: no script, no file beside it, no network.

Everything that comes from a record, a file or a model is escaped.
"""
from html import escape
from itertools import groupby
from pathlib import Path

from chat import KINDS
from eval.curves import Line, panel
from eval.examples import Example, Seen
from eval.tables import SPANS, Cell, Run, Table, cell_text, series

# (light, dark), of about the same lightness each; dashes tell lines apart without colour
COLOURS = (("#0b62a4", "#6cb4ee"), ("#c2410c", "#ff9d5c"), ("#047857", "#4fd1a5"), ("#9d2f7f", "#f08fd3"),
           ("#6b5a00", "#e3cf57"), ("#4b5563", "#c3cad5"))
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "4 2")
EDGES = (0.1, 0.3, 1, 3)    # nats, where a token's colour changes
SHADES = (0.18, 0.36, 0.56, 0.8)
WHISKER = 120               # width of an interval's picture


def make_page(runs: list[Run], settings: Table, tables: list[Table], examples: list[Example],
              seen: dict[str, list[Seen]], notes: list[str]) -> str:
    """settings: the table of configurations; seen: by the letters of the runs that have a checkpoint."""
    about = "".join(f"<li>{escape(note)}</li>" for note in notes)
    parts = [f"<h1>{len(runs)} runs compared</h1>", keys(runs),
             f'<h2>Notes</h2><ul class="faint">{about}</ul>' if notes else "",
             "<h2>Configuration</h2>", table_html(settings, runs, heading=False), *curves(runs),
             "<h2>Results</h2>", *(table_html(table, runs) for table in tables)]
    if seen:
        parts += [answers(runs, examples, seen), token_losses(runs, examples, seen)]
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    title = " and ".join(run.folder.name for run in runs[:3]) + (" ..." if len(runs) > 3 else "")
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{style}{run_styles(len(runs))}</style></head>\n<body>\n"
            + "\n".join(parts) + "\n</body></html>\n")


def run_styles(count: int) -> str:
    """Colour and dashes of each run, and the shades of tokens."""
    light, dark = ("".join(f".run{i} {{ --c: {COLOURS[i % len(COLOURS)][mode]}; }}\n" for i in range(count))
                   for mode in (0, 1))
    dashes = "".join(f"polyline.run{i} {{ stroke-dasharray: {DASHES[i % len(DASHES)]}; }}\n"
                     for i in range(count))
    shades = "".join(f".{side}{level} {{ background: rgb(var(--{side}) / {shade}); }}\n"
                     for side in ("better", "worse") for level, shade in enumerate(SHADES, 1))
    return (f"{light}@media (prefers-color-scheme: dark) {{\n{dark}}}\n{dashes}"
            f"polyline.raw {{ stroke-dasharray: none; }}\n{shades}")


def letter(runs: list[Run], run: Run) -> str:
    return f'<span class="letter run{runs.index(run)}">{run.letter}</span>'


def keys(runs: list[Run]) -> str:
    line = '<svg viewBox="0 0 48 12"><polyline class="run{}" points="0,6 48,6"/></svg>'
    items = [f"<li>{letter(runs, run)} {line.format(i)} {escape(str(run.folder))}</li>"
             for i, run in enumerate(runs)]
    return f'<ul class="keys">{"".join(items)}</ul>'


# ---------------------------------------------------------------- tables


def table_html(table: Table, runs: list[Run], heading: bool = True) -> str:
    first, *others = runs
    others = [run for run in others if any(run.letter in row.differences for row in table.rows)]
    differences = [cell for row in table.rows for cell in row.differences.values()]
    reach = max((abs(bound) for cell in differences for bound in cell.interval or ()), default=0.0)
    cells = [cell for row in table.rows for cell in row.cells.values()]
    style = "number" if any(not isinstance(cell.value, str) for cell in cells) else "words"
    # a letter stands above the numbers: at the right, or where intervals come behind them at the left
    right = style == "number" and not any(cell.interval for cell in cells)
    th = '<th class="number">' if right else "<th>"
    head = "".join(f"{th}{letter(runs, run)}</th>" for run in runs)
    if others:
        head += "".join(f"{th}{letter(runs, run)} \u2212 {letter(runs, first)}</th>"
                        + (f'<th class="faint">± {reach:.2g}</th>' if reach else "") for run in others)
    rows = ""
    for row in table.rows:
        rows += f'<tr><th scope="row">{escape(row.label)}</th>'
        rows += "".join(cell_html(row.cells.get(run.letter), style) for run in runs)
        for cell in (row.differences.get(run.letter) for run in others):
            rows += cell_html(cell, style, "+") if row.differences else "<td></td>"
            rows += f"<td>{whisker(cell, reach)}</td>" if reach else ""
        rows += "</tr>\n"
    caption = f'<p class="faint">{escape(table.caption)}</p>' if table.caption else ""
    title = f"<h3>{escape(table.title)}</h3>" if heading else ""
    return (f'{title}{caption}<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>")


def cell_html(cell: Cell | None, style: str, sign: str = "") -> str:
    if cell is None or isinstance(cell.value, str):
        return f'<td class="{style}">' + (escape(cell.value) if cell else "\u2013") + "</td>"
    value, _, rest = cell_text(cell, sign).partition(" ")
    rest = f' <span class="interval">{rest}</span>' if rest else ""
    return f'<td class="{style}">{value}{rest}</td>'


def whisker(cell: Cell | None, reach: float) -> str:
    """A difference with its interval beside zero; the point is open where zero is within."""
    if cell is None or cell.interval is None:
        return ""
    low, high, at = (WHISKER / 2 * (1 + 0.9 * x / reach) for x in (*cell.interval, cell.value))
    style = "open" if cell.interval[0] <= 0 <= cell.interval[1] else ""
    return (f'<svg class="whisker" viewBox="0 0 {WHISKER} 18">'
            f'<path class="gridline" d="M{WHISKER / 2:g} 0V18"/><path d="M{low:.1f} 9H{high:.1f}"/>'
            f'<circle class="{style}" cx="{at:.1f}" cy="9" r="3.5"/></svg>')


# ---------------------------------------------------------------- curves


def curves(runs: list[Run]) -> list[str]:
    """A panel for each span: while training, and on each held-out file."""
    def panels(heading: str, about: str, names: list[tuple[str, list]], smooth: bool) -> list[str]:
        drawn = [panel(name, [Line(i, run.letter, mine, smooth)
                              for i, (run, mine) in enumerate(zip(runs, points))])
                 for name, points in names if any(points)]
        return [f'<h2>{heading}</h2><p class="faint">NLL in nats a token over steps. {about}</p>'
                f'<div class="grid">{"".join(drawn)}</div>'] if drawn else []

    held_out = dict.fromkeys((data, kind) for run in runs for line in run.evaluations for data in line["data"]
                             for kind in SPANS if kind in line["data"][data])
    return panels("NLL while training",
                  "Bold: smoothed; faint: as measured, at each step for spans that are trained on, now and "
                  "then for the others.",
                  [(kind, [series(run.metrics, f"nll_{kind}") for run in runs]) for kind in SPANS], True
                  ) + panels("Held-out NLL while training", "Mean over tokens.", [
                      (f"{data}: {kind}", [held_out_points(run, data, kind) for run in runs])
                      for data, kind in held_out], False)


def held_out_points(run: Run, data: str, kind: str) -> list[tuple[float, float]]:
    found = [(line["step"], line["data"].get(data, {}).get(kind)) for line in run.evaluations]
    return [(step, row["nll_token_mean"]) for step, row in found if row]


# ---------------------------------------------------------------- examples


def box(heading: str, content: str) -> str:
    return f'<div class="box"><h4>{heading}</h4><div class="said">{content}</div></div>'


def answers(runs: list[Run], examples: list[Example], seen: dict[str, list[Seen]]) -> str:
    out = ["<h2>Answers</h2>", '<p class="faint">Greedy.</p>']
    for i, example in enumerate(examples):
        out.append(f'<h3>{i + 1}. <span class="faint">{escape(example.where)}</span></h3>')
        out += [box(message["role"], escape(message["content"])) for message in example.question]
        boxes = [] if example.expected is None else [box("expected", escape(example.expected))]
        for run in (run for run in runs if run.letter in seen):
            one = seen[run.letter][i]
            same = example.expected is not None and one.answer is not None and not one.cut and (
                one.answer.strip() == example.expected.strip())
            more = " as expected" if same else " cut off" if one.cut else ""
            text = "there is nothing to answer" if one.answer is None else one.answer
            boxes.append(box(letter(runs, run) + more, escape(text)))
        out.append(f'<div class="grid">{"".join(boxes)}</div>')
    return "\n".join(out)


def token_losses(runs: list[Run], examples: list[Example], seen: dict[str, list[Seen]]) -> str:
    """The examples' tokens, coloured by NLL of each later run less that of the first one that was seen."""
    first, *others = (run for run in runs if run.letter in seen)
    if not others:
        return ""
    out = ["<h2>Loss by token</h2>", legend(first.letter)]
    for i, example in enumerate(examples):
        out.append(f'<h3>{i + 1}. <span class="faint">{escape(example.where)}</span></h3>')
        base = seen[first.letter][i]
        for other in others:
            mine = seen[other.letter][i]
            if mine.ids != base.ids:
                tokens = "tokenised otherwise: there are no common tokens to compare"
            else:
                tokens = f'<div class="spans">{spans(base, mine, first.letter, other.letter)}</div>'
            heading = f"{letter(runs, other)} \u2212 {letter(runs, first)}"
            out.append(f'<div class="box"><h4>{heading}</h4>{tokens}</div>')
    return "\n".join(out)


def spans(base: Seen, mine: Seen, first: str, second: str) -> str:
    """Each span's kind and mean NLL, with its tokens beside."""
    out, start = [], 0
    for kind, same in groupby(base.kinds):
        end = start + len(list(same))
        a, b = base.nll[max(start, 1) - 1:end - 1], mine.nll[max(start, 1) - 1:end - 1]
        means = f"{first} {sum(a) / len(a):.2f}, {second} {sum(b) / len(b):.2f}" if a else ""
        tokens = "".join(token(base, mine, t, first, second) for t in range(start, end))
        out.append(f'<div>{KINDS[kind]}<br><span class="faint">{means}</span></div>'
                   f'<div class="tokens {KINDS[kind]}">{tokens}</div>')
        start = end
    return "".join(out)


def token(base: Seen, mine: Seen, t: int, first: str, second: str) -> str:
    text = visible(base.texts[t])
    if t == 0:
        return f'<span title="the first token: nothing predicts it">{text}</span>'
    a, b = base.nll[t - 1], mine.nll[t - 1]
    style = shade(b - a)
    style = f' class="{style}"' if style else ""
    return f'<span{style} title="{first} {a:.3f}, {second} {b:.3f}, difference {b - a:+.3f}">{text}</span>'


def shade(difference: float) -> str:
    """Style of a token's background, "" for a small difference: shade(-0.5) -> "better2"."""
    level = sum(abs(difference) >= edge for edge in EDGES)
    return f"{'better' if difference < 0 else 'worse'}{level}" if level else ""


def visible(text: str) -> str:
    """Escaped, and with marks for what cannot be seen: line breaks, tabs, spaces that stand alone."""
    if not text:
        return "\u25cc"     # the first bytes of a character that later tokens complete
    if text.strip(" ") == "":
        return "\u2423" * len(text)
    return escape(text).replace("\n", "\u21b5\n").replace("\t", "\u21e5\t").replace("\r", "\u240d")


def legend(first: str) -> str:
    levels = list(enumerate(zip(EDGES, [*EDGES[1:], None]), 1))

    def swatch(side: str, sign: str, level: int, low: float, high: float | None) -> str:
        to = f" to {sign}{high:g}" if high else " and beyond"
        return f'<span class="{side}{level}">{sign}{low:g}{to}</span>'

    lower = "".join(swatch("better", "\u2212", level, *bounds) for level, bounds in reversed(levels))
    higher = "".join(swatch("worse", "+", level, *bounds) for level, bounds in levels)
    return (f'<p class="legend">NLL less that of {first}, nats: {lower}<span>within {EDGES[0]:g}</span>'
            f'{higher}</p><p class="faint">Blue: lower, the later run finds the token likelier. A token\'s '
            "title has both values. \u21b5 line break, \u2423 space, \u21e5 tab, \u25cc part of a character."
            "</p>")
