"""Weights stored packed stay packed: `linear` or `experts` over such weights becomes the op of their format.

Passes before this one see dense products alone, so one set of patterns serves every format. Where else a weight is read
(a table, experts whose three weights differ in format), it is dequantized, which happens when the engine is written.
"""

from dataclasses import asdict
from typing import Any

from slipstream.build.rewrite import NewNames
from slipstream.engine.graph import Graph, Node, TensorType
from slipstream.engine.shapes import infer_node
from slipstream.kernels import packed_experts
from slipstream.kernels.registry import known_ops
from slipstream.schema.format import QUANTIZES_ACTIVATIONS, WeightFormat


class LowerFormats:
    name = "lower_formats"
    benefit = "quantized weights stay packed: fewer bytes to read in each step"

    def run(self, graph: Graph) -> int:
        lowering = _Lowering(graph)
        for node in graph.nodes:
            lowering.add(node)
        read = {name for node in lowering.nodes for name in node.inputs} | set(graph.outputs)
        graph.nodes[:] = [node for node in lowering.nodes if node.op != "concat" or node.outputs[0] in read]
        return lowering.num_lowered


class _Lowering:
    def __init__(self, graph: Graph) -> None:
        self.nodes: list[Node] = []
        self.num_lowered = 0
        self._graph, self._producers = graph, graph.producers()
        self._names = NewNames(graph.types)
        self._quantized: dict[tuple[Any, ...], tuple[str, ...]] = {}  # an input and how → the nodes that share it

    def add(self, node: Node) -> None:
        weights = self._weights(node)
        formats = {self._graph.formats.get(name) for name in weights}
        format = formats.pop() if len(formats) == 1 else None
        if format is None or (node.op == "experts" and (format.order or format.kind not in packed_experts.OPS)):
            self.nodes.append(node)
            return
        self.num_lowered += 1
        if node.op == "experts":
            self._lower_experts(node, weights, format)
        else:
            self._lower_linear(node, weights, format)

    def _lower_linear(self, node: Node, weights: tuple[str, ...], format: WeightFormat) -> None:
        inputs: dict[str, str | None] = dict(zip(("x", "weight", "bias"), node.inputs, strict=True))
        inputs |= self._parts(weights, format)
        attributes = asdict(format) | {"dtype": self._graph.types[node.outputs[0]].dtype}
        if format.kind in QUANTIZES_ACTIVATIONS:
            rounding = QUANTIZES_ACTIVATIONS[format.kind]
            inputs["x"], inputs["x_scale"] = self._quantize(str(inputs["x"]), rounding, attributes)
        self.nodes.append(_call(f"linear_{format.kind}", inputs, node.outputs, attributes))

    def _lower_experts(self, node: Node, weights: tuple[str, ...], format: WeightFormat) -> None:
        inputs: dict[str, str | None] = dict(
            zip((argument.name for argument in known_ops()["experts"].tensor_arguments), node.inputs, strict=True)
        )
        for name, weight in zip(packed_experts.WEIGHTS, weights, strict=True):
            inputs |= {f"{name}_{part}": found for part, found in self._parts((weight,), format).items()}
        attributes = asdict(format) | node.attributes
        self.nodes.append(_call(f"experts_{format.kind}", inputs, node.outputs, attributes))

    def _weights(self, node: Node) -> tuple[str, ...]:
        """The stored weights behind a product: its own, or those that a fusion joined."""
        if node.op == "experts":
            return tuple(str(name) for name in node.inputs[3:6])
        if node.op != "linear" or node.inputs[1] is None:
            return ()
        maker = self._producers.get(node.inputs[1])
        joined = maker.inputs if maker is not None and maker.op == "concat" else node.inputs[1:2]
        return tuple(name for name in joined if name is not None)

    def _parts(self, weights: tuple[str, ...], format: WeightFormat) -> dict[str, str]:
        found = {}
        stored = [stored_parts(self._graph, weight, format) for weight in weights]
        for part in format.parts(1, 1):
            names = tuple(each[part] for each in stored)
            is_shared = part == "order"  # of one format, so they are equal
            found[part] = names[0] if is_shared or len(names) == 1 else self._make("concat", names, {})[0]
        return found

    def _quantize(self, x: str, kind: str, attributes: dict[str, Any]) -> tuple[str, ...]:
        key = (x, kind, attributes["input_scale"], attributes["input_group_size"])
        if key not in self._quantized:
            op = known_ops()[f"quantize_{kind}"]
            chosen = {argument.name: attributes[argument.name] for argument in op.attributes}
            self._quantized[key] = self._make(op.name, (x,), chosen)
        return self._quantized[key]

    def _make(self, op: str, inputs: tuple[str, ...], attributes: dict[str, Any]) -> tuple[str, ...]:
        outputs = self._names.of(op, known_ops()[op].num_outputs or 1)
        self.nodes.append(Node(op, inputs, outputs, attributes))
        self._graph.types |= infer_node(self.nodes[-1], self._graph.types)
        return outputs


def stored_parts(graph: Graph, weight: str, format: WeightFormat) -> dict[str, str]:
    """What a packed weight is stored as, part by part: weights of the graph from now on."""
    sizes = (int(size) for size in graph.types[weight].shape)
    found = {part: f"{weight}.{part}" for part in format.parts(1, 1)}
    for part, (shape, dtype) in format.parts(*sizes).items():
        graph.weights[found[part]] = graph.types[found[part]] = TensorType(shape, dtype)
    return found


def _call(name: str, inputs: dict[str, str | None], outputs: tuple[str, ...], attributes: dict[str, Any]) -> Node:
    """A node with the arguments that the op's schema names."""
    op = known_ops()[name]
    return Node(
        name,
        tuple(inputs.get(argument.name) for argument in op.tensor_arguments),
        outputs,
        {argument.name: attributes[argument.name] for argument in op.attributes},
    )


PASS = LowerFormats()
