"""Weights on their way from the mapped file to the device."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from slipstream.engine.tensor_file import TensorFile
from slipstream.errors import CapacityError

BUFFER_BYTES = 64 << 20
NUM_BUFFERS = 3


class Event(Protocol):
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


def load_weights(file: TensorFile, names: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """By name: on a CPU views of the mapping, on a GPU copies there. Raises CapacityError where they do not fit."""
    if device.type == "cpu":
        return {name: file.read(name) for name in names}
    buffers = [torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(NUM_BUFFERS)]
    try:
        weights = {name: torch.empty(file.shape(name), dtype=file.dtype(name), device=device) for name in names}
    except torch.OutOfMemoryError:
        size = sum(file.read(name).nbytes for name in names)
        free, total = torch.cuda.mem_get_info(device)
        raise CapacityError(
            f"The weights take {size / 2**30:.1f} GiB and {device} has {free / 2**30:.1f} GiB of its "
            f"{total / 2**30:.1f} GiB free; free some, build from a checkpoint of fewer bits or set --device cpu."
        ) from None
    copy_through(buffers, [torch.cuda.Event() for _ in buffers], ((file.read(name), weights[name]) for name in names))
    torch.cuda.synchronize(device)  # the buffers are free to go
    return weights


def copy_through(buffers: Sequence[Tensor], is_empty: Sequence[Event], pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy each source to its target by way of buffers of bytes, all of one size, which take turns.

    While the device empties one, all cores fill the next: torch splits such a copy over its threads. What was copied
    last may still be on its way.
    """
    turn = used = 0
    size = len(buffers[0])
    for source, target in pairs:
        source_B, target_B = (tensor.reshape(-1).view(torch.uint8) for tensor in (source, target))
        for start in range(0, len(source_B), size):
            piece = source_B[start : start + size]
            if used + len(piece) > size:
                is_empty[turn].record()
                turn, used = (turn + 1) % len(buffers), 0
                is_empty[turn].synchronize()
            staged = buffers[turn][used : used + len(piece)]
            staged.copy_(piece)
            target_B[start : start + size].copy_(staged, non_blocking=True)
            used += len(piece)
