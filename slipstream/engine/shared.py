"""What drafters share with the model that they draft for, read from its engine."""

from typing import Any

from torch import Tensor

from slipstream.engine.folder import Engine
from slipstream.engine.graph import Node, TensorType
from slipstream.errors import EngineError
from slipstream.kernels.linear.panels import panel_weight


def lm_head(engine: Engine) -> Tensor:
    """The matrix that makes logits of hidden states, [vocab_size, hidden_size], a view of the engine's file.

    Out of a CPU's panels it is written out in float32. Raises EngineError where the engine has it in another packed
    format alone. (Tied to the embedding it is there for that.)
    """
    graph, manifest = engine.graph, engine.manifest
    makers = {name: node for node in graph.nodes for name in node.outputs}
    node = makers[graph.outputs[0]]
    while not node.op.startswith("linear"):  # what is done to logits afterwards does not change their order
        node = makers[str(node.inputs[0])]
    if node.op == "linear_panels":
        return _of_panels(engine, node)
    whole = TensorType(
        (manifest.vocab_size, manifest.hidden_size), manifest.dtype
    )  # the numbers of a packed one are none
    for name in _names_of_weight(node):
        if graph.weights.get(name) == whole:
            return engine.weights.read(name)
    raise EngineError(
        f"{engine.path} has its output layer in a packed format or in parts, which no drafter can share; build the "
        "engine without --quantization and with --tp_size 1, or take a drafter with a head of its own."
    )


def _of_panels(engine: Engine, node: Node) -> Tensor:
    panels, scale, shift = (None if name is None else engine.weights.read(name) for name in node.inputs[2:5])
    how: Any = node.attributes
    sizes = engine.manifest.vocab_size, engine.manifest.hidden_size
    assert panels is not None and scale is not None
    return panel_weight(panels, scale, shift, how["bits"], how["group_size"], *sizes)


def _names_of_weight(node: Node) -> list[str]:
    """The weights that a product reads; a packed one's parts are called after it."""
    read = [name for name in node.inputs if name is not None]
    return [*read, *(name.rpartition(".")[0] for name in read)]
