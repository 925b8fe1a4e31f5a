"""Nodes whose results nobody reads, and which write nothing, go."""

from slipstream.build.example import trace
from slipstream.build.rewrite import Symbol, ops
from slipstream.engine.graph import Graph, Node
from slipstream.kernels.registry import known_ops


class DeadCode:
    name = "dead_code"
    benefit = "nothing is computed in vain"

    def run(self, graph: Graph) -> int:
        read = set(graph.outputs)
        kept: list[Node] = []
        for node in reversed(graph.nodes):
            if known_ops()[node.op].is_mutating or read & set(node.outputs):
                kept.append(node)
                read |= {name for name in node.inputs if name is not None}
        removed = len(graph.nodes) - len(kept)
        graph.nodes[:] = reversed(kept)
        graph.weights = {name: kind for name, kind in graph.weights.items() if name in read}
        return removed


PASS = DeadCode()


def example() -> Graph:
    def block(x: Symbol, y: Symbol) -> Symbol:
        ops.mul(ops.silu(x), y)
        return ops.add(x, y)

    return trace(block, inputs={"x": ("T", 8), "y": ("T", 8)}, weights={})
