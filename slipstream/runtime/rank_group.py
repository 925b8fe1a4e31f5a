"""The ranks of an engine as the first of them has them. It schedules, and tells the others what a step is.

The others (rank_process.py) are processes that it starts on this machine, or that a launcher has started anywhere
(meeting.py). Each keeps a line to it, which brings the plans, says that it lives, and is its lifeline. One that dies or
falls silent takes all with it: a step cannot go on without its part, and nothing of the others' state is worth more
than a new start.
"""

import contextlib
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from slipstream.errors import RankError
from slipstream.runtime.meeting import Door, Line, keep_store, open_store
from slipstream.runtime.ranks import ProcessRanks
from slipstream.schema.launch import LOOPBACK, Launch
from slipstream.schema.mapping import Mapping
from slipstream.schema.request import GenerateRequest
from slipstream.schema.sampling import SamplingParams
from slipstream.schema.step import BlockCopy, SequenceStep, StepPlan

BEAT_SECONDS = 1.0  # a rank says that it lives
SILENCE_SECONDS = 20.0  # after which it does not
ARRIVAL_SECONDS = 120.0  # in which all have to come
_GOODBYE_SECONDS = 5.0

_NEW = GenerateRequest("", (), SamplingParams(), 0, 1)  # of whom the other ranks know only that there is one


class RankGroup:
    """All ranks. `join` gives this one's part in them, once the others are there."""

    def __init__(
        self, mapping: Mapping, setup: dict[str, Any], device: torch.device,
        at_start: Callable[[], None], at_end: Callable[[], None],
    ) -> None:  # fmt: skip
        """setup: what rank_process.py reads first."""
        self.at_start, self._at_end = at_start, at_end  # on the thread that computes
        self.on_lost: Callable[[], None] = lambda: None  # called from another thread
        self._mapping, self._device = mapping, device
        self._setup = setup | {"mapping": asdict(mapping)}
        self._ranks: ProcessRanks | None = None
        self._lost = ""
        self._is_lost, self._is_closed = threading.Event(), threading.Event()
        self._are_here = threading.Event()  # the others, or it is known that one will never be
        self._num_here = 0
        self._lines: dict[int, Line] = {}
        self._places: dict[int, str] = {}  # of ranks that somebody else has started: the names of their machines
        launch = Launch.read()
        if launch is None:
            self._store, port = keep_store(LOOPBACK)
            others = [Launch(rank, mapping.num_ranks, rank, LOOPBACK, port) for rank in range(1, mapping.num_ranks)]
            self._door = Door(LOOPBACK, self._store)
            self._children = {each.rank: _start(each) for each in others}
        else:
            self._store, self._children = open_store(launch), {}
            self._door = Door(launch.host, self._store)
        self._watcher = threading.Thread(target=self._watch, name="slipstream-ranks", daemon=True)
        self._watcher.start()

    @property
    def is_lost(self) -> bool:
        return self._is_lost.is_set()

    def join(self) -> ProcessRanks:
        """Once the others are there. Raises RankError where one has ended before."""
        self._are_here.wait()
        self.check()
        address = self._lines[1].address
        self._ranks = ProcessRanks(self._store, 0, self._mapping, self._device, address)
        return self._ranks

    def announce(self, plan: StepPlan, logit_counts: Sequence[int]) -> None:
        """Tell the other ranks of a step, which they then compute with this one."""
        message = plan_to_json(plan, logit_counts)
        for line in self._lines.values():
            with contextlib.suppress(OSError):  # it is gone, which its line tells
                line.say(message)

    def why(self, error: Exception) -> RankError:
        """What a failure of this rank's step comes from: mostly of another rank, which is known soon."""
        if isinstance(error, RankError):
            self._is_lost.wait(_GOODBYE_SECONDS)
        else:
            self._lose(f"rank 0 failed within a step: {type(error).__name__}: {error}")
        reason = self._lost or str(error).rstrip(".")
        return RankError(f"{reason}; the ranks cannot go on without each other.")

    def check(self) -> None:
        """Raises RankError where a rank is gone."""
        if self.is_lost:
            raise self.why(RankError(self._lost))

    def close(self) -> None:
        """End the others; they end too where this process does."""
        if self._is_closed.is_set():
            return
        self._is_closed.set()
        if self._ranks is not None and not self.is_lost:
            self._ranks.close()
        for line in self._lines.values():
            line.end()
        end = time.monotonic() + _GOODBYE_SECONDS
        for child in self._children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, end - time.monotonic()) if self._lines else 0.0)
        self._end_all()
        self._watcher.join()
        for child in self._children.values():
            assert child.stdin is not None
            child.stdin.close()
            child.wait()
        self._at_end()

    # --- on the watcher's thread ---

    def _watch(self) -> None:
        """Lets the others in, and reads what they say until they end."""
        last_arrival = time.monotonic() + ARRIVAL_SECONDS
        heard: dict[int, float] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(self._door, selectors.EVENT_READ)
            while heard or not (self._are_here.is_set() or self._is_closed.is_set()):
                for key, _ in selector.select(BEAT_SECONDS):
                    if key.fileobj is self._door:
                        if (rank := self._admit()) is not None:
                            selector.register(self._lines[rank], selectors.EVENT_READ, rank)
                            heard[rank] = time.monotonic()
                    elif (said := self._lines[key.data].hear()) is not None:
                        heard[key.data] = time.monotonic()
                        self._listen(key.data, said)
                    else:
                        selector.unregister(key.fileobj)
                        del heard[key.data]
                        self._note_end(key.data)
                self._look_for_missing(last_arrival)
                for rank, last in heard.items():
                    if time.monotonic() - last > SILENCE_SECONDS:
                        self._lose(f"{self._name(rank)} has not answered for {SILENCE_SECONDS:.0f} seconds")
        self._door.close()
        for line in self._lines.values():
            line.close()

    def _admit(self) -> int | None:
        """The rank that came, if it is one that is waited for."""
        admitted = self._door.admit()
        if admitted is None:
            return None
        line, said = admitted
        rank = said["rank"]
        if rank not in self._missing() or self.is_lost:
            line.close()
            return None
        self._lines[rank] = line
        if rank not in self._children:
            self._places[rank] = said["host"]
        device = "cpu" if self._device.type == "cpu" else f"cuda:{(self._device.index or 0) + said['local_rank']}"
        with contextlib.suppress(OSError):
            line.say(self._setup | {"device": device})
        return rank

    def _listen(self, rank: int, said: dict[str, Any]) -> None:
        self._num_here += "is_here" in said
        if self._num_here == self._mapping.num_ranks - 1:
            self._are_here.set()
        if "error" in said:
            self._lose(f"{self._name(rank)}: {str(said['error']).rstrip('.')}")

    def _look_for_missing(self, last_arrival: float) -> None:
        missing = self._missing()
        for rank in missing:
            if rank in self._children and self._children[rank].poll() is not None:
                self._note_end(rank)
        if missing and time.monotonic() > last_arrival:
            self._lose(f"rank {missing[0]} has not come within {ARRIVAL_SECONDS:.0f} seconds")

    def _missing(self) -> list[int]:
        return [rank for rank in range(1, self._mapping.num_ranks) if rank not in self._lines]

    def _note_end(self, rank: int) -> None:
        if self._is_closed.is_set():
            return
        how = ""
        if rank in self._children:
            code = self._children[rank].wait()
            how = f", by signal {-code}" if code < 0 else f", with exit code {code}"
        self._lose(f"{self._name(rank)} has ended{how}")

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._places[rank]}" if rank in self._places else f"rank {rank}"

    def _lose(self, why: str) -> None:
        """The first reason counts: what follows it follows from it."""
        if self.is_lost or self._is_closed.is_set():
            return
        self._lost = why
        self._is_lost.set()
        self._are_here.set()
        self._end_all()
        if self._ranks is not None:
            self._ranks.abort()
        self.on_lost()

    def _end_all(self) -> None:
        for line in self._lines.values():
            line.cut()
        for child in self._children.values():
            if child.poll() is None:
                child.kill()


def _start(launch: Launch) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "slipstream.runtime.rank_process"], env=os.environ | launch.environment(),
        stdin=subprocess.PIPE, stdout=2,  # what prints there is for people
        start_new_session=True,  # Ctrl-C is for the first rank, which ends the others
    )  # fmt: skip


def plan_to_json(plan: StepPlan, logit_counts: Sequence[int]) -> list[Any]:
    """All that the other ranks need: they hold no requests, and tokens that only the first rank knows come as numbers
    on the device (Ranks.copy_first)."""
    sequences = [
        [each.slot, each.start, each.token_ids, each.sample, each.table_changes, each.new is not None, each.num_drafts]
        for each in plan.sequences
    ]
    copies = [[copy.source, copy.target, copy.num_tokens] for copy in plan.copies]
    return [plan.step, sequences, copies, list(logit_counts)]


def plan_from_json(values: list[Any]) -> tuple[StepPlan, list[int]]:
    step, sequences, copies, logit_counts = values
    found = tuple(
        SequenceStep(slot, start, tuple(token_ids), sample, table_changes, _NEW if is_new else None, (), num_drafts)
        for slot, start, token_ids, sample, table_changes, is_new, num_drafts in sequences
    )
    return StepPlan(step, found, tuple(BlockCopy(*copy) for copy in copies)), logit_counts
