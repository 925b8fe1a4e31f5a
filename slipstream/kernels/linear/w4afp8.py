"""y = x Wᵀ + b with weights of 4 bits in groups that share a scale, and E4M3 activations: TensorRT-LLM's W4A8 AWQ.

Weights are packed as those of w4a16, without zero points: -8 to 7, all of which E4M3 and halves hold exactly.
"""

from functools import partial

import torch
from torch import Tensor

from slipstream.kernels.linear import w4a16
from slipstream.kernels.linear.groups import dequantize, product, quantized_linear_shapes
from slipstream.kernels.registry import kernel, on_gpu_with_fp8, op


@op(
    "linear_w4afp8(Tensor x, Tensor x_scale, Tensor packed, Tensor scale, Tensor? bias, int group_size, "
    "int input_group_size, str dtype) -> Tensor",
    shapes=partial(quantized_linear_shapes, packed_dtype=torch.uint8, x_dtype=torch.float8_e4m3fn),
)
def linear_w4afp8(
    x_MK: Tensor, x_scale_MG: Tensor, packed: Tensor, scale_NG: Tensor, bias_N: Tensor | None, group_size: int,
    input_group_size: int, dtype: str,
) -> Tensor:  # fmt: skip
    """x E4M3 and its scale as quantize_fp8 gives them, packed uint8 [N, ⌈K/2⌉]; the result is in dtype."""
    weight_NK = w4a16.weight(packed, scale_NG, None, None, group_size, x_MK.shape[1])
    x_MK = dequantize(x_MK, x_scale_MG, None, input_group_size)
    return product(x_MK, weight_NK, bias_N, getattr(torch, dtype))


@kernel(linear_w4afp8, "triton", on_gpu_with_fp8)
def linear_w4afp8_triton(
    x_MK: Tensor, x_scale_MG: Tensor, packed: Tensor, scale_NG: Tensor, bias_N: Tensor | None, group_size: int,
    input_group_size: int, dtype: str, is_batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """x may be one row that is not rounded, as that of linear_fp8."""
    from slipstream.kernels.triton import linear as skinny

    weight = skinny.Weight(packed, scale_NG, None, group_size)
    if x_MK.dtype == torch.float8_e4m3fn:
        weight = weight._replace(x_scale_MG=x_scale_MG, x_group_size=input_group_size)
    if not skinny.supports(x_MK, weight):
        weight_NK = w4a16.weight(packed, scale_NG, None, None, group_size, x_MK.shape[1])
        x_MK = dequantize(x_MK, x_scale_MG, None, input_group_size)
        return product(x_MK, weight_NK, bias_N, getattr(torch, dtype), is_batch_invariant)
    return skinny.product(x_MK, weight, bias_N, getattr(torch, dtype), is_batch_invariant=is_batch_invariant)
