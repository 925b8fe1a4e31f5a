"""DraftControl: how many drafts each sequence gets, so that the engine says the most tokens a second.

    tokens    that a step says: one a sequence, and the drafts that are accepted; counted by sequence and place
    seconds   that it takes, by how many sequences and drafts it has; the engine's clock says
    asked     for the next step: the length of draft, and the sequences that have one, of the most tokens a second

So a sequence that quotes may have drafts and one beside it none, and where a step has so many rows that each costs its
full time nobody has any: that is plain decoding. What is measured fades, or is forgotten when it is old.

Each sequence begins with a trial: too short to cost much, long enough to count, and shorter still while nothing is
known of times, when a whole batch has its first one. One whose drafts do not pay is left alone until its next trial.
What trials lose is owed, and the next ones wait until a small part of the time has made up for it: this bounds what all
of them cost, in batches of any size, where a step with drafts takes no more than three plain ones. Where plain steps,
or steps with drafts, have not been seen of late, a few are made.

It has no clock and draws no numbers: what it asks for follows from what it was told. It imports no torch.

Shape suffixes: S sequences, N places in a draft, K = N + 1 lengths of a draft.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import log2
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from slipstream.schema.build import DraftShape

Numbers = NDArray[np.float64]

_EVERY = 4  # steps from one choice to the next
_OWN_MEMORY, _COMMON_MEMORY = 0.85, 0.98  # what a verification leaves of those before it: a sequence's own, and of all
_COMMON_WEIGHT = 2.0  # verifications that what holds for all counts as, for a sequence
_AT_FIRST = 0.5  # part of the drafts at a place that is expected to be accepted where nothing is known
_TRIAL, _TRIAL_STEPS = 2, 16  # verifications, and steps after which it ends without
_PAUSE = 16  # steps between two trials, at least
_FIRST_DRAFTS = 32  # of a step, before it is known what they cost
_AT_ONCE = 2  # times the drafts that were seen are the most that the next steps have: each size is timed on the way
_FOR_TRIALS = 0.015  # of the time
_MOST_LOST = 2  # plain steps, by a step with drafts: where it took longer, the machine was busy
_SAVED = 8  # plain steps: as much of what drafts have gained is kept for trials
_AS_GOOD = 0.985  # of the rate of plain decoding: what cannot be told apart goes on as it is
_NUM_SAMPLES, _FEWEST_SAMPLES = 7, 3
_OLD = 512  # steps after which a measured time is forgotten


class Observed(NamedTuple):
    """What a step did with the drafts of a sequence."""

    slot: int
    num_verified: int = 0
    accepted: Sequence[int] = ()  # which of these, counted from 1
    num_asked: int = 0  # for its next step
    num_given: int = 0
    num_unmade: int = 0  # of a late step: rows of drafts that were asked for and not made

    @property
    def num_rows(self) -> int:
        """That took time."""
        return self.num_verified + self.num_unmade


@dataclass(slots=True)
class _State:
    """Of a sequence."""

    num_asked: int = 0
    is_drafting: bool = False
    trial_len: int = 0  # drafts of each step of its trial
    num_to_verify: int = 0  # until that is over
    trial_ends: int = 0  # or at this step
    next_trial: int = 0  # the step from which it may have one


class DraftControl:
    """One for a scheduler. Slots are those of its sequences."""

    def __init__(
        self, max_draft_len: int, num_slots: int, shape: DraftShape = DraftShape.CHAIN, *, pays_for_asked: bool = False
    ) -> None:
        """pays_for_asked: steps have rows for the drafts that were asked for, whether they are made or not."""
        self.max_draft_len, self.shape, self._pays_for_asked = max_draft_len, shape, pays_for_asked
        self._lengths_K = np.arange(max_draft_len + 1)
        self._acceptance = _Acceptance(max_draft_len, num_slots, is_chain=shape is DraftShape.CHAIN)
        self._times: dict[int, _Times] = defaultdict(_Times)  # by about how many sequences a step has
        self._states: dict[int, _State] = {}
        self._step = self._next_choice = 0
        self._seconds_owed = 0.0
        self._num_asked = 0  # by the last step

    def start(self, slot: int) -> None:
        """A sequence enters."""
        self._states[slot] = _State()
        self._acceptance.forget(slot)

    def stop(self, slot: int) -> None:
        del self._states[slot]

    @property
    def is_idle(self) -> bool:
        """Whether the next step asks for no drafts, whichever sequences it has."""
        return not any(state.is_drafting or self._is_due(state) for state in self._states.values())

    @property
    def draft_lens(self) -> list[int]:
        """Drafts asked for, of each sequence."""
        return [state.num_asked for state in self._states.values()]

    def ask(self, slots: Sequence[int]) -> list[int]:
        """How many drafts each of these sequences of the next step is to have in the step after."""
        due = [self._states[slot] for slot in slots if self._is_due(self._states[slot])]
        for state in due:
            self._begin_trial(state, self._trial_len(len(slots)))
        self._step += 1
        drafting = [slot for slot in slots if self._states[slot].is_drafting]
        if drafting and self._step >= self._next_choice:
            self._next_choice = self._step + _EVERY
            self._choose(drafting, len(slots))
        return [self._states[slot].num_asked for slot in slots]

    def observe(self, drafts: Sequence[Observed], num_sequences: int, seconds: float | None) -> None:
        """A step of so many sequences is over, of which these had drafts or were asked for some.

        seconds: None where it computed prompts as well.
        """
        told = [each for each in drafts if each.slot in self._states]
        self._acceptance.count(told)
        for each in told:
            self._states[each.slot].num_to_verify -= each.num_verified > 0
        asked_before, self._num_asked = self._num_asked, sum(each.num_asked for each in told)
        if seconds is not None and num_sequences:
            # Drafts that a step verifies were asked for by the one before. Only where it asks for about as many again
            # does it take the time of both, verifying and drafting.
            is_typical = self._num_asked.bit_length() == asked_before.bit_length()
            self._time(told, num_sequences, seconds, is_typical=is_typical)

    def _time(self, told: Sequence[Observed], num_sequences: int, seconds: float, *, is_typical: bool) -> None:
        times = self._times[_about(num_sequences)]
        num_rows = sum(each.num_rows for each in told)
        if is_typical:
            kind = times.drafting[num_rows.bit_length()] if self._num_asked else times.plain
            kind.append(_Time(self._step, num_rows, seconds))
        self._seconds_owed = max(min(self._seconds_owed, 0.0), self._seconds_owed - _FOR_TRIALS * seconds)
        if num_rows:  # what was seen before costs were known is charged when they are
            num_said = num_sequences + sum(len(each.accepted) for each in told)
            times.unpaid.append((num_rows, num_said / num_sequences))
        if times.known is not None:
            self._pay(times, *times.known)

    def _pay(self, times: "_Times", plain: float, curve: "_Curve") -> None:
        for num_rows, num_said in times.unpaid:
            lost = float(curve.at(num_rows)) - plain * num_said
            self._seconds_owed += min(lost, _MOST_LOST * plain)
            self._seconds_owed = max(-_SAVED * plain, self._seconds_owed)
        times.unpaid.clear()

    def _is_due(self, state: _State) -> bool:
        return not state.is_drafting and state.next_trial <= self._step and self._seconds_owed <= 0

    def _trial_len(self, num_sequences: int) -> int:
        """Before it is known what drafts cost, all sequences have their first trial at once, and a short one."""
        if self.shape is DraftShape.WHOLE:
            return self.max_draft_len
        longest = -(-self.max_draft_len // 2)
        if self._times[_about(num_sequences)].known is not None:
            return longest
        return max(1, min(longest, _FIRST_DRAFTS // num_sequences))

    def _begin_trial(self, state: _State, num_drafts: int) -> None:
        self._next_choice = self._step  # what holds for all may ask for more at once
        state.is_drafting, state.num_asked, state.trial_len = True, num_drafts, num_drafts
        state.num_to_verify, state.trial_ends = _TRIAL, self._step + _TRIAL_STEPS

    def _choose(self, drafting: list[int], num_sequences: int) -> None:
        times = self._times[_about(num_sequences)]
        plain, curve = times.of_plain(self._step), times.of_drafts(self._step)
        states = [self._states[slot] for slot in drafting]
        if curve is None:  # of verifying, any time would do
            for state in states:
                state.num_asked = state.trial_len
        elif plain is None:
            for state in states:
                state.num_asked = 0
        else:
            times.known = plain, curve
            best = self._best(drafting, num_sequences, plain, curve)
            for state, num_drafts in zip(states, best, strict=True):
                self._settle(state, num_drafts)

    def _settle(self, state: _State, num_drafts: int) -> None:
        is_on_trial = state.num_to_verify > 0 and self._step < state.trial_ends
        state.num_asked = num_drafts or (state.trial_len if is_on_trial else 0)
        if not state.num_asked:
            state.is_drafting, state.next_trial = False, self._step + _PAUSE

    def _best(self, drafting: list[int], num_sequences: int, plain: float, curve: "_Curve") -> list[int]:
        """Of each length, the sequences that it gains most; of the lengths and how many sequences have it, the best."""
        gains_SK, given_S = self._acceptance.of(drafting)
        order_SK = (-gains_SK).argsort(0)
        num_said_SK = num_sequences + np.take_along_axis(gains_SK * given_S[:, None], order_SK, 0).cumsum(0)
        paid_S = np.ones_like(given_S) if self._pays_for_asked else given_S
        num_drafts_SK = paid_S[order_SK].cumsum(0) * self._lengths_K
        rates_SK = num_said_SK / curve.at(num_drafts_SK)
        rates_SK[num_drafts_SK > _AT_ONCE * max(curve.num_drafts[-1], len(drafting))] = 0
        if self.shape is DraftShape.WHOLE:
            rates_SK[:, :-1] = 0
        count, length = np.unravel_index(rates_SK.argmax(), rates_SK.shape)
        lengths = [0] * len(drafting)
        if rates_SK[count, length] >= _AS_GOOD * num_sequences / plain:
            for row in order_SK[: count + 1, length]:
                lengths[row] = int(length)
        return lengths


class _Acceptance:
    """How often the drafts at each place are accepted, and how many are given that were asked for."""

    def __init__(self, max_draft_len: int, num_slots: int, *, is_chain: bool) -> None:
        self._is_chain = is_chain
        self._places_N = np.arange(max_draft_len)
        self._tries, self._hits = np.zeros((2, num_slots, max_draft_len))
        self._common_tries, self._common_hits = np.zeros((2, max_draft_len))  # of all sequences
        self._given = np.ones(num_slots)

    def forget(self, slot: int) -> None:
        self._tries[slot] = self._hits[slot] = 0
        self._given[slot] = 1

    def count(self, sequences: Sequence[Observed]) -> None:
        asked = [each for each in sequences if each.num_asked]
        if asked:
            slots = [each.slot for each in asked]
            given_S = np.array([min(1.0, each.num_given / each.num_asked) for each in asked])
            self._given[slots] = _OWN_MEMORY * self._given[slots] + (1 - _OWN_MEMORY) * given_S
        verified = [each for each in sequences if each.num_verified]
        if verified:
            slots = [each.slot for each in verified]
            tries_SN = self._places_N < np.array([each.num_verified for each in verified])[:, None]
            hits_SN = np.zeros(tries_SN.shape)
            nodes = [(row, node - 1) for row, each in enumerate(verified) for node in each.accepted]
            if nodes:
                hits_SN[tuple(zip(*nodes, strict=True))] = 1
            self._tries[slots] = _OWN_MEMORY * self._tries[slots] + tries_SN
            self._hits[slots] = _OWN_MEMORY * self._hits[slots] + hits_SN
            self._common_tries = _COMMON_MEMORY * self._common_tries + tries_SN.sum(0)
            self._common_hits = _COMMON_MEMORY * self._common_hits + hits_SN.sum(0)

    def of(self, slots: list[int]) -> tuple[Numbers, Numbers]:
        """[S, K] how many drafts are accepted of a draft of each length, and [S] which part of what is asked comes."""
        common_N = (self._common_hits + _AT_FIRST) / (self._common_tries + 1)
        rates_SN = (self._hits[slots] + _COMMON_WEIGHT * common_N) / (self._tries[slots] + _COMMON_WEIGHT)
        if self._is_chain:
            rates_SN = np.minimum.accumulate(rates_SN, 1)
        return np.pad(rates_SN.cumsum(1), ((0, 0), (1, 0))), self._given[slots]


class _Time(NamedTuple):
    step: int
    num_drafts: int
    seconds: float


class _Curve(NamedTuple):
    """Seconds of a step by its drafts, rising; beyond what was tried, each costs what the last ones did."""

    num_drafts: list[int]
    seconds: list[float]

    def at(self, num_drafts: Any) -> Any:
        slope = 0.0
        if len(self.num_drafts) > 1:
            slope = (self.seconds[-1] - self.seconds[-2]) / (self.num_drafts[-1] - self.num_drafts[-2])
        num_beyond = np.maximum(0, np.asarray(num_drafts) - self.num_drafts[-1])
        return np.interp(num_drafts, self.num_drafts, self.seconds) + slope * num_beyond


class _Times:
    """Of steps with about as many sequences: the latest."""

    def __init__(self) -> None:
        self.known: tuple[float, _Curve] | None = None  # of plain steps and others, at the last choice
        # Drafts that steps verified, and their tokens a sequence, which are not accounted for yet.
        self.unpaid: deque[tuple[int, float]] = deque(maxlen=_OLD)
        self.plain = _latest()  # nothing verified, and nothing asked for
        self.drafting: dict[int, deque[_Time]] = defaultdict(_latest)  # by the bits of the number of drafts verified

    def of_plain(self, now: int) -> float | None:
        typical = _typical(self.plain, now)
        return None if typical is None else typical.seconds

    def of_drafts(self, now: int) -> _Curve | None:
        """None until steps that verified drafts were seen."""
        typical = [_typical(self.drafting[bits], now) for bits in sorted(self.drafting)]
        known = [time for time in typical if time is not None]
        if not known or not known[-1].num_drafts:
            return None
        plain = _typical(self.plain, now)
        if known[0].num_drafts and plain is not None:
            known = [plain, *known]
        return _Curve([time.num_drafts for time in known], list(accumulate((time.seconds for time in known), max)))


def _latest() -> deque[_Time]:
    return deque(maxlen=_NUM_SAMPLES)


def _typical(times: deque[_Time], now: int) -> _Time | None:
    """One of the shorter ones: what disturbs a step makes it longer."""
    recent = sorted((time for time in times if time.step > now - _OLD), key=lambda time: time.seconds)
    return recent[len(recent) // 4] if len(recent) >= _FEWEST_SAMPLES else None


def _about(num_sequences: int) -> int:
    return round(3 * log2(num_sequences))
