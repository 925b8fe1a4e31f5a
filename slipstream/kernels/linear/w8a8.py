"""y = x Wᵀ + b with weights and activations of 8 bits (SmoothQuant, LLM.int8: arXiv:2211.10438, 2208.07339)."""

from functools import partial

import torch
from torch import Tensor

from slipstream.kernels.cpu.library import native
from slipstream.kernels.linear.groups import (
    activation_scale,
    dequantize,
    per_column,
    product,
    quantized_shapes,
    shifted,
    shifted_linear_shapes,
)
from slipstream.kernels.registry import kernel, on_gpu, op

LARGEST = 127


def _quantize_shapes(x_MK: Tensor, input_scale: float, input_group_size: int) -> tuple[Tensor, Tensor]:
    return quantized_shapes(x_MK, input_group_size, torch.int8)


@op("quantize_w8a8(Tensor x, float input_scale, int input_group_size) -> (Tensor, Tensor)", shapes=_quantize_shapes)
def quantize_w8a8(x_MK: Tensor, input_scale: float, input_group_size: int) -> tuple[Tensor, Tensor]:
    """x / scale, rounded half to even, as int8, and the scales float32 [M, G].

    A scale is the largest magnitude of its row (or group of columns) / 127, or input_scale where that is not 0.
    """
    scale_MG = activation_scale(x_MK, input_scale, input_group_size, LARGEST)
    scaled_MK = x_MK.float() / per_column(scale_MG, x_MK.shape[1], input_group_size)
    return scaled_MK.round_().clamp_(-LARGEST - 1, LARGEST).to(torch.int8), scale_MG


@kernel(quantize_w8a8, "triton", on_gpu, is_row_by_row=True)
def quantize_w8a8_triton(x_MK: Tensor, input_scale: float, input_group_size: int) -> tuple[Tensor, Tensor]:
    from slipstream.kernels.triton import rows

    return rows.quantize(x_MK, rows.Quantized(input_scale, input_group_size, "int8"))


@op(
    "linear_w8a8(Tensor x, Tensor x_scale, Tensor packed, Tensor scale, Tensor? shift, Tensor? bias, int group_size, "
    "int input_group_size, str dtype) -> Tensor",
    shapes=partial(shifted_linear_shapes, packed_dtype=torch.int8),
)
def linear_w8a8(
    x_MK: Tensor, x_scale_MG: Tensor, packed_NK: Tensor, scale_NG: Tensor, shift_NG: Tensor | None,
    bias_N: Tensor | None, group_size: int, input_group_size: int, dtype: str,
) -> Tensor:  # fmt: skip
    """x int8 and its scale as quantize_w8a8 gives them, packed int8 [N, K]; the result is in dtype."""
    x_MK = dequantize(x_MK, x_scale_MG, None, input_group_size)
    weight_NK = shifted(dequantize(packed_NK, scale_NG, None, group_size), shift_NG, group_size)
    return product(x_MK, weight_NK, bias_N, getattr(torch, dtype))


@kernel(linear_w8a8, "triton", on_gpu)
def linear_w8a8_triton(
    x_MK: Tensor, x_scale_MG: Tensor, packed_NK: Tensor, scale_NG: Tensor, shift_NG: Tensor | None,
    bias_N: Tensor | None, group_size: int, input_group_size: int, dtype: str, is_batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    from slipstream.kernels.triton import linear as skinny

    weight = skinny.Weight(packed_NK, scale_NG, None, group_size, x_scale_MG, input_group_size)
    if shift_NG is not None or not skinny.supports(x_MK, weight):
        x_MK = dequantize(x_MK, x_scale_MG, None, input_group_size)
        weight_NK = shifted(dequantize(packed_NK, scale_NG, None, group_size), shift_NG, group_size)
        return product(x_MK, weight_NK, bias_N, getattr(torch, dtype), is_batch_invariant)
    return skinny.product(x_MK, weight, bias_N, getattr(torch, dtype), is_batch_invariant=is_batch_invariant)


native(quantize_w8a8)
