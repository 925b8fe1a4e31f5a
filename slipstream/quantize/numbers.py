"""Round to nearest: which scales map a weight onto the numbers of a format, and the weight in these numbers.

Every method ends here: it has chosen what to round (quantize/awq.py and others), and this says to what.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.errors import ModelError
from slipstream.kernels.linear import nvfp4, w4a16
from slipstream.kernels.linear.groups import SMALLEST_AMAX, per_column
from slipstream.schema.format import INTEGERS_OF_4_BITS, WeightFormat

_INT4, _INT8, _E4M3 = (0, 15), (-128, 127), (-448, 448)
_RANGES = {
    "w4a16": _INT4, "w4afp8": _INT4, "w8a16": _INT8, "w8a8": _INT8, "fp8": _E4M3, "fp8a16": _E4M3,
    "nvfp4a16": (-nvfp4.LARGEST, nvfp4.LARGEST),
}  # fmt: skip
SMALLEST_E4M3 = 2.0**-9
_AT_ONCE = 1 << 20  # numbers of a weight: what is made of them on the way is several times as large


@dataclass(frozen=True)
class Scales:
    """w = (value - zero) · scale for each group of columns of a row: [N, G]. zero None: 8 for INT4, 0 for others."""

    scale_NG: Tensor
    zero_NG: Tensor | None = None
    row_scale: float = 1.0  # of NVFP4, all of whose scales are numbers of E4M3 times this


def find_scales(
    weight_NK: Tensor, format: WeightFormat, shrink: float | Tensor = 1.0, num_rows: int = 1, row_scale: float = 0.0
) -> Scales:
    """Scales by the largest and smallest number of each group, in float32 but rounded to the format's dtype.

    shrink: a share of that range, [N, G] or a number; what lies outside is cut off.  num_rows: that share a scale.
    row_scale: of NVFP4, where this is a part of a weight; 0: found here.
    """
    groups_NGC = grouped(weight_NK, format.group_size)
    lowest, largest = _RANGES[format.kind]
    if format.has_zeros:
        low_NG = groups_NGC.amin(2).clamp_max(0) * shrink  # 0 is among them, so that padding changes nothing
        high_NG = groups_NGC.amax(2).clamp_min(0) * shrink
        scale_NG = _stored((high_NG - low_NG).clamp_min(SMALLEST_AMAX) / (largest - lowest), format)
        zero_NG = (lowest - low_NG / scale_NG).round().clamp(lowest, largest)
        return Scales(scale_NG, zero_NG)
    amax_NG = _over_rows(groups_NGC.abs().amax(2), num_rows) * shrink
    if format.kind == "nvfp4a16":
        row_scale = row_scale or row_scale_of(weight_NK, format)
        # Columns that make up for others' errors may have grown beyond what row_scale was found for.
        scale_NG = (amax_NG / (largest * row_scale)).clamp(SMALLEST_E4M3, _E4M3[1]).to(torch.float8_e4m3fn)
        return Scales(scale_NG.float() * row_scale, None, row_scale)
    # 16 numbers are -8 to 7: half a step more than the largest is cut off, and all others are nearer.
    steps = 7.5 if format.kind in INTEGERS_OF_4_BITS else largest
    return Scales(_stored(amax_NG.clamp_min(SMALLEST_AMAX) / steps, format))


def row_scale_of(weight_NK: Tensor, format: WeightFormat) -> float:
    """Of NVFP4: with it the group of the largest number has the largest scale that E4M3 has. 1 for other formats."""
    if format.kind != "nvfp4a16":
        return 1.0
    largest = nvfp4.LARGEST * torch.finfo(torch.float8_e4m3fn).max
    return float(1 / (largest / weight_NK.abs().max().clamp_min(SMALLEST_AMAX)))  # an inverse: so some tools store it


def zero_of(scales: Scales, format: WeightFormat) -> Tensor | int:
    """[N, G], or one number for all."""
    return scales.zero_NG if scales.zero_NG is not None else 8 if format.kind in INTEGERS_OF_4_BITS else 0


def round_to(weight_NK: Tensor, scales: Scales, format: WeightFormat) -> Tensor:
    """The nearest number that the format has for each, in float32."""
    num_columns = weight_NK.shape[1]
    zero = zero_of(scales, format)
    if isinstance(zero, Tensor):
        zero = per_column(zero, num_columns, format.group_size)
    values_NK = weight_NK / per_column(scales.scale_NG, num_columns, format.group_size) + zero
    lowest, largest = _RANGES[format.kind]
    if format.kind.startswith("fp8"):
        return values_NK.clamp_(lowest, largest).to(torch.float8_e4m3fn).float()
    if format.kind == "nvfp4a16":
        return nvfp4.numbers_of(nvfp4.nearest(values_NK))
    return values_NK.round_().clamp_(lowest, largest)


def from_values(values_NK: Tensor, scales: Scales, format: WeightFormat) -> Tensor:
    """The weight that the numbers stand for, in float32."""
    num_columns = values_NK.shape[1]
    zero = zero_of(scales, format)
    if isinstance(zero, Tensor):
        zero = per_column(zero, num_columns, format.group_size)
    return (values_NK - zero) * per_column(scales.scale_NG, num_columns, format.group_size)


def to_parts(values_NK: Tensor, scales: Scales, format: WeightFormat) -> dict[str, Tensor]:
    """As a checkpoint stores them (schema/format.py: WeightFormat)."""
    if format.kind == "nvfp4a16":
        return {
            "packed": w4a16.pack(nvfp4.nearest(values_NK)),
            "scale": (scales.scale_NG / scales.row_scale).to(torch.float8_e4m3fn),
            "row_scale": torch.full((len(values_NK), 1), scales.row_scale, device=values_NK.device),
        }
    if format.kind in INTEGERS_OF_4_BITS:
        packed = w4a16.pack(values_NK.to(torch.uint8))
    elif format.kind.startswith("fp8"):
        packed = values_NK.to(torch.float8_e4m3fn)
    else:
        packed = values_NK.to(torch.int8)
    parts = {"packed": packed, "scale": scales.scale_NG.to(getattr(torch, format.scale_dtype)).contiguous()}
    if scales.zero_NG is not None:
        parts["zero"] = scales.zero_NG.to(packed.dtype).contiguous()
    return parts


def parts_by_rows(
    weight_NK: Tensor, format: WeightFormat, scales_of: Callable[[Tensor], Scales], num_rows: int = 1
) -> dict[str, Tensor]:
    """to_parts of the weight rounded to these scales, some rows at a time; num_rows: that share a scale."""
    made = []
    for rows in _slices(weight_NK, num_rows):
        scales = scales_of(weight_NK[rows])
        made.append(to_parts(round_to(weight_NK[rows], scales, format), scales, format))
    return {name: torch.cat([each[name] for each in made]) for name in made[0]}


def nearest_parts(weight_NK: Tensor, format: WeightFormat, num_rows: int = 1) -> dict[str, Tensor]:
    """The same of the scales that find_scales finds."""
    row_scale = row_scale_of(weight_NK, format)
    return parts_by_rows(
        weight_NK, format, lambda rows_NK: find_scales(rows_NK, format, num_rows=num_rows, row_scale=row_scale),
        num_rows,
    )  # fmt: skip


def nearest(weight_NK: Tensor, format: WeightFormat, num_rows: int = 1, scale: Tensor | float = 1.0) -> Tensor:
    """The weight, or each of a stack, rounded with its columns scaled, as products read it, in float32."""
    if weight_NK.ndim == 3:
        return torch.stack([nearest(each_NK, format, num_rows, scale) for each_NK in weight_NK])
    found_NK, row_scale = torch.empty_like(weight_NK), row_scale_of(weight_NK, format)
    for rows in _slices(weight_NK, num_rows):
        scaled_NK = weight_NK[rows] * scale
        scales = find_scales(scaled_NK, format, num_rows=num_rows, row_scale=row_scale)
        torch.div(from_values(round_to(scaled_NK, scales, format), scales, format), scale, out=found_NK[rows])
    return found_NK


def _slices(weight_NK: Tensor, num_rows: int) -> Iterator[slice]:
    """Rows, in multiples of so many."""
    step = max(1, _AT_ONCE // (weight_NK.shape[1] * num_rows)) * num_rows
    return (slice(first, first + step) for first in range(0, len(weight_NK), step))


def check_weight(name: str, weight: Tensor) -> None:
    """Raises ModelError for what no scale can map."""
    if not weight.sum().isfinite():  # which a weight of any size has in no more memory
        raise ModelError(f"{name} has numbers that are NaN or infinite; such a model cannot be quantized.")


def _stored(scale_NG: Tensor, format: WeightFormat) -> Tensor:
    """As it will be read again: numbers are rounded for that scale, not for another one."""
    return scale_NG.to(getattr(torch, format.scale_dtype)).float().clamp_min(torch.finfo(torch.float16).tiny)


def grouped(weight_NK: Tensor, group_size: int) -> Tensor:
    """[N, G, columns of a group]; what the last group lacks is 0."""
    num_columns = weight_NK.shape[1]
    size = group_size or num_columns
    return functional.pad(weight_NK, (0, -num_columns % size)).unflatten(1, (-1, size))


def _over_rows(amax_NG: Tensor, num_rows: int) -> Tensor:
    """The largest of so many rows, for each of them."""
    if num_rows == 1:
        return amax_NG
    count = len(amax_NG)
    padded = functional.pad(amax_NG, (0, 0, 0, -count % num_rows)).unflatten(0, (-1, num_rows))
    return padded.amax(1).repeat_interleave(num_rows, 0)[:count]
