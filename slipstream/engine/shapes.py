"""What each value of a graph looks like: the ops' own shape functions, run on meta tensors.

A dimension that varies is stood for by a large prime, so that it can be told from every fixed size afterwards.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from slipstream.engine.graph import Graph, Node, TensorType
from slipstream.errors import BuildError
from slipstream.kernels.registry import known_ops

_STAND_INS = {"T": 1_000_003, "S": 1_000_033, "S1": 1_000_037, "B": 1_000_039, "R": 1_000_081, "N": 1_000_099}
_LETTERS = {size: letter for letter, size in _STAND_INS.items()}


def infer_types(graph: Graph) -> dict[str, TensorType]:
    """The type of every value, inputs and weights included. Layers are alike, so each kind of node is asked once."""
    types = graph.inputs | graph.weights
    for name, of_name in types.items():
        taken = next((size for size in of_name.shape if size in _LETTERS), None)
        if taken is not None:
            raise BuildError(f"{name} is {of_name}; {taken} is kept to stand for a size that varies.")
    known: dict[tuple[Any, ...], list[TensorType]] = {}
    for node in graph.nodes:
        kind = (node.op, str(node.attributes), len(node.outputs), *(name and types[name] for name in node.inputs))
        if kind not in known:
            known[kind] = list(infer_node(node, types).values())
        types |= zip(node.outputs, known[kind], strict=True)
    return types


def infer_node(node: Node, types: dict[str, TensorType]) -> dict[str, TensorType]:
    """The types of what one node makes. Raises BuildError where the op does not take such inputs."""
    op = known_ops()[node.op]
    takes_list = any(argument.kind == "Tensor[]" for argument in op.arguments)
    try:
        inputs = [None if name is None else _meta(types[name]) for name in node.inputs]
        result = op.shapes(*([inputs] if takes_list else inputs), **node.attributes)
        results: Iterable[Tensor] = () if result is None else [result] if isinstance(result, Tensor) else result
        return {name: _type(tensor) for name, tensor in zip(node.outputs, results, strict=True)}
    except Exception as error:  # shapes are told by any code that declares ops, a user's too
        given = ", ".join("None" if name is None else str(types[name]) for name in node.inputs)
        raise BuildError(f"{node} cannot be: {node.op} does not take ({given}): {_in_letters(error)}.") from None


def _in_letters(error: Exception) -> str:
    text = str(error).rstrip(".")
    for size, letter in _LETTERS.items():
        text = text.replace(str(size), letter)
    return text


def _meta(kind: TensorType) -> Tensor:
    shape = [_STAND_INS[size] if isinstance(size, str) else size for size in kind.shape]
    return torch.empty(shape, dtype=getattr(torch, kind.dtype), device="meta")


def _type(tensor: Tensor) -> TensorType:
    shape = tuple(_LETTERS.get(size, size) for size in tensor.shape)
    return TensorType(shape, str(tensor.dtype).removeprefix("torch."))
