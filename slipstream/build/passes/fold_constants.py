"""What depends on weights alone is computed once, when the engine is written."""

from itertools import takewhile

from slipstream.build.example import trace
from slipstream.build.rewrite import Symbol, ops
from slipstream.engine.graph import Graph, Node

_LONGEST_NAME = 200  # characters; names in a stored graph have a limit


class FoldConstants:
    name = "fold_constants"
    benefit = "weights are joined at build time, not in each step"

    def run(self, graph: Graph) -> int:
        kept: list[Node] = []
        folded: dict[str, str] = {}  # a folded node's output → the weight it became
        for node in graph.nodes:
            inputs = tuple(name and folded.get(name, name) for name in node.inputs)
            node = Node(node.op, inputs, node.outputs, node.attributes)
            if _is_constant(node, graph):
                (old,) = node.outputs
                folded[old] = _add_to_prologue(node, graph)
            else:
                kept.append(node)
        graph.nodes[:] = kept
        _drop_unread_weights(graph)
        return len(folded)


def _is_constant(node: Node, graph: Graph) -> bool:
    read = [name for name in node.inputs if name is not None]
    reads_weights_alone = bool(read) and all(name in graph.weights for name in read)
    return reads_weights_alone and len(node.outputs) == 1 and node.outputs[0] not in graph.outputs


def _add_to_prologue(node: Node, graph: Graph) -> str:
    """The weight that this node makes; where two layers join the same weights (tied layers), they share the result."""
    for made in graph.prologue:
        if (made.op, made.inputs, made.attributes) == (node.op, node.inputs, node.attributes):
            return made.outputs[0]
    (old,) = node.outputs
    base = name = _joined([name for name in node.inputs if name is not None])[:_LONGEST_NAME]
    number = 0
    while name in graph.types:
        number += 1
        name = f"{base}_{number}"
    graph.prologue.append(Node(node.op, node.inputs, (name,), node.attributes))
    graph.weights[name] = graph.types[name] = graph.types.pop(old)
    return name


def _joined(names: list[str]) -> str:
    """a.q_proj.weight, a.k_proj.weight → a.q_proj+k_proj.weight"""
    parts = [name.split(".") for name in names]
    head = _common_start(parts)
    tail = _common_start([part[:0:-1] for part in (part[len(head) :] for part in parts)])[::-1]
    middles = [".".join(part[len(head) : len(part) - len(tail)]) for part in parts]
    return ".".join([*head, "+".join(dict.fromkeys(filter(None, middles))), *tail]).strip(".")


def _common_start(lists: list[list[str]]) -> list[str]:
    same = takewhile(lambda column: len(set(column)) == 1, zip(*lists, strict=False))
    return [column[0] for column in same]


def _drop_unread_weights(graph: Graph) -> None:
    """Parts of a joined weight stay only where a step still reads them; the prologue knows its own inputs."""
    read = {name for node in graph.nodes for name in node.inputs} | set(graph.outputs)
    graph.weights = {name: kind for name, kind in graph.weights.items() if name in read}


PASS = FoldConstants()


def example() -> Graph:
    def block(x: Symbol, a: Symbol, b: Symbol) -> Symbol:
        return ops.linear(x, ops.concat(a, b))

    return trace(block, inputs={"x": ("T", 8)}, weights={"mlp.a.weight": (3, 8), "mlp.b.weight": (5, 8)})
