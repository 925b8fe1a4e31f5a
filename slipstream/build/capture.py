"""A model becomes a graph: torch.export on the meta device, then one node for each recorded op.

No weight is read: parameters have shapes only. Constants that a model computes for itself (non-persistent buffers,
such as the rotary frequencies) come out beside the graph.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from slipstream.build.passes.last_token import ROW_WISE
from slipstream.engine.graph import Graph, Node, TensorType
from slipstream.engine.shapes import infer_types
from slipstream.errors import BuildError
from slipstream.kernels.attention.metadata import STEP_SHAPES, StepTensors
from slipstream.kernels.registry import known_ops
from slipstream.schema.model import DecoderConfig

# torch's own operators that mean the same as one of ours, so that a model file may write `x + y`.
_ATEN = {
    "aten.add.Tensor": "add",
    "aten.mul.Tensor": "mul",
    "aten.silu.default": "silu",
    "aten.linear.default": "linear",
    "aten.embedding.default": "embedding",
}


@dataclass(frozen=True)
class Captured:
    graph: Graph
    constants: dict[str, Tensor]


def capture(model_class: Any, config: DecoderConfig, dtype: str, tokens_per_block: int) -> Captured:
    """Record one step of a model over T tokens of S sequences.

    The graph's inputs are the StepTensors ("step.token_ids", ...) and each layer's cache ("kv.0", ...); its outputs
    are the logits of all T tokens, [T, vocab_size], and the hidden states that they are made of, [T, hidden_size].
    """
    with torch.device("meta"):
        model = model_class(config)
    constants = dict(model.named_buffers())
    model = _to_meta(model, getattr(torch, dtype))
    exported = _export(model, config, getattr(torch, dtype), tokens_per_block)
    graph = _Translator(exported, model, config, dtype, tokens_per_block).graph()
    graph.types = infer_types(graph)
    graph.outputs += _hidden_states(graph)
    graph.check()
    return Captured(graph, constants)


def _hidden_states(graph: Graph) -> tuple[str, ...]:
    """What the head reads, which embeddings are made of; nothing where the logits do not come from a linear head."""
    producers = graph.producers()
    node = producers.get(graph.outputs[0])
    while node is not None and node.op in ROW_WISE:
        node = producers.get(str(node.inputs[0]))
    if node is None or node.op != "linear" or graph.types[str(node.inputs[0])].shape[0] != "T":
        return ()
    return (str(node.inputs[0]),)


def _to_meta(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Weights in the engine's dtype; buffers keep theirs (the rotary table stays float32)."""
    buffers = {name: buffer.dtype for name, buffer in model.named_buffers()}
    model = model.to(device="meta", dtype=dtype)
    for name, kind in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_buffer(name).to(kind))
    return model.eval().requires_grad_(False)


def _export(
    model: nn.Module, config: DecoderConfig, dtype: torch.dtype, tokens_per_block: int
) -> torch.export.ExportedProgram:
    sizes = {"T": 7, "S": 3, "S1": 4, "B": 5, "R": 2}

    def example(*letters: str) -> Tensor:
        return torch.empty([sizes[letter] for letter in letters], dtype=torch.int64, device="meta")

    step = StepTensors(**{name: example(*letters) for name, letters in STEP_SHAPES.items()})
    kv_shape = (config.kv_planes, 11, tokens_per_block, config.num_kv_heads, config.head_dim)
    kv = [torch.empty(kv_shape, dtype=dtype, device="meta") for _ in range(config.num_layers)]
    any_size = torch.export.Dim.AUTO
    dynamic_shapes = {
        "step": [dict.fromkeys(range(len(letters)), any_size) for letters in STEP_SHAPES.values()],
        "kv": [{1: any_size}] * config.num_layers,
    }
    return torch.export.export(model, (step, kv), dynamic_shapes=dynamic_shapes, strict=False)


class _Translator:
    """torch.fx nodes to ours, one to one; views and Python are refused, since an engine has only ops."""

    def __init__(
        self,
        exported: torch.export.ExportedProgram,
        model: nn.Module,
        config: DecoderConfig,
        dtype: str,
        tokens_per_block: int,
    ) -> None:
        self._fx_graph = exported.graph
        self._ops = known_ops()
        self._names: dict[str, str] = {}  # fx name → our value
        self._inputs = {f"step.{name}": TensorType(letters, "int64") for name, letters in STEP_SHAPES.items()}
        kv_shape = (config.kv_planes, "N", tokens_per_block, config.num_kv_heads, config.head_dim)
        kv_type = TensorType(kv_shape, dtype)
        self._inputs |= {f"kv.{layer}": kv_type for layer in range(config.num_layers)}
        self._weights: dict[str, TensorType] = {}
        self._nodes: list[Node] = []
        self._name_placeholders(exported, model)

    def graph(self) -> Graph:
        outputs: tuple[str, ...] = ()
        for fx_node in self._fx_graph.nodes:
            if fx_node.op == "call_function":
                self._translate(fx_node)
            elif fx_node.op == "output":
                outputs = tuple(self._names[value.name] for value in fx_node.args[0])
        return Graph(self._inputs, self._weights, self._nodes, outputs)

    def _name_placeholders(self, exported: torch.export.ExportedProgram, model: nn.Module) -> None:
        # Tied weights are one parameter under two names; the first is the one a checkpoint stores.
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        first_name: dict[int, str] = {}
        for name, tensor in tensors.items():
            first_name.setdefault(id(tensor), name)
        user_inputs = iter(self._inputs)
        for spec in exported.graph_signature.input_specs:
            if spec.target is None:
                name = next(user_inputs)
            else:
                tensor = tensors[spec.target]
                name = first_name[id(tensor)]
                self._weights[name] = TensorType(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            self._names[spec.arg.name] = name

    def _translate(self, fx_node: fx.Node) -> None:
        target = str(fx_node.target)
        if target == "<built-in function getitem>":
            return  # named where its tuple is made
        name = (
            target.removeprefix("slipstream.").removesuffix(".default")
            if "slipstream." in target
            else _ATEN.get(target)
        )
        if name is None:
            known = ", ".join(sorted(_ATEN))
            raise BuildError(
                f"the model calls {target}, which no op stands for; use an op of slipstream.kernels, or one of {known}."
            )
        op = self._ops[name]
        bound: dict[str, Any] = dict(zip((argument.name for argument in op.arguments), fx_node.args, strict=False))
        bound |= fx_node.kwargs
        extra = [*fx_node.args[len(op.arguments) :], *(set(bound) - {argument.name for argument in op.arguments})]
        if extra:  # x.add(y, alpha=2) is not our add
            raise BuildError(f"the model calls {target} with {extra[0]!r}, which the op {name} does not take.")
        attributes = {argument.name: bound[argument.name] for argument in op.attributes}
        self._nodes.append(Node(name, self._tensors(op, bound), self._outputs(fx_node), attributes))

    def _tensors(self, op: Any, bound: dict[str, Any]) -> tuple[str | None, ...]:
        values: list[Any] = []
        for argument in op.tensor_arguments:
            value = bound.get(argument.name)
            values.extend(value if isinstance(value, list | tuple) else [value])
        if not all(value is None or isinstance(value, fx.Node) for value in values):
            raise BuildError(f"the model passes a number to {op.name} where a tensor belongs.")
        return tuple(None if value is None else self._names[value.name] for value in values)

    def _outputs(self, fx_node: fx.Node) -> tuple[str, ...]:
        result = fx_node.meta["val"]
        if result is None:
            return ()
        if isinstance(result, Tensor):
            self._names[fx_node.name] = fx_node.name
            return (fx_node.name,)
        outputs = tuple(f"{fx_node.name}.{index}" for index in range(len(result)))
        for user in fx_node.users:
            self._names[user.name] = outputs[user.args[1]]  # type: ignore[index]
        return outputs
