"""WeightFormat: how the weight of one linear is stored and run. A format says which numbers, never who chose them."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from slipstream.errors import CorruptFile

# Format → what one packed element is. "a16": activations stay as they are; "a8" and plain fp8: they are quantized too.
PACKED_DTYPES = {"w4a16": "uint8", "w8a16": "int8", "fp8a16": "float8_e4m3fn", "w8a8": "int8", "fp8": "float8_e4m3fn"}
QUANTIZES_ACTIVATIONS = ("w8a8", "fp8")
SCALE_DTYPES = ("float32", "bfloat16", "float16")
PART_NAMES = ("packed", "scale", "zero", "order")

PartType = tuple[tuple[int, ...], str]  # shape and dtype


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """The numbers behind a weight [N, K]: w[n, k] = (packed[n, k] - zero[n, g]) · scale[n, g], g = k // group_size.

    Every part but the order has one row for each of the N outputs, so weights of one format are joined, and split, by
    rows. Equal formats mean that one product may serve joined weights: what they must share (the order of the columns,
    the scale of their input) is part of the format.
    """

    kind: str
    group_size: int = 0  # columns of a row that share a scale; 0: all
    scale_dtype: str = "float32"
    has_zeros: bool = False  # else zero is 8 for 4 bits and 0 for 8
    order: str = ""  # act-order: a digest of the permutation of the columns; "": they are in their own order
    input_scale: float = 0.0  # of the activations, found at calibration; 0: measured in each step
    input_group_size: int = 0  # columns of an activation row that share a scale; 0: all

    def num_groups(self, num_in: int) -> int:
        return -(-num_in // self.group_size) if self.group_size else 1

    def parts(self, *shape: int) -> dict[str, PartType]:
        """Each part's shape and dtype, for a weight [num_out, num_in] or a stack of such, [num_experts, ...]."""
        *stack, num_out, num_in = shape
        columns = -(-num_in // 2) if self.kind == "w4a16" else num_in
        groups = (*stack, num_out, self.num_groups(num_in))
        found: dict[str, PartType] = {"packed": ((*stack, num_out, columns), PACKED_DTYPES[self.kind])}
        found["scale"] = (groups, self.scale_dtype)
        if self.has_zeros:
            found["zero"] = (groups, PACKED_DTYPES[self.kind])
        if self.order:
            found["order"] = ((num_in,), "int32")
        return found

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Self:
        """Raises CorruptFile for what no reader of ours writes."""
        kinds = {each.name: each.type for each in fields(cls)}
        ok = isinstance(values, dict) and values.keys() == kinds.keys()
        if not ok or not all(type(values[name]) is kind for name, kind in kinds.items()):
            raise CorruptFile(f"{where}: {str(values)[:80]!r} is no weight format; convert the model again.")
        format = cls(**values)
        sizes = (format.group_size, format.input_group_size)
        sane = format.kind in PACKED_DTYPES and format.scale_dtype in SCALE_DTYPES and len(format.order) <= 64
        if not sane or not all(0 <= size < 2**31 for size in sizes) or not 0 <= format.input_scale < 1e30:
            raise CorruptFile(f"{where}: {str(values)[:80]!r} is no weight format; convert the model again.")
        return format
