"""What the formats share: one scale for a group of columns, and weights as they were before packing."""

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.kernels.fits import need, need_floats, need_shape

SMALLEST_AMAX = 1e-12  # of a row of zeros, which must not be divided by nothing


def per_column(values_NG: Tensor, num_columns: int, group_size: int) -> Tensor:
    """A group's number for each of its columns, [N, num_columns]; [N, 1] where a row is one group."""
    if not group_size:
        return values_NG
    return values_NG.repeat_interleave(min(group_size, num_columns), dim=1)[:, :num_columns]


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


def num_groups(num_columns: int, group_size: int) -> int:
    """Groups of a row; a size of 0 means one group of all."""
    need(group_size >= 0, "a group cannot have less than no columns")
    return -(-num_columns // group_size) if group_size else 1


def packed_rows(
    num_in: int, packed: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, bias_N: Tensor | None, group_size: int,
    packed_dtype: torch.dtype,
) -> tuple[int, ...]:  # fmt: skip
    """Rows of a packed weight that takes num_in columns; (experts, rows) of a stack. Two 4-bit columns share a byte."""
    need_floats(scale=scale_NG, bias=bias_N)
    need(packed.dtype == packed_dtype, f"packed must be {packed_dtype}")
    need(zero_NG is None or zero_NG.dtype == packed_dtype, f"zero must be {packed_dtype}")
    rows, groups = packed.shape[:-1], num_groups(num_in, group_size)
    need_shape("packed", packed, *rows, -(-num_in // 2) if packed_dtype == torch.uint8 else num_in)
    need_shape("scale", scale_NG, *rows, groups)
    need_shape("zero", zero_NG, *rows, groups)
    need_shape("bias", bias_N, *rows)
    return tuple(rows)


def linear_shapes(
    x_MK: Tensor, packed: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, order_K: Tensor | None,
    bias_N: Tensor | None, group_size: int, *, packed_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What a linear gives whose activations are as they are."""
    need_floats(x=x_MK)
    num_rows, num_in = x_MK.shape
    (num_out,) = packed_rows(num_in, packed, scale_NG, zero_NG, bias_N, group_size, packed_dtype)
    need(order_K is None or order_K.dtype == torch.int32, "order must be int32")
    need_shape("order", order_K, num_in)
    return x_MK.new_empty(num_rows, num_out)


def quantized_linear_shapes(
    x_MK: Tensor, x_scale_MG: Tensor, packed_NK: Tensor, scale_NG: Tensor, bias_N: Tensor | None, group_size: int,
    input_group_size: int, dtype: str, *, packed_dtype: torch.dtype, x_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """What a linear gives whose activations are quantized, too."""
    need(x_MK.dtype == x_dtype, f"x must be {x_dtype}")
    need(x_scale_MG.dtype == torch.float32, "x_scale must be float32")
    num_rows, num_in = x_MK.shape
    need_shape("x_scale", x_scale_MG, num_rows, num_groups(num_in, input_group_size))
    (num_out,) = packed_rows(num_in, packed_NK, scale_NG, None, bias_N, group_size, packed_dtype)
    y_MN = x_MK.new_empty(num_rows, num_out, dtype=getattr(torch, dtype))
    need_floats(y=y_MN)
    return y_MN


def shifted_linear_shapes(
    x_MK: Tensor, x_scale_MG: Tensor, packed: Tensor, scale_NG: Tensor, shift_NG: Tensor | None,
    bias_N: Tensor | None, group_size: int, input_group_size: int, dtype: str, *, packed_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The same of activations of 8 bits and a weight whose groups may each take something off."""
    need_floats(shift=shift_NG)
    need_shape("shift", shift_NG, *scale_NG.shape)
    return quantized_linear_shapes(
        x_MK, x_scale_MG, packed, scale_NG, bias_N, group_size, input_group_size, dtype, packed_dtype=packed_dtype,
        x_dtype=torch.int8,
    )  # fmt: skip


def shifted(weight_NK: Tensor, shift_NG: Tensor | None, group_size: int) -> Tensor:
    if shift_NG is None:
        return weight_NK
    return weight_NK - per_column(shift_NG.float(), weight_NK.shape[1], group_size)


def product(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, dtype: torch.dtype, is_batch_invariant: bool = False
) -> Tensor:
    """x Wᵀ + b of a weight in float32, rounded to dtype once."""
    if is_batch_invariant:
        from slipstream.kernels.triton import linear as skinny

        weight = skinny.Weight(weight_NK)
        return skinny.product(x_MK.float().contiguous(), weight, bias_N, dtype, is_batch_invariant=True)
    y_MN = x_MK.float() @ weight_NK.t()
    return (y_MN if bias_N is None else y_MN + bias_N.float()).to(dtype)


def activation_scale(x_MK: Tensor, input_scale: float, group_size: int, largest: float) -> Tensor:
    """float32 [M, G]: what maps the largest magnitude of each group of columns onto the largest number."""
    num_rows, num_columns = x_MK.shape
    size = min(group_size or num_columns, num_columns)
    groups = -(-num_columns // size)
    if input_scale:
        return torch.full((num_rows, groups), input_scale, dtype=torch.float32, device=x_MK.device)
    padded = functional.pad(x_MK.float().abs(), (0, groups * size - num_columns))
    return padded.unflatten(1, (groups, size)).amax(2).clamp_min_(SMALLEST_AMAX) / largest


def quantized_shapes(x_MK: Tensor, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What quantizing activations gives: the numbers, and float32 scales [M, G]."""
    need_floats(x=x_MK)
    num_rows, num_columns = x_MK.shape
    scale_MG = x_MK.new_empty(num_rows, num_groups(num_columns, group_size), dtype=torch.float32)
    return x_MK.new_empty(x_MK.shape, dtype=dtype), scale_MG
