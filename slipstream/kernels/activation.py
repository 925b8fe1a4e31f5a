"""SiLU, alone and gated."""

from torch import Tensor
from torch.nn import functional

from slipstream.kernels.registry import op


@op("silu(Tensor x) -> Tensor")
def silu(x: Tensor) -> Tensor:
    return functional.silu(x)


def _half_columns(x_TI2: Tensor) -> Tensor:
    return x_TI2.new_empty(x_TI2.shape[0], x_TI2.shape[1] // 2)


@op("silu_and_mul(Tensor x) -> Tensor", shapes=_half_columns)
def silu_and_mul(x_TI2: Tensor) -> Tensor:
    """silu(gate) * up, where gate and up are the two halves of each row (SwiGLU, arXiv:2002.05202)."""
    gate_TI, up_TI = x_TI2.chunk(2, dim=1)
    return functional.silu(gate_TI).mul_(up_TI)
