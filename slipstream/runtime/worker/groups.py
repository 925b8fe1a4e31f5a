"""KV groups (schema/kv.py) in the graph: each layer reads its group's block tables and sees its group's window."""

from collections.abc import Sequence
from dataclasses import replace

from slipstream.engine.graph import Graph, Node
from slipstream.schema.kv import KVGroup

_ONE_A_GROUP = ("step.slots", "step.block_tables")


def group_input(name: str, group: int) -> str:
    """What a graph calls an input of a group: the first group's has the name that the build gave it."""
    return f"{name}.{group}" if group else name


def with_groups(graph: Graph, groups: Sequence[KVGroup]) -> Graph:
    """The graph as these groups run it. An engine is built without knowing them: its windows may be narrowed later."""
    group_of = {f"kv.{layer}": index for index, group in enumerate(groups) for layer in group.layers}
    nodes = []
    for node in graph.nodes:
        caches = [name for name in node.inputs if name in group_of]
        nodes.append(_of_group(node, group_of[caches[0]], groups) if caches else node)
    more = {
        group_input(name, index): graph.inputs[name]
        for index in range(1, len(groups))
        for name in _ONE_A_GROUP
        if name in graph.inputs
    }
    return replace(graph, nodes=nodes, inputs=graph.inputs | more, types=graph.types | more)


def _of_group(node: Node, index: int, groups: Sequence[KVGroup]) -> Node:
    inputs = tuple(group_input(name, index) if name in _ONE_A_GROUP else name for name in node.inputs)
    values = {"window": groups[index].window, "sink_tokens": groups[index].sink_tokens}
    attributes = {name: values.get(name, value) for name, value in node.attributes.items()}
    return replace(node, inputs=inputs, attributes=attributes)
