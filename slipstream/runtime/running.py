"""RunningList: the sequences that run, best rank first. Each has a slot: the worker's row for its sampling state."""

from bisect import bisect_left, insort
from heapq import heappop, heappush

from slipstream.runtime.sequence import Rank, Sequence


class RunningList:
    def __init__(self, num_slots: int) -> None:
        self.sequences: list[Sequence] = []  # `enter` and `leave` alone change it
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots))  # a heap
        self._freed_slots: list[int] = []  # since take_freed_slots

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free_slots)

    def enter(self, sequence: Sequence) -> int:
        """Its slot, which is the lowest that is free."""
        sequence.slot = heappop(self._free_slots)
        insort(self.sequences, sequence, key=_rank)
        return sequence.slot

    def leave(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        heappush(self._free_slots, sequence.slot)
        self._freed_slots.append(sequence.slot)
        sequence.slot = None
        del self.sequences[bisect_left(self.sequences, sequence.rank, key=_rank)]

    def take_freed_slots(self) -> tuple[int, ...]:
        """Those that were left since the last call."""
        slots = tuple(self._freed_slots)
        self._freed_slots.clear()
        return slots

    def check(self) -> None:
        slots = [sequence.slot for sequence in self.sequences if sequence.slot is not None]
        assert len(slots) == len(self.sequences), "a running sequence has no slot"
        assert sorted(slots + self._free_slots) == list(range(self._num_slots)), f"slots {slots} in use"
        ranks = [sequence.rank for sequence in self.sequences]
        assert ranks == sorted(set(ranks)), f"the running sequences are out of order: {ranks}"


def _rank(sequence: Sequence) -> Rank:
    return sequence.rank
