"""y = x Wᵀ + b with weights of 8 floating bits (E4M3, arXiv:2209.05433), and activations of the same, or as they are.

A weight has one scale for each row, or one for each 128 columns of a row (DeepSeek's blocks, arXiv:2412.19437, whose
128 rows repeat it). The scale of a whole tensor is repeated for its rows: q, k and v are joined without requantizing.
"""

from functools import cache, partial

import torch
from torch import Tensor

from slipstream.kernels.cpu.library import native
from slipstream.kernels.linear.groups import (
    activation_scale,
    dequantize,
    linear_shapes,
    per_column,
    product,
    quantized_linear_shapes,
    quantized_shapes,
)
from slipstream.kernels.registry import kernel, on_gpu_with_fp8, op

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def _quantize_shapes(x_MK: Tensor, input_scale: float, input_group_size: int) -> tuple[Tensor, Tensor]:
    return quantized_shapes(x_MK, input_group_size, torch.float8_e4m3fn)


@op("quantize_fp8(Tensor x, float input_scale, int input_group_size) -> (Tensor, Tensor)", shapes=_quantize_shapes)
def quantize_fp8(x_MK: Tensor, input_scale: float, input_group_size: int) -> tuple[Tensor, Tensor]:
    """x / scale as E4M3, beyond 448 cut off, and the scales float32 [M, G].

    A scale is the largest magnitude of its row (or group of columns) / 448, or input_scale where that is not 0.
    """
    scale_MG = activation_scale(x_MK, input_scale, input_group_size, LARGEST)
    scaled_MK = x_MK.float() / per_column(scale_MG, x_MK.shape[1], input_group_size)
    return scaled_MK.clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale_MG


@kernel(quantize_fp8, "triton", on_gpu_with_fp8)
def quantize_fp8_triton(
    x_MK: Tensor, input_scale: float, input_group_size: int, is_batch_invariant: bool = False
) -> tuple[Tensor, Tensor]:
    from slipstream.kernels.triton import rows

    how = rows.Quantized(input_scale, input_group_size, "float8_e4m3fn", keeps_one_row=not is_batch_invariant)
    return rows.quantize(x_MK, how)


@op(
    "linear_fp8(Tensor x, Tensor x_scale, Tensor packed, Tensor scale, Tensor? bias, int group_size, "
    "int input_group_size, str dtype) -> Tensor",
    shapes=partial(quantized_linear_shapes, packed_dtype=torch.float8_e4m3fn, x_dtype=torch.float8_e4m3fn),
)
def linear_fp8(
    x_MK: Tensor, x_scale_MG: Tensor, packed_NK: Tensor, scale_NG: Tensor, bias_N: Tensor | None, group_size: int,
    input_group_size: int, dtype: str,
) -> Tensor:  # fmt: skip
    """x E4M3 and its scale as quantize_fp8 gives them, packed E4M3 [N, K]; the result is in dtype.

    On a GPU x may be one row that is not rounded, with scales of 1 (kernels/triton/rows.py: Quantized).
    """
    x_MK = dequantize(x_MK, x_scale_MG, None, input_group_size)
    return product(x_MK, dequantize(packed_NK, scale_NG, None, group_size), bias_N, getattr(torch, dtype))


@kernel(linear_fp8, "cublas", on_gpu_with_fp8)
def linear_fp8_cublas(
    x_MK: Tensor, x_scale_MG: Tensor, packed_NK: Tensor, scale_NG: Tensor, bias_N: Tensor | None, group_size: int,
    input_group_size: int, dtype: str,
) -> Tensor:  # fmt: skip
    """Scales by row; or by 128 columns, which cuBLASLt takes on Hopper alone and reads 16 bytes of a column at once."""
    num_out, num_columns = packed_NK.shape
    is_taken = len(x_MK) > 0 and num_columns % 128 == num_out % 16 == 0 and dtype == "bfloat16"
    is_taken = is_taken and x_MK.dtype == torch.float8_e4m3fn
    is_taken = is_taken and scale_NG.dtype == torch.float32 and (bias_N is None or bias_N.dtype == torch.bfloat16)
    if group_size or input_group_size:
        is_taken = is_taken and group_size == input_group_size == 128 and bias_N is None and _multiplies_blocks()
        is_taken = is_taken and len(x_MK) % 4 == 0
    if not is_taken:
        return linear_fp8_triton(x_MK, x_scale_MG, packed_NK, scale_NG, bias_N, group_size, input_group_size, dtype)
    scales = x_scale_MG.t().contiguous().t(), scale_NG.t().contiguous()
    return torch._scaled_mm(
        x_MK, packed_NK.t(), *scales, bias=bias_N, out_dtype=torch.bfloat16, use_fast_accum=not group_size
    )


@cache
def _multiplies_blocks() -> bool:
    version = tuple(int(part) for part in str(torch.version.cuda).split("."))
    return version >= (12, 9) and torch.cuda.get_device_capability()[0] == 9


@kernel(linear_fp8, "triton", on_gpu_with_fp8)
def linear_fp8_triton(
    x_MK: Tensor, x_scale_MG: Tensor, packed_NK: Tensor, scale_NG: Tensor, bias_N: Tensor | None, group_size: int,
    input_group_size: int, dtype: str, is_batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    from slipstream.kernels.triton import linear as skinny

    weight = skinny.Weight(packed_NK, scale_NG, None, group_size)
    if x_MK.dtype == torch.float8_e4m3fn:
        weight = weight._replace(x_scale_MG=x_scale_MG, x_group_size=input_group_size)
    if not skinny.supports(x_MK, weight):
        x_MK = dequantize(x_MK, x_scale_MG, None, input_group_size)
        weight_NK = dequantize(packed_NK, scale_NG, None, group_size)
        return product(x_MK, weight_NK, bias_N, getattr(torch, dtype), is_batch_invariant)
    return skinny.product(x_MK, weight, bias_N, getattr(torch, dtype), is_batch_invariant=is_batch_invariant)


def _a16_shapes(x_MK: Tensor, packed_NK: Tensor, scale_NG: Tensor, bias_N: Tensor | None, group_size: int) -> Tensor:
    return linear_shapes(x_MK, packed_NK, scale_NG, None, None, bias_N, group_size, packed_dtype=torch.float8_e4m3fn)


@op(
    "linear_fp8a16(Tensor x, Tensor packed, Tensor scale, Tensor? bias, int group_size) -> Tensor",
    shapes=_a16_shapes,
)
def linear_fp8a16(x_MK: Tensor, packed_NK: Tensor, scale_NG: Tensor, bias_N: Tensor | None, group_size: int) -> Tensor:
    """packed E4M3 [N, K], x as it is."""
    return product(x_MK, dequantize(packed_NK, scale_NG, None, group_size), bias_N, x_MK.dtype)


@kernel(linear_fp8a16, "triton", on_gpu_with_fp8)
def linear_fp8a16_triton(
    x_MK: Tensor, packed_NK: Tensor, scale_NG: Tensor, bias_N: Tensor | None, group_size: int,
    is_batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    from slipstream.kernels.triton import linear as skinny

    weight = skinny.Weight(packed_NK, scale_NG, None, group_size)
    if not skinny.supports(x_MK, weight):
        weight_NK = dequantize(packed_NK, scale_NG, None, group_size)
        return product(x_MK, weight_NK, bias_N, x_MK.dtype, is_batch_invariant)
    return skinny.product(x_MK, weight, bias_N, x_MK.dtype, is_batch_invariant=is_batch_invariant)


native(linear_fp8a16, packed=("float8_e4m3fn",))
