"""Sums of short tensors over the GPUs of one machine: each GPU reads all others' parts in one kernel (one-shot).

For the tokens of a decoding step on two GPUs NCCL takes 11 us, torch's kernel 6.6 without the copy that comes before it
here (benchmarks/2026-11-22-h200-ranks.md). The memory that GPUs show each other is torch's, too
(torch.distributed._symmetric_memory); every rank adds in the order of ranks, so that all have the same bits.

A kernel of ours that goes on with the sum (kernels/reduce_norm.py) reads the others' rows itself, from two places for
each row, which calls take in turns; behind them lie, for each rank, the numbers of the calls that it has told of.
"""

import os
import secrets
import time
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slipstream.kernels.collectives import ShownRows
from slipstream.runtime.meeting import first_line

MAX_BYTES = 2 << 20  # beyond, each GPU's reading of everything costs more than NCCL
SHOWN_ROWS = 128  # each has a program that waits for the other ranks': all of them must run at the same time
SHOWN_ROW_BYTES = 32 << 10
RELEASE_SECONDS = 10.0


def open_one_shot(store: dist.Store, rank: int, size: int, device: torch.device) -> "OneShot | None":
    """None, with a warning, where GPUs cannot see each other's memory. All ranks call it, and all get the same."""
    if device.type != "cuda":
        return None
    store = dist.PrefixStore("one-shot", store)
    if rank == 0:
        store.set("name", f"slipstream-{secrets.token_hex(4)}")
    try:
        found = OneShot(store.get("name").decode(), store, rank, size, device)
    except RuntimeError as error:
        found = None
        warnings.warn(
            f"Ranks add up through NCCL alone, which takes longer for few tokens: the GPUs cannot read each other's "
            f"memory ({first_line(error)}).",
            stacklevel=2,
        )
    store.set(str(rank), "" if found is None else "ready")
    return found if all(store.get(str(other)) for other in range(size)) else None


class CountedStore(dist.Store):
    """Where ranks exchange what torch tells of their memory, as KIND/NUMBER/RANK: numbered from 0 here.

    torch numbers exchanges over all groups of a process, and the first rank's may have had groups before, which the
    others' new processes have not: they would wait for each other for ever.
    """

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self._store, self._first = store, -1

    def set(self, key: str, value: bytes) -> None:  # type: ignore[override]
        self._store.set(self._renumbered(key), value)  # type: ignore[arg-type]

    def get(self, key: str) -> bytes:
        return self._store.get(self._renumbered(key))

    def wait(self, keys: list[str], *timeout: timedelta) -> None:
        self._store.wait([self._renumbered(key) for key in keys], *timeout)

    def _renumbered(self, key: str) -> str:
        kind, number, rank = key.rsplit("/", 2)
        if self._first < 0:
            self._first = int(number)
        return f"{kind}/{int(number) - self._first}/{rank}"


class OneShot:
    """What the ranks of one machine read from each other."""

    def __init__(self, name: str, store: dist.Store, rank: int, size: int, device: torch.device) -> None:
        """name: the same on all ranks, and no other group's. Raises RuntimeError without access between the GPUs."""
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # not every machine's NVSwitch has it to give
        from torch._C._distributed_c10d import _register_process_group, _SymmetricMemory

        self._store = CountedStore(store)
        _SymmetricMemory.set_group_info(name, rank, size, self._store)
        # kept: later versions of torch find the store by the group's name
        self._group = dist.ProcessGroup(self._store, rank, size)
        _register_process_group(name, self._group)  # type: ignore[arg-type]
        self._name, self._rank, self._size, self._device = name, rank, size, device
        self._mine = _SymmetricMemory.empty_strided_p2p((MAX_BYTES,), (1,), torch.uint8, device, name)
        self._shared: Any = _SymmetricMemory.rendezvous(self._mine, name)
        self._first_told = 2 * SHOWN_ROWS * SHOWN_ROW_BYTES
        num_bytes = self._first_told + 4 * size * SHOWN_ROWS
        self._rows = _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device, name)
        self._rows.zero_()
        shared_rows: Any = _SymmetricMemory.rendezvous(self._rows, name)
        torch.cuda.synchronize(device)
        shared_rows.barrier()  # nobody tells of a call before all are zeros
        self._calls_S = torch.zeros(SHOWN_ROWS, dtype=torch.int32, device=device)
        self._shown = ShownRows(tuple(shared_rows.buffer_ptrs), self._calls_S, rank, SHOWN_ROW_BYTES)

    def takes(self, x: Tensor) -> bool:
        return x.dtype in (torch.bfloat16, torch.float32) and x.nbytes <= MAX_BYTES and x.nbytes % 16 == 0

    def add_up(self, x: Tensor) -> Tensor:
        """Also in a recorded graph; one at a time, in the same order on all ranks."""
        mine = self._mine.view(x.dtype)[: x.numel()]
        return torch.ops.symm_mem.one_shot_all_reduce_copy(mine, x.flatten(), "sum", self._name).view(x.shape)

    def shown_rows(self, x: Tensor) -> ShownRows | None:
        """Where a kernel may add up x [rows, columns], as add_up does."""
        fits = x.shape[0] <= SHOWN_ROWS and x.shape[1] * x.itemsize <= SHOWN_ROW_BYTES
        return self._shown if fits and x.dtype in (torch.bfloat16, torch.float16, torch.float32) else None

    def release(self) -> None:
        """From another thread, once a rank is lost: end the kernels that wait for its signals, whatever they add up."""
        stream, end = torch.cuda.Stream(self._device), time.monotonic() + RELEASE_SECONDS
        busy = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(stream):
            while time.monotonic() < end and not busy.query():
                for other in range(self._size):  # what torch's kernel waits for is a 1 here and a 0 there
                    self._shared.get_signal_pad(other, dtype=torch.int32).fill_(other == self._rank)
                told = self._rows[self._first_told :].view(torch.int32).view(self._size, SHOWN_ROWS)
                told.copy_(self._calls_S + 1)
                stream.synchronize()
