"""A rank's part of a weight, read as the engine is written: a range of its rows or of its columns."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from slipstream.schema.format import PART_NAMES, WeightFormat

Reader = Callable[[str], Tensor]


@dataclass(frozen=True)
class Cut:
    """start:stop along a dimension of the weight; the last one has its columns, the one before its rows.

    order_of: a weight in act-order whose columns these are (or the rows that make them): start:stop then counts them
    in the order in which it stores them, in which groups are whole.
    like: of another weight that must be in one format with this one, and whose columns are cut.
    """

    dim: int
    start: int
    stop: int
    order_of: str = ""
    like: tuple[int, int] | None = None  # group_size and input_group_size

    def of(self, tensor: Tensor, read: Reader) -> Tensor:
        if not self.order_of:
            return tensor.narrow(self.dim, self.start, self.stop - self.start).contiguous()
        order_K = read(f"{self.order_of}.order")[self.start : self.stop]
        return tensor.index_select(self.dim, order_K.long())


def cut_format(format: WeightFormat, shape: tuple[int, ...], cut: Cut) -> WeightFormat:
    """The format of a part. A cut through a group of columns leaves smaller groups, which repeat its scale."""
    if cut.like is not None:
        return replace(format, group_size=cut.like[0], input_group_size=cut.like[1])
    if not _is_of_columns(cut, shape):
        return format
    return replace(
        format,
        group_size=_fitting(format.group_size, shape[-1], cut),
        input_group_size=_fitting(format.input_group_size, shape[-1], cut),
        order="",
    )


def cut_reader(
    read: Reader,
    cuts: Mapping[str, Cut],
    formats: Mapping[str, WeightFormat],
    shapes: Mapping[str, tuple[int, ...]],
) -> Reader:
    """Reads each weight, or part of a packed one, as `cuts` have it. formats and shapes: those of whole weights."""

    def read_cut(name: str) -> Tensor:
        weight, _, part = name.rpartition(".")
        if part not in PART_NAMES or weight not in formats:
            weight, part = name, ""
        cut = cuts.get(weight)
        if cut is None:
            return read(name)
        if part == "order":
            return read(name)
        if part and _is_of_columns(cut, shapes[weight]):
            return _columns_of_part(part, read(name), cut, formats[weight], shapes[weight][-1])
        tensor = read(name)
        if part in ("scale", "zero", "shift") and cut.like is not None:
            tensor = _in_smaller_groups(tensor, formats[weight].group_size, cut.like[0], shapes[weight][-1])
        return cut.of(tensor, read)

    return read_cut


def _in_smaller_groups(tensor: Tensor, group_size: int, smaller: int, num_columns: int) -> Tensor:
    if group_size == smaller:
        return tensor
    return tensor.repeat_interleave(group_size // smaller, -1)[..., : -(-num_columns // smaller)]


def _columns_of_part(part: str, tensor: Tensor, cut: Cut, format: WeightFormat, num_columns: int) -> Tensor:
    """Of an act-order weight, too: its columns are stored in that order."""
    if part == "row_scale":
        return tensor
    if part == "packed":
        size = 8 // format.bits
        assert cut.start % size == 0, f"{cut} begins in the middle of a byte"
    else:
        size = _fitting(format.group_size, num_columns, cut)
        if not size:
            return tensor
        tensor = _in_smaller_groups(tensor, format.group_size, size, num_columns)
    return tensor[..., cut.start // size : -(-cut.stop // size)].contiguous()


def _fitting(group_size: int, num_columns: int, cut: Cut) -> int:
    """The largest groups of which the cut goes through none."""
    ends = (cut.start, cut.stop if cut.stop < num_columns else 0)
    return math.gcd(group_size, *ends) if group_size else 0


def _is_of_columns(cut: Cut, shape: tuple[int, ...]) -> bool:
    return cut.dim == len(shape) - 1 > 0
