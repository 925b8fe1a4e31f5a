"""The KV of a prompt on its way from the engine that computed it to the one that goes on: a file in shared memory.

    places    [rows, groups]     where in the others the block is that a row of the block table has; -1 for none
    kv.0 …    [planes, blocks, tokens, heads, numbers]     these blocks, of each tensor of the KV cache

It is worth no more than the time that it saves: who cannot write or read it goes without.
"""

import contextlib
import os
from collections.abc import Sequence
from itertools import count, starmap
from pathlib import Path

import torch
from torch import Tensor

from slipstream.engine.tensor_file import TensorEntry, TensorFile, write_tensors
from slipstream.errors import SlipstreamError
from slipstream.runtime.transfer import ToHost, on_device
from slipstream.schema.step import BlockLoad, BlockSave

_PLACES, _NUM_TOKENS = "places", "num_tokens"


class Saving:
    """Blocks on their way to the host, from where `write` takes them to the file."""

    def __init__(self, save: BlockSave, caches: Sequence[Tensor]) -> None:
        """caches: the whole tensors of the KV cache, each indexed by block in its second dimension."""
        self._save = save
        block_ids = [block_id for row in save.rows for block_id in row if block_id]
        blocks_C = on_device(block_ids, torch.int64, caches[0].device)
        self._blocks = [ToHost(cache_PNBKD[:, blocks_C]) for cache_PNBKD in caches]

    def write(self) -> str | None:
        """Why it could not be written, None where it was."""
        numbers = count()
        places = torch.tensor([[next(numbers) if block_id else -1 for block_id in row] for row in self._save.rows])
        tensors = {_PLACES: places} | {f"kv.{index}": each.wait() for index, each in enumerate(self._blocks)}
        try:
            # Whoever asked has made the file: where it is gone, nobody waits, and none is left behind.
            with Path(self._save.path).open("r+b") as file:
                write_tensors(file, starmap(_entry, tensors.items()), {_NUM_TOKENS: str(self._save.num_tokens)})
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self._save.path, 0)  # the memory is short: keep none of it
            return f"the KV of its prompt could not be written to {self._save.path}: {error.strerror}"
        return None


def _entry(name: str, tensor: Tensor) -> TensorEntry:
    return name, tensor.shape, tensor.dtype, lambda: tensor


class HandedKV:
    """A file that was written so, mapped; its name is gone, and its memory goes with this object."""

    def __init__(self, file: TensorFile) -> None:
        self._file, self._places = file, file.read(_PLACES)

    @classmethod
    def receive(cls, path: str, num_tokens: int, caches: Sequence[Tensor]) -> "HandedKV | None":
        """None where there is no such file, or not of so many tokens for such a cache."""
        try:
            file = TensorFile.open(path)
        except SlipstreamError:
            return None
        finally:
            with contextlib.suppress(OSError):
                Path(path).unlink()
        return cls(file) if _fits(file, num_tokens, caches) else None

    def fill(self, load: BlockLoad, caches: Sequence[Tensor]) -> None:
        """Put its blocks where the table has its own for them."""
        places = self._places[load.first : load.first + len(load.rows)].tolist()
        pairs = [
            (source, target)
            for row, targets in zip(places, load.rows, strict=True)
            for source, target in zip(row, targets, strict=True)
            if target
        ]
        if not pairs:
            return
        sources_C = torch.tensor([source for source, _ in pairs])
        targets_C = on_device([target for _, target in pairs], torch.int64, caches[0].device)
        for index, cache_PNBKD in enumerate(caches):
            blocks_PCBKD = self._file.read(f"kv.{index}")[:, sources_C]
            cache_PNBKD[:, targets_C] = blocks_PCBKD.to(cache_PNBKD.device)


def _fits(file: TensorFile, num_tokens: int, caches: Sequence[Tensor]) -> bool:
    """All that `fill` relies on: the file may have come over a network."""
    blocks = {f"kv.{index}": cache_PNBKD for index, cache_PNBKD in enumerate(caches)}
    if file.metadata.get(_NUM_TOKENS) != str(num_tokens) or set(file.names()) != {_PLACES, *blocks}:
        return False
    if not all(_are_of(cache_PNBKD, file.shape(name), file.dtype(name)) for name, cache_PNBKD in blocks.items()):
        return False
    places, num_blocks = file.read(_PLACES), min(file.shape(name)[1] for name in blocks)
    covers = places.ndim == 2 and len(places) * caches[0].shape[2] >= num_tokens
    return covers and places.dtype == torch.int64 and bool(((places >= -1) & (places < num_blocks)).all())


def _are_of(cache_PNBKD: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    planes, _, *block = cache_PNBKD.shape
    return shape[:1] + shape[2:] == (planes, *block) and dtype == cache_PNBKD.dtype
