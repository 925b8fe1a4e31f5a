"""Map a file into memory, and look at a piece of the mapping as a tensor."""

import contextlib
import math
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import torch

from slipstream.errors import CorruptFile, ModelError

# Without a reservation, or Linux refuses to map a file larger than the memory, as if every page were to be written.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_FLAGS = mmap.MAP_PRIVATE | _NO_RESERVE


def map_file(path: Path, at_least: int) -> mmap.mmap:
    """Map a whole file, copy on write: torch may write to its tensors, the file never changes.

    Raises ModelError where the file cannot be opened and CorruptFile where it has fewer than `at_least` (> 0) bytes.
    """
    try:
        if not path.is_file():  # a named pipe would block forever
            raise ModelError(f"{path} is not a file.")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < at_least:
                raise CorruptFile(f"{path} has only {size} bytes; the smallest valid file of its kind has {at_least}.")
            mapping = mmap.mmap(file.fileno(), size, flags=_FLAGS, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from None
    if mapping[:23] == b"version https://git-lfs":
        mapping.close()
        raise CorruptFile(
            f"{path} is a Git LFS pointer and not the weights themselves; run `git lfs pull` in its folder."
        )
    return mapping


def unmap(mapping: mmap.mmap) -> None:
    """Release a mapping now, or with the last tensor that still views it."""
    with contextlib.suppress(BufferError):
        mapping.close()


def view(mapping: mmap.mmap, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor of `shape` at a byte offset, without a copy; an offset off the dtype's alignment costs one.

    It goes by way of numpy, which locks the mapping while it views it: torch.frombuffer does not, and a mapping closed
    under its tensor crashes the process.
    """
    raw = torch.from_numpy(np.frombuffer(mapping, np.uint8, count=math.prod(shape) * dtype.itemsize, offset=offset))
    if offset % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(shape)


def can_be_shape(shape: tuple[int, ...]) -> bool:
    """Whether torch can hold such a shape: with an empty dimension the others may still overflow its strides."""
    return math.prod(max(size, 1) for size in shape) < 2**62
