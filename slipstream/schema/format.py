"""WeightFormat: how the weight of one linear is stored and run. A format says which numbers, never who chose them."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from slipstream.errors import CorruptFile

# Format → what one packed element is; uint8: two numbers of 4 bits. "a16": activations stay as they are.
PACKED_DTYPES = {
    "w4a16": "uint8", "w8a16": "int8", "fp8a16": "float8_e4m3fn", "nvfp4a16": "uint8",
    "w8a8": "int8", "fp8": "float8_e4m3fn", "w4afp8": "uint8", "w4a8": "uint8",
}  # fmt: skip
# Format → the op, quantize_…, that does.
QUANTIZES_ACTIVATIONS = {"w8a8": "w8a8", "fp8": "fp8", "w4afp8": "fp8", "w4a8": "w8a8"}
INTEGERS_OF_4_BITS = ("w4a16", "w4afp8", "w4a8")
SHIFTED = ("w4a8", "w8a8")  # where they have zeros
SCALE_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn")
ITEM_SIZES = {"uint8": 1, "int8": 1, "float8_e4m3fn": 1, "float16": 2, "bfloat16": 2, "float32": 4, "int32": 4}
PART_NAMES = ("packed", "scale", "row_scale", "zero", "shift", "order")

PartType = tuple[tuple[int, ...], str]  # shape and dtype


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """The numbers behind a weight [N, K]: w[n, k] = (packed[n, k] - zero[n, g]) · scale[n, g], g = k // group_size.

    In nvfp4a16 numbers are E2M1, 16 share a scale in E4M3, and a row's row_scale multiplies all (NVIDIA's two levels).
    In w4a8 and w8a8 zeros are of any size, and stored as what they take off: packed · scale - shift (GGUF's Q4_1).
    Every part but the order has one row for each of the N outputs, so weights of one format are joined, and split, by
    rows. Equal formats mean that one product may serve joined weights: what they must share (the order of the columns,
    the scale of their input) is part of the format.
    """

    kind: str
    group_size: int = 0  # columns of a row that share a scale; 0: all
    scale_dtype: str = "float32"
    has_zeros: bool = False  # else zero is 8 for integers of 4 bits and 0 for all others
    order: str = ""  # act-order: a digest of the permutation of the columns; "": they are in their own order
    input_scale: float = 0.0  # of the activations, found at calibration; 0: measured in each step
    input_group_size: int = 0  # columns of an activation row that share a scale; 0: all

    @property
    def bits(self) -> int:
        """Of a packed number."""
        return 4 if PACKED_DTYPES[self.kind] == "uint8" else 8

    def num_groups(self, num_in: int) -> int:
        return -(-num_in // self.group_size) if self.group_size else 1

    def parts(self, *shape: int) -> dict[str, PartType]:
        """Each part's shape and dtype, for a weight [num_out, num_in] or a stack of such, [num_experts, ...]."""
        *stack, num_out, num_in = shape
        columns = -(-num_in * self.bits // 8)
        groups = (*stack, num_out, self.num_groups(num_in))
        found: dict[str, PartType] = {"packed": ((*stack, num_out, columns), PACKED_DTYPES[self.kind])}
        found["scale"] = (groups, self.scale_dtype)
        if self.kind == "nvfp4a16":
            found["row_scale"] = ((*stack, num_out, 1), "float32")
        if self.has_zeros and self.kind in SHIFTED:
            found["shift"] = (groups, self.scale_dtype)
        elif self.has_zeros:
            found["zero"] = (groups, PACKED_DTYPES[self.kind])
        if self.order:
            found["order"] = ((num_in,), "int32")
        return found

    def num_bytes(self, *shape: int) -> int:
        """Of all parts of a weight of this shape."""
        return sum(math.prod(sizes) * ITEM_SIZES[dtype] for sizes, dtype in self.parts(*shape).values())

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
        if format.kind == "nvfp4a16" or format.scale_dtype == "float8_e4m3fn":
            sane = format == NVFP4
        if not sane or not all(0 <= size < 2**31 for size in sizes) or not 0 <= format.input_scale < 1e30:
            raise CorruptFile(f"{where}: {str(values)[:80]!r} is no weight format; convert the model again.")
        return format


NVFP4 = WeightFormat(kind="nvfp4a16", group_size=16, scale_dtype="float8_e4m3fn")  # the only one of its kind
