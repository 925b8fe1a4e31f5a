"""The two ends of an engine's graph as functions of their own, for drafters: its embedding, and its head.

Where ranks share them, the first rank, which drafts alone, has the other ranks' parts too: it waits for nobody.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.engine.choices import Choices
from slipstream.engine.folder import Engine, open_engine
from slipstream.engine.graph import Graph
from slipstream.errors import EngineError
from slipstream.kernels.collectives import ALONE, Alone, Ranks
from slipstream.kernels.registry import known_ops
from slipstream.runtime.worker.graphs import compile_graph
from slipstream.runtime.worker.hidden import layer_input
from slipstream.runtime.worker.weights import load_weights

TOKEN_IDS, LOGIT_ROWS = "step.token_ids", "step.logit_rows"

Weights = Mapping[str, Tensor]
Function = Callable[[list[Tensor]], Tensor]


def embedding_of(
    engine: Engine, weights: Weights, choices: Choices, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """token ids [N] -> what the first layer reads, [N, hidden_size]. weights: the engine's, loaded."""
    ranks = _ranks_of_stage(engine, 0)
    parts = [_part(each.graph, layer_input(each, 0), (TOKEN_IDS,)) for each in ranks]
    run = _together(ranks, parts, engine, weights, choices, device)
    return lambda token_ids_N: run([token_ids_N])


def head_of(engine: Engine, weights: Weights, choices: Choices, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What the head reads, [N, hidden_size] -> logits [N, vocab_size]. weights: the engine's, loaded."""
    ranks = _ranks_of_stage(engine, engine.manifest.pp_size - 1)
    parts = [_part(each.graph, each.graph.outputs[0], (each.graph.outputs[1], LOGIT_ROWS)) for each in ranks]
    run = _together(ranks, parts, engine, weights, choices, device)
    return lambda x_NH: run([x_NH, torch.arange(len(x_NH), device=device)])


def _ranks_of_stage(engine: Engine, stage: int) -> list[Engine]:
    mapping = engine.manifest.mapping
    ranks = [rank for rank in range(mapping.num_ranks) if mapping.stage(rank) == stage]
    return [engine if rank == engine.rank else open_engine(engine.path, rank) for rank in ranks]


def _part(graph: Graph, output: str, inputs: Sequence[str]) -> Graph:
    """What makes one value of others."""
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
    return replace(
        graph,
        inputs={name: graph.types.get(name) or graph.inputs[name] for name in inputs},
        weights={name: kind for name, kind in graph.weights.items() if name in needed},
        nodes=nodes[::-1],
        outputs=(output,),
    )


def _together(
    ranks: Sequence[Engine], parts: Sequence[Graph], own: Engine, loaded: Weights, choices: Choices,
    device: torch.device,
) -> Function:  # fmt: skip
    """What the ranks of a stage compute together, of the parts that each has of it, all on this one."""

    def function(engine: Engine, part: Graph, ranks: Ranks) -> Function:
        names = list(part.weights)
        is_own = engine is own
        weights = {name: loaded[name] for name in names} if is_own else load_weights(engine.weights, names, device)
        run = compile_graph(part, weights, choices, device, ranks=ranks).run
        return lambda inputs: run(dict(zip(part.inputs, inputs, strict=True)))[0]

    meetings = [[node for node in part.nodes if known_ops()[node.op].is_collective] for part in parts]
    if not meetings[0]:  # all have all of it
        return function(ranks[0], parts[0], ALONE)
    if len(meetings[0]) > 1:
        raise EngineError(
            "this method drafts with the model's own embedding and head, which the ranks of this model compute in "
            "several turns; take another speculative method, or build with --tp_size 1."
        )
    until = [
        _part(part, str(node.inputs[0]), tuple(part.inputs)) for part, (node,) in zip(parts, meetings, strict=True)
    ]
    here = _AllHere([function(*each, ALONE) for each in zip(ranks[1:], until[1:], strict=True)])
    run = function(ranks[0], parts[0], here)

    def compute(inputs: list[Tensor]) -> Tensor:
        here.inputs = inputs
        return run(inputs)

    return compute


class _AllHere(Alone):
    """The first of some ranks, which computes what the others bring to their meeting."""

    def __init__(self, others: Sequence[Function]) -> None:
        self.inputs = list[Tensor]()
        self._others = others

    def add_up(self, x: Tensor) -> Tensor:
        return sum((other(self.inputs) for other in self._others), x)

    def collect(self, x: Tensor) -> Tensor:
        parts = (other(self.inputs) for other in self._others)
        return torch.stack([x, *(functional.pad(part, (0, x.shape[1] - part.shape[1])) for part in parts)])
