"""Hidden states for drafters, out of the graph that runs anyway.

step.token_ids ── embedding ── layer 0 ── … ── layer n ── last norm ── head ── logits
                          layer_input(0)  layer_input(n)           LAST

The first rank drafts, alone; what layers of earlier stages read comes to it through the stages.
"""

from collections.abc import Sequence
from dataclasses import replace

from slipstream.engine.folder import Engine
from slipstream.engine.graph import Attribute, Graph, Node, TensorType
from slipstream.errors import EngineError
from slipstream.speculative.drafter import LAST


def with_hidden(graph: Graph, layers: Sequence[int], engine: Engine) -> Graph:
    """The engine's graph that gives these hidden states too, after the logits and what the head reads.

    In a stage before the last one it sends on those that are there by then, after all that it sends anyway.
    """
    first, stop = engine.manifest.layers
    names = {layer: f"layers.{layer}.input" for layer in layers if 0 <= layer < first}
    kind = _kind(engine)
    how: dict[str, Attribute] = {"num_columns": engine.manifest.hidden_size, "dtype": kind.dtype}
    received = [Node("receive", ("step.positions",), (name,), how) for name in names.values()]
    types = graph.types | dict.fromkeys(names.values(), kind)
    for layer in layers:
        if layer >= first and (layer < stop or engine.is_last_stage):
            names[layer] = layer_input(engine, layer)
    place = max((place for place, node in enumerate(graph.nodes, 1) if node.op == "receive"), default=0)
    nodes = [*graph.nodes[:place], *received, *graph.nodes[place:]]
    if engine.is_last_stage:
        asked = [graph.outputs[1] if layer == LAST else names[layer] for layer in layers]
        return replace(graph, nodes=nodes, types=types, outputs=(*graph.outputs[:2], *asked))
    sent = {f"{name}.sent": name for name in names.values()}
    nodes += [Node("send", (name,), (output,)) for output, name in sent.items()]
    return replace(graph, nodes=nodes, types=types | dict.fromkeys(sent, kind), outputs=(*graph.outputs, *sent))


def layer_input(engine: Engine, layer: int) -> str:
    """The residual stream before a layer: what its attention is made of, and is then added to.

    Raises EngineError where the graph has no such value.
    """
    graph, kind, cache = engine.graph, _kind(engine), f"kv.{layer}"
    above = {name for node in graph.nodes if cache in node.inputs for name in node.inputs}
    for node in reversed(graph.nodes):
        if above.intersection(node.outputs):
            above.update(node.inputs, node.outputs)
    below = set[str]()
    for node in graph.nodes:
        if cache in node.inputs or below.intersection(filter(None, node.inputs)):
            if node.op.startswith(("add", "reduce_add")):
                for name in filter(None, node.inputs):
                    if name in above and name not in below and graph.types.get(name) == kind:
                        return name
            below.update(node.outputs)
    raise EngineError(
        f"this method drafts from what layer {layer} reads, which cannot be told from the graph of this model; take "
        "another speculative method."
    )


def _kind(engine: Engine) -> TensorType:
    return TensorType(("T", engine.manifest.hidden_size), engine.manifest.dtype)
