"""Activations, alone and gated: SiLU, and GELU (arXiv:1606.08415) exact or by its tanh approximation."""

from torch import Tensor
from torch.nn import functional

from slipstream.kernels.cpu.library import native
from slipstream.kernels.fits import need, need_floats
from slipstream.kernels.registry import kernel, on_gpu, op


def _like_first(x: Tensor, *_: object, **__: object) -> Tensor:
    need_floats(x=x)
    return x.new_empty(x.shape)


@op("silu(Tensor x) -> Tensor", shapes=_like_first, is_row_by_row=True)
def silu(x: Tensor) -> Tensor:
    return functional.silu(x)


@op("gelu(Tensor x, bool approximate) -> Tensor", shapes=_like_first, is_row_by_row=True)
def gelu(x: Tensor, approximate: bool) -> Tensor:
    return functional.gelu(x, approximate="tanh" if approximate else "none")


def half_columns(x_TI2: Tensor, *_: object, **__: object) -> Tensor:
    need_floats(x=x_TI2)
    num_tokens, num_columns = x_TI2.shape
    need(num_columns % 2 == 0, "x must have an even number of columns")
    return x_TI2.new_empty(num_tokens, num_columns // 2)


@op("silu_and_mul(Tensor x) -> Tensor", shapes=half_columns)
def silu_and_mul(x_TI2: Tensor) -> Tensor:
    """silu(gate) * up, where gate and up are the two halves of each row (SwiGLU, arXiv:2002.05202)."""
    gate_TI, up_TI = x_TI2.chunk(2, dim=1)
    return functional.silu(gate_TI).mul_(up_TI)


@op("gelu_and_mul(Tensor x, bool approximate) -> Tensor", shapes=half_columns)
def gelu_and_mul(x_TI2: Tensor, approximate: bool) -> Tensor:
    """gelu(gate) * up, where gate and up are the two halves of each row (GEGLU, arXiv:2002.05202)."""
    gate_TI, up_TI = x_TI2.chunk(2, dim=1)
    return gelu.reference(gate_TI, approximate).mul_(up_TI)


@kernel(silu_and_mul, "triton", on_gpu, is_row_by_row=True)
def silu_and_mul_triton(x_TI2: Tensor) -> Tensor:
    from slipstream.kernels.triton import rows

    return rows.activate(x_TI2, "silu", is_gated=True)[0]


@kernel(gelu_and_mul, "triton", on_gpu, is_row_by_row=True)
def gelu_and_mul_triton(x_TI2: Tensor, approximate: bool) -> Tensor:
    from slipstream.kernels.triton import rows

    return rows.activate(x_TI2, "gelu_tanh" if approximate else "gelu", is_gated=True)[0]


for each in (silu, gelu, silu_and_mul, gelu_and_mul):
    native(each)
