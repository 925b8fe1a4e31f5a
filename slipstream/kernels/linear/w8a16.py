"""y = x Wᵀ + b with weights of 8 bits, -128 to 127, in rows or groups that share a scale; activations as they are."""

from functools import partial

import torch
from torch import Tensor

from slipstream.kernels.cpu.library import native
from slipstream.kernels.linear.groups import dequantize, linear_shapes, product
from slipstream.kernels.registry import kernel, on_gpu, op


@op(
    "linear_w8a16(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? order, Tensor? bias, int group_size)"
    " -> Tensor",
    shapes=partial(linear_shapes, packed_dtype=torch.int8),
)
def linear_w8a16(
    x_MK: Tensor, packed_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, order_K: Tensor | None,
    bias_N: Tensor | None, group_size: int,
) -> Tensor:  # fmt: skip
    """packed int8 [N, K]; order int32 [K] (act-order): packed column j multiplies column order[j] of x."""
    weight_NK = dequantize(packed_NK, scale_NG, zero_NG, group_size, order_K)
    return product(x_MK, weight_NK, bias_N, x_MK.dtype)


@kernel(linear_w8a16, "triton", on_gpu)
def linear_w8a16_triton(
    x_MK: Tensor, packed_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, order_K: Tensor | None,
    bias_N: Tensor | None, group_size: int, is_batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    from slipstream.kernels.triton import linear as skinny

    weight = skinny.Weight(packed_NK, scale_NG, zero_NG, group_size)
    if not skinny.supports(x_MK, weight):
        weight_NK = dequantize(packed_NK, scale_NG, zero_NG, group_size, order_K)
        return product(x_MK, weight_NK, bias_N, x_MK.dtype, is_batch_invariant)
    ordered_MK = x_MK if order_K is None else x_MK.index_select(1, order_K)
    return skinny.product(ordered_MK, weight, bias_N, x_MK.dtype, is_batch_invariant=is_batch_invariant)


native(linear_w8a16, packed=("int8",), zero=("int8",))
