"""WaitingQueue: sequences that may be admitted, best rank first."""

import heapq
from collections.abc import Collection

from slipstream.runtime.sequence import Rank, Sequence


class WaitingQueue:
    """A heap of ranks, from which any member can be removed.

    A preempted sequence comes back under its old rank, which puts it before all that arrived after it. A follower stays
    outside, in its leader's list, until the leader's prompt is computed and can be shared.
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

    def push_after(self, leader: Sequence | None, sequence: Sequence) -> None:
        """Only one that came before can be a leader, so no two wait for each other."""
        if leader is not None and not leader.is_prompt_computed:
            leader.followers.append(sequence)
        else:
            self.push(sequence)

    def push_followers(self, leader: Sequence) -> None:
        """The leader's prompt is computed, or never will be."""
        for follower in leader.followers:
            if not follower.is_finished:
                self.push(follower)
        leader.followers.clear()

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

    def check(self, alive: Collection[Sequence]) -> None:
        """Prove that each of these sequences that does not run is here or follows one of them."""
        waiting = [sequence for sequence in alive if sequence.slot is None]
        followers = {
            follower
            for leader in alive
            for follower in leader.followers
            if not follower.is_finished and not leader.is_prompt_computed
        }
        assert len(self) + len(followers) == len(waiting), "a waiting sequence is lost"
        for sequence in waiting:
            name = sequence.request.request_id
            assert (sequence in self) != (sequence in followers), f"{name!r} is in no queue, or in two"
            assert not sequence.num_computed and not len(sequence.table), f"{name!r} waits and holds KV blocks"
