"""RMSNorm (arXiv:1910.07467) and LayerNorm (arXiv:1607.06450), alone and with the residual sum before; unit rows."""

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.kernels.cpu.library import native
from slipstream.kernels.fits import need_floats, need_heads, need_same_dtype, need_shape
from slipstream.kernels.registry import kernel, on_gpu, op

ROWS_AT_ONCE = 4096  # of a weight, in float32: the head of a large model is most of a gigabyte in bfloat16


def rms_norm_shapes(x_TN: Tensor, weight_H: Tensor, *_: object, **__: object) -> Tensor:
    need_floats(x=x_TN, weight=weight_H)
    (num_tokens, num_columns), (size,) = x_TN.shape, weight_H.shape
    need_heads("x", num_columns, size)
    return x_TN.new_empty(num_tokens, num_columns)


@op("rms_norm(Tensor x, Tensor weight, float eps, float weight_offset) -> Tensor", shapes=rms_norm_shapes)
def rms_norm(x_TN: Tensor, weight_H: Tensor, eps: float, weight_offset: float) -> Tensor:
    """Normalise each group of len(weight) columns: a whole row, or one attention head of it.

    The mean square is taken in float32 and the result rounded before the weight, as Hugging Face's Llama does. Where
    weights are stored as their distance from weight_offset (Gemma: 1), the product is taken in float32, as there.
    """
    x = x_TN.unflatten(1, (-1, weight_H.shape[0])).float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
    if weight_offset:
        return (normed * (weight_H.float() + weight_offset)).to(x_TN.dtype).flatten(1)
    return normed.to(x_TN.dtype).mul_(weight_H).flatten(1)


def add_rms_norm_shapes(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, *_: object, **__: object
) -> tuple[Tensor, Tensor]:
    _need_residual(x_TH, residual_TH)
    return rms_norm_shapes(x_TH, weight_H), x_TH.new_empty(x_TH.shape)


def _need_residual(x_TH: Tensor, residual_TH: Tensor) -> None:
    need_same_dtype(x_TH, residual=residual_TH)
    need_shape("residual", residual_TH, *x_TH.shape)


@op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset) -> (Tensor, Tensor)",
    shapes=add_rms_norm_shapes,
)
def add_rms_norm(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual)"""
    total_TH = x_TH + residual_TH
    return rms_norm.reference(total_TH, weight_H, eps, weight_offset), total_TH


@kernel(rms_norm, "triton", on_gpu, is_row_by_row=True)
def rms_norm_triton(x_TN: Tensor, weight_H: Tensor, eps: float, weight_offset: float) -> Tensor:
    from slipstream.kernels.triton import rows

    return rows.norm(x_TN, None, weight_H, None, eps, weight_offset=weight_offset)[0]


@kernel(add_rms_norm, "triton", on_gpu, is_row_by_row=True)
def add_rms_norm_triton(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    from slipstream.kernels.triton import rows

    normed_TH, _, total_TH = rows.norm(x_TH, residual_TH, weight_H, None, eps, weight_offset=weight_offset)
    return normed_TH, total_TH


@op("normalize_rows(Tensor weight) -> Tensor")
def normalize_rows(weight_NK: Tensor) -> Tensor:
    """Each row scaled to length 1; a row of zeros stays."""
    out_NK = torch.empty_like(weight_NK)
    for weight_RK, out_RK in zip(weight_NK.split(ROWS_AT_ONCE), out_NK.split(ROWS_AT_ONCE), strict=True):
        out_RK.copy_(functional.normalize(weight_RK.float(), dim=1))
    return out_NK


def layer_norm_shapes(x_TH: Tensor, weight_H: Tensor, bias_H: Tensor | None, *_: object, **__: object) -> Tensor:
    need_floats(x=x_TH)
    need_same_dtype(x_TH, weight=weight_H, bias=bias_H)
    num_tokens, size = x_TH.shape[:2]
    need_shape("x", x_TH, num_tokens, size)
    need_shape("weight", weight_H, size)
    need_shape("bias", bias_H, size)
    return x_TH.new_empty(x_TH.shape)


@op("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor", shapes=layer_norm_shapes)
def layer_norm(x_TH: Tensor, weight_H: Tensor, bias_H: Tensor | None, eps: float) -> Tensor:
    return functional.layer_norm(x_TH, weight_H.shape, weight_H, bias_H, eps)


def add_layer_norm_shapes(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor | None, *_: object, **__: object
) -> tuple[Tensor, Tensor]:
    _need_residual(x_TH, residual_TH)
    return layer_norm_shapes(x_TH, weight_H, bias_H), x_TH.new_empty(x_TH.shape)


@op(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    shapes=add_layer_norm_shapes,
)
def add_layer_norm(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual)"""
    total_TH = x_TH + residual_TH
    return layer_norm.reference(total_TH, weight_H, bias_H, eps), total_TH


@kernel(layer_norm, "triton", on_gpu, is_row_by_row=True)
def layer_norm_triton(x_TH: Tensor, weight_H: Tensor, bias_H: Tensor | None, eps: float) -> Tensor:
    from slipstream.kernels.triton import rows

    return rows.norm(x_TH, None, weight_H, bias_H, eps, is_layer=True)[0]


@kernel(add_layer_norm, "triton", on_gpu, is_row_by_row=True)
def add_layer_norm_triton(
    x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, bias_H: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    from slipstream.kernels.triton import rows

    normed_TH, _, total_TH = rows.norm(x_TH, residual_TH, weight_H, bias_H, eps, is_layer=True)
    return normed_TH, total_TH


for each in (rms_norm, add_rms_norm, layer_norm, add_layer_norm):
    native(each)
