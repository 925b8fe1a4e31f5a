"""Hidden states for drafters, out of the graph that runs anyway; and its two ends, as functions of their own.

step.token_ids ── embedding ── layer 0 ── … ── layer n ── last norm ── head ── logits
                          layer_input(0)  layer_input(n)           LAST
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slipstream.engine.choices import Choices
from slipstream.engine.graph import Graph
from slipstream.errors import EngineError
from slipstream.runtime.worker.graphs import compile_graph
from slipstream.speculative.drafter import LAST

TOKEN_IDS, LOGIT_ROWS = "step.token_ids", "step.logit_rows"


def with_hidden(graph: Graph, layers: Sequence[int]) -> Graph:
    """The graph that gives these hidden states too, after the logits and what the head reads."""
    names = [graph.outputs[1] if layer == LAST else layer_input(graph, layer) for layer in layers]
    return replace(graph, outputs=(*graph.outputs[:2], *names))


def layer_input(graph: Graph, layer: int) -> str:
    """The residual stream before a layer: what its attention is made of, and is then added to.

    Raises EngineError where the graph has no such value.
    """
    cache = f"kv.{layer}"
    above = {name for node in graph.nodes if cache in node.inputs for name in node.inputs}
    for node in reversed(graph.nodes):
        if above.intersection(node.outputs):
            above.update(node.inputs, node.outputs)
    kind, below = graph.types[graph.outputs[1]], set[str]()
    for node in graph.nodes:
        if cache in node.inputs or below.intersection(filter(None, node.inputs)):
            if node.op.startswith("add"):
                for name in filter(None, node.inputs):
                    if name in above and name not in below and graph.types.get(name) == kind:
                        return name
            below.update(node.outputs)
    raise EngineError(
        f"this method drafts from what layer {layer} reads, which cannot be told from the graph of this model; take "
        "another speculative method."
    )


def embedding_of(
    graph: Graph, weights: dict[str, Tensor], choices: Choices, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """token ids [N] -> what the first layer reads, [N, hidden_size]."""
    run = _part(graph, layer_input(graph, 0), (TOKEN_IDS,), weights, choices, device)
    return lambda token_ids_N: run({TOKEN_IDS: token_ids_N})


def head_of(
    graph: Graph, weights: dict[str, Tensor], choices: Choices, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """What the head reads, [N, hidden_size] -> logits [N, vocab_size]."""
    logits, hidden = graph.outputs[:2]
    run = _part(graph, logits, (hidden, LOGIT_ROWS), weights, choices, device)
    return lambda x_NH: run({hidden: x_NH, LOGIT_ROWS: torch.arange(len(x_NH), device=device)})


def _part(
    graph: Graph, output: str, inputs: Sequence[str], weights: dict[str, Tensor], choices: Choices, device: torch.device
) -> Callable[[dict[str, Tensor]], Tensor]:
    """What makes one value of others, compiled."""
    needed, nodes = {output}, []
    for node in reversed(graph.nodes):
        if needed.difference(inputs).intersection(node.outputs):
            nodes.append(node)
            needed.update(filter(None, node.inputs))
    unknown = sorted(name for name in needed.intersection(graph.inputs) if name not in inputs)
    if unknown:
        raise EngineError(
            f"this method drafts with the model's own embedding and head, which in this model read {unknown[0]} too; "
            "take another speculative method."
        )
    part = replace(
        graph,
        inputs={name: graph.types.get(name) or graph.inputs[name] for name in inputs},
        weights={name: kind for name, kind in graph.weights.items() if name in needed},
        nodes=nodes[::-1],
        outputs=(output,),
    )
    run = compile_graph(part, {name: weights[name] for name in part.weights}, choices, device).run
    return lambda values: run(values)[0]
