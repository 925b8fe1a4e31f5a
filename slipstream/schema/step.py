"""One iteration, from the scheduler to the workers and back.

What is made for each sequence of a step is a NamedTuple: a frozen dataclass takes several times as long to make.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from slipstream.schema.request import GenerateRequest, TokenLogprobs

PENDING = -1


class SequenceStep(NamedTuple):
    """What one sequence does in a step: compute the tokens at positions [start, start + len(token_ids)).

    tokens known   |----------------------------|
    KV computed    |-----------|                       before the step
    this step                  |==========|            token_ids; their K and V are written, then attended to
    sample                                ^            only where the chunk reaches the last known token, and not
                                                       where the request pools
    drafts                                 |~~~|       then there may be drafts: the worker's own, which are verified

    Where the step before is still running, the last of token_ids may be PENDING: what it samples for this slot. If that
    step verifies drafts, nobody knows yet how far it gets: then this one begins up to late_by tokens later.
    """

    slot: int  # the worker's row for this sequence's sampling state
    start: int
    token_ids: tuple[int, ...]
    sample: bool
    # Where the block table is not as in this slot's step before: (place, block id in each KV group), 0 for a block that
    # no row sees. All of it with `new`, nothing in most steps. The table covers start + len(token_ids) tokens.
    table_changes: tuple[tuple[int, tuple[int, ...]], ...] = ()
    new: GenerateRequest | None = None  # set in the first step after admission (again after preemption)
    output_token_ids: tuple[int, ...] = ()  # with `new`: tokens generated before a preemption
    num_drafts: int = 0  # the first of those that this slot's step before has told of, or was asked for
    max_drafts: int = 0  # that are asked for, for its next step
    late_by: int = 0  # at most: as many as the step before accepts

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_drafts


@dataclass(frozen=True)
class BlockCopy:
    """Copy a KV block, in all layers of its group, before the step runs; its first num_tokens are what matters."""

    source: int
    target: int
    num_tokens: int


class BlockLoad(NamedTuple):
    """Fill KV blocks with what another engine computed, before the step runs."""

    kv: Any  # the worker's, opened by its receive()
    first: int  # place in the sequence's block table of the first of these
    rows: tuple[tuple[int, ...], ...]  # block ids, one a KV group; 0 for none


class BlockSave(NamedTuple):
    """Write KV blocks to a file for another engine, after the step has run."""

    place: int  # of the sequence in this plan
    path: str
    num_tokens: int
    rows: tuple[tuple[int, ...], ...]  # block ids from the table's first place on, one a KV group; 0 for none


@dataclass(frozen=True)
class StepPlan:
    step: int
    sequences: tuple[SequenceStep, ...]
    copies: tuple[BlockCopy, ...] = ()
    freed_slots: tuple[int, ...] = ()  # slots released since the last plan
    loads: tuple[BlockLoad, ...] = ()
    saves: tuple[BlockSave, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(sequence.num_tokens for sequence in self.sequences)


class SequenceResult(NamedTuple):
    """The outcome for one SequenceStep, in the same order."""

    token_ids: tuple[int, ...] = ()  # drafts that were accepted, and the token sampled after them
    logprobs: tuple[TokenLogprobs, ...] = ()  # one a token, where asked for
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # for the prompt tokens that FOLLOW each computed row
    error: str | None = None  # this sequence alone failed (a user's logits processor raised, say)
    vector: bytes | None = None  # of one that pools, in the step of its last token
    num_drafts: int = 0  # that the worker has for this sequence's next step
    accepted: tuple[int, ...] = ()  # which of the step's drafts token_ids begins with, counted from 1


@dataclass(frozen=True)
class StepResult:
    sequences: tuple[SequenceResult, ...] = field(default=())


def packed(lengths: Sequence[int], budget: int) -> Iterator[list[tuple[int, int, int]]]:
    """Texts one after the other, in steps of `budget` tokens: which text, from which token to which."""
    pieces, left = [], budget
    for index, length in enumerate(lengths):
        start = 0
        while start < length:
            end = min(length, start + left)
            pieces.append((index, start, end))
            left, start = left - (end - start), end
            if not left:
                yield pieces
                pieces, left = [], budget
    if pieces:
        yield pieces
