"""y = x Wᵀ + b with weights of 4 bits in groups, and activations of 8: what GGUF's Q4_0 and Q4_1 are on a CPU.

Weights are packed as those of w4a16. A zero that is no whole number is stored as what it takes off: its shift.
"""

from functools import partial

import torch
from torch import Tensor

from slipstream.kernels.linear import w4a16
from slipstream.kernels.linear.groups import dequantize, product, shifted, shifted_linear_shapes
from slipstream.kernels.registry import op


def weight(packed: Tensor, scale_NG: Tensor, shift_NG: Tensor | None, group_size: int, num_in: int) -> Tensor:
    """The weight in float32 [N, num_in]: packed · scale - shift, or (packed - 8) · scale."""
    if shift_NG is None:
        return w4a16.weight(packed, scale_NG, None, None, group_size, num_in)
    return shifted(dequantize(w4a16.unpack(packed, num_in), scale_NG, None, group_size), shift_NG, group_size)


@op(
    "linear_w4a8(Tensor x, Tensor x_scale, Tensor packed, Tensor scale, Tensor? shift, Tensor? bias, int group_size, "
    "int input_group_size, str dtype) -> Tensor",
    shapes=partial(shifted_linear_shapes, packed_dtype=torch.uint8),
)
def linear_w4a8(
    x_MK: Tensor, x_scale_MG: Tensor, packed: Tensor, scale_NG: Tensor, shift_NG: Tensor | None,
    bias_N: Tensor | None, group_size: int, input_group_size: int, dtype: str,
) -> Tensor:  # fmt: skip
    """x int8 and its scale as quantize_w8a8 gives them, packed uint8 [N, ⌈K/2⌉]; the result is in dtype."""
    weight_NK = weight(packed, scale_NG, shift_NG, group_size, x_MK.shape[1])
    return product(dequantize(x_MK, x_scale_MG, None, input_group_size), weight_NK, bias_N, getattr(torch, dtype))
