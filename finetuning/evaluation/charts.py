"""The drawings of a report's page as SVG: curves with their intervals, and a difference beside the noise floor."""

import math
from html import escape

from finetuning.evaluation.words import number, width_of, written

LINES = 6  # colours of curves
LEFT, RIGHT, TOP, BOTTOM, WIDE, HIGH = 56, 12, 10, 44, 460, 270  # margins and size of a chart


def chart(curve):
    """Lines with their 95 % intervals shaded, and a legend above them; `curve` is one of report["curves"]."""
    points = [point for line in curve["lines"] for point in line["points"]]
    if not points:
        return '<p class="soft">no points</p>'
    x_low, x_high = _span(point["x"] for point in points)
    y_low, y_high = _span(point[key] for point in points for key in ("y", "low", "high") if point[key] is not None)
    x = lambda value: round(LEFT + (value - x_low) / (x_high - x_low) * (WIDE - LEFT - RIGHT), 1)
    y = lambda value: round(TOP + (y_high - value) / (y_high - y_low) * (HIGH - TOP - BOTTOM), 1)
    floor = HIGH - BOTTOM
    parts = [
        f'<line class="grid" x1="{LEFT}" y1="{y(at)}" x2="{WIDE - RIGHT}" y2="{y(at)}"/>'
        f'<text x="{LEFT - 6}" y="{y(at) + 4}" text-anchor="end">{number(at)}</text>'
        for at in _ticks(y_low, y_high)
    ]
    parts += [
        f'<text x="{x(at)}" y="{floor + 16}" text-anchor="middle">{number(at)}</text>' for at in _ticks(x_low, x_high)
    ]
    parts.append(
        f'<text x="{(LEFT + WIDE - RIGHT) / 2}" y="{HIGH - 8}" text-anchor="middle">{escape(curve["x_title"])}</text>'
        f'<text transform="translate(12 {(TOP + floor) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(curve['y_title'])}</text>"
    )
    parts += [_line(index, line, x, y) for index, line in enumerate(curve["lines"])]
    legend = "".join(
        f'<li><svg viewBox="0 0 36 12" aria-hidden="true"><line x1="0" y1="6" x2="36" y2="6" stroke-width="3" '
        f"{_pen(index)}/></svg>{escape(line['label'])}</li>"
        for index, line in enumerate(curve["lines"])
    )
    name = escape(f"{curve['title']}: {curve['y_title']} over {curve['x_title']}")
    return (
        f'<ul class="legend">{legend}</ul>'
        f'<svg class="chart" viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{name}">{"".join(parts)}</svg>'
    )


def _line(index, line, x, y):
    points = sorted(line["points"], key=lambda point: point["x"])
    banded = [point for point in points if point["low"] is not None and point["high"] is not None]
    around = [(point["x"], point["high"]) for point in banded] + [(point["x"], point["low"]) for point in banded[::-1]]
    joined = lambda pairs: " ".join(f"{x(left)},{y(up)}" for left, up in pairs)
    dots = "".join(
        f'<circle cx="{x(point["x"])}" cy="{y(point["y"])}" r="3.5" style="fill:{_color(index)}">'
        f"<title>{escape(line['label'])} at {number(point['x'])}: {escape(_told(point))}</title></circle>"
        for point in points
    )
    band = f'<polygon class="area" points="{joined(around)}" style="fill:{_color(index)}"/>' if banded else ""
    middle = joined((point["x"], point["y"]) for point in points)
    return f'{band}<polyline class="path" points="{middle}" {_pen(index)}/>{dots}'


def _told(point):
    return written({"value": point["y"], **point}) if width_of(point) else number(point["y"])


def _color(index):
    return f"var(--c{index % LINES})"


def _pen(index):
    """Colour and dashes, so that lines differ without colours too."""
    dashes = ("", "7 4", "2 3", "9 3 2 3")[index % 4]
    return f'style="stroke:{_color(index)};stroke-dasharray:{dashes or "none"}"'


def _span(values):
    """(low, high) of the values with a little room, never empty."""
    values = list(values)
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or 0.5
    return low - room, high + room


def _ticks(low, high, most=6):
    """Round numbers between low and high, at most about `most`."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def forest(difference, every, floor):
    """A difference and its interval, 200 wide with 0 in its middle, the noise floor shaded; "" without an interval.

    every  all differences that are drawn below each other, this one too: they share a scale
    floor  how far two runs of the reference may be apart, or None
    """
    if difference is None or width_of(difference) is None:
        return ""
    floor = floor or 0.0
    most = max([floor, *(abs(one[key]) for one in every for key in ("low", "high") if one[key] is not None)]) or 1.0
    at = lambda value: round(100 + 94 * value / most, 1)
    return (
        f'<svg class="forest" viewBox="0 0 200 30" role="img" aria-label="{escape(written(difference, sign=True))}">'
        f'<rect class="noise" x="{at(-floor)}" y="2" width="{round(at(floor) - at(-floor), 1)}" height="26"/>'
        '<line class="zero" x1="100" y1="0" x2="100" y2="30" stroke-width="2"/>'
        f'<line class="bar" x1="{at(difference["low"])}" y1="15" x2="{at(difference["high"])}" y2="15"/>'
        f'<circle cx="{at(difference["value"])}" cy="15" r="5"/></svg>'
    )
