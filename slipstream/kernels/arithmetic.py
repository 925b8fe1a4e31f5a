"""Elementwise sums and products, and moving rows and columns about."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slipstream.kernels.cpu.library import Kind, native
from slipstream.kernels.fits import need, need_floats
from slipstream.kernels.registry import op


def _sum_shapes(x: Tensor, y: Tensor) -> Tensor:
    need_floats(x=x, y=y)
    return x + y


@op("add(Tensor x, Tensor y) -> Tensor", shapes=_sum_shapes, is_row_by_row=True)
def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


@op("mul(Tensor x, Tensor y) -> Tensor", shapes=_sum_shapes, is_row_by_row=True)
def mul(x: Tensor, y: Tensor) -> Tensor:
    return x * y


def _like_first(x: Tensor, *_: object, **__: object) -> Tensor:
    need_floats(x=x)
    return x.new_empty(x.shape)


@op("scale(Tensor x, float factor) -> Tensor", shapes=_like_first, is_row_by_row=True)
def scale(x: Tensor, factor: float) -> Tensor:
    """x times a number known at build time, rounded to x's dtype first, as Hugging Face's Gemma does."""
    return x * torch.tensor(factor, dtype=x.dtype)


@op("soft_cap(Tensor x, float cap) -> Tensor", shapes=_like_first, is_row_by_row=True)
def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap): near x where x is small, never beyond cap (arXiv:2408.00118)."""
    return torch.tanh(x / cap) * cap


@op("concat(Tensor[] parts) -> Tensor")
def concat(parts: Sequence[Tensor]) -> Tensor:
    """Stack along the first dimension: the rows of weights that share their input."""
    return torch.cat(list(parts))


def _split_shapes(x_TN: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    num_tokens, num_columns = x_TN.shape
    need(sum(sizes) == num_columns, f"the sizes must add up to {num_columns} columns")
    return [x_TN.new_empty(num_tokens, size) for size in sizes]


@op("split(Tensor x, int[] sizes) -> Tensor[]", shapes=_split_shapes, is_row_by_row=True)
def split(x_TN: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Column ranges of x as views: whoever reads them must honour the row stride."""
    return list(torch.split(x_TN, list(sizes), dim=1))


def _select_shapes(x_TH: Tensor, rows_R: Tensor) -> Tensor:
    (_, num_columns), (num_rows,) = x_TH.shape, rows_R.shape
    return x_TH.new_empty(num_rows, num_columns)


@op("select_rows(Tensor x, Tensor rows) -> Tensor", shapes=_select_shapes, is_row_by_row=True)
def select_rows(x_TH: Tensor, rows_R: Tensor) -> Tensor:
    return x_TH.index_select(0, rows_R)


def _are_alike(kinds: dict[str, Kind | None], attributes: dict[str, Any]) -> bool:
    """Rows with rows: nothing is repeated, and nothing else has a row to begin with."""
    return kinds["x"] == kinds["y"] and kinds["x"] is not None and len(kinds["x"][1]) == 2


def _has_rows(kinds: dict[str, Kind | None], attributes: dict[str, Any]) -> bool:
    return kinds["x"] is not None and len(kinds["x"][1]) == 2


for each in (add, mul):
    native(each, _are_alike)
for each in (scale, soft_cap):
    native(each, _has_rows)
native(select_rows)
