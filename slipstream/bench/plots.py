"""Plots as SVG: a few lines, points or intervals between two axes. Colours are the page's (--c0 …, currentColor)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

COLOURS = 6  # that the page has
_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 44

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[Point]
    is_stepped: bool = False  # the value holds until the next point
    labels: Sequence[str] = ()  # one a point: then each is drawn


@dataclass(frozen=True)
class Plot:
    """Both axes begin at 0, unless told otherwise."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]


def svg_of(plot: Plot) -> str:
    points = [point for series in plot.series for point in series.points] or [(0.0, 0.0)]
    x_ticks, y_ticks = ticks(max(x for x, _ in points)), ticks(max(y for _, y in points))
    area = _Area(x_ticks[-1], y_ticks[-1])
    parts = [*_axes(plot, area, x_ticks, y_ticks)]
    for index, series in enumerate(plot.series):
        parts += _drawn(series, area, index % COLOURS)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(plot.title)}">{"".join(parts)}</svg>'


def ticks(most: float) -> list[float]:
    """From 0 to `most` or a little more, in three to six steps of 1, 2 or 5 times a power of ten."""
    if most <= 0:
        return [0.0, 1.0]
    power = 10.0 ** floor(log10(most))
    step = next(size * power for size in (0.2, 0.5, 1.0, 2.0) if most <= 6 * size * power)
    return [round(index * step, 12) for index in range(ceil(most / step - 1e-9) + 1)]


@dataclass(frozen=True)
class _Area:
    x_most: float
    y_most: float

    def x(self, value: float) -> float:
        return round(_LEFT + value / self.x_most * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        return round(_HEIGHT - _BOTTOM - value / self.y_most * (_HEIGHT - _TOP - _BOTTOM), 1)


def _axes(plot: Plot, area: _Area, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> Iterator[str]:
    low, left, right = area.y(0), area.x(0), area.x(x_ticks[-1])
    for tick in y_ticks:
        yield f'<line class="grid" x1="{left}" x2="{right}" y1="{area.y(tick)}" y2="{area.y(tick)}"/>'
        yield f'<text x="{left - 6}" y="{area.y(tick) + 4}" text-anchor="end">{tick:g}</text>'
    for tick in x_ticks:
        yield f'<text x="{area.x(tick)}" y="{low + 16}" text-anchor="middle">{tick:g}</text>'
    yield f'<text x="{(left + right) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(plot.x_label)}</text>'
    middle = (_TOP + low) / 2
    yield f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{escape(plot.y_label)}</text>'


def _drawn(series: Series, area: _Area, colour: int) -> Iterator[str]:
    places = [(area.x(x), area.y(y)) for x, y in series.points]
    path, before = "", 0.0
    for x, y in places:
        if path and series.is_stepped:
            path += f"L{x} {before}"
        path += f"{'L' if path else 'M'}{x} {y}"
        before = y
    yield f'<path class="c{colour}" d="{path}"><title>{escape(series.name)}</title></path>'
    for (x, y), label in zip(places, series.labels, strict=False):
        yield f'<circle class="c{colour}" cx="{x}" cy="{y}" r="4"><title>{escape(label)}</title></circle>'
