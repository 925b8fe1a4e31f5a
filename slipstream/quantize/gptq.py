"""GPTQ (arXiv:2210.17323): columns are rounded one after another, and those still to come make up for the error.

The error of a column is weighed by the inverse of H = 2/n Σ x xᵀ, whose Cholesky factor U (upper) gives each step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from slipstream.quantize.numbers import Scales, find_scales, round_to, row_scale_of, zero_of
from slipstream.schema.format import WeightFormat

AT_ONCE = 128  # columns, after which the rest of the weight is corrected; groups that share a scale divide it
MOST_COLUMNS = 16384  # that make up for each other: H of a 70B's 28,672 would take 3.3 GB, and some copies to invert


@dataclass(frozen=True)
class Compensation:
    """What H says of each step.

    factors: U of the columns in order_K, a square for each part of them that makes up for its own errors alone.
    """

    factors: tuple[Tensor, ...]
    is_dead_K: Tensor  # in order_K, too
    order_K: Tensor | None  # None: as they are


@dataclass
class Hessian:
    """Sum of 2 x xᵀ over the rows seen, float32: a square for each part of the columns, mostly one [K, K]."""

    sums: list[Tensor]
    num_rows: int = 0

    @classmethod
    def empty(cls, num_columns: int, device: torch.device) -> "Hessian":
        num_parts = -(-num_columns // MOST_COLUMNS)
        size = -(-num_columns // (num_parts * AT_ONCE)) * AT_ONCE
        sizes = [min(size, num_columns - first) for first in range(0, num_columns, size)]
        return cls([torch.zeros(each, each, device=device) for each in sizes])

    def add(self, x_MK: Tensor) -> None:
        for sum_KK, part_MK in zip(self.sums, x_MK.split([len(each) for each in self.sums], 1), strict=True):
            sum_KK.addmm_(part_MK.t(), part_MK, alpha=2.0)
        self.num_rows += len(x_MK)

    def compensation(self, *, damping: float = 0.01, act_order: bool = False) -> Compensation:
        """act_order: columns of large inputs first, in each part. The sums are used up: they are large."""
        factors, dead, orders, first = [], [], [], 0
        while self.sums:
            hessian_KK = self.sums.pop(0).div_(max(1, self.num_rows))
            diagonal = hessian_KK.diagonal()
            is_dead_K = diagonal == 0  # inputs that were never anything but 0: their columns do not matter
            diagonal[is_dead_K] = 1
            if act_order:
                order_K = diagonal.argsort(descending=True, stable=True)
                hessian_KK, is_dead_K = hessian_KK[order_K][:, order_K], is_dead_K[order_K]
                orders.append(first + order_K)
            first += len(hessian_KK)
            factors.append(_inverse_factor(hessian_KK, damping))
            dead.append(is_dead_K)
        return Compensation(tuple(factors), torch.cat(dead), torch.cat(orders) if act_order else None)


@dataclass(frozen=True)
class Rounded:
    values_NK: Tensor  # in the order of order_K
    scales: Scales
    order_K: Tensor | None  # packed column j is column order[j]


def gptq(weight_NK: Tensor, compensation: Compensation, format: WeightFormat, num_rows: int = 1) -> Rounded:
    """float32 in; the numbers are those of `format`, whose groups are made in the compensation's order of columns.

    num_rows: that share a scale.
    """
    order_K = compensation.order_K
    weight_NK = weight_NK.clone() if order_K is None else weight_NK[:, order_K]
    weight_NK[:, compensation.is_dead_K] = 0
    values_NK = torch.empty_like(weight_NK)
    scales_of = partial(find_scales, format=format, num_rows=num_rows, row_scale=row_scale_of(weight_NK, format))
    scales = [] if format.group_size else [scales_of(weight_NK)]
    start = 0
    for factor_KK in compensation.factors:
        part_NK, made_NK = (each[:, start : start + len(factor_KK)] for each in (weight_NK, values_NK))
        for first in range(0, len(factor_KK), AT_ONCE):
            columns, rest = slice(first, first + AT_ONCE), slice(first + AT_ONCE, None)
            block_CN = part_NK[:, columns].t().contiguous()
            errors_CN = _round_block(block_CN, factor_KK[columns, columns], format, scales, scales_of)
            made_NK[:, columns] = block_CN.t()
            part_NK[:, rest].addmm_(errors_CN.t(), factor_KK[columns, rest], alpha=-1)
        start += len(factor_KK)
    zeros = [each.zero_NG for each in scales if each.zero_NG is not None]
    zero_NG = torch.cat(zeros, 1) if zeros else None
    joined = replace(scales[0], scale_NG=torch.cat([each.scale_NG for each in scales], 1), zero_NG=zero_NG)
    if order_K is not None and not format.group_size:  # no group was made: each goes back to its place
        return Rounded(torch.empty_like(values_NK).index_copy_(1, order_K, values_NK), joined, None)
    return Rounded(values_NK, joined, order_K)


def _round_block(
    block_CN: Tensor, factor_CC: Tensor, format: WeightFormat, scales: list[Scales],
    scales_of: Callable[[Tensor], Scales],
) -> Tensor:  # fmt: skip
    """Leaves its numbers in block_CN, by columns, and returns their errors by the factors [C, N]; adds its groups'
    scales to `scales`."""
    errors_CN = torch.empty_like(block_CN)
    for column, steps_C in enumerate(factor_CC):
        if format.group_size and column % format.group_size == 0:
            group_NC = block_CN[column : column + format.group_size].t()
            scales.append(scales_of(group_NC))
        weight_N1 = block_CN[column, :, None]
        values_N1 = round_to(weight_N1, scales[-1], format)
        rounded_N1 = (values_N1 - zero_of(scales[-1], format)) * scales[-1].scale_NG
        errors_CN[column] = ((weight_N1 - rounded_N1) / steps_C[column])[:, 0]
        block_CN[column + 1 :].addr_(steps_C[column + 1 :], errors_CN[column], alpha=-1)
        block_CN[column] = values_N1[:, 0]
    return errors_CN


def _inverse_factor(hessian_KK: Tensor, damping: float) -> Tensor:
    """U with H⁻¹ = Uᵀ U; more damping where H is not positive enough. Changes hessian_KK, as large as it may be."""
    diagonal = hessian_KK.diagonal()
    mean, damped = diagonal.mean(), 0.0
    for _ in range(8):
        diagonal.add_((damping - damped) * mean)
        lower_KK, failed = torch.linalg.cholesky_ex(hessian_KK)
        if not failed:
            break
        damping, damped = 10 * damping, damping
    else:
        raise AssertionError("a sum of squares with as much on its diagonal is positive")
    return torch.linalg.cholesky(torch.cholesky_inverse(lower_KK), upper=True)
