"""Tensors as the protocol writes them: values in JSON, or bytes (the binary tensor extension, and gRPC)."""

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from slipstream.errors import RequestError

_CODES = {
    "BOOL": "?", "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q", "UINT8": "B", "UINT16": "H", "UINT32": "I",
    "UINT64": "Q", "FP16": "e", "FP32": "f", "FP64": "d",
}  # fmt: skip
MAX_DIMS = 8
DATATYPES = ("BYTES", *_CODES)


@dataclass(frozen=True)
class Tensor:
    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Sequence[Any]  # row by row; those of BYTES are texts

    def __post_init__(self) -> None:
        if self.datatype not in DATATYPES:
            raise RequestError(f"{self.name} has the datatype {self.datatype!r}; there are {', '.join(DATATYPES)}.")
        if min(self.shape, default=1) < 0 or math.prod(self.shape) != len(self.values):
            raise RequestError(
                f"{self.name} has {len(self.values)} values and the shape {list(self.shape)}; they must agree."
            )

    def to_bytes(self) -> bytes:
        if self.datatype == "BYTES":
            encoded = [value.encode() for value in self.values]
            return b"".join(struct.pack("<I", len(each)) + each for each in encoded)
        return struct.pack(f"<{len(self.values)}{_CODES[self.datatype]}", *self.values)


def from_bytes(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Tensor:
    """Little-endian, row by row; of BYTES each value after its length in four bytes. Raises RequestError."""
    if datatype == "BYTES":
        values: Sequence[Any] = list(_texts(name, raw))
    elif code := _CODES.get(datatype):
        count, rest = divmod(len(raw), struct.calcsize(f"<{code}"))
        if rest:
            raise RequestError(f"{name} has {len(raw)} bytes, which is no whole number of {datatype} values.")
        values = struct.unpack(f"<{count}{code}", raw)
    else:
        values = ()  # a datatype that is none, which Tensor refuses
    return Tensor(name, datatype, tuple(shape), values)


def from_json(name: str, datatype: str, shape: Sequence[int], data: Any) -> Tensor:
    """data: values in a list, or in lists within lists. Raises RequestError."""
    return Tensor(name, datatype, tuple(shape), list(_flat(name, data)))


def _flat(name: str, data: Any, depth: int = 0) -> Iterator[Any]:
    if not isinstance(data, list):
        yield data
        return
    if depth == MAX_DIMS:
        raise RequestError(f"{name} has lists within lists, more than {MAX_DIMS} deep; give its values in one.")
    for part in data:
        yield from _flat(name, part, depth + 1)


def _texts(name: str, raw: bytes) -> Iterator[str]:
    start = 0
    while start < len(raw):
        end = start + 4
        length = int.from_bytes(raw[start:end], "little")
        value = raw[end : end + length]
        if end > len(raw) or len(value) < length:
            raise RequestError(f"{name} ends inside a value; each is its length in four bytes, then its bytes.")
        yield text_of(name, value)
        start = end + length


def text_of(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise RequestError(f"{name} holds bytes that are not UTF-8; send text.") from None
