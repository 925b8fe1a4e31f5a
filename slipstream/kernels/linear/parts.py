"""What each format means: a packed weight back as numbers, and the op that rounds what it is multiplied with."""

import torch
from torch import Tensor

from slipstream.kernels.linear import nvfp4, w4a8, w4a16
from slipstream.kernels.linear.groups import dequantize, shifted
from slipstream.kernels.registry import Op, known_ops
from slipstream.schema.format import INTEGERS_OF_4_BITS, QUANTIZES_ACTIVATIONS, WeightFormat


def dense_weight(format: WeightFormat, parts: dict[str, Tensor], num_in: int) -> Tensor:
    """The weight [N, num_in], or the stack of such, in float32, from its parts by name (schema/format.py)."""
    packed, scale, zero, order = (parts.get(name) for name in ("packed", "scale", "zero", "order"))
    assert packed is not None and scale is not None
    if packed.ndim == 3:
        return torch.stack([dense_weight(format, one_of(parts, each), num_in) for each in range(len(packed))])
    if format.kind == "nvfp4a16":
        return nvfp4.weight(packed, scale, parts["row_scale"], num_in)
    if format.kind == "w4a8":
        return w4a8.weight(packed, scale, parts.get("shift"), format.group_size, num_in)
    if format.kind in INTEGERS_OF_4_BITS:
        return w4a16.weight(packed, scale, zero, order, format.group_size, num_in)
    return shifted(dequantize(packed, scale, zero, format.group_size, order), parts.get("shift"), format.group_size)


def one_of(parts: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """The parts of one weight of a stack, whose weights share the order of their columns."""
    return {name: part if name == "order" else part[index] for name, part in parts.items()}


def rounding_op(kind: str) -> Op:
    """Of a format of QUANTIZES_ACTIVATIONS: (x, input_scale, input_group_size) → numbers and their scales."""
    return known_ops()[f"quantize_{QUANTIZES_ACTIVATIONS[kind]}"]
