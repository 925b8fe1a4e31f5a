"""What drafters share with the model that they draft for, read from its engine."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.engine.folder import Engine, open_engine
from slipstream.engine.graph import Node, TensorType
from slipstream.errors import EngineError
from slipstream.kernels.linear.panels import linear_panels, panel_weight, to_panel_scales, to_panels
from slipstream.kernels.linear.w8a8 import quantize_w8a8

INPUT_GROUP_SIZE = 32  # columns of what is multiplied in bytes that share a scale

# Of a weight [N, K] and a bias [N]: what gives [..., N] for [..., K].
ToProduct = Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]]


def head_of_tokens(
    engine: Engine, token_ids_D: Tensor, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """[..., hidden_size] -> logits of these tokens alone, [..., D]: in bytes on a CPU where the model's own are.

    Raises EngineError where lm_head does.
    """
    rows_DH = lm_head(engine)[token_ids_D]
    if to_product := products_in_bytes(engine, device):
        return to_product(rows_DH, None)
    rows_DH = rows_DH.to(device, dtype)
    return lambda x: functional.linear(x, rows_DH)


def products_in_bytes(engine: Engine, device: torch.device) -> ToProduct | None:
    """How a drafter's weights are to be multiplied on a CPU where the model's own head is in bytes; elsewhere None."""
    kernels = linear_panels.candidates(device, torch.int8)
    if _head_node(engine).op == "linear_panels" and "native" in kernels:
        return partial(_product_in_bytes, kernels["native"].function)
    return None


def _product_in_bytes(
    multiply: Callable[..., Tensor], weight_NK: Tensor, bias_N: Tensor | None
) -> Callable[[Tensor], Tensor]:
    packed_NK, scale_N1 = quantize_w8a8.reference(weight_NK, 0.0, 0)
    panels, scale = to_panels.reference(packed_NK, 8), to_panel_scales.reference(scale_N1, None)
    quantize = quantize_w8a8.candidates(weight_NK.device, torch.float32)["native"].function
    num_out, num_in = weight_NK.shape

    def product(x: Tensor) -> Tensor:
        numbers = quantize(x.reshape(-1, num_in), 0.0, INPUT_GROUP_SIZE)
        found = multiply(*numbers, panels, scale, None, bias_N, 8, 0, INPUT_GROUP_SIZE, num_out)
        return found.view(*x.shape[:-1], num_out)

    return product


def lm_head(engine: Engine) -> Tensor:
    """The matrix that makes logits of hidden states, [vocab_size, hidden_size], a view of the engine's file.

    Out of a CPU's panels it is written out in float32; of several ranks it is put together. Raises EngineError where
    the engine has it in another packed format alone. (Tied to the embedding it is there for that.)
    """
    if engine.graph.types[_head_node(engine).outputs[0]].shape[1] == engine.manifest.vocab_size:
        return _rows(engine)
    ranks = range(engine.manifest.tp_size)  # those of the last stage
    return torch.cat([_rows(engine if rank == engine.rank else open_engine(engine.path, rank)) for rank in ranks])


def _rows(engine: Engine) -> Tensor:
    """Those of the head that the engine's rank has."""
    graph, manifest, node = engine.graph, engine.manifest, _head_node(engine)
    if node.op == "linear_panels":
        return _of_panels(engine, node)
    num_rows = graph.types[node.outputs[0]].shape[1]
    whole = TensorType((num_rows, manifest.hidden_size), manifest.dtype)  # the numbers of a packed one are none
    for name in _names_of_weight(node):
        if graph.weights.get(name) == whole:
            return engine.weights.read(name)
    raise EngineError(
        f"{engine.path} has its output layer in a packed format, which no drafter can share; build the engine without "
        "--quantization, or take a drafter with a head of its own."
    )


def _head_node(engine: Engine) -> Node:
    makers = {name: node for node in engine.graph.nodes for name in node.outputs}
    node = makers[engine.graph.outputs[0]]
    while not node.op.startswith("linear"):  # what is done to logits afterwards does not change their order
        node = makers[str(node.inputs[0])]
    return node


def _of_panels(engine: Engine, node: Node) -> Tensor:
    panels, scale, shift = (None if name is None else engine.weights.read(name) for name in node.inputs[2:5])
    how: Any = node.attributes
    assert panels is not None and scale is not None
    sizes = how["num_out"], engine.manifest.hidden_size
    return panel_weight(panels, scale, shift, how["bits"], how["group_size"], *sizes)


def _names_of_weight(node: Node) -> list[str]:
    """The weights that a product reads; a packed one's parts are called after it."""
    read = [name for name in node.inputs if name is not None]
    return [*read, *(name.rpartition(".")[0] for name in read)]
