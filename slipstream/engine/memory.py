"""What an engine will need before any of it is allocated."""

import math

import torch

from slipstream.engine.graph import Graph, TensorType
from slipstream.schema.build import MAX_RECORDED_TOKENS


def plan_memory(graph: Graph, *, max_num_tokens: int, max_batch_size: int) -> dict[str, int]:
    """Bytes: weights (all), activations (the most alive at once in the largest step), recorded (the same in the largest
    step that a GPU records, whose activations are beside the others). The manifest knows the KV's.

    The largest step has prompts whose logprobs were asked for: then every token has a row of logits. Such steps are not
    recorded.
    """

    def activations(num_tokens: int, num_rows: int) -> int:
        tokens = {"T": num_tokens, "R": num_rows}
        return _peak(graph, tokens | {"S": max_batch_size, "S1": max_batch_size + 1, "B": 1, "N": 1})

    recorded = min(max_num_tokens, MAX_RECORDED_TOKENS)
    return {
        "weights": sum(_num_bytes(kind, {}) for kind in graph.weights.values()),
        "activations": activations(max_num_tokens, max_num_tokens),
        "recorded": activations(recorded, min(recorded, max_batch_size)),
    }


def _peak(graph: Graph, sizes: dict[str, int]) -> int:
    """Walk the nodes; a value lives from its node to its last reader. Views (split) count as copies: an upper bound."""
    last_use = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs if name is not None}
    last_use |= dict.fromkeys(graph.outputs, len(graph.nodes))
    made = {name for node in graph.nodes for name in node.outputs}
    alive = peak = 0
    for index, node in enumerate(graph.nodes):
        alive += sum(_num_bytes(graph.types[name], sizes) for name in node.outputs)
        peak = max(peak, alive)
        done = {name for name in (*node.inputs, *node.outputs) if name in made and last_use.get(name, index) == index}
        alive -= sum(_num_bytes(graph.types[name], sizes) for name in done)
    return peak


def _num_bytes(kind: TensorType, sizes: dict[str, int]) -> int:
    return (
        math.prod(sizes[size] if isinstance(size, str) else size for size in kind.shape)
        * getattr(torch, kind.dtype).itemsize
    )
