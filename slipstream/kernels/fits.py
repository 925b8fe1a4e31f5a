"""What ops ask of their arguments, for the functions that tell the shapes of what they make.

Kernels trust their arguments, and an engine's graph may come from anyone. So whatever would have a kernel read or write
beside its tensors, or make one of another shape than announced, is refused where shapes are told: before anything runs.
"""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def need(holds: bool, what: str) -> None:
    """Raises ValueError, which whoever asked for shapes puts into a sentence."""
    if not holds:
        raise ValueError(what)


def need_floats(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        need(tensor is None or tensor.dtype in FLOATS, f"{name} must be of floating-point numbers")


def need_same_dtype(x: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        need(tensor is None or tensor.dtype == x.dtype, f"{name} must be {x.dtype}")


def need_shape(name: str, tensor: Tensor | None, *shape: int) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, not {list(tensor.shape)}")


def need_heads(name: str, num_columns: int, head_dim: int) -> None:
    need(head_dim > 0 and num_columns % head_dim == 0, f"{name} must be of whole heads of {head_dim} numbers")
