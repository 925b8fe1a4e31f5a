"""Experts of a layer: each is rounded by the rows that its router sends it.

gate and up read these, down what they make of them. An expert that fewer rows reach than a weight has columns says too
little about them: that weight is rounded to the nearest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.engine.graph import Node
from slipstream.kernels.moe import gated


@dataclass
class Routed:
    """What one `experts` node read of each chunk: rows, and the experts that each goes to."""

    node: Node
    chunks: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, inputs: Sequence[Any]) -> None:
        x_TH, _, ids_TK = inputs[:3]
        self.chunks.append((x_TH, ids_TK))

    def divide(self, scale_H: Tensor) -> None:
        """Columns of the rows, which the norm before them divides from now on."""
        self.chunks = [(x_TH / scale_H, ids_TK) for x_TH, ids_TK in self.chunks]

    @property
    def names(self) -> tuple[str, str, str]:
        """Of the weights: gate, up, down."""
        gate, up, down = self.node.inputs[3:6]
        return str(gate), str(up), str(down)

    @property
    def is_linear_in_up(self) -> bool:
        """So that rows of up can be divided by what columns of down are multiplied with."""
        return self._limit == self._up_offset == 0 and self.node.inputs[7] is None

    def rows(self, expert: int) -> Tensor:
        """That the expert is sent, [R, H]."""
        return torch.cat([x_TH[(ids_TK == expert).any(1)] for x_TH, ids_TK in self.chunks])

    def hidden(self, expert: int, rows_RH: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What its down reads, [R, I]."""
        gate_RI, up_RI = (
            functional.linear(rows_RH, weights[str(weight)][expert], None if bias is None else weights[bias][expert])
            for weight, bias in zip(self.node.inputs[3:5], self.node.inputs[6:8], strict=True)
        )
        return gated(gate_RI, up_RI, float(self._attribute("alpha")), self._limit, self._up_offset)

    @property
    def _limit(self) -> float:
        return self._attribute("limit")

    @property
    def _up_offset(self) -> float:
        return self._attribute("up_offset")

    def _attribute(self, name: str) -> float:
        return float(self.node.attributes[name])  # type: ignore[arg-type]
