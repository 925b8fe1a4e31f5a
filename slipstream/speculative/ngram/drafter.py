"""N-gram drafts: the text's own words, continued where its end has stood before (prompt lookup).

    text     … the cat sat on the mat … the cat          the longest end that was there before: "the cat"
    draft                                        sat on the mat …

Texts that quote, edit or summarize say much twice (github.com/apoorvumang/prompt-lookup-decoding). A suffix automaton
(Blumer et al., 1985) knows the longest such end after each token, of any length, in constant time a token; memory is
linear in the text. Where an end was there more than once, the first place counts. On a GPU, which would be waited for,
the text is searched where it is (on_device.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slipstream.schema.request import GenerateRequest
from slipstream.schema.speculative import Speculation
from slipstream.speculative.drafter import AnyDrafter, Draft, Target, Verified, read_options
from slipstream.speculative.drafter import Drafter as Base

LONGEST_ON_DEVICE = 1 << 17  # tokens of a text, of which each slot has room for the longest


@dataclass(frozen=True)
class Options:
    min_ngram: int = 2  # the shortest end that is looked for


class Drafter(Base):
    @classmethod
    def class_for(cls, device: torch.device, max_seq_len: int) -> type[AnyDrafter]:
        if cls is not Drafter or device.type != "cuda" or max_seq_len > LONGEST_ON_DEVICE:
            return cls
        from slipstream.speculative.ngram.on_device import Drafter as OnDevice  # kernels, which a CPU has no use for

        return OnDevice

    def __init__(self, speculation: Speculation, target: Target) -> None:
        super().__init__(speculation, target)
        self._min_ngram = read_options(Options, speculation).min_ngram
        self._texts: dict[int, Automaton] = {}  # by slot

    def start(self, slot: int, token_ids: Sequence[int], request: GenerateRequest) -> None:
        self._texts[slot] = Automaton(token_ids)

    def draft(self, verified: Verified) -> list[Draft]:
        drafts = []
        for slot, most, token_ids in zip(verified.slots, verified.max_drafts, verified.lists(), strict=True):
            text = self._texts[slot]
            text.extend(token_ids)
            drafts.append(Draft(text.continuation(self._min_ngram, most)))
        return drafts

    def stop(self, slot: int) -> None:
        self._texts.pop(slot, None)


class Automaton:
    """The suffix automaton of a text that grows. A state is a set of substrings that end at the same places."""

    def __init__(self, token_ids: Sequence[int] = ()) -> None:
        self._text: list[int] = []
        # Of each state: the state after each token, the state of its longest suffix that ends elsewhere too, its
        # longest substring's length, and the end of that substring's first occurrence.
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length, self._end = [-1], [0], [0]
        self._last = 0
        self.extend(token_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            self._append(token_id)

    def continuation(self, min_ngram: int, num_tokens: int) -> list[int]:
        """What followed the longest end of the text that it had before, at most so many tokens; [] if it is short.

        Where that place is so near that its continuation runs into the end, it goes on with what it has found: a text
        that repeats itself is expected to go on doing so.
        """
        before = self._link[self._last]
        if before <= 0 or self._length[before] < min_ngram:
            return []
        start = self._end[before]
        period = len(self._text) - start
        return [self._text[start + index % period] for index in range(num_tokens)]

    def _append(self, token_id: int) -> None:
        self._text.append(token_id)
        new = self._add({}, 0, len(self._text), len(self._text))
        state = self._last
        while state != -1 and token_id not in self._next[state]:
            self._next[state][token_id] = new
            state = self._link[state]
        self._last = new
        if state == -1:
            return
        found = self._next[state][token_id]
        if self._length[found] == self._length[state] + 1:
            self._link[new] = found
            return
        clone = self._add(dict(self._next[found]), self._link[found], self._length[state] + 1, self._end[found])
        self._link[found] = self._link[new] = clone
        while state != -1 and self._next[state].get(token_id) == found:
            self._next[state][token_id] = clone
            state = self._link[state]

    def _add(self, following: dict[int, int], link: int, length: int, end: int) -> int:
        self._next.append(following)
        self._link.append(link)
        self._length.append(length)
        self._end.append(end)
        return len(self._link) - 1
