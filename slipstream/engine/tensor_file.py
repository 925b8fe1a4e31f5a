"""Safetensors files: read by mapping, after the header has been checked; written as a stream, one tensor at a time.

    | 8 bytes: n | n bytes: JSON header | tensor data, back to back |

The format: https://github.com/huggingface/safetensors#format. Its own library is not used to read because it offers
either a mapping or bytes to check, not both; the rules enforced here are at least as strict as its own.
"""

import contextlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import torch

from slipstream.engine.bounded_json import parse_object
from slipstream.engine.mapping import can_be_shape, map_file, unmap, view
from slipstream.errors import CorruptFile

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100 << 20  # bytes; the safetensors library has the same limit
MAX_RANK = 8
DATA_ALIGNMENT = 64  # bytes: a cache line, and the widest vector load

# name, shape, dtype, and the function that makes the tensor when its turn to be written comes
TensorEntry = tuple[str, Sequence[int], torch.dtype, Callable[[], torch.Tensor]]


class _Span(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the data section
    end: int


class TensorFile:
    """A safetensors file. Tensors are views of the mapping: opening is instant, and pages load when touched.

    A tensor may outlive the file object: the mapping goes when its last tensor does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapping = map_file(path, at_least=8)
        try:
            self._data_start, self.metadata, self._spans = _read_header(path, self._mapping)
        except BaseException:
            unmap(self._mapping)
            raise

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Map and check a file. Raises CorruptFile, or ModelError where it cannot be read."""
        return cls(Path(path))

    def names(self) -> list[str]:
        return list(self._spans)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._spans[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._spans[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """A view of the mapping (a copy where the file left the tensor unaligned). Writing to it leaves the file be."""
        span = self._spans[name]
        return view(self._mapping, self._data_start + span.begin, span.shape, span.dtype)

    def close(self) -> None:
        unmap(self._mapping)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _read_header(path: Path, mapping: Any) -> tuple[int, dict[str, str], dict[str, _Span]]:
    length = struct.unpack_from("<Q", mapping)[0]
    limit = min(HEADER_LIMIT, len(mapping) - 8)
    if length > limit:
        raise CorruptFile(f"{path} claims a header of {length} bytes; it can have at most {limit}.")
    header = parse_object(mapping[8 : 8 + length], f"The header of {path}", unique_keys=True)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFile(f"{path} has a __metadata__ that is not an object of strings.")
    spans = {name: _read_span(path, name, entry) for name, entry in header.items()}
    _check_layout(path, spans, len(mapping) - 8 - length)
    return 8 + length, metadata, spans


def _read_span(path: Path, name: str, entry: Any) -> _Span:
    def corrupt(what: str) -> CorruptFile:
        return CorruptFile(f"{path}: tensor {name!r} {what}.")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise corrupt("is not described by exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise corrupt(f"has the dtype {str(entry['dtype'])[:40]!r}; known are {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > MAX_RANK or not can_be_shape(tuple(shape)):
        raise corrupt(f"has a shape that is not a list of at most {MAX_RANK} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise corrupt("has data_offsets that are not two offsets")
    begin, end = offsets
    num_bytes = math.prod(shape) * dtype.itemsize
    if end - begin != num_bytes:
        raise corrupt(f"has {num_bytes} bytes by its shape and dtype, but its data_offsets span {end - begin}")
    return _Span(dtype, tuple(shape), begin, end)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_layout(path: Path, spans: dict[str, _Span], num_bytes: int) -> None:
    """The data section is covered exactly: no overlap, no hole, nothing after the last tensor."""
    position = 0
    for name, span in sorted(spans.items(), key=lambda item: (item[1].begin, item[1].end)):
        if span.end > num_bytes:
            raise CorruptFile(
                f"{path}: tensor {name!r} ends at byte {span.end} of a data section of {num_bytes} bytes."
            )
        if span.begin != position:
            what = "overlaps the tensor before it" if span.begin < position else "leaves a hole before it"
            raise CorruptFile(
                f"{path}: tensor {name!r} begins at byte {span.begin} and {what}, which ends at {position}."
            )
        position = span.end
    if position != num_bytes:
        raise CorruptFile(f"{path} has {num_bytes - position} bytes after its last tensor that belong to none.")


def write_tensor_file(
    path: str | Path,
    tensors: Iterable[TensorEntry],
    metadata: dict[str, str],
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write a safetensors file, one tensor in memory at a time.

    The data section starts on a 64-byte border, and wider dtypes come first, so that every tensor is aligned to its own
    elements. `progress` gets the bytes of each tensor just written. The file appears under its name when it is whole.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            write_tensors(file, tensors, metadata, progress)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_tensors(
    file: BinaryIO,
    tensors: Iterable[TensorEntry],
    metadata: dict[str, str],
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """What such a file is, into one that is open."""
    entries = sorted(tensors, key=lambda entry: -entry[2].itemsize)
    file.write(_header(entries, metadata))
    for name, shape, dtype, make in entries:
        tensor = make()
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
            made = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{name} was announced as {dtype} {list(shape)} and made as {made}.")
        progress(file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data))
        del tensor  # before the next is made


def _header(entries: list[TensorEntry], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, shape, dtype, _ in entries:
        if name in header:
            raise ValueError(f"Two tensors are named {name}.")
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
