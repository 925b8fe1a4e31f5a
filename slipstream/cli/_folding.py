"""Stretches of a graph that repeat, such as its layers: drawn once, with the number of times beside them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from slipstream.engine.graph import Graph, Node

_SHORTEST, _LONGEST = 3, 400  # ops of a layer


@dataclass(frozen=True)
class Stretch:
    """`times` runs of `length` nodes each, one after the other, all alike."""

    start: int
    length: int
    times: int

    @property
    def end(self) -> int:
        return self.start + self.length * self.times


def fold(graph: Graph) -> list[Stretch]:
    """The graph's nodes in order, what repeats (in longest stretches first) taken together."""
    kinds: dict[tuple[object, ...], int] = {}
    numbers = [kinds.setdefault(_kind(node, graph), len(kinds)) for node in graph.nodes]
    return _fold(numbers, 0, len(numbers))


def _kind(node: Node, graph: Graph) -> tuple[object, ...]:
    """Equal for nodes that do the same in two layers: the same op on values of the same types, step inputs by name."""
    inputs = tuple(
        name and (unnumbered(name) if name in graph.inputs else "", graph.types[name]) for name in node.inputs
    )
    return node.op, str(node.attributes), inputs, tuple(graph.types[name] for name in node.outputs)


def unnumbered(name: str) -> str:
    """layers.3.norm.weight → layers.i.norm.weight"""
    return re.sub(r"\b\d+\b", "i", name)


def _fold(numbers: Sequence[int], start: int, end: int) -> list[Stretch]:
    best = _most_repeated(numbers, start, end)
    if best is None:
        return [Stretch(position, 1, 1) for position in range(start, end)]
    return [*_fold(numbers, start, best.start), best, *_fold(numbers, best.end, end)]


def _most_repeated(numbers: Sequence[int], start: int, end: int) -> Stretch | None:
    """What covers the most nodes; of those the shortest, and the first."""
    best: Stretch | None = None
    for length in range(_SHORTEST, min(_LONGEST, (end - start) // 2) + 1):
        run = 0  # how many nodes in a row equal the one `length` further on
        for position in range(start, end - length + 1):
            if position < end - length and numbers[position] == numbers[position + length]:
                run += 1
                continue
            found = Stretch(position - run, length, run // length + 1)
            if found.times > 1 and (best is None or found.length * found.times > best.length * best.times):
                best = found
            run = 0
    return best
