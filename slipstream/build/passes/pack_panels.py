"""For a CPU, weights lie as its dot products of bytes read them; so nothing is reordered when an engine starts."""

from collections.abc import Mapping
from typing import Any

from slipstream.build.example import trace
from slipstream.build.lower import stored_parts
from slipstream.build.rewrite import NewNames, Symbol, ops
from slipstream.engine.graph import Graph, Node
from slipstream.engine.shapes import infer_node
from slipstream.kernels.registry import known_ops

PRODUCTS = {"linear_w8a8": 8, "linear_w4a8": 4}  # → bits of a weight
_SCALES = ("scale", "shift")


class PackPanels:
    name = "pack_panels"
    benefit = "weights of 4 and 8 bits are read in the order in which a CPU multiplies them"

    def run(self, graph: Graph) -> int:
        if not graph.is_for_cpu:
            return 0
        names = NewNames(graph.types)
        made = [_with_panels(node, graph, names) if _can_be_packed(node, graph) else [node] for node in graph.nodes]
        graph.nodes[:] = [node for nodes in made for node in nodes]
        return sum(len(nodes) > 1 for nodes in made)


def _can_be_packed(node: Node, graph: Graph) -> bool:
    """A product of bytes, or a table of such numbers, with a result in float32."""
    if node.op not in (*PRODUCTS, "embedding") or graph.types[node.outputs[0]].dtype != "float32":
        return False
    if node.op in PRODUCTS:
        return _fit(node.attributes["group_size"], node.attributes["input_group_size"])
    format = graph.formats.get(str(node.inputs[0]))
    return format is not None and f"linear_{format.kind}" in PRODUCTS and _fit(format.group_size, 0)


def _fit(group_size: Any, input_group_size: Any) -> bool:
    """Groups of columns, of the weight and of x, must fit into each other."""
    small, large = sorted((group_size, input_group_size))
    return large % 8 == 0 and (not small or (small % 8 == 0 and large % small == 0))


def _with_panels(node: Node, graph: Graph, names: NewNames) -> list[Node]:
    made: list[Node] = []

    def make(op: str, inputs: tuple[str | None, ...], **attributes: Any) -> str:
        (output,) = names.of(op, 1)
        made.append(Node(op, inputs, (output,), attributes))
        graph.types |= infer_node(made[-1], graph.types)
        return output

    def panels(parts: Mapping[str, str | None], bits: int) -> tuple[str | None, ...]:
        scales = [make("to_panel_scales", (parts[name], None)) if parts.get(name) else None for name in _SCALES]
        return make("to_panels", (parts["packed"],), bits=bits), *scales

    if node.op == "embedding":
        table, token_ids = (str(name) for name in node.inputs)
        format, num_in = graph.formats[table], graph.types[table].shape[1]
        inputs = (*panels(stored_parts(graph, table, format), format.bits), token_ids)
        how: dict[str, Any] = {"bits": format.bits, "group_size": format.group_size, "num_in": num_in}
        return [*made, Node("embedding_panels", inputs, node.outputs, how)]
    arguments = (argument.name for argument in known_ops()[node.op].tensor_arguments)
    given = dict(zip(arguments, node.inputs, strict=True))
    bits = PRODUCTS[node.op]
    inputs = (given["x"], given["x_scale"], *panels(given, bits), given["bias"])
    how = {name: node.attributes[name] for name in ("group_size", "input_group_size")}
    num_out = graph.types[node.outputs[0]].shape[1]
    return [*made, Node("linear_panels", inputs, node.outputs, {"bits": bits, **how, "num_out": num_out})]


PASS = PackPanels()


def example() -> Graph:
    def block(x: Symbol, weight: Symbol, bias: Symbol) -> Symbol:
        numbers = ops.quantize_w8a8(x, input_scale=0.0, input_group_size=8)
        packed = ops.quantize_w8a8(weight, input_scale=0.0, input_group_size=0)
        how = {"group_size": 0, "input_group_size": 8, "dtype": "float32"}
        return ops.linear_w8a8(*numbers, *packed, None, bias, **how)

    graph = trace(block, inputs={"x": ("T", 12)}, weights={"weight": (18, 12), "bias": (18,)})
    graph.is_for_cpu = True
    return graph
