"""Stream: a model's graph run over texts, one decoder block at a time, with the weights of one block in memory.

The graph is the one that a build captures, before any rewrite, in float32. What flows between blocks is kept for each
chunk of the texts; a block may be run as often as a method needs, with any weights.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.build.capture import Captured, capture
from slipstream.checkpoint.folder import Checkpoint
from slipstream.engine.graph import Graph, Node
from slipstream.kernels.moe import Product, run_experts
from slipstream.kernels.registry import known_ops

BLOCK_SIZE = 32  # tokens of a page of the cache, of which each text has its own

Weights = Mapping[str, Tensor]
Watch = Callable[[Node, Sequence[Any]], None]  # called with a node and its inputs, before it runs
Rounding = Callable[[Tensor], Tensor]  # of what a product, or an expert's, reads; or of what a cache is given


@dataclass(frozen=True)
class Block:
    """The nodes of one decoder layer; or those before the first, or after the last, whose layer is -1 and the number of
    layers."""

    layer: int
    nodes: tuple[Node, ...]
    weights: tuple[str, ...]  # that they read
    needed: frozenset[str]  # what later blocks read of what there is by then


def blocks_of(graph: Graph, num_layers: int) -> list[Block]:
    """A node belongs to the layer of the weight or the cache that it reads, or to that of the node before it."""
    layers: list[list[Node]] = [[] for _ in range(num_layers + 2)]
    current = -1
    for node in graph.nodes:
        found = [layer for name in node.inputs if name is not None and (layer := _layer_of(name)) is not None]
        if found:
            current = max(current, *found)
        elif current == num_layers - 1 and any(name in graph.weights for name in node.inputs if name is not None):
            current = num_layers  # the last norm, which no layer has
        layers[current + 1].append(node)
    blocks: list[Block] = []
    needed = set(graph.outputs)
    for index in range(len(layers) - 1, -1, -1):
        nodes = tuple(layers[index])
        read = dict.fromkeys(name for node in nodes for name in node.inputs if name is not None)
        weights = tuple(name for name in read if name in graph.weights)
        blocks.append(Block(index - 1, nodes, weights, frozenset(needed)))
        made = {name for node in nodes for name in node.outputs}
        needed = (needed | (set(read) - set(weights))) - made
    return blocks[::-1]


def _layer_of(name: str) -> int | None:
    first, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return int(number) if first in ("layers", "kv") and number.isdigit() else None


def captured_graph(checkpoint: Checkpoint) -> Captured:
    return capture(checkpoint.model.Model, checkpoint.config, "float32", BLOCK_SIZE)


class Stream:
    """`state` of each chunk: the values that blocks still to come read, by name."""

    def __init__(
        self, checkpoint: Checkpoint, captured: Captured, chunks: Sequence[Tensor], device: torch.device
    ) -> None:
        """chunks: token ids [texts, length] each."""
        self.graph, self._checkpoint, self._device = captured.graph, checkpoint, device
        self.blocks = blocks_of(captured.graph, checkpoint.config.num_layers)
        self._constants = {name: tensor.to(device) for name, tensor in captured.constants.items()}
        self._steps = [_step(chunk, device) for chunk in chunks]
        self.states: list[dict[str, Tensor]] = [{} for _ in chunks]

    def add_copy(self, chunk: int) -> int:
        """Another chunk, of the same texts and as far as this one."""
        self._steps.append(self._steps[chunk])
        self.states.append(self.states[chunk])
        return len(self.states) - 1

    def token_ids(self, chunk: int) -> Tensor:
        """[texts, length]"""
        step = self._steps[chunk]
        return step["step.token_ids"].view(len(step["step.kv_lens"]), -1)

    def weights(self, block: Block) -> dict[str, Tensor]:
        """In float32, read for this call: whoever has them may change them."""
        return {name: self._constants[name] if name in self._constants else self._read(name) for name in block.weights}

    def run(
        self,
        block: Block,
        weights: Weights,
        chunk: int,
        *,
        given: Mapping[str, Tensor] = {},
        roundings: Mapping[str, Rounding] = {},
        watch: Watch | None = None,
    ) -> dict[str, Tensor]:
        """One chunk through a block; returns the chunk's state after it, which is kept by `advance` alone.

        given: what the block, a part of one, reads of the others.
        roundings: of what products read, by the names of their weights; and of keys and values, by those of caches.
        """
        values: dict[str, Any] = {**self._steps[chunk], **self.states[chunk], **weights, **given}
        last_use = {name: index for index, node in enumerate(block.nodes) for name in node.inputs if name is not None}
        for index, node in enumerate(block.nodes):
            for name in node.inputs:
                if name is not None and name.startswith("kv.") and name not in values:
                    values[name] = self._cache(name, chunk)
            inputs = [None if name is None else values[name] for name in node.inputs]
            if watch is not None:
                watch(node, inputs)
            made = _call(node, inputs, roundings, self._device)
            values.update(zip(node.outputs, made, strict=True))
            for name in {*node.inputs, *node.outputs}:
                if name is not None and last_use.get(name, index) == index and name not in block.needed:
                    values.pop(name, None)
        return {name: values[name] for name in block.needed if name in values and name not in self._steps[chunk]}

    def advance(self, block: Block, weights: Weights, roundings: Mapping[str, Rounding] = {}) -> None:
        """All chunks through a block."""
        for chunk in range(len(self.states)):
            self.states[chunk] = self.run(block, weights, chunk, roundings=roundings)

    def _read(self, name: str) -> Tensor:
        return self._checkpoint.read(name).to(self._device, torch.float32, copy=True)

    def _cache(self, name: str, chunk: int) -> Tensor:
        planes, _, *sizes = self.graph.inputs[name].shape
        num_blocks = self._steps[chunk]["step.block_tables"].numel() + 1
        return torch.zeros(planes, num_blocks, *sizes, device=self._device)  # type: ignore[arg-type]


def _step(token_ids_SL: Tensor, device: torch.device) -> dict[str, Tensor]:
    """The inputs of a step that has whole texts of one length."""
    num_texts, length = token_ids_SL.shape
    width = -(-length // BLOCK_SIZE)
    tables_SB = 1 + torch.arange(num_texts * width).view(num_texts, width)
    positions_L = torch.arange(length)
    slots_SL = tables_SB[:, positions_L // BLOCK_SIZE] * BLOCK_SIZE + positions_L % BLOCK_SIZE
    found = {
        "token_ids": token_ids_SL.flatten(),
        "positions": positions_L.repeat(num_texts),
        "slots": slots_SL.flatten(),
        "query_starts": torch.arange(num_texts + 1) * length,
        "kv_lens": torch.full((num_texts,), length),
        "block_tables": tables_SB,
        "logit_rows": torch.arange(num_texts * length),
    }
    return {f"step.{name}": tensor.to(device) for name, tensor in found.items()}


def _call(node: Node, inputs: list[Any], roundings: Mapping[str, Rounding], device: torch.device) -> tuple[Tensor, ...]:
    attributes = [node.attributes[argument.name] for argument in known_ops()[node.op].attributes]
    if node.op == "linear" and (rounding := roundings.get(str(node.inputs[1]))) is not None:
        inputs = [rounding(inputs[0]), *inputs[1:]]
    elif node.op == "kv_write" and (rounding := roundings.get(str(node.inputs[2]))) is not None:
        inputs = [*_rounded_planes(rounding, inputs), *inputs[2:]]
    elif node.op == "experts" and not roundings.keys().isdisjoint(node.inputs[3:6]):
        read, hidden = (roundings.get(str(node.inputs[index]), _as_it_is) for index in (3, 5))
        return (_rounded_experts(read, hidden, *inputs, *attributes),)
    op = known_ops()[node.op]
    kernel = list(op.candidates(device, torch.float32).values())[-1]  # the newest
    if any(argument.kind == "Tensor[]" for argument in op.arguments):
        inputs = [inputs]
    made = kernel.function(*inputs, *attributes)
    return () if made is None else tuple(made) if isinstance(made, tuple | list) else (made,)


def _rounded_planes(rounding: Rounding, inputs: list[Any]) -> list[Tensor | None]:
    """Keys and values, or what there is of them, rounded as the planes of a cache: [P, T, heads, numbers]."""
    planes, heads = [each for each in inputs[:2] if each is not None], inputs[2].shape[3]
    rounded = iter(rounding(torch.stack([each.unflatten(1, (heads, -1)) for each in planes])).flatten(2))
    return [None if each is None else next(rounded) for each in inputs[:2]]


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _rounded_experts(
    read: Rounding, hidden: Rounding, x_TH: Tensor, shares_TK: Tensor, ids_TK: Tensor, gate_EIH: Tensor, up_EIH: Tensor,
    down_EHI: Tensor, gate_bias_EI: Tensor | None, up_bias_EI: Tensor | None, down_bias_EH: Tensor | None,
    alpha: float, limit: float, up_offset: float,
) -> Tensor:  # fmt: skip
    def product(weight_ENK: Tensor, bias_EN: Tensor | None, rounding: Rounding) -> Product:
        return lambda expert, x_RK: functional.linear(
            rounding(x_RK), weight_ENK[expert], None if bias_EN is None else bias_EN[expert]
        )

    return run_experts(
        x_TH, shares_TK, ids_TK, len(gate_EIH), product(gate_EIH, gate_bias_EI, read),
        product(up_EIH, up_bias_EI, read), product(down_EHI, down_bias_EH, hidden), alpha, limit, up_offset,
    )  # fmt: skip
