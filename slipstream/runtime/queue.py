"""WaitingQueue: sequences that may be admitted, best rank first."""

import heapq

from slipstream.runtime.sequence import Rank, Sequence


class WaitingQueue:
    """A heap of ranks, from which any member can be removed.

    A preempted sequence comes back under its old rank, which puts it before all that arrived after it.
    """

    def __init__(self) -> None:
        self._members: dict[Rank, Sequence] = {}
        self._heap: list[Rank] = []  # those of the members, and of removed ones until they surface

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.rank in self._members

    def push(self, sequence: Sequence) -> None:
        self._members[sequence.rank] = sequence
        heapq.heappush(self._heap, sequence.rank)

    def peek(self) -> Sequence | None:
        """The sequence with the best rank, or None."""
        while self._heap and self._heap[0] not in self._members:
            heapq.heappop(self._heap)
        return self._members[self._heap[0]] if self._heap else None

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, if it is in; amortised O(log n)."""
        self._members.pop(sequence.rank, None)
        if len(self._heap) > 2 * len(self._members) + 16:  # mostly removed ones: they must not pile up
            self._heap = sorted(self._members)  # a sorted list is a heap
