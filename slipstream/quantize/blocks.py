"""One decoder block quantized: look at what flows through it, scale columns where the method does, then round."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slipstream.checkpoint.quantized.linears import digest_of_order
from slipstream.engine.graph import Node
from slipstream.kernels.attention.cache import LARGEST, to_numbers, to_stored
from slipstream.kernels.linear.groups import dequantize
from slipstream.kernels.linear.parts import dense_weight, rounding_op
from slipstream.quantize import awq, smoothquant
from slipstream.quantize.experts import Routed
from slipstream.quantize.gptq import Compensation, Hessian, gptq
from slipstream.quantize.groups import Group, column_amax, groups_of, rescale, shared_scales, weights_of
from slipstream.quantize.numbers import check_weight, nearest, nearest_parts, parts_by_rows, to_parts
from slipstream.quantize.qformats import QFormat
from slipstream.quantize.reach import reach_of
from slipstream.quantize.stream import Block, Rounding, Stream
from slipstream.schema.format import QUANTIZES_ACTIVATIONS, WeightFormat

SAMPLE_ROWS = 512  # of a product's inputs, on which ranges are searched


@dataclass
class Quantized:
    """What became of a block: parts by weight, weights that scales moved into, the largest key and value a head."""

    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    formats: dict[str, WeightFormat] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    kv_amax_PK: Tensor | None = None  # [planes, KV heads]


@dataclass
class Inputs:
    """Of the products that read one value: sums over rows of it, and the first of them."""

    amax_K: Tensor
    abs_sum_K: Tensor
    sample_MK: Tensor
    hessian: Hessian | None
    num_rows: int = 0

    _compensation: Compensation | None = None

    @classmethod
    def empty(cls, x_MK: Tensor, has_hessian: bool) -> "Inputs":
        """Of rows like these."""
        zeros_K = x_MK.new_zeros(x_MK.shape[1])
        hessian = Hessian.empty(x_MK.shape[1], x_MK.device) if has_hessian else None
        return cls(zeros_K, zeros_K, x_MK[:0], hessian)

    def add(self, x_MK: Tensor) -> None:
        self.amax_K, self.abs_sum_K = self.amax_K.maximum(x_MK.abs().amax(0)), self.abs_sum_K + x_MK.abs().sum(0)
        if not self.num_rows:
            self.sample_MK = x_MK[:SAMPLE_ROWS].clone()
        self.num_rows += len(x_MK)
        if self.hessian is not None:
            self.hessian.add(x_MK)

    def compensation(self, *, act_order: bool) -> Compensation | None:
        """Once all rows have been seen; the same for all products that read them."""
        if self._compensation is None and self.hessian is not None:
            self._compensation = self.hessian.compensation(act_order=act_order)
        return self._compensation


class Watch:
    """Collects what a method needs to know, chunk after chunk."""

    def __init__(self, names: frozenset[str], has_hessian: bool) -> None:
        self._names, self._has_hessian = names, has_hessian
        self.inputs: dict[str, Inputs] = {}  # by value
        self.routed: dict[str, Routed] = {}  # by the name of gate
        self.kv_amax_PK: Tensor | None = None
        self._seen: set[str] = set()  # in this chunk

    def begin_chunk(self) -> None:
        self._seen.clear()

    def __call__(self, node: Node, inputs: Sequence[Any]) -> None:
        if node.op == "experts" and not self._names.isdisjoint(node.inputs[3:6]):
            self.routed.setdefault(str(node.inputs[3]), Routed(node)).add(inputs)
        if weights_of(node, self._names) and node.inputs[0] not in self._seen:
            value = str(node.inputs[0])
            self._seen.add(value)
            if value not in self.inputs:
                self.inputs[value] = Inputs.empty(inputs[0], self._has_hessian)
            self.inputs[value].add(inputs[0])
        elif node.op == "kv_write":
            planes = [each for each in inputs[:2] if each is not None]
            heads = inputs[2].shape[3]
            amax_PK = torch.stack([each.unflatten(1, (heads, -1)).abs().amax((0, 2)) for each in planes])
            self.kv_amax_PK = amax_PK if self.kv_amax_PK is None else self.kv_amax_PK.maximum(amax_PK)


class BlockQuantizer:
    def __init__(
        self, qformat: QFormat, stream: Stream, chunks: Sequence[int], formats: Mapping[str, WeightFormat], dtype: str
    ) -> None:
        """chunks: of the stream, to calibrate with; none where there is no text.  formats: of the weights to quantize.
        dtype: what the others are stored in.
        """
        self._qformat, self._stream, self._chunks, self._formats = qformat, stream, chunks, formats
        self._names, self._dtype = frozenset(formats), getattr(torch, dtype)

    def run(self, block: Block, weights: dict[str, Tensor]) -> Quantized:
        """weights: float32, of the block; they are what it runs with afterwards."""
        for name, weight in weights.items():
            check_weight(name, weight)
        mine = [name for name in block.weights if name in self._names]
        watch = Watch(self._names, self._qformat.compensates)
        for chunk in self._chunks:
            watch.begin_chunk()
            self._stream.run(block, weights, chunk, watch=watch)
        groups = groups_of(block, self._stream.graph, self._names)
        found = Quantized(kv_amax_PK=watch.kv_amax_PK)
        if self._chunks and (self._qformat.smooths or self._qformat.scales_columns):
            self._scale_columns(block, weights, groups, watch, found)
            for routed in watch.routed.values():
                self._scale_hidden(routed, weights)
        for routed in watch.routed.values():
            self._round_experts(routed, weights, found)
        in_group = {name: group for group in groups for name in group.weights}
        for name in (name for name in mine if name not in found.parts):
            group = in_group.get(name)
            self._round(name, weights, watch.inputs.get(group.value) if group else None, found)
        return found

    # --- scaling columns before they are rounded ---

    def _scale_columns(
        self, block: Block, weights: dict[str, Tensor], groups: list[Group], watch: Watch, found: Quantized
    ) -> None:
        for group in groups:
            if not group.divided:
                continue
            inputs, reach = watch.inputs[group.value], reach_of(block, self._stream.graph, group)
            given = self._stream.run(reach.before, weights, self._chunks[0])
            expected = self._stream.run(reach.moved, weights, self._chunks[0], given=given)
            loss_of = partial(self._loss, reach.moved, weights, group, given, expected)
            amax_K = column_amax(weights, group.weights)
            candidates = [shared_scales(scale_K, group) for scale_K in self._candidates(inputs, amax_K)]
            losses = [loss_of(scale_K) for scale_K in candidates]
            if not candidates or min(losses) >= loss_of(None):
                continue
            scale_K = candidates[losses.index(min(losses))]
            rescale(weights, group, scale_K)
            inputs.amax_K, inputs.sample_MK = inputs.amax_K / scale_K, inputs.sample_MK / scale_K
            for routed in watch.routed.values():
                if routed.node.inputs[0] == group.value:
                    routed.divide(scale_K)
            for name in (*group.divided, *group.routers):
                if name not in self._names:  # as it will be read again
                    weights[name] = weights[name].to(self._dtype).float()
                    found.changed[name] = weights[name].to(self._dtype)

    def _scale_hidden(self, routed: Routed, weights: dict[str, Tensor]) -> None:
        """Columns of each expert's down, which rows of its up are divided by."""
        _, up, down = routed.names
        if not (routed.is_linear_in_up and self._names.issuperset((up, down))):
            return
        for expert, (up_IH, down_HI) in enumerate(zip(weights[up], weights[down], strict=True)):
            inputs = self._inputs_of(routed.hidden(expert, routed.rows(expert), weights))
            if inputs is None:
                continue
            loss_of = partial(self._loss_of_matrix, down_HI, self._formats[down], inputs.sample_MK)
            candidates = self._candidates(inputs, down_HI.abs().amax(0))
            losses = [loss_of(scale_I) for scale_I in candidates]
            if min(losses) < loss_of(1.0):
                scale_I = candidates[losses.index(min(losses))]
                down_HI.mul_(scale_I)
                up_IH.div_(scale_I[:, None])

    def _loss_of_matrix(
        self, weight_NK: Tensor, format: WeightFormat, x_MK: Tensor, scale_K: Tensor | float
    ) -> float:  # fmt: skip
        rounded_NK = nearest(weight_NK, format, self._qformat.rows_per_scale, scale_K)
        rounded_MK = rounding_of(format)(x_MK / scale_K) * scale_K if format.kind in QUANTIZES_ACTIVATIONS else x_MK
        return (rounded_MK @ rounded_NK.t() - x_MK @ weight_NK.t()).square().sum().item()

    def _inputs_of(self, x_MK: Tensor) -> Inputs | None:
        """Of one expert; None where they are too few to go by."""
        if len(x_MK) < x_MK.shape[1]:
            return None
        inputs = Inputs.empty(x_MK, self._qformat.compensates)
        inputs.add(x_MK)
        return inputs

    def _candidates(self, inputs: Inputs, amax_K: Tensor) -> list[Tensor]:
        """amax_K: of the weights that are scaled."""
        if self._qformat.scales_columns:
            mean_K = inputs.abs_sum_K / inputs.num_rows
            return [awq.awq_scales(mean_K, ratio) for ratio in awq.RATIOS if ratio]
        return [smoothquant.smoothing(inputs.amax_K, amax_K, alpha) for alpha in smoothquant.ALPHAS]

    def _loss(
        self, moved: Block, weights: Mapping[str, Tensor], group: Group, given: Mapping[str, Tensor],
        expected: Mapping[str, Tensor], scale_K: Tensor | None,
    ) -> float:  # fmt: skip
        """How far what the group reaches moves where it alone is rounded, its columns scaled."""
        scale, format = 1.0 if scale_K is None else scale_K, self._formats[group.weights[0]]
        changed = {
            name: nearest(weights[name], self._formats[name], self._qformat.rows_per_scale, scale)
            for name in group.weights
        }
        roundings: dict[str, Rounding] = {}
        if format.kind in QUANTIZES_ACTIVATIONS:
            rounding = rounding_of(format)
            roundings = dict.fromkeys(group.weights, lambda x: rounding(x / scale) * scale)
        made = self._stream.run(moved, {**weights, **changed}, self._chunks[0], given=given, roundings=roundings)
        return sum((made[name] - expected[name]).square().sum().item() for name in made)

    # --- rounding ---

    def _round_experts(self, routed: Routed, weights: dict[str, Tensor], found: Quantized) -> None:
        names = [name for name in routed.names if name in self._names]
        made: dict[str, list[dict[str, Tensor]]] = {name: [] for name in names}
        for expert in range(len(weights[names[0]])):
            rows_RH = routed.rows(expert)
            hidden_RI = routed.hidden(expert, rows_RH, weights)
            of_rows, of_hidden = self._inputs_of(rows_RH), self._inputs_of(hidden_RI)
            for name in names:
                inputs, format = of_hidden if name == routed.names[2] else of_rows, self._formats[name]
                _, parts = self._round_matrix(weights[name][expert], format, inputs, reorders=False)
                weights[name][expert] = dense_weight(format, parts, weights[name].shape[-1])
                made[name].append(parts)
        for name in names:
            found.formats[name] = self._formats[name]
            found.parts[name] = {part: torch.stack([parts[part] for parts in made[name]]) for part in made[name][0]}

    def _round(self, name: str, weights: dict[str, Tensor], inputs: Inputs | None, found: Quantized) -> None:
        format, weight = self._formats[name], weights[name]
        if weight.ndim == 3:  # experts, of which no text says anything
            each = [self._round_matrix(matrix, format, None)[1] for matrix in weight]
            found.parts[name] = {part: torch.stack([parts[part] for parts in each]) for part in each[0]}
        else:
            format, found.parts[name] = self._round_matrix(weight, format, inputs)
        found.formats[name] = format
        weights[name] = dense_weight(format, found.parts[name], weight.shape[-1])

    def _round_matrix(
        self, weight_NK: Tensor, format: WeightFormat, inputs: Inputs | None, *, reorders: bool = True
    ) -> tuple[WeightFormat, dict[str, Tensor]]:
        """Its parts, and their format: act-order is found here. reorders: whether columns may be stored in it."""
        act_order = (
            reorders and self._qformat.orders_columns
        ) or not format.group_size  # where a row is one group, columns go back to their places
        compensation = inputs.compensation(act_order=act_order) if inputs is not None else None
        if compensation is not None:
            rounded = gptq(weight_NK, compensation, format, self._qformat.rows_per_scale)
            parts = to_parts(rounded.values_NK, rounded.scales, format)
            if rounded.order_K is not None:
                parts["order"] = rounded.order_K.int()
                format = replace(format, order=digest_of_order(parts["order"].cpu()))
            return format, parts
        if inputs is not None and self._qformat.scales_columns:
            return format, parts_by_rows(
                weight_NK, format, partial(awq.clipped_scales, x_MK=inputs.sample_MK, format=format)
            )
        return format, nearest_parts(weight_NK, format, self._qformat.rows_per_scale)


def rounding_of(format: WeightFormat) -> Callable[[Tensor], Tensor]:
    """What a product of this format makes of its activations."""
    return partial(_rounded, format=format)


def _rounded(x_MK: Tensor, format: WeightFormat) -> Tensor:
    values_MK, scale_MG = rounding_op(format.kind).reference(x_MK, format.input_scale, format.input_group_size)
    return dequantize(values_MK, scale_MG, None, format.input_group_size)


def kv_scales(amax_PK: Tensor, dtype: str) -> Tensor:
    """The scale of each plane and head of a cache, from the largest number that calibration saw there."""
    return amax_PK.clamp_min(1e-6) / LARGEST[getattr(torch, dtype)]


def kv_rounded(x_PTKD: Tensor, scales_PK: Tensor, dtype: str) -> Tensor:
    """What is read again of keys and values that a cache of 8 bits was given."""
    scales_PK = scales_PK.to(x_PTKD.device)
    stored = [
        to_stored(x_TKD, scale_K, getattr(torch, dtype)) for x_TKD, scale_K in zip(x_PTKD, scales_PK, strict=True)
    ]
    return torch.stack(
        [to_numbers(each, scale_K, x_PTKD.dtype) for each, scale_K in zip(stored, scales_PK, strict=True)]
    )
