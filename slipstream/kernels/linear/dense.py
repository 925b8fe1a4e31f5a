"""y = x Wᵀ + b with weights stored as they are used (float32, bfloat16, float16)."""

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.kernels.cpu.library import native
from slipstream.kernels.fits import need_floats, need_same_dtype, need_shape
from slipstream.kernels.linear.groups import product
from slipstream.kernels.registry import kernel, on_gpu, op


def _linear_shapes(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    need_floats(x=x_MK)
    need_same_dtype(x_MK, weight=weight_NK, bias=bias_N)
    num_rows, num_in = x_MK.shape
    num_out = weight_NK.shape[0]
    need_shape("weight", weight_NK, num_out, num_in)
    need_shape("bias", bias_N, num_out)
    return x_MK.new_empty(num_rows, num_out)


@op("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", shapes=_linear_shapes)
def linear(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    return functional.linear(x_MK, weight_NK, bias_N)


@kernel(linear, "weight_first", lambda device, _dtype: device.type == "cpu")
def linear_weight_first(x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """(W xᵀ)ᵀ: with few rows the library then spreads W, not x, over the threads.

    One row is doubled, since for a vector the library takes a path of one thread (11 instead of 33 GB/s of W where this
    was measured; a view of stride 0 instead of the copy gives 3).
    """
    num_rows = x_MK.shape[0]
    columns_KM = (torch.cat([x_MK, x_MK]) if num_rows == 1 else x_MK).t()
    y_MN = torch.mm(weight_NK, columns_KM).t()[:num_rows]
    return y_MN if bias_N is None else y_MN + bias_N


@kernel(linear, "triton", on_gpu)
def linear_triton(
    x_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, is_batch_invariant: bool = False
) -> Tensor:
    """For few rows; cuBLAS has no equal for many, but chooses the order of its sums by their number."""
    from slipstream.kernels.triton import linear as skinny

    weight = skinny.Weight(weight_NK)
    if skinny.supports(x_MK, weight) and (x_MK.shape[0] <= 64 or is_batch_invariant):
        return skinny.product(x_MK, weight, bias_N, x_MK.dtype, is_batch_invariant=is_batch_invariant)
    if is_batch_invariant:
        return product(x_MK, weight_NK.float(), bias_N, x_MK.dtype, is_batch_invariant=True)
    return functional.linear(x_MK, weight_NK, bias_N)


native(linear)
