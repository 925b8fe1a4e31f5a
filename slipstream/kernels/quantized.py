"""Norms and activations that give their result quantized, as the linears of 8 bits read it: numbers and their scales.

The full-width result is never written. dtype names what a number is: int8, or float8_e4m3fn.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slipstream.kernels import activation, norm
from slipstream.kernels.cpu.library import native
from slipstream.kernels.linear import fp8, w8a8
from slipstream.kernels.linear.groups import quantized_shapes
from slipstream.kernels.linear.panels import ROWS, linear_panels
from slipstream.kernels.registry import kernel, on_gpu_with_fp8, op

if TYPE_CHECKING:
    from slipstream.kernels.triton.rows import Quantized

_QUANTIZE = {"int8": w8a8.quantize_w8a8, "float8_e4m3fn": fp8.quantize_fp8}

HOW = "float input_scale, int input_group_size, str dtype"


def quantize_by_reference(x_TN: Tensor, input_scale: float, group_size: int, dtype: str) -> tuple[Tensor, Tensor]:
    """x / scale in this dtype, and the scales float32 [T, G]."""
    quantized_TN, scale_TG = _QUANTIZE[dtype].reference(x_TN, input_scale, group_size)
    return quantized_TN, scale_TG


def _quantized(x_TN: Tensor, group_size: int, dtype: str) -> tuple[Tensor, Tensor]:
    if dtype not in _QUANTIZE:
        raise ValueError(f"dtype {dtype}")
    return quantized_shapes(x_TN, group_size, getattr(torch, dtype))


def _norm_shapes(
    x_TH: Tensor, weight_H: Tensor, eps: float, weight_offset: float, input_scale: float, input_group_size: int,
    dtype: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _quantized(norm.rms_norm_shapes(x_TH, weight_H), input_group_size, dtype)


@op(
    f"rms_norm_quantize(Tensor x, Tensor weight, float eps, float weight_offset, {HOW}) -> (Tensor, Tensor)",
    shapes=_norm_shapes,
)
def rms_norm_quantize(
    x_TH: Tensor, weight_H: Tensor, eps: float, weight_offset: float, input_scale: float, input_group_size: int,
    dtype: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """rms_norm(x), and its scales float32 [T, G]."""
    normed_TH = norm.rms_norm.reference(x_TH, weight_H, eps, weight_offset)
    return quantize_by_reference(normed_TH, input_scale, input_group_size, dtype)


def add_norm_shapes(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float, weight_offset: float, input_scale: float,
    input_group_size: int, dtype: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    normed_TH, total_TH = norm.add_rms_norm_shapes(x_TH, residual_TH, weight_H)
    return *_quantized(normed_TH, input_group_size, dtype), total_TH


@op(
    "add_rms_norm_quantize(Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset, "
    f"{HOW}) -> (Tensor, Tensor, Tensor)",
    shapes=add_norm_shapes,
)
def add_rms_norm_quantize(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float, weight_offset: float, input_scale: float,
    input_group_size: int, dtype: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """rms_norm(x + residual), its scales, and x + residual as it is."""
    normed_TH, total_TH = norm.add_rms_norm.reference(x_TH, residual_TH, weight_H, eps, weight_offset)
    return *quantize_by_reference(normed_TH, input_scale, input_group_size, dtype), total_TH


def _layer_norm_shapes(
    x_TH: Tensor, weight_H: Tensor, bias_H: Tensor | None, eps: float, input_scale: float, input_group_size: int,
    dtype: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _quantized(norm.layer_norm_shapes(x_TH, weight_H, bias_H), input_group_size, dtype)


@op(
    f"layer_norm_quantize(Tensor x, Tensor weight, Tensor? bias, float eps, {HOW}) -> (Tensor, Tensor)",
    shapes=_layer_norm_shapes,
)
def layer_norm_quantize(
    x_TH: Tensor, weight_H: Tensor, bias_H: Tensor | None, eps: float, input_scale: float, input_group_size: int,
    dtype: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """layer_norm(x), and its scales float32 [T, G]."""
    normed_TH = norm.layer_norm.reference(x_TH, weight_H, bias_H, eps)
    return quantize_by_reference(normed_TH, input_scale, input_group_size, dtype)


def _add_layer_norm_shapes(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor | None, eps: float, input_scale: float,
    input_group_size: int, dtype: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    normed_TH, total_TH = norm.add_layer_norm_shapes(x_TH, residual_TH, weight_H, bias_H)
    return *_quantized(normed_TH, input_group_size, dtype), total_TH


@op(
    "add_layer_norm_quantize(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, "
    f"{HOW}) -> (Tensor, Tensor, Tensor)",
    shapes=_add_layer_norm_shapes,
)
def add_layer_norm_quantize(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor | None, eps: float, input_scale: float,
    input_group_size: int, dtype: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """layer_norm(x + residual), its scales, and x + residual as it is."""
    normed_TH, total_TH = norm.add_layer_norm.reference(x_TH, residual_TH, weight_H, bias_H, eps)
    return *quantize_by_reference(normed_TH, input_scale, input_group_size, dtype), total_TH


def _gated_shapes(x_TI2: Tensor, input_scale: float, input_group_size: int, dtype: str) -> tuple[Tensor, Tensor]:
    return _quantized(activation.half_columns(x_TI2), input_group_size, dtype)


@op(f"silu_and_mul_quantize(Tensor x, {HOW}) -> (Tensor, Tensor)", shapes=_gated_shapes)
def silu_and_mul_quantize(
    x_TI2: Tensor, input_scale: float, input_group_size: int, dtype: str
) -> tuple[Tensor, Tensor]:
    """silu_and_mul(x), and its scales float32 [T, G]."""
    return quantize_by_reference(activation.silu_and_mul.reference(x_TI2), input_scale, input_group_size, dtype)


def _panels_silu_shapes(
    x_MK: Tensor, x_scale_MG: Tensor, panels: Tensor, scale: Tensor, shift: Tensor | None, bias_N: Tensor | None,
    bits: int, group_size: int, input_group_size: int, num_out: int, output_group_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    product = linear_panels.shapes(
        x_MK, x_scale_MG, panels, scale, shift, bias_N, bits, group_size, input_group_size, num_out
    )
    return _gated_shapes(product, 0.0, output_group_size, "int8")


@op(
    "linear_panels_silu_and_mul_quantize(Tensor x, Tensor x_scale, Tensor panels, Tensor scale, Tensor? shift, "
    "Tensor? bias, int bits, int group_size, int input_group_size, int num_out, int output_group_size) -> "
    "(Tensor, Tensor)",
    shapes=_panels_silu_shapes,
)
def linear_panels_silu_and_mul_quantize(
    x_MK: Tensor, x_scale_MG: Tensor, panels: Tensor, scale: Tensor, shift: Tensor | None, bias_N: Tensor | None,
    bits: int, group_size: int, input_group_size: int, num_out: int, output_group_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """silu_and_mul(linear_panels(x)) in int8, and its scales float32 [T, G]."""
    product = linear_panels.reference(
        x_MK, x_scale_MG, panels, scale, shift, bias_N, bits, group_size, input_group_size, num_out
    )
    return silu_and_mul_quantize.reference(product, 0.0, output_group_size, "int8")


def _gated_gelu_shapes(
    x_TI2: Tensor, approximate: bool, input_scale: float, input_group_size: int, dtype: str
) -> tuple[Tensor, Tensor]:
    return _gated_shapes(x_TI2, input_scale, input_group_size, dtype)


@op(f"gelu_and_mul_quantize(Tensor x, bool approximate, {HOW}) -> (Tensor, Tensor)", shapes=_gated_gelu_shapes)
def gelu_and_mul_quantize(
    x_TI2: Tensor, approximate: bool, input_scale: float, input_group_size: int, dtype: str
) -> tuple[Tensor, Tensor]:
    """gelu_and_mul(x), and its scales float32 [T, G]."""
    return quantize_by_reference(
        activation.gelu_and_mul.reference(x_TI2, approximate), input_scale, input_group_size, dtype
    )


def _gelu_shapes(
    x_TI: Tensor, approximate: bool, input_scale: float, input_group_size: int, dtype: str
) -> tuple[Tensor, Tensor]:
    return _quantized(x_TI, input_group_size, dtype)


@op(f"gelu_quantize(Tensor x, bool approximate, {HOW}) -> (Tensor, Tensor)", shapes=_gelu_shapes)
def gelu_quantize(
    x_TI: Tensor, approximate: bool, input_scale: float, input_group_size: int, dtype: str
) -> tuple[Tensor, Tensor]:
    """gelu(x), and its scales float32 [T, G]."""
    return quantize_by_reference(activation.gelu.reference(x_TI, approximate), input_scale, input_group_size, dtype)


def how_on_gpu(input_scale: float, group_size: int, dtype: str, is_batch_invariant: bool = False) -> "Quantized":
    """What quantizes for a product in E4M3 on a GPU may leave one row as it is: linear_fp8 multiplies either there."""
    from slipstream.kernels.triton.rows import Quantized

    return Quantized(input_scale, group_size, dtype, dtype == "float8_e4m3fn" and not is_batch_invariant)


@kernel(rms_norm_quantize, "triton", on_gpu_with_fp8)
def rms_norm_quantize_triton(
    x_TH: Tensor, weight_H: Tensor, eps: float, weight_offset: float, input_scale: float, input_group_size: int,
    dtype: str, is_batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from slipstream.kernels.triton import rows

    how = how_on_gpu(input_scale, input_group_size, dtype, is_batch_invariant)
    return rows.norm(x_TH, None, weight_H, None, eps, weight_offset=weight_offset, how=how)[:2]


@kernel(add_rms_norm_quantize, "triton", on_gpu_with_fp8)
def add_rms_norm_quantize_triton(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float, weight_offset: float, input_scale: float,
    input_group_size: int, dtype: str, is_batch_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from slipstream.kernels.triton import rows

    how = how_on_gpu(input_scale, input_group_size, dtype, is_batch_invariant)
    return rows.norm(x_TH, residual_TH, weight_H, None, eps, weight_offset=weight_offset, how=how)


@kernel(layer_norm_quantize, "triton", on_gpu_with_fp8)
def layer_norm_quantize_triton(
    x_TH: Tensor, weight_H: Tensor, bias_H: Tensor | None, eps: float, input_scale: float, input_group_size: int,
    dtype: str, is_batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from slipstream.kernels.triton import rows

    how = how_on_gpu(input_scale, input_group_size, dtype, is_batch_invariant)
    return rows.norm(x_TH, None, weight_H, bias_H, eps, is_layer=True, how=how)[:2]


@kernel(add_layer_norm_quantize, "triton", on_gpu_with_fp8)
def add_layer_norm_quantize_triton(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor | None, eps: float, input_scale: float,
    input_group_size: int, dtype: str, is_batch_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from slipstream.kernels.triton import rows

    how = how_on_gpu(input_scale, input_group_size, dtype, is_batch_invariant)
    return rows.norm(x_TH, residual_TH, weight_H, bias_H, eps, is_layer=True, how=how)


@kernel(silu_and_mul_quantize, "triton", on_gpu_with_fp8)
def silu_and_mul_quantize_triton(
    x_TI2: Tensor, input_scale: float, input_group_size: int, dtype: str, is_batch_invariant: bool = False
) -> tuple[Tensor, Tensor]:
    from slipstream.kernels.triton import rows

    return rows.activate(
        x_TI2, "silu", is_gated=True, how=how_on_gpu(input_scale, input_group_size, dtype, is_batch_invariant)
    )


@kernel(gelu_and_mul_quantize, "triton", on_gpu_with_fp8)
def gelu_and_mul_quantize_triton(
    x_TI2: Tensor,
    approximate: bool,
    input_scale: float,
    input_group_size: int,
    dtype: str,
    is_batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    from slipstream.kernels.triton import rows

    name = "gelu_tanh" if approximate else "gelu"
    how = how_on_gpu(input_scale, input_group_size, dtype, is_batch_invariant)
    return rows.activate(x_TI2, name, is_gated=True, how=how)


@kernel(gelu_quantize, "triton", on_gpu_with_fp8)
def gelu_quantize_triton(
    x_TI: Tensor,
    approximate: bool,
    input_scale: float,
    input_group_size: int,
    dtype: str,
    is_batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    from slipstream.kernels.triton import rows

    name = "gelu_tanh" if approximate else "gelu"
    how = how_on_gpu(input_scale, input_group_size, dtype, is_batch_invariant)
    return rows.activate(x_TI, name, is_gated=False, how=how)


for each in (
    rms_norm_quantize, add_rms_norm_quantize, layer_norm_quantize, add_layer_norm_quantize, silu_and_mul_quantize,
    gelu_and_mul_quantize, gelu_quantize,
):  # fmt: skip
    native(each, lambda kinds, how: how["dtype"] == "int8")


def has_whole_panels(num_out: int, group_size: int) -> bool:
    """Whether each group of the result, and its part of the gate, is some panels of the weight."""
    return group_size > 0 and group_size % ROWS == 0 and num_out % (2 * group_size) == 0


native(
    linear_panels_silu_and_mul_quantize,
    lambda kinds, how: has_whole_panels(how["num_out"], how["output_group_size"]),
    x=("int8",),
    panels=("uint8",),
    scale=("float32", "float16"),
    shift=("float32", "float16"),
)
