"""Pipeline parallelism: the graph of one step becomes that of one stage, which has some of the decoder layers.

A cut goes between two layers, where as little as possible is still to be read: mostly the residual stream alone. What
a stage needs of the one before arrives (`receive`) and leaves for the next (`send`); what does not depend on tokens,
such as rotary angles, is computed by each stage that reads it. Stages are as even as can be in bytes of weights, those
of the embedding and the head among them. Tensor parallelism, fusions and lowering come after, on the stage's own graph.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

import torch

from slipstream.engine.graph import Graph, Node
from slipstream.engine.shapes import infer_types
from slipstream.errors import BuildError


@dataclass(frozen=True)
class Stage:
    """The nodes start:stop of a captured graph."""

    start: int
    stop: int
    name = "stage"
    benefit = "each stage has some of the layers, with their weights and their part of the KV cache"

    def run(self, graph: Graph) -> int:
        """How many layers it has."""
        flow = _Flow(graph)
        own = graph.nodes[self.start : self.stop]
        received = [_receive(graph, name) for name in flow.alive(self.start)]
        sent = [Node("send", (name,), (f"{name}.sent",)) for name in flow.alive(self.stop)]
        graph.nodes[:] = [*received, *flow.repeated(self.start, own), *own, *sent]
        graph.outputs = tuple(node.outputs[0] for node in sent) or graph.outputs
        read = {name for node in graph.nodes for name in node.inputs if name is not None}
        graph.inputs = {name: kind for name, kind in graph.inputs.items() if name in read or not _is_cache(name)}
        graph.weights = {name: kind for name, kind in graph.weights.items() if name in read}
        graph.kv_dtypes = {name: dtype for name, dtype in graph.kv_dtypes.items() if name in read}
        graph.equal = {name: kept for name, kept in graph.equal.items() if {name, kept} <= read}
        graph.types = infer_types(graph)
        return sum(map(_is_cache, graph.inputs))


def stages_of(graph: Graph, count: int) -> list[Stage]:
    """The first one first. Raises BuildError where the graph cannot be cut into so many."""
    cuts = _cuts(graph)
    if count > len(cuts) + 1:
        raise BuildError(
            f"pp_size is {count}, but the model can be cut into at most {len(cuts) + 1} stages, a layer or more each; "
            f"it must be from 1 to {len(cuts) + 1}."
        )
    ends = [0, *cuts, len(graph.nodes)]
    sizes = [_num_bytes(graph, graph.nodes[start:stop]) for start, stop in pairwise(ends)]
    starts = [0, *(ends[index] for index in evenly(sizes, count)), len(graph.nodes)]
    return [Stage(start, stop) for start, stop in pairwise(starts)]


def evenly(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """Where each of `count` runs but the first begins, the largest sum of a run being as small as can be."""
    ends = [0, *accumulate(sizes)]

    @cache
    def best(stop: int, count: int) -> tuple[int, tuple[int, ...]]:
        """Of the first `stop` sizes: the largest sum, and where runs begin."""
        if count == 1:
            return ends[stop], ()
        found = ((start, *best(start, count - 1)) for start in range(count - 1, stop))
        return min((max(largest, ends[stop] - ends[start]), (*starts, start)) for start, largest, starts in found)

    return best(len(sizes), count)[1]


class _Flow:
    """Which values of a graph are made of tokens, and for how long they are needed."""

    def __init__(self, graph: Graph) -> None:
        self._nodes = graph.nodes
        of_tokens = {"step.token_ids", *filter(_is_cache, graph.inputs)}
        self._made: dict[str, int] = {}  # by which node; of those values alone
        for index, node in enumerate(graph.nodes):
            if not of_tokens.isdisjoint(node.inputs):
                of_tokens.update(node.outputs)
                self._made |= dict.fromkeys(node.outputs, index)
        self._of_tokens = of_tokens
        self._last_read = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs if name}
        self._last_read |= dict.fromkeys(graph.outputs, len(graph.nodes))

    def alive(self, index: int) -> list[str]:
        """Made before the node at `index`, and read by it or later."""
        if index == len(self._nodes):
            return []
        return [name for name, made in self._made.items() if made < index <= self._last_read.get(name, made)]

    def num_alive(self) -> list[int]:
        """Before each node."""
        changes = [0] * (len(self._nodes) + 2)
        for name, made in self._made.items():
            changes[made + 1] += 1
            changes[self._last_read.get(name, made) + 1] -= 1
        return list(accumulate(changes))

    def repeated(self, start: int, own: Sequence[Node]) -> list[Node]:
        """The nodes before `start` that these need and that do not depend on tokens."""
        read = {name for node in own for name in node.inputs}
        found: list[Node] = []
        for node in reversed(self._nodes[:start]):
            if not read.isdisjoint(node.outputs) and self._of_tokens.isdisjoint(node.outputs):
                found.append(node)
                read.update(node.inputs)
        return found[::-1]


def _cuts(graph: Graph) -> list[int]:
    """Nodes before which the graph can be cut, one between each two layers, unless one reads the other's cache."""
    reads: dict[str, list[int]] = {}  # of each cache, by which nodes
    for index, node in enumerate(graph.nodes):
        for name in node.inputs:
            if name is not None and _is_cache(name):
                reads.setdefault(name, []).append(index)
    of_layers, num_alive, found, last = list(reads.values()), _Flow(graph).num_alive(), list[int](), 0
    for layer in range(1, len(of_layers)):
        last, first = max(last, *of_layers[layer - 1]), min(map(min, of_layers[layer:]))
        if last < first:
            found.append(min(range(last + 1, first + 1), key=lambda place: (num_alive[place], -place)))
    return found


def _receive(graph: Graph, name: str) -> Node:
    kind = graph.types[name]
    if len(kind.shape) != 2 or kind.shape[0] != "T" or not getattr(torch, kind.dtype).is_floating_point:
        raise BuildError(
            f"The value {name} would go from one stage to the next, but it is {kind} and no row of numbers a token; "
            "build with --pp_size 1."
        )
    return Node("receive", ("step.positions",), (name,), {"num_columns": kind.shape[1], "dtype": kind.dtype})


def _num_bytes(graph: Graph, nodes: Sequence[Node]) -> int:
    """Of the weights that these nodes read, as they are stored."""
    read = {name for node in nodes for name in node.inputs if name in graph.weights}
    return sum(math.prod(map(int, graph.weights[name].shape)) * _num_bits(graph, str(name)) // 8 for name in read)


def _num_bits(graph: Graph, weight: str) -> int:
    format = graph.formats.get(weight)
    return 8 * getattr(torch, graph.weights[weight].dtype).itemsize if format is None else format.bits


def _is_cache(name: str) -> bool:
    return name.startswith("kv.")
