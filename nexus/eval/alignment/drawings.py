"""Clouds of points and groups of bars as SVG written by hand, in the colours and type of the report page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nexus.eval.markup import escaped, missing
from nexus.eval.plots import NUM_COLOURS, Point
from nexus.eval.report import Drawing

WIDTH, HEIGHT = 480, 300
LEFT, RIGHT, TOP, BOTTOM = 44, 468, 14, 262
TICKS = 4


@dataclass(frozen=True)
class Cloud:
    """Points by group, drawn on one scale from edge to edge of the box; `x` and `y` say what the axes are."""

    title: str
    note: str
    x: str
    y: str
    groups: Mapping[str, Sequence[Point]]


@dataclass(frozen=True)
class Bars:
    """Values by series side by side at each of `places`, from 0; None is not there. `x` says what the places are."""

    title: str
    note: str
    x: str
    places: Sequence[str]
    series: Mapping[str, Sequence[float | None]]


def draw(drawing: Cloud | Bars) -> str:
    """Legend and drawing as HTML."""
    match drawing:
        case Cloud():
            return _cloud(drawing)
        case Bars():
            return _bars(drawing)


def drawing(figure: Cloud | Bars) -> Drawing:
    """A figure as a block of a report page."""
    return Drawing(figure.title, figure.note, draw(figure))


def _legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 24 8" aria-hidden="true"><path class="line c{i % NUM_COLOURS}" d="M1,4 23,4"/></svg>'
        f"<b>{escaped(name)}</b></li>"
        for i, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def _svg(words: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(words)}">{"".join(parts)}</svg>'


def _cloud(cloud: Cloud) -> str:
    points = [point for group in cloud.groups.values() for point in group]
    if not points or not all(math.isfinite(value) for point in points for value in point):
        return f"<p>{missing('no points to draw')}</p>"
    (left, right), (low, high) = (_span([point[axis] for point in points]) for axis in (0, 1))
    parts = [
        f'<path class="axis" d="M{LEFT},{TOP}V{BOTTOM}H{RIGHT}" fill="none"/>',
        f'<text class="x" x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 26}">{escaped(cloud.x)}</text>',
        f'<text class="x" transform="translate({LEFT - 14} {(TOP + BOTTOM) / 2}) rotate(-90)">'
        f"{escaped(cloud.y)}</text>",
    ]
    for number, group in enumerate(cloud.groups.values()):
        # A line of no length with round ends is a dot, in a fifth of the letters that a circle takes.
        dots = "".join(
            f"M{LEFT + 6 + (x - left) / (right - left) * (RIGHT - LEFT - 12):.1f},"
            f"{BOTTOM - 6 - (y - low) / (high - low) * (BOTTOM - TOP - 12):.1f}h0"
            for x, y in group
        )
        style = "stroke-width:4.5;stroke-linecap:round;opacity:.65"
        parts.append(f'<path class="line c{number % NUM_COLOURS}" style="{style}" d="{dots}"/>')
    counts = ", ".join(f"{name} ({len(group)} points)" for name, group in cloud.groups.items())
    return _legend(list(cloud.groups)) + _svg(f"{cloud.title}: {counts}", parts)


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 1, high + 1)


def _bars(bars: Bars) -> str:
    values = [value for series in bars.series.values() for value in series if value is not None]
    if not values:
        return f"<p>{missing('no bars to draw')}</p>"
    top, bottom = max([*values, 1e-9]), min([*values, 0.0])
    height, room = BOTTOM - TOP, (RIGHT - LEFT) / len(bars.places)
    wide = room * 0.8 / len(bars.series)

    def at(value: float) -> float:
        return BOTTOM - (value - bottom) / (top - bottom) * height

    parts = []
    for tick in range(TICKS + 1):
        level = bottom + (top - bottom) * tick / TICKS
        parts.append(f'<path class="grid" d="M{LEFT},{at(level):.1f}H{RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{at(level) + 4:.1f}">{level:.2f}</text>')
    for number, (name, series) in enumerate(bars.series.items()):
        for place, value in enumerate(series):
            if value is None:
                continue
            x = LEFT + place * room + room * 0.1 + number * wide
            y, end = sorted((at(value), at(0.0)))
            title = f"<title>{escaped(f'{name}, {bars.places[place]}: {value:.4f}')}</title>"
            parts.append(
                f'<g class="c{number % NUM_COLOURS}"><rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" '
                f'height="{end - y:.1f}" style="fill:var(--c)">{title}</rect></g>'
            )
    stride = math.ceil(len(bars.places) / 16)
    for place, label in enumerate(bars.places):
        if place % stride == 0:
            x = LEFT + (place + 0.5) * room
            parts.append(f'<text class="x" x="{x:.1f}" y="{BOTTOM + 16}">{escaped(label)}</text>')
    parts.append(f'<text class="x" x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 4}">{escaped(bars.x)}</text>')
    words = "; ".join(
        f"{name}: {', '.join('missing' if v is None else f'{v:.3f}' for v in series)}"
        for name, series in bars.series.items()
    )
    return _legend(list(bars.series)) + _svg(f"{bars.title} by {bars.x}: {words}", parts)
