"""trace(): a small graph written as a function over ops; how passes state the graph they are for."""

import inspect
from collections.abc import Callable
from typing import Any

from slipstream.build.rewrite import Symbol, ops
from slipstream.engine.graph import Graph, Node, TensorType
from slipstream.engine.shapes import infer_types

__all__ = ["trace"]  # public, with the names of rewrite.py

_INTEGERS = ("slots", "query_starts", "kv_lens", "block_tables", "rows", "step.")


def trace(
    function: Callable[..., Any],
    inputs: dict[str, tuple[int | str, ...]],
    weights: dict[str, tuple[int, ...]],
) -> Graph:
    """Run the function on symbols, inputs first, then weights, in the order given; shapes as in {"x": ("T", 8)}.

    Everything is float32, except that inputs named as step tensors are (slots, kv_lens, step.…) are int64.
    Raises BuildError where an op does not take what it is given.
    """
    names = [*inputs, *weights]
    count = len(inspect.signature(function).parameters)
    assert count <= len(names)
    nodes, results = ops.record(function, [Symbol(name) for name in names])
    graph = Graph(
        inputs={name: TensorType(shape, _dtype(name)) for name, shape in inputs.items()},
        weights={name: TensorType(shape, "float32") for name, shape in weights.items()},
        nodes=[
            Node(
                node.op,
                tuple(None if s is None else s.name for s in node.inputs),
                tuple(s.name for s in node.outputs),
                node.attributes,
            )
            for node in nodes
        ],
        outputs=tuple(symbol.name for symbol in results),
    )
    graph.types = infer_types(graph)
    graph.check()
    return graph


def _dtype(name: str) -> str:
    return "int64" if name.startswith(_INTEGERS) else "float32"
