"""Elementwise sums and products, and moving rows and columns about."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slipstream.kernels.registry import op


@op("add(Tensor x, Tensor y) -> Tensor")
def add(x: Tensor, y: Tensor) -> Tensor:
    return x + y


@op("mul(Tensor x, Tensor y) -> Tensor")
def mul(x: Tensor, y: Tensor) -> Tensor:
    return x * y


@op("scale(Tensor x, float factor) -> Tensor")
def scale(x: Tensor, factor: float) -> Tensor:
    """x times a number known at build time, rounded to x's dtype first, as Hugging Face's Gemma does."""
    return x * torch.tensor(factor, dtype=x.dtype)


@op("soft_cap(Tensor x, float cap) -> Tensor")
def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap): near x where x is small, never beyond cap (arXiv:2408.00118)."""
    return torch.tanh(x / cap).mul_(cap)


@op("concat(Tensor[] parts) -> Tensor")
def concat(parts: Sequence[Tensor]) -> Tensor:
    """Stack along the first dimension: the rows of weights that share their input."""
    return torch.cat(list(parts))


def _split_shapes(x_TN: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    return [x_TN.new_empty(x_TN.shape[0], size) for size in sizes]


@op("split(Tensor x, int[] sizes) -> Tensor[]", shapes=_split_shapes)
def split(x_TN: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Column ranges of x as views: whoever reads them must honour the row stride."""
    return list(torch.split(x_TN, list(sizes), dim=1))


@op("select_rows(Tensor x, Tensor rows) -> Tensor")
def select_rows(x_TH: Tensor, rows_R: Tensor) -> Tensor:
    return x_TH.index_select(0, rows_R)
