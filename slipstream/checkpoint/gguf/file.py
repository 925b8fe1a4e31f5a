"""A bounded reader of GGUF files, the format of llama.cpp.

    | magic, version, counts | key-value pairs | tensor infos | padding | tensor data, each aligned |

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package dequantizes; the header is
parsed here, since the package's own reader loops over whatever counts the file claims. The rule that bounds everything:
a count is believed only if the bytes left in the file could hold that many of the smallest possible item.
"""

import math
import mmap
import re
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import gguf
import numpy as np
import torch

from slipstream.engine.mapping import can_be_shape, map_file, unmap, view
from slipstream.errors import CorruptFile, ModelError, UnsupportedModel

GGMLType = gguf.GGMLQuantizationType

MAX_RANK = 4
MAX_NESTING = 4  # of arrays; llama.cpp writes none inside another
MAX_SPLITS = 65535  # the file stores 16 bits
MIN_PAIR_BYTES = 8 + 4 + 1  # an empty key, its type, one byte of value
MIN_INFO_BYTES = 8 + 4 + 4 + 8  # an empty name, no dimensions, type, offset
STRING, ARRAY, BOOL = 8, 9, 7
NUMBERS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    BOOL: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE | re.DOTALL)

PLAIN_DTYPES = {  # stored as they are, and read without a copy; every other type is dequantized
    GGMLType.F32: torch.float32,
    GGMLType.F16: torch.float16,
    GGMLType.BF16: torch.bfloat16,
    GGMLType.F64: torch.float64,
    GGMLType.I8: torch.int8,
    GGMLType.I16: torch.int16,
    GGMLType.I32: torch.int32,
    GGMLType.I64: torch.int64,
}


class _Tensor(NamedTuple):
    shape: tuple[int, ...]  # torch's order: the dimension that varies fastest comes last
    ggml_type: Any
    begin: int  # bytes from the start of the file
    end: int
    mapping: mmap.mmap


class _Cursor:
    """A position in a mapped file that cannot run past its end. `what` names what is being read, for the message."""

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path = path
        self.mapping = mapping
        self.position = 0

    def corrupt(self, what: str) -> CorruptFile:
        return CorruptFile(f"{self.path}: {what}.")

    def take(self, num_bytes: int, what: str) -> bytes:
        self.require(num_bytes, what)
        self.position += num_bytes
        return self.mapping[self.position - num_bytes : self.position]

    def require(self, num_bytes: int, what: str) -> None:
        left = len(self.mapping) - self.position
        if num_bytes > left:
            raise self.corrupt(f"{what} would take {num_bytes} bytes and the file has {left} left")

    def u32(self, what: str) -> int:
        return struct.unpack("<I", self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return struct.unpack("<Q", self.take(8, what))[0]

    def string(self, what: str) -> str:
        data = self.take(self.u64(what), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.corrupt(f"{what} is not valid UTF-8") from None

    def value(self, kind: int, what: str, nesting: int = 0) -> Any:
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what, nesting)
        if kind not in NUMBERS:
            raise self.corrupt(f"{what} has the unknown value type {kind}")
        return np.frombuffer(self.take(np.dtype(NUMBERS[kind]).itemsize, what), NUMBERS[kind])[0].item()

    def array(self, what: str, nesting: int) -> list[Any]:
        kind, count = self.u32(what), self.u64(what)
        if kind in NUMBERS:
            data = self.take(count * np.dtype(NUMBERS[kind]).itemsize, what)
            return np.frombuffer(data, NUMBERS[kind]).tolist()
        if kind == STRING:
            return self.strings(count, what)
        if nesting == MAX_NESTING:
            raise self.corrupt(f"{what} has arrays nested more than {MAX_NESTING} deep")
        self.require(count * (4 + 8), what)
        return [self.value(kind, what, nesting + 1) for _ in range(count)]

    def strings(self, count: int, what: str) -> list[str]:
        """As `count` calls of string(), in a third of the time: a vocabulary and its merges have some 400 000."""
        self.require(count * 8, what)
        mapping, unpack, end = self.mapping, struct.Struct("<Q").unpack_from, len(self.mapping)
        position, strings = self.position, []
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(mapping, position)[0]
                if position > end:
                    break
                strings.append(mapping[start:position].decode())
        except (struct.error, UnicodeDecodeError):
            pass
        if len(strings) < count:
            raise self.corrupt(f"string {len(strings)} of {count} in {what} runs past the end or is not valid UTF-8")
        self.position = position
        return strings


class GGUFFile:
    """The metadata and tensors of a GGUF file, and of its siblings where it is one of a split set."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mappings: list[mmap.mmap] = []
        try:
            self.metadata, self.tensors = self._open_part(path)
            count = self.metadata.get("split.count", 1)
            if count not in (0, 1):  # 0 is what llama.cpp leaves in a file merged from parts
                self.metadata, self.tensors = self._open_split(count)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Map and check a file. Raises CorruptFile, UnsupportedModel, or ModelError where it cannot be read."""
        return cls(Path(path))

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """In torch's order, which is the reverse of the file's."""
        return self.tensors[name].shape

    def ggml_type(self, name: str) -> Any:
        """The gguf.GGMLQuantizationType it is stored as."""
        return self.tensors[name].ggml_type

    def dtype(self, name: str) -> torch.dtype:
        """Of what read() returns."""
        return PLAIN_DTYPES.get(self.tensors[name].ggml_type, torch.float32)

    def read(self, name: str) -> torch.Tensor:
        """A view of the mapping for plain types (F32, F16, BF16, …), else the dequantized float32 tensor."""
        shape, ggml_type, begin, end, mapping = self.tensors[name]
        if ggml_type in PLAIN_DTYPES or begin == end:
            return view(mapping, begin, shape, self.dtype(name))
        rows = self.blocks(name).view(math.prod(shape[:-1]), -1).numpy()
        try:
            return torch.from_numpy(gguf.dequantize(rows, ggml_type)).view(shape)
        except NotImplementedError:
            raise UnsupportedModel(f"{self.path}: tensor {name!r} is {ggml_type.name}, which cannot be read.") from None

    def blocks(self, name: str) -> torch.Tensor:
        """A view of the mapping: the bytes of each block, uint8 [..., blocks of a row, bytes of a block]."""
        shape, ggml_type, begin, _, mapping = self.tensors[name]
        columns, num_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
        return view(mapping, begin, (*shape[:-1], shape[-1] // columns, num_bytes), torch.uint8)

    def close(self) -> None:
        for mapping in self._mappings:
            unmap(mapping)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _open_part(self, path: Path) -> tuple[dict[str, Any], dict[str, _Tensor]]:
        self._mappings.append(map_file(path, at_least=4 + 4 + 8 + 8))
        cursor = _Cursor(path, self._mappings[-1])
        _read_version(cursor)
        num_tensors, num_pairs = cursor.u64("the number of tensors"), cursor.u64("the number of metadata pairs")
        metadata = _read_metadata(cursor, num_pairs)
        return metadata, _read_tensors(cursor, num_tensors, metadata.get("general.alignment", 32))

    def _open_split(self, count: Any) -> tuple[dict[str, Any], dict[str, _Tensor]]:
        """Open all of name-00001-of-0000N.gguf and so on. The metadata that matters is in the first."""
        if type(count) is not int or not 1 < count <= MAX_SPLITS:
            raise CorruptFile(
                f"{self.path}: split.count is {str(count)[:40]}; it must be a number from 1 to {MAX_SPLITS}."
            )
        match = SPLIT_NAME.fullmatch(self.path.name)
        if not match or int(match[3]) != count:
            example = f"{self.path.stem}-00001-of-{count:05d}.gguf"
            raise ModelError(f"{self.path} is one of {count} parts and not named like one; name it as in {example}.")
        self.close()
        self._mappings.clear()
        first: dict[str, Any] = {}
        tensors: dict[str, _Tensor] = {}
        for number in range(count):
            path = self.path.with_name(f"{match[1]}-{number + 1:05d}-of-{match[3]}{match[4]}")
            if not path.is_file():
                raise ModelError(f"{path} is missing; all {count} parts of the model must be in one folder.")
            metadata, part = self._open_part(path)
            if metadata.get("split.count") != count or metadata.get("split.no") != number:
                raise CorruptFile(f"{path} does not say that it is part {number + 1} of {count}.")
            if not part.keys().isdisjoint(tensors):
                raise CorruptFile(
                    f"{path} holds tensor {min(part.keys() & tensors)!r}, which an earlier part holds too."
                )
            first = first or metadata
            tensors |= part
        return first, tensors


def _read_version(cursor: _Cursor) -> None:
    if cursor.take(4, "the magic") != b"GGUF":
        raise cursor.corrupt("this is not a GGUF file, which would begin with the letters GGUF")
    version = cursor.u32("the version")
    if version and not version & 0xFFFF:
        raise cursor.corrupt("this is a big-endian GGUF file; only little-endian ones can be read")
    if version not in (2, 3):
        raise cursor.corrupt(f"this is version {version} of GGUF; versions 2 and 3 can be read")


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    cursor.require(count * MIN_PAIR_BYTES, f"the {count} metadata pairs")
    metadata: dict[str, Any] = {}
    for number in range(count):
        key = cursor.string(f"the key of metadata pair {number}")
        if key in metadata:
            raise cursor.corrupt(f"the metadata key {key!r} occurs twice")
        what = f"the value of {key!r}"
        metadata[key] = cursor.value(cursor.u32(what), what)
    return metadata


def _read_tensors(cursor: _Cursor, count: int, alignment: Any) -> dict[str, _Tensor]:
    if type(alignment) is not int or not 8 <= alignment <= 65536 or alignment & (alignment - 1):
        raise cursor.corrupt(f"general.alignment is {str(alignment)[:40]}; it must be a power of two from 8 to 65536")
    cursor.require(count * MIN_INFO_BYTES, f"the description of {count} tensors")
    tensors: dict[str, _Tensor] = {}
    for number in range(count):
        name = cursor.string(f"the name of tensor {number}")
        if name in tensors:
            raise cursor.corrupt(f"the tensor {name!r} occurs twice")
        tensors[name] = _read_tensor(cursor, name, alignment)
    data_start = cursor.position + -cursor.position % alignment
    tensors = {
        name: tensor._replace(begin=data_start + tensor.begin, end=data_start + tensor.end)
        for name, tensor in tensors.items()
    }
    _check_layout(cursor, tensors)
    return tensors


def _read_tensor(cursor: _Cursor, name: str, alignment: int) -> _Tensor:
    """One tensor info, with offsets still relative to the data section."""
    what = f"the description of tensor {name!r}"
    rank = cursor.u32(what)
    if rank > MAX_RANK:
        raise cursor.corrupt(f"tensor {name!r} has {rank} dimensions; at most {MAX_RANK} are possible")
    shape = tuple(cursor.u64(what) for _ in range(rank))[::-1]
    kind, offset = cursor.u32(what), cursor.u64(what)
    if kind not in gguf.GGML_QUANT_SIZES:
        known = ", ".join(ggml_type.name for ggml_type in gguf.GGML_QUANT_SIZES)
        raise UnsupportedModel(f"{cursor.path}: tensor {name!r} has the ggml type number {kind}; known are {known}.")
    if not can_be_shape(shape):
        raise cursor.corrupt(f"tensor {name!r} has an impossible shape")
    ggml_type = GGMLType(kind)
    block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
    if block > 1 and (not shape or shape[-1] % block):
        raise cursor.corrupt(f"tensor {name!r} of shape {list(shape)} has rows that are not whole blocks of {block}")
    if offset % alignment:
        raise cursor.corrupt(f"tensor {name!r} begins at byte {offset}, which is not a multiple of {alignment}")
    return _Tensor(shape, ggml_type, offset, offset + math.prod(shape) // block * block_bytes, cursor.mapping)


def _check_layout(cursor: _Cursor, tensors: dict[str, _Tensor]) -> None:
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin < tensor.end and tensor.begin < position:
            raise cursor.corrupt(f"tensor {name!r} overlaps the one before it")
        if tensor.end > len(cursor.mapping):
            size = len(cursor.mapping)
            raise cursor.corrupt(f"tensor {name!r} ends at byte {tensor.end} and the file has {size}: it is truncated")
        position = max(position, tensor.end)
