"""Ranks as threads of one process, for graphs: what is exact of them does not need processes of their own."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

from slipstream.kernels.collectives import Ranks
from slipstream.schema.mapping import Mapping
from tests.oracle import GraphRunner

T = TypeVar("T")
WAIT_SECONDS = 60.0  # for a rank that has failed, and will never send


class Meeting:
    """Where some of the ranks show each other what they have."""

    def __init__(self, size: int) -> None:
        self._parts: list[Tensor | None] = [None] * size
        self._barrier = threading.Barrier(size)

    def collect(self, place: int, x: Tensor) -> Tensor:
        self._parts[place] = x.clone()
        self._barrier.wait()
        found = torch.stack([part for part in self._parts if part is not None])
        self._barrier.wait()
        return found

    def abort(self) -> None:
        self._barrier.abort()


class ThreadRanks:
    """One of them; they wait for each other, and an error of one is an error of all."""

    def __init__(self, rank: int, mapping: Mapping, meetings: Sequence[Meeting], sent: "list[SimpleQueue[Tensor]]"):
        """meetings: of all, then of the ranks of each stage. sent: to each rank."""
        self.rank, self.size, self.num_here = rank, mapping.num_ranks, mapping.num_ranks
        self._mapping, self._all, self._sent = mapping, meetings[0], sent
        self._stage = meetings[1 + mapping.stage(rank)]

    def add_up(self, x: Tensor) -> Tensor:
        return self.collect(x).sum(0)

    def shown_rows(self, x: Tensor) -> None:
        pass

    def collect(self, x: Tensor) -> Tensor:
        return self._stage.collect(self._mapping.place(self.rank), x)

    def send(self, x: Tensor) -> None:
        self._sent[self._mapping.after(self.rank)].put(x)

    def receive(self, x: Tensor) -> None:
        x.copy_(self._sent[self.rank].get(timeout=WAIT_SECONDS))

    def copy_first(self, x: Tensor) -> None:
        x.copy_(self._all.collect(self.rank, x)[0])

    def least(self, number: int) -> int:
        return int(self._all.collect(self.rank, torch.tensor(number)).min())


def on_ranks(mapping: Mapping, work: Callable[[Ranks], T]) -> list[T]:
    """What the work gives on each rank."""
    size = mapping.num_ranks
    meetings = [Meeting(size), *(Meeting(mapping.tp_size) for _ in range(mapping.pp_size))]
    sent = [SimpleQueue[Tensor]() for _ in range(size)]
    found, errors = dict[int, T](), list[BaseException]()

    def run(rank: int) -> None:
        try:
            found[rank] = work(ThreadRanks(rank, mapping, meetings, sent))
        except BaseException as error:
            errors.append(error)
            for meeting in meetings:
                meeting.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    for error in (*real, *errors):
        raise error
    return [found[rank] for rank in range(size)]


def logits_on_ranks(engine: Path, mapping: Mapping, chunks: Sequence[list[int]]) -> Tensor:
    """Of one sequence in these chunks; the same, to the last bit, on every rank of the last stage."""

    def run(ranks: Ranks) -> Tensor:
        runner = GraphRunner(engine, rank=ranks.rank, ranks=ranks)
        return torch.cat([runner.logits(chunk) for chunk in chunks])

    first, *others = on_ranks(mapping, run)[: mapping.tp_size]
    assert all(torch.equal(first, other) for other in others)
    return first
