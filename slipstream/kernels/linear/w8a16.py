"""y = x Wᵀ + b with weights of 8 bits, -128 to 127, in rows or groups that share a scale; activations as they are."""

from torch import Tensor

from slipstream.kernels.linear.groups import dequantize, linear_shapes, product
from slipstream.kernels.registry import op


@op(
    "linear_w8a16(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? order, Tensor? bias, int group_size)"
    " -> Tensor",
    shapes=linear_shapes,
)
def linear_w8a16(
    x_MK: Tensor, packed_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, order_K: Tensor | None,
    bias_N: Tensor | None, group_size: int,
) -> Tensor:  # fmt: skip
    """packed int8 [N, K]; order int32 [K] (act-order): packed column j multiplies column order[j] of x."""
    weight_NK = dequantize(packed_NK, scale_NG, zero_NG, group_size, order_K)
    return product(x_MK, weight_NK, bias_N, x_MK.dtype)
