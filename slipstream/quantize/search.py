"""Mixed precision: bits go where the divergence that a byte takes away is largest.

A unit (the products that share an input, or the experts of a layer) is rounded alone to each of the formats, and what
that does to the next token's distribution is measured: one more copy of a text that flows through the rest of the
model. So weights are read once, however many units there are. Divergences of units are taken to add up.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slipstream.build.capture import Captured
from slipstream.checkpoint.folder import Checkpoint
from slipstream.engine.graph import Graph
from slipstream.errors import ModelError
from slipstream.quantize.groups import groups_of
from slipstream.quantize.numbers import check_weight, nearest
from slipstream.quantize.quality import Quality
from slipstream.quantize.stream import Block, Stream
from slipstream.schema.format import WeightFormat

INT8 = WeightFormat(kind="w8a16")


@dataclass
class Unit:
    """kl: nats a token for each of the formats, from the smallest; the last is the weights as they are."""

    weights: tuple[str, ...]
    num_bytes: list[int]
    kl: list[float] = field(default_factory=list)
    level: int = 0

    def gain(self, level: int) -> float:
        return self.kl[self.level] - self.kl[level]

    def cost(self, level: int) -> int:
        return self.num_bytes[level] - self.num_bytes[self.level]


def choose_formats(
    checkpoint: Checkpoint,
    captured: Captured,
    names: frozenset[str],
    smallest: WeightFormat,
    bits: float,
    token_ids_SL: Tensor,
    device: torch.device,
    progress: Callable[[str, int, int], None],
) -> dict[str, WeightFormat]:
    """The format of each weight, none for those that stay as they are: at most so many bits a weight on average.

    Raises ModelError for fewer bits than the smallest format has.
    """
    levels = (smallest, INT8)
    stream = Stream(checkpoint, captured, [token_ids_SL], device)
    units = {block.layer: _units(block, captured.graph, names, levels, checkpoint) for block in stream.blocks}
    every = [unit for found in units.values() for unit in found]
    num_weights = sum(math.prod(checkpoint.shapes[name]) for name in names)
    least, most = (sum(unit.num_bytes[at] for unit in every) for at in (0, -1))
    budget = bits / 8 * num_weights
    if not budget >= least:  # NaN is not, either
        raise ModelError(
            f"--auto_quantize_bits is {bits}, but the smallest format takes {8 * least / num_weights:.2f} bits a "
            f"weight; give {math.ceil(80 * least / num_weights) / 10} to {8 * most / num_weights:.0f}."
        )
    _measure(stream, units, levels, progress)
    _spend(every, budget - least)
    return {name: levels[unit.level] for unit in every if unit.level < len(levels) for name in unit.weights}


def _units(
    block: Block, graph: Graph, names: frozenset[str], levels: Sequence[WeightFormat], checkpoint: Checkpoint
) -> list[Unit]:
    experts = [tuple(str(name) for name in node.inputs[3:6]) for node in block.nodes if node.op == "experts"]
    of_experts = {name for each in experts for name in each}
    groups = [group.weights for group in groups_of(block, graph, names)]
    found = [rest for each in groups if (rest := tuple(name for name in each if name not in of_experts))]
    found += [each for each in experts if names.issuperset(each)]
    dtype = getattr(torch, checkpoint.dtype)
    return [
        Unit(weights, [
            *(sum(format.num_bytes(*checkpoint.shapes[name]) for name in weights) for format in levels),
            sum(math.prod(checkpoint.shapes[name]) for name in weights) * dtype.itemsize,
        ])
        for weights in found
    ]  # fmt: skip


def _measure(
    stream: Stream, units: Mapping[int, list[Unit]], levels: Sequence[WeightFormat],
    progress: Callable[[str, int, int], None],
) -> None:  # fmt: skip
    """Sets `kl` of each unit."""
    begun: list[tuple[Unit, int]] = []  # and the copy of the text that met it rounded, a copy for each level in turn
    for index, block in enumerate(stream.blocks):
        progress("search", index, len(stream.blocks))
        weights = stream.weights(block)
        is_last = block is stream.blocks[-1]
        rounded: dict[int, Mapping[str, Tensor]] = {}
        for unit in units[block.layer]:
            for name in unit.weights:
                check_weight(name, weights[name])
            for format in levels:
                copy = stream.add_copy(0)
                begun.append((unit, copy))
                rounded[copy] = {name: nearest(weights[name], format) for name in unit.weights}
        base, logits = stream.run(block, weights, 0), stream.graph.outputs[0]
        for unit, copy in begun:
            result = stream.run(block, {**weights, **rounded.get(copy, {})}, copy)
            if not is_last:
                stream.states[copy] = result
                continue
            quality = Quality()  # logits are large: of one copy at a time
            quality.add(result[logits], base[logits], stream.token_ids(0))
            unit.kl.append(quality.kl / quality.num_tokens)
        if not is_last:
            stream.states[0] = base
    for found in units.values():
        for unit in found:
            unit.kl.append(0.0)


def _spend(units: Sequence[Unit], budget: float) -> None:
    """One step of one unit after another, the best for its bytes among those that can still be paid."""
    while True:
        steps = [
            (unit.gain(above) / unit.cost(above), index, above)
            for index, unit in enumerate(units)
            for above in range(unit.level + 1, len(unit.num_bytes))
            if unit.cost(above) <= budget
        ]
        gain_a_byte, index, above = max(steps, default=(0.0, 0, 0))
        if gain_a_byte <= 0:
            return
        budget -= units[index].cost(above)
        units[index].level = above
