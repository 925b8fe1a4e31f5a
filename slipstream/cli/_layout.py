"""Where the boxes of a drawing go: rows from top to bottom, straight columns where the graph has them.

The usual three steps for layered drawings (Sugiyama, Tagawa, Toda, 1981): each box one row below the lowest it reads;
boxes of a row in the order of their neighbours' mean; then places as near to the neighbours as the order allows. A line
that passes rows has a point of its own in each of them, so that it goes around the boxes, and mostly straight.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

GAP_X, GAP_Y = 28.0, 30.0
_SWEEPS = 12
_SETTLING = 200  # sweeps; boxes that pull at one another come to rest slowly


@dataclass(eq=False)
class Box:
    """Something with a size, to be placed: x and y are its middle."""

    width: float
    height: float
    x: float = 0.0
    y: float = 0.0
    row: int = 0
    band: tuple[float, float] = (0.0, 0.0)  # top and bottom of its row
    above: list["Box"] = field(default_factory=list)
    below: list["Box"] = field(default_factory=list)

    @property
    def is_point(self) -> bool:
        return self.width == 0


@dataclass(frozen=True)
class Edge:
    source: Box
    target: Box
    points: list[Box]  # the source, a point in each row between, the target


def place(boxes: Sequence[Box], pairs: Sequence[tuple[Box, Box]]) -> list[Edge]:
    """Give every box its place; `boxes` are in an order in which sources come before their targets."""
    for source, target in pairs:
        target.above.append(source)
    for box in boxes:
        box.row = max((source.row + 1 for source in box.above), default=0)
        box.above.clear()
    rows: list[list[Box]] = [[] for _ in range(max((box.row for box in boxes), default=0) + 1)]
    for box in boxes:
        rows[box.row].append(box)
    edges = [_connect(source, target, rows) for source, target in pairs]
    _order(rows)
    _place_x(rows)
    _place_y(rows)
    return edges


def _connect(source: Box, target: Box, rows: list[list[Box]]) -> Edge:
    points = [source]
    for row in range(source.row + 1, target.row):
        points.append(Box(0, 0, row=row))
        rows[row].append(points[-1])
    points.append(target)
    for upper, lower in pairwise(points):
        upper.below.append(lower)
        lower.above.append(upper)
    return Edge(source, target, points)


def _order(rows: list[list[Box]]) -> None:
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for row in rows if down else reversed(rows):
            for position, box in enumerate(row):
                box.x = position
            places = {id(box): _mean(box.above if down else box.below, box.x) for box in row}
            row.sort(key=lambda box: places[id(box)])
            for position, box in enumerate(row):
                box.x = position


def _mean(neighbours: list[Box], otherwise: float) -> float:
    return sum(each.x for each in neighbours) / len(neighbours) if neighbours else otherwise


def _place_x(rows: list[list[Box]]) -> None:
    """Each line is a spring: stiff where it passes rows, weak where it joins a box, so that boxes keep in line."""
    for row in rows:
        _settle(row, [0.0] * len(row), [1.0] * len(row))
    for sweep in range(_SETTLING):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            pulls = [[(_stiffness(box, each), each.x) for each in (*box.above, *box.below)] for box in row]
            weights = [sum(weight for weight, _ in pull) or 0.01 for pull in pulls]
            wanted = [
                sum(weight * x for weight, x in pull) / weight_sum if pull else box.x
                for box, pull, weight_sum in zip(row, pulls, weights, strict=True)
            ]
            _settle(row, wanted, weights)


def _stiffness(one: Box, other: Box) -> float:
    return (1.0, 0.02, 8.0)[one.is_point + other.is_point]


def _settle(row: list[Box], wanted: list[float], weights: list[float]) -> None:
    """Each box as near to its wanted place as order and gaps allow (least squares; pools of adjacent violators)."""
    offsets, right = [], 0.0
    for box in row:
        offsets.append(right + box.width / 2)
        right += box.width + GAP_X
    pools: list[tuple[float, float, int]] = []  # (weighted sum, weight, boxes): those that touch share one shift
    for want, weight, offset in zip(wanted, weights, offsets, strict=True):
        pools.append((weight * (want - offset), weight, 1))
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            right_pool, left_pool = pools.pop(), pools.pop()
            pools.append(tuple(a + b for a, b in zip(left_pool, right_pool, strict=True)))  # type: ignore[arg-type]
    shifts = [total / weight for total, weight, count in pools for _ in range(count)]
    for box, shift, offset in zip(row, shifts, offsets, strict=True):
        box.x = shift + offset


def _place_y(rows: list[list[Box]]) -> None:
    top = 0.0
    for row in rows:
        height = max(box.height for box in row)
        for box in row:
            box.y, box.band = top + height / 2, (top, top + height)
        top += height + GAP_Y
