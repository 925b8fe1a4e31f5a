"""Where the ranks' parts meet, and at once the residual sum and the norm that read what they add up to.

On GPUs of one machine a few rows are read from the others' memory by the kernel that goes on with them: one launch
instead of two, and what was added up is never written (triton/rows.py).
"""

from typing import TYPE_CHECKING

from torch import Tensor

from slipstream.kernels import norm, quantized
from slipstream.kernels.collectives import ALONE, Ranks
from slipstream.kernels.registry import kernel, on_gpu, on_gpu_with_fp8, op

if TYPE_CHECKING:
    from slipstream.kernels.triton.rows import Quantized


@op(
    "reduce_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset) -> (Tensor, Tensor)",
    shapes=norm.add_rms_norm_shapes,
)
def reduce_add_rms_norm(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float, weight_offset: float, *, ranks: Ranks = ALONE
) -> tuple[Tensor, Tensor]:
    """add_rms_norm of all_reduce(x)"""
    x_TH = ranks.add_up(x_TH.contiguous())
    return norm.add_rms_norm.reference(x_TH, residual_TH, weight_H, eps, weight_offset)


@kernel(reduce_add_rms_norm, "triton", on_gpu)
def reduce_add_rms_norm_triton(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float, weight_offset: float, *, ranks: Ranks = ALONE
) -> tuple[Tensor, Tensor]:
    return _reduced(x_TH, residual_TH, weight_H, eps, weight_offset, None, ranks)[::2]


@op(
    "reduce_add_rms_norm_quantize(Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset, "
    f"{quantized.HOW}) -> (Tensor, Tensor, Tensor)",
    shapes=quantized.add_norm_shapes,
)
def reduce_add_rms_norm_quantize(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float, weight_offset: float, input_scale: float,
    input_group_size: int, dtype: str, *, ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """add_rms_norm_quantize of all_reduce(x)"""
    x_TH, how = ranks.add_up(x_TH.contiguous()), (input_scale, input_group_size, dtype)
    add_norm = quantized.add_rms_norm_quantize.reference
    return add_norm(x_TH, residual_TH, weight_H, eps, weight_offset, *how)


@kernel(reduce_add_rms_norm_quantize, "triton", on_gpu_with_fp8)
def reduce_add_rms_norm_quantize_triton(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float, weight_offset: float, input_scale: float,
    input_group_size: int, dtype: str, *, ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    how = quantized.how_on_gpu(input_scale, input_group_size, dtype)
    return _reduced(x_TH, residual_TH, weight_H, eps, weight_offset, how, ranks)


def _reduced(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float, weight_offset: float, how: "Quantized | None",
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(result, its scales, the sum)"""
    from slipstream.kernels.triton import rows

    x_TH = x_TH.contiguous()
    shown = ranks.shown_rows(x_TH)
    if shown is None:
        x_TH = ranks.add_up(x_TH)
    return rows.norm(x_TH, residual_TH, weight_H, None, eps, weight_offset=weight_offset, how=how, shown=shown)
