"""y = x Wᵀ + b with weights of 4 bits in groups that share a scale and a zero point: AWQ, GPTQ, round-to-nearest.

Two neighbouring columns share a byte, the earlier in its low half. Values are 0 to 15, less the zero point (8 without
one). Weights of 2 and 3 bits are held in this format too.
"""

from functools import partial

import torch
from torch import Tensor

from slipstream.kernels.cpu.library import native
from slipstream.kernels.linear.groups import dequantize, linear_shapes, product
from slipstream.kernels.registry import kernel, on_gpu, op

SYMMETRIC_ZERO = 8


def pack(values_NK: Tensor) -> Tensor:
    """uint8 values from 0 to 15 [N, K] → uint8 [N, ⌈K/2⌉]."""
    low, high = values_NK[:, ::2], values_NK[:, 1::2]
    if low.shape[1] > high.shape[1]:
        high = torch.cat([high, high.new_zeros(len(high), 1)], 1)
    return low | (high << 4)


def unpack(packed: Tensor, num_columns: int) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], 2).flatten(1)[:, :num_columns]


def weight(
    packed: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, order_K: Tensor | None, group_size: int, num_in: int
) -> Tensor:
    """The weight in float32 [N, num_in]."""
    zero_NG = torch.full_like(scale_NG, SYMMETRIC_ZERO) if zero_NG is None else zero_NG
    return dequantize(unpack(packed, num_in), scale_NG, zero_NG, group_size, order_K)


@op(
    "linear_w4a16(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? order, Tensor? bias, int group_size)"
    " -> Tensor",
    shapes=partial(linear_shapes, packed_dtype=torch.uint8),
)
def linear_w4a16(
    x_MK: Tensor, packed: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, order_K: Tensor | None,
    bias_N: Tensor | None, group_size: int,
) -> Tensor:  # fmt: skip
    """packed uint8 [N, ⌈K/2⌉]; order int32 [K] (act-order): packed column j multiplies column order[j] of x."""
    weight_NK = weight(packed, scale_NG, zero_NG, order_K, group_size, x_MK.shape[1])
    return product(x_MK, weight_NK, bias_N, x_MK.dtype)


@kernel(linear_w4a16, "triton", on_gpu)
def linear_w4a16_triton(
    x_MK: Tensor, packed: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, order_K: Tensor | None,
    bias_N: Tensor | None, group_size: int, is_batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    from slipstream.kernels.triton import linear as skinny

    as_packed = skinny.Weight(packed, scale_NG, zero_NG, group_size)
    if not skinny.supports(x_MK, as_packed):
        weight_NK = weight(packed, scale_NG, zero_NG, order_K, group_size, x_MK.shape[1])
        return product(x_MK, weight_NK, bias_N, x_MK.dtype, is_batch_invariant)
    ordered_MK = x_MK if order_K is None else x_MK.index_select(1, order_K)
    return skinny.product(ordered_MK, as_packed, bias_N, x_MK.dtype, is_batch_invariant=is_batch_invariant)


native(linear_w4a16, packed=("uint8",), zero=("uint8",))
