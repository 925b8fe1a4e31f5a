"""KV groups (schema/kv.py) in the graph: each layer reads its group's block tables and sees its group's window.

An engine is built without knowing them: windows are narrowed, sinks kept and drafts made when it is started.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from slipstream.engine.graph import Graph, Node, TensorType
from slipstream.errors import EngineError
from slipstream.schema.kv import KVGroup

ONE_A_GROUP = ("step.slots", "step.block_tables")
_ONLY_WRITE = ("kv_write", "rope_kv_write")


def group_input(name: str, group: int) -> str:
    """What a graph calls an input of a group: the first group's has the name that the build gave it."""
    return f"{name}.{group}" if group else name


def with_groups(graph: Graph, groups: Sequence[KVGroup]) -> Graph:
    """The graph as these groups run it."""
    if groups[0].sink_tokens:
        graph = _with_sinks(graph, groups)
    group_of = {f"kv.{layer}": index for index, group in enumerate(groups) for layer in group.layers}
    nodes = []
    for node in graph.nodes:
        caches = [name for name in node.inputs if name in group_of]
        nodes.append(_of_group(node, group_of[caches[0]], groups) if caches else node)
    more = {
        group_input(name, index): graph.inputs[name]
        for index in range(1, len(groups))
        for name in ONE_A_GROUP
        if name in graph.inputs
    }
    return replace(graph, nodes=nodes, inputs=graph.inputs | more, types=graph.types | more)


def with_trees(graph: Graph, num_words: int) -> Graph:
    """The graph where drafts may branch: each row sees its own past in its tree. num_words: of a row's mask."""
    more = {
        "step.positions": TensorType(("T",), "int64"),
        "step.tree_starts": TensorType(("S",), "int64"),
        "step.tree_masks": TensorType(("T", num_words), "int64"),
    }
    nodes = [_with_tree(node, tuple(more)) if _reads_a_cache(node) else node for node in graph.nodes]
    return replace(graph, nodes=nodes, inputs=graph.inputs | more, types=graph.types | more)


def _reads_a_cache(node: Node) -> bool:
    return node.op not in _ONLY_WRITE and any(name is not None and name.startswith("kv.") for name in node.inputs)


def _with_tree(node: Node, tree: tuple[str, ...]) -> Node:
    if node.op != "attention":
        why = "sink_token_length" if node.op == "streaming_attention" else f"this model's op {node.op}"
        raise EngineError(f"drafts of this method branch, which {why} cannot; take another speculative method.")
    return replace(node, op="tree_attention", inputs=(*node.inputs[:5], *tree, *node.inputs[5:]))


def _of_group(node: Node, index: int, groups: Sequence[KVGroup]) -> Node:
    inputs = tuple(group_input(name, index) if name in ONE_A_GROUP else name for name in node.inputs)
    attributes = node.attributes
    if "window" in attributes:
        attributes = attributes | {"window": groups[index].window}
    return replace(node, inputs=inputs, attributes=attributes)


def _with_sinks(graph: Graph, groups: Sequence[KVGroup]) -> Graph:
    """Each attention becomes one that sees the sinks too, with its query rotated once more, for them.

    The text may outgrow what float32 can count, so its own angles are computed as for far positions.
    """
    (window,), (sink_tokens,) = {group.window for group in groups}, {group.sink_tokens for group in groups}
    producers, types, nodes = graph.producers(), dict(graph.types), list[Node]()

    def add(op: str, inputs: tuple[str | None, ...], like: tuple[str, ...], attributes: Mapping[str, Any]) -> None:
        """A node that makes what `like` names, for the sinks; once."""
        outputs = tuple(map(_for_sinks, like))
        if outputs[0] not in types:
            types.update({output: types[name] for output, name in zip(outputs, like, strict=True)})
            nodes.append(Node(op, inputs, outputs, dict(attributes)))

    for node in graph.nodes:
        if node.op != "attention":
            nodes.append(replace(node, op="far_cos_sin") if node.op == "rope_cos_sin" else node)
            continue
        q, unrotated, table = _rotation(node, producers)
        positions, inv_freq = table.inputs
        add("place_in_window", (positions,), (str(positions),), {"window": window})
        add("rope_cos_sin", (_for_sinks(positions), inv_freq), table.outputs, table.attributes)
        head_dim = types[str(node.inputs[1])].shape[-1]
        add("rope", (unrotated, *map(_for_sinks, table.outputs)), (q,), {"head_dim": head_dim})
        inputs = (q, _for_sinks(q), *node.inputs[1:5], node.inputs[-1])
        nodes.append(Node("streaming_attention", inputs, node.outputs, node.attributes | {"sink_tokens": sink_tokens}))
    return replace(graph, nodes=nodes, types=types)


def _rotation(attention: Node, producers: dict[str, Node]) -> tuple[str, str, Node]:
    """The query of an attention, what it was before its rotation, and the table of angles."""
    match attention.inputs:
        case (str(q), _, _, _, _, None, None, _):
            match producers.get(q):
                case Node("rope", (str(unrotated), str(cos), _)) | Node(
                    "rope_kv_write", (str(unrotated), _, _, str(cos), *_)
                ):
                    table = producers.get(cos)
                    if table is not None and table.op == "rope_cos_sin" and len(table.inputs) == 2:
                        return q, unrotated, table
    raise EngineError(
        "sink_token_length needs plain rotary attention (RoPE; no ALiBi, learned positions, latent heads or sinks of "
        "its own), which this model has not; leave it out."
    )


def _for_sinks(name: str | None) -> str:
    return f"{name}.for_sinks"
