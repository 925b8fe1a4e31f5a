"""Each value is named after the op that makes it, in order: what a fused op makes no longer carries an old name."""

from slipstream.build.example import trace
from slipstream.build.rewrite import NewNames, Symbol, ops
from slipstream.engine.graph import Graph, Node


class Renumber:
    name = "renumber"
    benefit = "the graph reads as it runs: linear_7 is the eighth linear"

    def run(self, graph: Graph) -> int:
        """How many values have a new name."""
        new_names = NewNames([*graph.inputs, *graph.weights])
        names: dict[str, str] = {}
        nodes = []
        for node in graph.nodes:
            names |= dict(zip(node.outputs, new_names.of(node.op, len(node.outputs)), strict=True))
            inputs = tuple(name and names.get(name, name) for name in node.inputs)
            nodes.append(Node(node.op, inputs, tuple(names[name] for name in node.outputs), node.attributes))
        graph.nodes[:] = nodes
        graph.outputs = tuple(names.get(name, name) for name in graph.outputs)
        graph.types = graph.inputs | graph.weights | {new: graph.types[old] for old, new in names.items()}
        return sum(old != new for old, new in names.items())


PASS = Renumber()


def example() -> Graph:
    def block(x: Symbol, y: Symbol) -> Symbol:
        return ops.mul(ops.silu(x), y)  # trace() names these silu0.0 and mul1.0

    return trace(block, inputs={"x": ("T", 8), "y": ("T", 8)}, weights={})
