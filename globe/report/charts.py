"""Small charts as inline SVG: colours and dashes come from the page's style sheet, so they follow its colour scheme."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 10, 34
_MAX_POINTS = 160
_MAX_TICKS = 6
_MAX_MARKS = 3000

T = TypeVar("T")
Points = Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Chart:
    """A picture with what it needs to be read."""

    title: str
    svg: Markup
    legend: tuple[str, ...] = ()
    """Names of the curves, in the order of the style classes s0, s1, …"""
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Curve:
    label: str
    points: Points
    band: Sequence[tuple[float, float, float]] = ()
    """x, low and high of a shaded range about the curve."""


def curve_chart(
    title: str, curves: Sequence[Curve], x_label: str, *, logarithmic: bool = False, from_zero: bool = False
) -> Chart | None:
    """Curves over one x axis; None where no finite point is left to draw (on a logarithmic scale: none above 0)."""
    curves = [_drawable(curve, logarithmic) for curve in curves]
    ends = [curve.points for curve in curves if curve.points]
    if not ends:
        return None
    x = _Axis([point[0] for points in ends for point in points], _LEFT, WIDTH - _RIGHT)
    values = [point[1] for points in ends for point in points]
    values += [value for curve in curves for place in curve.band for value in place[1:]]
    y = _Axis([0.0, *values] if from_zero else values, HEIGHT - _BOTTOM, _TOP, logarithmic)
    marks = [_frame(x, y, [(tick, _short(tick)) for tick in x.ticks], x_label)]
    for number, curve in enumerate(curves):
        if curve.band:
            there = [(x(place), y(low)) for place, low, _ in curve.band]
            back = [(x(place), y(high)) for place, _, high in reversed(curve.band)]
            marks.append(Markup('<path class="s{} band" d="{}Z"/>').format(number, _path([*there, *back])))
        line = [(x(place), y(value)) for place, value in _thinned(curve.points)]
        if len(line) == 1:
            marks.append(Markup('<circle class="s{} dot" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(number, *line[0]))
        else:
            marks.append(Markup('<path class="s{} line" d="{}"/>').format(number, _path(line)))
    spans = [_span(curve.points) for curve in curves if curve.points]
    told = [
        f"{curve.label or title} {span}" for curve, span in zip(filter(lambda c: c.points, curves), spans, strict=True)
    ]
    svg = _svg(f"{title} against {x_label}: {'; '.join(told)}", marks)
    if not any(curve.label for curve in curves):
        return Chart(title, svg, caption=spans[0])
    labels = [f"{curve.label}, {_span(curve.points)}" if curve.points else curve.label for curve in curves]
    return Chart(title, svg, tuple(labels))


def _span(points: Points) -> str:
    """What a curve says, to be read."""
    return f"from {_short(points[0][1])} to {_short(points[-1][1])}"


def strip_chart(title: str, groups: Mapping[str, Sequence[float]], x_label: str, top: float = 0.0) -> Chart | None:
    """A column of marks for each group, one mark for each value, and a dot at the median.

    The value axis reaches from 0 to at least `top`. With more than a few thousand values: a bar from the least to the
    greatest, a thick one from the tenth to the ninetieth percentile. None where no finite value is left to draw.
    """
    finite = {name: sorted(value for value in values if math.isfinite(value)) for name, values in groups.items()}
    if not any(finite.values()):
        return None
    x = _Axis([-0.5, len(groups) - 0.5], _LEFT, WIDTH - _RIGHT)
    y = _Axis([0.0, top, *(value for values in finite.values() for value in values)], HEIGHT - _BOTTOM, _TOP)
    step = math.ceil(len(groups) / 12)
    labels = [(place, name) for place, name in enumerate(groups) if place % step == 0]
    marks = [_frame(x, y, labels, x_label)]
    half = min(7.0, 0.36 * (x(1) - x(0)))
    crowded = sum(map(len, finite.values())) > _MAX_MARKS
    single, outer, inner = [], [], []
    for place, values in enumerate(finite.values()):
        if not values:
            continue
        centre = x(place)
        if crowded:
            outer.append(f"M{centre:.1f},{y(values[0]):.1f}V{y(values[-1]):.1f}")
            inner.append(f"M{centre:.1f},{y(_quantile(values, 0.1)):.1f}V{y(_quantile(values, 0.9)):.1f}")
        else:
            single += [f"M{centre - half:.1f},{y(value):.1f}h{2 * half:.1f}" for value in values]
        marks.append(
            Markup(
                '<circle class="median" cx="{:.1f}" cy="{:.1f}" r="2.2"><title>{}: {} to {}, median {}</title></circle>'
            ).format(
                centre,
                y(statistics.median(values)),
                list(groups)[place],
                *map(_short, (values[0], values[-1], statistics.median(values))),
            )
        )
    for kind, parts in (("each", single), ("whole", outer), ("most", inner)):
        if parts:
            marks.insert(1, Markup('<path class="{}" d="{}"/>').format(kind, "".join(parts)))
    every = sorted(value for values in finite.values() for value in values)
    spread = f"{_short(every[0])} to {_short(every[-1])}, median {_short(statistics.median(every))}"
    told = f"{title} by {x_label}: {spread}"
    caption = (
        f"{'bar: least to greatest; thick: 10 to 90 %; dot: median' if crowded else 'dot: median'}. In all {spread}"
    )
    return Chart(title, _svg(told, marks), caption=caption)


def summary_curve(label: str, curves: Iterable[Points]) -> Curve:
    """Median and full range of several curves; one that ends early keeps its last value, as a finished fit does."""
    curves = [points for points in curves if points]
    places = _thinned(sorted({place for points in curves for place, _ in points}))
    columns = [_held(points, places) for points in curves]
    rows = [sorted(row) for row in zip(*columns, strict=True)]
    band = [(place, row[0], row[-1]) for place, row in zip(places, rows, strict=True)]
    return Curve(label, [(place, statistics.median(row)) for place, row in zip(places, rows, strict=True)], band)


def _held(points: Points, places: Sequence[float]) -> list[float]:
    """The curve's last value at or before each place."""
    values: list[float] = []
    number = 0
    for place in places:
        while number + 1 < len(points) and points[number + 1][0] <= place:
            number += 1
        values.append(points[number][1])
    return values


class _Axis:
    """Values to pixels, and where the ticks are."""

    def __init__(self, values: Sequence[float], start: float, end: float, logarithmic: bool = False) -> None:
        low, high = min(values), max(values)
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # flat
            low, high = (
                (low / 2, high * 2) if logarithmic else (low - 0.5 - 0.1 * abs(low), high + 0.5 + 0.1 * abs(high))
            )
        self._map = math.log10 if logarithmic else float
        self._start, self._end = start, end
        if logarithmic:
            self.ticks = _decades(low, high)
        else:
            if start > end:  # upwards: room above the highest
                high += 0.04 * (high - low)
            self.ticks = _plain_ticks(low, high)
        self._low, self._span = self._map(low), self._map(high) - self._map(low)

    def __call__(self, value: float) -> float:
        return self._start + (self._end - self._start) * (self._map(value) - self._low) / self._span


def _decades(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic scale: 1, 2 and 5 of each decade, or decades only, or some of them."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
    shown = [tick for tick in ticks if low <= tick <= high]
    if len(shown) > _MAX_TICKS:
        decades = [10.0**exponent for exponent in exponents if low <= 10.0**exponent <= high]
        shown = decades[:: max(1, math.ceil(len(decades) / _MAX_TICKS))]
    return shown if len(shown) > 2 else _plain_ticks(low, high)


def _plain_ticks(low: float, high: float) -> list[float]:
    ticks = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in ticks if low - 1e-9 <= tick <= high + 1e-9]


def _frame(x: _Axis, y: _Axis, x_ticks: Sequence[tuple[float, str]], x_label: str) -> Markup:
    """Grid lines, tick labels, base line and the name of the x axis."""
    floor = HEIGHT - _BOTTOM
    grid = "".join(f"M{_LEFT},{y(tick):.1f}H{WIDTH - _RIGHT}" for tick in y.ticks)
    parts = [
        Markup('<path class="grid" d="{}"/><path class="axis" d="M{},{}H{}"/>').format(
            grid, _LEFT, floor, WIDTH - _RIGHT
        )
    ]
    parts += [
        Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(_LEFT - 6, y(tick) + 4, _short(tick))
        for tick in y.ticks
    ]
    parts += [
        Markup('<text x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(
            min(x(tick), WIDTH - 2), floor + 15, "end" if x(tick) + 3.5 * len(label) > WIDTH - 2 else "middle", label
        )
        for tick, label in x_ticks
    ]
    parts.append(
        Markup('<text class="name" x="{}" y="{}" text-anchor="end">{}</text>').format(
            WIDTH - _RIGHT, HEIGHT - 4, x_label
        )
    )
    return Markup("").join(parts)


def _svg(told: str, marks: Iterable[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, told, Markup("").join(marks)
    )


def _drawable(curve: Curve, logarithmic: bool) -> Curve:
    def good(*values: float) -> bool:
        return all(math.isfinite(value) for value in values) and not (logarithmic and min(values[1:]) <= 0)

    points = [point for point in curve.points if good(*point)]
    return Curve(curve.label, points, [place for place in curve.band if good(*place)])


def _thinned(points: Sequence[T]) -> list[T]:
    """At most so many of them, evenly spaced, with the first and the last."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    return [points[round(number * (len(points) - 1) / (_MAX_POINTS - 1))] for number in range(_MAX_POINTS)]


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]


def _short(value: float) -> str:
    """Three significant digits, without an exponent where that is short."""
    return f"{value:.3g}" if 1e-4 <= abs(value) < 1e5 or value == 0 else f"{value:.0e}".replace("e-0", "e-")
