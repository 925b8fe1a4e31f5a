"""Groups: products that read one value, and the weight before them that can take the inverse of their columns' scales.

y = W x is (W · s) (x / s). Where x comes from a norm, its weight is divided; where it is the attention's output, rows
of v_proj are; where it is a gated activation, those of up_proj. gate and up of all experts read one value, and so does
their router. Read off the graph, so that it holds for any model.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slipstream.engine.graph import Graph, Node
from slipstream.quantize.stream import Block

_ROUTERS = ("route_softmax", "route_sigmoid")
_NORMS = {"rms_norm": (1,), "layer_norm": (1, 2)}  # which inputs are weights that scale the result


@dataclass(frozen=True)
class Group:
    """weights: names, [N, K] each, or stacks of such, of the products that read `value` [T, K]."""

    value: str
    weights: tuple[str, ...]
    divided: tuple[str, ...] = ()  # weights whose rows, or numbers, are divided by s; () where nothing can take it
    routers: tuple[str, ...] = ()  # weights that read the value, too; they are not rounded, but scaled with the others
    weight_offset: float = 0.0  # the norm multiplies by this and its weight (Gemma: 1)
    heads: tuple[int, int] | None = None  # (query heads, KV heads) that share a row of v_proj, where x is attention's


def groups_of(block: Block, graph: Graph, quantized: frozenset[str]) -> list[Group]:
    """Of one block, in order; quantized: the weights that are."""
    by_value: dict[str, list[str]] = {}
    routers: dict[str, list[str]] = {}
    readers: dict[str, int] = {}
    scalable: dict[str, int] = {}  # readers that take scaled columns
    producers = {name: node for node in block.nodes for name in node.outputs}
    for node in block.nodes:
        for name in dict.fromkeys(node.inputs):
            if name is not None:
                readers[name] = readers.get(name, 0) + 1
        value, weights = str(next(iter(node.inputs), None)), weights_of(node, quantized)
        if weights:
            by_value.setdefault(value, []).extend(weights)
        elif node.op in _ROUTERS:
            routers.setdefault(value, []).append(str(node.inputs[1]))
        scalable[value] = scalable.get(value, 0) + bool(weights or node.op in _ROUTERS)
    found = []
    for value, names in by_value.items():
        group = Group(value, tuple(names), routers=tuple(routers.get(value, ())))
        if readers[value] == scalable[value] and value not in block.needed and value in producers:
            group = _with_divided(group, producers, readers, graph)
        found.append(group)
    return found


def weights_of(node: Node, quantized: frozenset[str]) -> tuple[str, ...]:
    """What its first input is multiplied with, where all of that is quantized; () for what is no product."""
    found = {"linear": node.inputs[1:2], "experts": node.inputs[3:5]}.get(node.op, ())
    names = tuple(str(name) for name in found)
    return names if quantized.issuperset(names) else ()


def _with_divided(group: Group, producers: dict[str, Node], readers: dict[str, int], graph: Graph) -> Group:
    maker = producers[group.value]
    num_columns = int(graph.types[group.value].shape[-1])
    if maker.op in _NORMS:
        weights = tuple(str(name) for index in _NORMS[maker.op] if (name := maker.inputs[index]) is not None)
        fits = all(graph.weights[name].shape == (num_columns,) for name in weights)
        offset = float(maker.attributes.get("weight_offset") or 0.0)  # type: ignore[arg-type]
        return replace(group, divided=weights, weight_offset=offset) if fits else group
    if maker.op == "mul":  # act(gate) · up: what is linear in it is up
        products = [producers.get(str(name)) for name in maker.inputs]
        linears = [
            node for node in products if node is not None and node.op == "linear" and readers[node.outputs[0]] == 1
        ]
        if len(linears) == 1:
            return replace(group, divided=_with_bias(linears[0]))
    if maker.op == "attention":
        values = _written_values(str(maker.inputs[1]), producers, graph)
        if values is not None and readers[values.outputs[0]] == 1:
            num_rows = int(graph.weights[str(values.inputs[1])].shape[0])
            head_dim = int(maker.attributes["value_dim"])  # type: ignore[arg-type]
            heads = num_columns // head_dim, num_rows // head_dim
            return replace(group, divided=_with_bias(values), heads=heads)
    return group


def _written_values(cache: str, producers: dict[str, Node], graph: Graph) -> Node | None:
    """The product whose rows are the values in a cache, unchanged."""
    for node in graph.nodes:
        if node.op == "kv_write" and node.inputs[2] == cache:
            maker = producers.get(str(node.inputs[1]))
            return maker if maker is not None and maker.op == "linear" else None
    return None


def _with_bias(linear: Node) -> tuple[str, ...]:
    return tuple(str(name) for name in linear.inputs[1:3] if name is not None)


def shared_scales(scale_K: Tensor, group: Group) -> Tensor:
    """s as the rows of `divided` can take it: query heads that read one KV head need one s; the largest of theirs."""
    if group.heads is None:
        return scale_K
    num_heads, num_kv_heads = group.heads
    each = scale_K.view(num_kv_heads, num_heads // num_kv_heads, -1).amax(1, keepdim=True)
    return each.expand(-1, num_heads // num_kv_heads, -1).reshape(-1)


def rescale(weights: dict[str, Tensor], group: Group, scale_K: Tensor) -> None:
    """W · s for the weights that read x, and what makes x becomes x / s. In place of the old entries of `weights`."""
    for name in (*group.weights, *group.routers):
        weights[name] = weights[name] * scale_K
    rows = scale_K
    if group.heads is not None:
        num_heads, num_kv_heads = group.heads
        rows = scale_K.view(num_kv_heads, num_heads // num_kv_heads, -1)[:, 0].flatten()
    for name in group.divided:
        tensor = weights[name]
        if tensor.ndim == 1:
            weights[name] = (tensor + group.weight_offset) / rows - group.weight_offset
        else:
            weights[name] = tensor / rows[:, None]


def column_amax(weights: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    """The largest magnitude of each column over these weights, [K]."""
    return torch.stack([weights[name].abs().flatten(0, -2).amax(0) for name in names]).amax(0)
