"""What depends on weights alone is computed once, when the engine is written."""

import os

from slipstream.build.example import trace
from slipstream.build.rewrite import Symbol, ops
from slipstream.engine.graph import Graph, Node


class FoldConstants:
    name = "fold_constants"
    benefit = "weights are joined at build time, not in each step"

    def run(self, graph: Graph) -> int:
        folded, kept = 0, []
        for node in graph.nodes:
            if node.inputs and all(name in graph.weights for name in node.inputs):
                node = _named_after_inputs(node, graph)
                graph.prologue.append(node)
                graph.weights |= {name: graph.types[name] for name in node.outputs}
                folded += 1
            else:
                kept.append(node)
        graph.nodes[:] = kept
        _drop_unread_weights(graph)
        return folded


def _named_after_inputs(node: Node, graph: Graph) -> Node:
    """a.q_proj.weight, a.k_proj.weight → a.q_proj+k_proj.weight; readers follow."""
    (old,) = node.outputs
    names = [name for name in node.inputs if name is not None]
    head = os.path.commonprefix(names).rpartition(".")[0]
    tail = os.path.commonprefix([name[::-1] for name in names])[::-1].partition(".")[2]
    middles = [name.removeprefix(head + ".").removesuffix("." + tail) for name in names]
    new = ".".join(part for part in (head, "+".join(middles), tail) if part)
    graph.types[new] = graph.types.pop(old)
    graph.nodes[:] = [
        Node(user.op, tuple(new if name == old else name for name in user.inputs), user.outputs, user.attributes)
        for user in graph.nodes
    ]
    return Node(node.op, node.inputs, (new,), node.attributes)


def _drop_unread_weights(graph: Graph) -> None:
    """Parts of a joined weight stay only where a step still reads them; the prologue knows its own inputs."""
    read = {name for node in graph.nodes for name in node.inputs} | set(graph.outputs)
    graph.weights = {name: kind for name, kind in graph.weights.items() if name in read}


PASS = FoldConstants()


def example() -> Graph:
    def block(x: Symbol, a: Symbol, b: Symbol) -> Symbol:
        return ops.linear(x, ops.concat(a, b))

    return trace(block, inputs={"x": ("T", 8)}, weights={"mlp.a.weight": (3, 8), "mlp.b.weight": (5, 8)})
