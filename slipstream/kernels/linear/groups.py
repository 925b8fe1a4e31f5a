"""What the formats share: one scale for a group of columns, and weights as they were before packing."""

import torch
from torch import Tensor
from torch.nn import functional

SMALLEST_AMAX = 1e-12  # of a row of zeros, which must not be divided by nothing


def per_column(values_NG: Tensor, num_columns: int, group_size: int) -> Tensor:
    """A group's number for each of its columns, [N, num_columns]; [N, 1] where a row is one group."""
    if not group_size:
        return values_NG
    return values_NG.repeat_interleave(group_size, dim=1)[:, :num_columns]


def dequantize(
    values_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, group_size: int, order_K: Tensor | None = None
) -> Tensor:
    """(values - zero) · scale in float32 [N, K]; with an order, each column back in its own place."""
    num_columns = values_NK.shape[1]
    weight_NK = values_NK.float()
    if zero_NG is not None:
        weight_NK -= per_column(zero_NG.float(), num_columns, group_size)
    weight_NK *= per_column(scale_NG.float(), num_columns, group_size)
    if order_K is None:
        return weight_NK
    return torch.empty_like(weight_NK).index_copy_(1, order_K.long(), weight_NK)


def linear_shapes(x_MK: Tensor, packed: Tensor, *_: object, **__: object) -> Tensor:
    """What a linear gives whose activations are as they are."""
    return x_MK.new_empty(x_MK.shape[0], packed.shape[0])


def product(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x Wᵀ + b of a dequantized weight, rounded to dtype once."""
    y_MN = x_MK.float() @ weight_NK.t()
    return (y_MN if bias_N is None else y_MN + bias_N.float()).to(dtype)


def activation_scale(x_MK: Tensor, input_scale: float, group_size: int, largest: float) -> Tensor:
    """float32 [M, G]: what maps the largest magnitude of each group of columns onto the largest number."""
    num_rows, num_columns = x_MK.shape
    size = group_size or num_columns
    num_groups = -(-num_columns // size)
    if input_scale:
        return torch.full((num_rows, num_groups), input_scale, device=x_MK.device)
    padded = functional.pad(x_MK.float().abs(), (0, num_groups * size - num_columns))
    return padded.unflatten(1, (num_groups, size)).amax(2).clamp_min_(SMALLEST_AMAX) / largest


def quantized_shapes(x_MK: Tensor, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What quantizing activations gives: the numbers, and float32 scales [M, G]."""
    num_groups = -(-x_MK.shape[1] // group_size) if group_size else 1
    return x_MK.new_empty(x_MK.shape, dtype=dtype), x_MK.new_empty(x_MK.shape[0], num_groups, dtype=torch.float32)
