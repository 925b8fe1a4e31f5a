"""From what the tools store to our packing: checked shapes, bits out of words, rows first.

Everything here is lazy: a reader checks names, shapes and dtypes when the model is opened, and converts one tensor at a
time when it is asked for. What two linears must share to be joined (an order of columns, a scale of their input) is
read at once.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from slipstream.checkpoint.packed import PackedLinear
from slipstream.checkpoint.tensors import TensorSource
from slipstream.errors import CorruptFile, UnsupportedModel
from slipstream.kernels.linear import w4a16
from slipstream.schema.format import NVFP4, WeightFormat

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn


class Parts:
    """The tensors of a model by name, each checked before it is used; `used` is what must not count as left over."""

    def __init__(self, tensors: TensorSource) -> None:
        self.tensors = tensors
        self.names = dict.fromkeys(tensors.names())
        self.used: set[str] = set()

    def owners(self, suffix: str) -> list[str]:
        """What comes before the suffix, in all names that end with it."""
        return [name.removesuffix(suffix) for name in self.names if name.endswith(suffix)]

    def use(self, name: str, shape: Iterable[int | None], dtypes: Iterable[torch.dtype]) -> Callable[[], Tensor]:
        """A function that reads the tensor. Raises CorruptFile unless it has this shape and one of the dtypes."""
        shape, dtypes = tuple(shape), tuple(dtypes)
        asked = f"{' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} {_text(shape)}"
        if name not in self.names:
            raise CorruptFile(f"The model lacks the tensor {name}, which must be {asked}.")
        actual, dtype = self.tensors.shape(name), self.tensors.dtype(name)
        fits = len(actual) == len(shape) and all(want in (None, size) for want, size in zip(shape, actual, strict=True))
        if not fits or dtype not in dtypes:
            found = f"{str(dtype).removeprefix('torch.')} {_text(actual)}"
            raise CorruptFile(f"The tensor {name} is {found}; by its quantization it must be {asked}.")
        self.used.add(name)
        return lambda: self.tensors.read(name)

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """The shape of what must be there with so many dimensions, none of them 0."""
        if name not in self.names:
            raise CorruptFile(f"The model lacks the tensor {name}, which its quantization asks for.")
        shape = self.tensors.shape(name)
        if len(shape) != rank or 0 in shape:
            raise CorruptFile(f"The tensor {name} is {list(shape)}; it must have {rank} dimensions, none of them 0.")
        return shape

    def scalar(self, name: str) -> float:
        """A positive number that stands alone, read now."""
        shape = self.tensors.shape(name) if name in self.names else ()
        value = float(self.use(name, (1,) * len(shape), FLOATS)().reshape(()))
        if not 0 < value < 1e30:
            raise CorruptFile(f"The tensor {name} is {value}; a scale must be above 0.")
        return value

    def scale_dtype(self, name: str) -> str:
        return str(self.tensors.dtype(name)).removeprefix("torch.") if name in self.names else "float32"


def _text(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


def values_of_words(words_RW: Tensor, bits: int, count: int) -> Tensor:
    """int32 words → uint8 values [R, count]: value i of a row is its bits [i · bits, (i + 1) · bits), lowest first."""
    bytes_RB = words_RW.contiguous().view(torch.uint8)
    if bits == 8:
        return bytes_RB[:, :count]
    if bits == 4:
        return w4a16.unpack(bytes_RB, count)
    single = np.unpackbits(bytes_RB.numpy(), axis=1, count=count * bits, bitorder="little")
    values = np.zeros((len(single), count), np.uint8)
    for bit in range(bits):
        values |= single[:, bit::bits] << bit
    return torch.from_numpy(values)


def words_of_values(values_RC: Tensor, bits: int) -> Tensor:
    """uint8 values of 4 or 8 bits → int32 words [R, ⌈C·bits/32⌉], the first value lowest."""
    packed = w4a16.pack(values_RC) if bits == 4 else values_RC
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4))
    return padded.clone(memory_format=torch.contiguous_format).view(torch.int32)


def column_order(group_of_K: Tensor, group_size: int, name: str) -> Tensor | None:
    """The columns sorted by their group, int32 [K], or None where they are sorted already."""
    num_columns = len(group_of_K)
    sorted_groups = torch.arange(num_columns, dtype=torch.int32) // (group_size or num_columns)
    if torch.equal(group_of_K.int(), sorted_groups):
        return None
    order_K = torch.argsort(group_of_K, stable=True)
    if not torch.equal(group_of_K[order_K].int(), sorted_groups):
        raise CorruptFile(
            f"The tensor {name} must put {group_size or num_columns} columns into each group from 0 to "
            f"{int(sorted_groups[-1])}; it has groups from {int(group_of_K.min())} to {int(group_of_K.max())}."
        )
    return order_K.int()


def digest_of_order(order_K: Tensor) -> str:
    """For WeightFormat.order; int32."""
    return hashlib.sha256(order_K.numpy().tobytes()).hexdigest()[:16]


def integer_linear(
    bits: int, shape: tuple[int, int], group_size: int, scale_dtype: str, *,
    values: Callable[[], Tensor], scale: Callable[[], Tensor], zero: Callable[[], Tensor] | None,
    order_K: Tensor | None = None,
) -> PackedLinear:  # fmt: skip
    """Weights of 1 to 8 bits, activations as they are.

    values: uint8 [N, K] from 0 to 2^bits - 1, columns in their own order; scale [N, G]; zero: uint8 [N, G], or None
    where it is 2^(bits - 1). Up to 4 bits become w4a16, more w8a16.
    """
    kind = "w4a16" if bits <= 4 else "w8a16"
    middle = 1 << (bits - 1)
    format = WeightFormat(
        kind=kind, group_size=group_size, scale_dtype=scale_dtype, has_zeros=zero is not None,
        order="" if order_K is None else digest_of_order(order_K),
    )  # fmt: skip

    def packed() -> Tensor:
        found = values() if order_K is None else values()[:, order_K.long()]
        if kind == "w4a16":
            return w4a16.pack(found if zero is not None else found + (w4a16.SYMMETRIC_ZERO - middle))
        return (found.to(torch.int16) - middle).to(torch.int8)

    def zeros() -> Tensor:
        assert zero is not None
        return zero() if kind == "w4a16" else (zero().to(torch.int16) - middle).to(torch.int8)

    parts = {"packed": packed, "scale": lambda: scale().contiguous()}
    if zero is not None:
        parts["zero"] = lambda: zeros().contiguous()
    if order_K is not None:
        parts["order"] = lambda: order_K
    return PackedLinear(format, shape, parts)


def eight_bit_linear(
    parts: Parts, owner: str, kind: str, scale_name: str, *, block: tuple[int, int] | None = None, group_size: int = 0,
    input_scale: float = 0.0, input_group_size: int = 0,
) -> PackedLinear:  # fmt: skip
    """A weight of int8 or E4M3 as it is stored, [N, K].

    Its scales: one; one for each row ([N] or [N, 1]), for each group of a row ([N, G]), or for each block.
    """
    name = f"{owner}.weight"
    num_out, num_in = parts.shape(name, 2)
    dtype = torch.int8 if kind.startswith("w8") else FP8
    packed = parts.use(name, (num_out, num_in), (dtype,))
    group_size = block[1] if block else group_size
    if group_size >= num_in:
        group_size = 0
    num_groups = -(-num_in // group_size) if group_size else 1
    found = parts.tensors.shape(scale_name) if scale_name in parts.names else ()
    if block:
        read = parts.use(scale_name, (-(-num_out // block[0]), num_groups), FLOATS)
    elif math.prod(found) == 1 and not group_size:
        read = parts.use(scale_name, found, FLOATS)
    elif len(found) == 1:
        read = parts.use(scale_name, (num_out,), FLOATS)
    else:
        read = parts.use(scale_name, (num_out, num_groups), FLOATS)

    def scale() -> Tensor:
        values = read().float()
        if block:
            return values.repeat_interleave(block[0], dim=0)[:num_out].contiguous()
        return values.reshape(-1, num_groups).expand(num_out, num_groups).contiguous()

    format = WeightFormat(
        kind=kind, group_size=group_size, input_scale=input_scale, input_group_size=input_group_size
    )  # fmt: skip
    return PackedLinear(format, (num_out, num_in), {"packed": packed, "scale": scale})


def nvfp4_linear(
    parts: Parts, owner: str, packed_name: str, global_name: str, *, is_inverse: bool = False
) -> PackedLinear:
    """packed uint8 [N, K/2], weight_scale E4M3 [N, K/16], and one number that multiplies all scales, or divides them.

    Scales of activations are not needed: those stay as they are.
    """
    num_out, num_bytes = parts.shape(f"{owner}.{packed_name}", 2)
    shape = num_out, 2 * num_bytes
    packed = parts.use(f"{owner}.{packed_name}", (num_out, num_bytes), (torch.uint8,))
    scale = parts.use(f"{owner}.weight_scale", (num_out, NVFP4.num_groups(shape[1])), (FP8,))
    factor = parts.scalar(f"{owner}.{global_name}")
    factor = 1 / factor if is_inverse else factor
    parts.used |= {name for name in (f"{owner}.input_global_scale", f"{owner}.input_scale") if name in parts.names}
    row_scale = lambda: torch.full((num_out, 1), factor)  # noqa: E731
    return PackedLinear(NVFP4, shape, {"packed": packed, "scale": scale, "row_scale": row_scale})


def matches_target(module: str, target: str) -> bool:
    """Does a target of a quantization config ("Linear", a name, "re:" and an expression) mean this linear?"""
    if not target.startswith("re:"):
        return target in ("Linear", module)
    expression = target.removeprefix("re:")
    # An expression comes from a stranger's file: none whose search may take exponential time.
    if len(expression) > 512 or re.search(r"\)[*+{]", expression) or sum(map(expression.count, "*+{")) > 6:
        raise UnsupportedModel(f"The target {target[:80]!r} is too involved; give plain names in config_groups.")
    try:
        return re.match(expression, module) is not None
    except re.error:
        raise CorruptFile(f"The target {target[:80]!r} is not a regular expression; fix config_groups.") from None
