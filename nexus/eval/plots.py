"""Curves as SVG written by hand, with a legend, and in words for those who do not see them."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from nexus.eval.markup import escaped, missing, rounded

Point = tuple[float, float]

# Lengths are in the units of the drawing, which is scaled to the width it gets on the page.
WIDTH, HEIGHT = 480, 280
LEFT, RIGHT, TOP, BOTTOM = 62, 458, 16, 232  # the plot area
LOG_SPAN = 30.0  # values that span more than this factor get a logarithmic axis
MARKED_POINTS = 60  # up to so many points of a line are marked and show their numbers under the mouse
NUM_COLOURS = 8


@dataclass(frozen=True)
class Curves:
    """Lines over a common axis labelled `x`: points (x, y) per series in drawing order.

    The y axis is logarithmic, and says so, when all values are positive and span more than a factor of 30. Points
    that are not finite interrupt the line and are counted in the legend.
    """

    title: str
    note: str
    x: str
    series: Mapping[str, Sequence[Point]]


@dataclass(frozen=True)
class _Axis:
    """Maps values to 0..1 between `low` and `high` (logarithms where `is_log`); ticks are (value, label)."""

    low: float
    high: float
    is_log: bool
    ticks: tuple[tuple[float, str], ...]

    def share(self, value: float) -> float:
        at = math.log10(value) if self.is_log else value
        # Halves, because the difference of two floats can be too large for a float.
        return (at / 2 - self.low / 2) / (self.high / 2 - self.low / 2)


def plot(curves: Curves) -> str:
    """The legend and the drawing as HTML; where no point is finite, the legend and a note."""
    lines = {name: _runs(points) for name, points in curves.series.items()}
    points = [point for runs in lines.values() for run in runs for point in run]
    legend = "".join(
        _legend(index, name, lines[name], len(curves.series[name])) for index, name in enumerate(curves.series)
    )
    legend = f'<ul class="legend">{legend}</ul>' if legend else ""
    if not points:
        return f"{legend}<p>{missing('no points to draw')}</p>"
    x_axis = _linear([x for x, _ in points], is_widened=False)
    values = [y for _, y in points]
    is_log = min(values) > 0 and max(values) / min(values) > LOG_SPAN
    y_axis = _logarithmic(values) if is_log else _linear(values, is_widened=True)
    drawn = "\n".join(_line(index, runs, x_axis, y_axis) for index, runs in enumerate(lines.values()))
    in_words = escaped(_in_words(curves, lines, is_log))
    return (
        f'{legend}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{in_words}">\n'
        f"{_frame(curves.x, x_axis, y_axis)}\n{drawn}\n</svg>"
    )


def _runs(points: Sequence[Point]) -> list[list[Point]]:
    """The stretches of consecutive finite points."""
    marked = groupby(points, key=lambda point: math.isfinite(point[0]) and math.isfinite(point[1]))
    return [list(run) for is_finite, run in marked if is_finite]


def _legend(index: int, name: str, runs: Sequence[Sequence[Point]], num_given: int) -> str:
    num_drawn = sum(len(run) for run in runs)
    end = f"ends at {rounded(float(runs[-1][-1][1]))}" if runs else missing("no points")
    skipped = f", {num_given - num_drawn} of {num_given} points are not finite" if num_drawn < num_given else ""
    sample = f'<svg viewBox="0 0 24 8" aria-hidden="true"><path class="{_colour(index)}" d="M1,4 23,4"/></svg>'
    return f"<li>{sample}<b>{escaped(name)}</b> <small>{end}{skipped}</small></li>"


def _in_words(curves: Curves, lines: Mapping[str, Sequence[Sequence[Point]]], is_log: bool) -> str:
    """The plot in words, for those who do not see it."""
    ends = [f"{name} from {runs[0][0][1]:.4g} to {runs[-1][-1][1]:.4g}" for name, runs in lines.items() if runs]
    return f"{curves.title} over {curves.x}{', logarithmic' if is_log else ''}: {'; '.join(ends)}"


def _colour(index: int) -> str:
    """Classes of a series: lines past the last colour start over, dashed."""
    return f"line c{index % NUM_COLOURS}" + (" dashed" if index >= NUM_COLOURS else "")


def _line(index: int, runs: Sequence[Sequence[Point]], x_axis: _Axis, y_axis: _Axis) -> str:
    is_marked = sum(len(run) for run in runs) <= MARKED_POINTS
    strokes, marks = [], []
    for run in runs:
        places = [f"{_x(x_axis, x):.1f},{_y(y_axis, y):.1f}" for x, y in run]
        if len(run) > 1:
            strokes.append(f"M{' '.join(places)}")
        if is_marked or len(run) == 1:
            marks += [_mark(point, *place.split(",")) for point, place in zip(run, places, strict=True)]
    path = f'<path class="{_colour(index)}" d="{"".join(strokes)}"/>' if strokes else ""
    return f'{path}<g class="mark c{index % NUM_COLOURS}">{"".join(marks)}</g>' if marks else path


def _mark(point: Point, x: str, y: str) -> str:
    return f'<circle cx="{x}" cy="{y}" r="3"><title>{float(point[0]):g}: {float(point[1]):.6g}</title></circle>'


def _x(axis: _Axis, value: float) -> float:
    return LEFT + axis.share(value) * (RIGHT - LEFT)


def _y(axis: _Axis, value: float) -> float:
    return BOTTOM - axis.share(value) * (BOTTOM - TOP)


def _frame(x_label: str, x_axis: _Axis, y_axis: _Axis) -> str:
    """Grid, tick labels and what the axes are."""
    across = [(_y(y_axis, value), label) for value, label in y_axis.ticks]
    down = [(_x(x_axis, value), label) for value, label in x_axis.ticks]
    parts = [
        *(f'<path class="grid" d="M{LEFT},{y:.1f} {RIGHT},{y:.1f}"/>' for y, _ in across),
        *(f'<text class="y" x="{LEFT - 8}" y="{y + 4:.1f}">{label}</text>' for y, label in across),
        *(f'<path class="axis" d="M{x:.1f},{BOTTOM} {x:.1f},{BOTTOM + 5}"/>' for x, _ in down),
        *(f'<text class="x" x="{x:.1f}" y="{BOTTOM + 20}">{label}</text>' for x, label in down),
        f'<path class="axis" d="M{LEFT},{BOTTOM} {RIGHT},{BOTTOM}"/>',
        f'<text class="x" x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 8}">{escaped(x_label)}</text>',
        f'<text class="scale" x="{RIGHT}" y="{TOP - 4}">log scale</text>' if y_axis.is_log else "",
    ]
    return "".join(parts)


def _linear(values: Sequence[float], is_widened: bool) -> _Axis:
    """An axis over all values; widened, it ends at round numbers."""
    low, high = float(min(values)), float(max(values))
    size = max(abs(low), abs(high))
    if high / 2 - low / 2 <= max(size * 1e-12, 1e-290):  # one value: put it in the middle
        pad = size * 0.1 if size > 1e-280 else 1.0
        low, high = max(low - pad, -sys.float_info.max), min(high + pad, sys.float_info.max)
    step = _round_step((high / 2 - low / 2) * 0.4)
    first, last = (math.floor, math.ceil) if is_widened else (math.ceil, math.floor)
    ticks = [index * step for index in range(first(low / step), last(high / step) + 1)]
    ticks = [tick for tick in ticks if math.isfinite(tick)]
    if is_widened:
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    return _Axis(low, high, False, tuple((tick, _tick_label(tick, step)) for tick in ticks))


def _round_step(rough: float) -> float:
    """The nearest of 1, 2, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next((factor * power for factor in (1.0, 2.0, 5.0) if factor * power >= rough * 0.999), 10.0 * power)


def _tick_label(tick: float, step: float) -> str:
    if tick == 0:
        return "0"
    if abs(tick) >= 1e6 or step < 1e-4:
        return f"{tick:.6g}"
    return f"{tick:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _logarithmic(values: Sequence[float]) -> _Axis:
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = (high - low) * 0.04
    low, high = low - margin, high + margin
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    stride = math.ceil((high - low) / 6)
    powers = range(math.ceil(low) - 1, math.floor(high) + 1)
    # From text, because 10.0 ** -2 * 5 is not 0.05.
    ticks = [float(f"{factor}e{power}") for power in powers if power % stride == 0 for factor in factors]
    kept = [tick for tick in ticks if tick > 0 and low <= math.log10(tick) <= high]
    return _Axis(low, high, True, tuple((tick, f"{tick:g}") for tick in kept))
