"""Weights of equal content become one: a head that was trained tied to the embedding and then stored beside it."""

from slipstream.build.example import trace
from slipstream.build.rewrite import Symbol, ops
from slipstream.engine.graph import Graph, Node


class ShareWeights:
    name = "share_weights"
    benefit = "tensors of equal content are stored, and kept in memory, once"

    def run(self, graph: Graph) -> int:
        """How many weights another now stands for."""
        shared = {name: kept for name, kept in graph.equal.items() if name in graph.weights and kept in graph.weights}
        for index, node in enumerate(graph.nodes):
            inputs = tuple(name and shared.get(name, name) for name in node.inputs)
            graph.nodes[index] = Node(node.op, inputs, node.outputs, node.attributes)
        for name in shared:
            del graph.weights[name], graph.types[name]
        return len(shared)


PASS = ShareWeights()


def example() -> Graph:
    def block(token_ids: Symbol, table: Symbol, head: Symbol) -> Symbol:
        return ops.linear(ops.embedding(table, token_ids), head)

    graph = trace(block, inputs={"step.token_ids": ("T",)}, weights={"embed.weight": (16, 8), "head.weight": (16, 8)})
    graph.equal = {"head.weight": "embed.weight"}
    return graph
