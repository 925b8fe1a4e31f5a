"""A model on its way into another tool's layout: its quantized linears, and in words what has no place there."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from slipstream.checkpoint.kv_cache import KVCache
from slipstream.engine.tensor_file import TensorEntry
from slipstream.kernels.linear import w4a16
from slipstream.schema.format import WeightFormat


@dataclass(frozen=True)
class QuantizedLinear:
    """The linear that is called `owner` there. read gives a part of its weight [num_out, num_in] (schema/format.py)."""

    owner: str
    format: WeightFormat
    num_out: int
    num_in: int
    read: Callable[[str], Tensor]

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def num_groups(self) -> int:
        return self.format.num_groups(self.num_in)

    @property
    def scale_dtype(self) -> torch.dtype:
        return getattr(torch, self.format.scale_dtype)

    def values(self) -> Tensor:
        """Of integers: uint8 [num_out, num_in] from 0 to 2^bits - 1, columns in their own order."""
        packed = self.read("packed")
        values = w4a16.unpack(packed, self.num_in) if self.bits == 4 else packed.view(torch.uint8) ^ 0x80
        if not self.format.order:
            return values
        return torch.empty_like(values).index_copy_(1, self.read("order").long(), values)

    def zeros(self) -> Tensor:
        """Of integers: uint8 [num_out, num_groups]."""
        if not self.format.has_zeros:
            return torch.full((self.num_out, self.num_groups), 1 << (self.bits - 1), dtype=torch.uint8)
        return self.read("zero") if self.bits == 4 else self.read("zero").view(torch.uint8) ^ 0x80

    def group_of_column(self) -> Tensor:
        """int32 [num_in]"""
        groups = torch.arange(self.num_in, dtype=torch.int32) // (self.format.group_size or self.num_in)
        if not self.format.order:
            return groups
        return torch.empty_like(groups).index_copy_(0, self.read("order").long(), groups)


@dataclass(frozen=True)
class QuantizedModel:
    """dense: what other linears, and other matrices, are called there; head, attentions (by layer): likewise."""

    linears: Sequence[QuantizedLinear]
    dense: Sequence[str]
    head: str
    attentions: dict[int, str]
    kv_cache: KVCache

    @property
    def is_quantized(self) -> bool:
        return bool(self.linears or self.kv_cache.dtype)


class Layout(Protocol):
    """How a tool stores quantized models: a module of this folder."""

    def refusal(self, model: QuantizedModel) -> str:
        """What the layout has no place for, and what would work instead; "" where it can hold the whole model."""

    def tensors(self, linear: QuantizedLinear) -> list[TensorEntry]: ...

    def cache_tensors(self, model: QuantizedModel) -> list[TensorEntry]: ...

    def config(self, model: QuantizedModel) -> dict[str, Any]:
        """quantization_config of config.json"""

    def files(self, model: QuantizedModel) -> dict[str, dict[str, Any]]:
        """JSON files of the tool's own, by name."""


def no_files(model: QuantizedModel) -> dict[str, dict[str, Any]]:
    return {}


def no_cache_tensors(model: QuantizedModel) -> list[TensorEntry]:
    return []


def refusal_of_layout(
    model: QuantizedModel, layout: str, refusal: Callable[[QuantizedLinear], str], *, has_head: bool = False
) -> str:
    """Of a layout with no place for a KV cache and with one group size; `refusal` is of a linear."""
    if not has_head and any(linear.owner == model.head for linear in model.linears):
        return f"{model.head} is packed, and {layout} leaves it as it is; give compressed-tensors"
    if model.kv_cache.dtype:
        return f"{layout} has no place for a KV cache in 8 bits; give compressed-tensors, or another --kv_cache_dtype"
    if shared_group_size(model) is None:
        return f"{layout} has one group size for all linears, and here they differ; give compressed-tensors"
    return first_refusal(model, refusal)


def first_refusal(model: QuantizedModel, refusal: Callable[[QuantizedLinear], str]) -> str:
    found = ((linear.owner, refusal(linear)) for linear in model.linears)
    return next((f"{owner} {why}" for owner, why in found if why), "")


def shared_group_size(model: QuantizedModel) -> int | None:
    """-1: a row of each linear has one scale; None: the linears differ."""
    if all(linear.format.group_size == 0 for linear in model.linears):
        return -1
    sizes = {linear.format.group_size or linear.num_in for linear in model.linears}
    return sizes.pop() if len(sizes) == 1 else None


def refusal_of_groups(linear: QuantizedLinear) -> str:
    size = linear.format.group_size
    if not size or linear.num_in % size == 0:
        return ""
    if linear.format.kind == "nvfp4a16":
        return f"has {linear.num_in} columns, which NVFP4's groups of 16 do not divide; give --exclude_modules for it"
    fitting = math.gcd(linear.num_in, size)
    return f"has {linear.num_in} columns, which groups of {size} do not divide; quantize it in groups of {fitting}"


def refusal_of_row_scales(linear: QuantizedLinear) -> str:
    """Of NVFP4, whose tools have one such scale for a linear."""
    row_scale_N1 = linear.read("row_scale")
    if (row_scale_N1 == row_scale_N1[0]).all():
        return ""
    return "has scales that differ from row to row, as joined linears do, and NVFP4 has one; give slipstream"
