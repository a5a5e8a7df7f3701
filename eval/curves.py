"""Lines over steps as SVG for a page: one small panel, its colours and dashes left to the page's style sheet.

A run's lines have the class run0, run1, ...; what is drawn with the text's colour follows light and dark.
"""
import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 280, 190
LEFT, RIGHT, TOP, BOTTOM = 36, 20, 8, 24        # margins, for numbers and letters
MOST_POINTS = 400                               # of a line: more cannot be seen, and make the page heavy
HALF_LIFE = 0.01                                # of smoothing, as a part of the steps
Points = list[tuple[float, float]]


@dataclass
class Line:
    """A run's curve in a panel."""
    number: int         # of the run, for its style
    letter: str
    points: Points
    smooth: bool        # draw it smoothed with the points themselves faint behind; else with a mark at each


def smoothed(points: Points) -> Points:
    """At each point the mean of all up to it, whose weights halve every HALF_LIFE of the whole length,
    however far apart the points are."""
    if not points:
        return []
    half_life = HALF_LIFE * points[-1][0] or 1
    total = weight = 0.0
    before, out = points[0][0], []
    for x, y in points:
        keep = 0.5 ** ((x - before) / half_life)
        total, weight, before = total * keep + y, weight * keep + 1, x
        out.append((x, total / weight))
    return out


def thinned(points: Points) -> Points:
    """At most MOST_POINTS of them and the last, as they are."""
    stride = -(-len(points) // MOST_POINTS)
    return points[:-1:stride] + points[-1:] if points else []


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high."""
    size = 10 ** math.floor(math.log10((high - low) / most))
    step = next(size * m for m in (1, 2, 5, 10, 20) if (high - low) / (size * m) <= most)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = (1, 2, 5) if math.log10(high / low) < 2.5 else (1,)
    return [m * 10.0 ** e for e in exponents for m in marks if low <= m * 10.0 ** e <= high]


def panel(title: str, lines: list[Line]) -> str:
    """An <svg> with the lines that have points. The second axis is logarithmic, and the title says so, where
    numbers differ more than tenfold: else what happens after the first steps cannot be seen."""
    lines = [line for line in lines if line.points]
    xs, ys = ([point[i] for line in lines for point in line.points] for i in (0, 1))
    log = min(ys) > 0 and max(ys) > 10 * min(ys)
    scale = math.log10 if log else float
    low, high = scale(min(ys)), scale(max(ys))
    pad = 0.04 * (high - low) or 0.1 * abs(high) or 0.1
    low, high = low - pad, high + pad
    start, end = min(xs), max(max(xs), min(xs) + 1)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return (LEFT + (WIDTH - LEFT - RIGHT) * (point[0] - start) / (end - start),
                TOP + (HEIGHT - TOP - BOTTOM) * (high - scale(point[1])) / (high - low))

    parts, last = [], []
    for y in log_ticks(10 ** low, 10 ** high) if log else ticks(low, high):
        at = place((start, y))[1]
        parts.append(f'<path class="gridline" d="M{LEFT} {at:.2f}H{WIDTH - RIGHT}"/>'
                     f'<text class="y" x="{LEFT - 6}" y="{at:.2f}" dy="0.32em">{y:g}</text>')
    for x in filter(float.is_integer, map(float, ticks(start, end))):
        at = place((x, ys[0]))[0]
        parts.append(f'<text class="x" x="{at:.2f}" y="{HEIGHT - 8}">{x:g}</text>')
    for line in lines:
        style = f"run{line.number}"
        drawn = smoothed(line.points) if line.smooth else line.points
        if line.smooth:
            parts.append(polyline(f"{style} raw", map(place, thinned(line.points))))
        parts.append(polyline(style, map(place, thinned(drawn))))
        for x, y in () if line.smooth else thinned(drawn):
            at = place((x, y))
            parts.append(f'<circle class="{style}" cx="{at[0]:.2f}" cy="{at[1]:.2f}" r="3">'
                         f"<title>{line.letter}, step {x:,}: {y:.4f}</title></circle>")
        last.append((line, place(drawn[-1])))
    parts += ends(last)
    name = escape(title) + (" (logarithmic)" if log else "")
    return (f'<figure><figcaption>{name}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="{name}">{"".join(parts)}</svg></figure>')


def polyline(style: str, places: Iterable[tuple[float, float]]) -> str:
    return f'<polyline class="{style}" points="{" ".join(f"{x:.2f},{y:.2f}" for x, y in places)}"/>'


def ends(lines: list[tuple[Line, tuple[float, float]]]) -> list[str]:
    """The runs' letters where their lines end, one below the other where lines end close together."""
    out, placed = [], []
    for line, (x, y) in sorted(lines, key=lambda each: each[1][1]):
        y = max([y, *(other + 12 for at, other in placed if abs(at - x) < 12)])
        placed.append((x, y))
        out.append(f'<text class="end run{line.number}" x="{x + 7:.2f}" y="{y:.2f}" dy="0.32em">'
                   f"{line.letter}</text>")
    return out
