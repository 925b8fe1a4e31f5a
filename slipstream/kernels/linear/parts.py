"""A packed weight back as numbers, whatever its format."""

from torch import Tensor

from slipstream.kernels.linear import w4a16
from slipstream.kernels.linear.groups import dequantize
from slipstream.schema.format import WeightFormat


def dense_weight(format: WeightFormat, parts: dict[str, Tensor], num_in: int) -> Tensor:
    """The weight [N, num_in] in float32, from its parts by name (schema/format.py)."""
    packed, scale, zero, order = (parts.get(name) for name in ("packed", "scale", "zero", "order"))
    assert packed is not None and scale is not None
    if format.kind == "w4a16":
        return w4a16.weight(packed, scale, zero, order, format.group_size, num_in)
    return dequantize(packed, scale, zero, format.group_size, order)
