"""Sequence: the state of one request, owned by the scheduler."""

import time
from dataclasses import dataclass, field
from typing import Any

from slipstream.runtime.kv import BlockTable
from slipstream.schema.request import FinishReason, GenerateRequest, Pooling, TokenLogprobs
from slipstream.schema.step import SequenceResult, SequenceStep

Rank = tuple[int, int]  # (priority, arrival); lower goes first. No two sequences have the same.


@dataclass(eq=False, slots=True)
class Sequence:
    """
    token_ids   |------ prompt ------|---- output ----|    known
                0                num_prompt       num_known
    KV          |-- num_computed --|                       the rest is to be computed; the last token always is
                |-num_cached-|                             found in the prefix tree at admission, not computed
    in flight                      |-- num_planned         steps that run compute the tokens up to here
                                                  |num_pending|  and sample these, one a step
    """

    request: GenerateRequest
    rank: Rank
    token_ids: list[int]
    stop_ids: frozenset[int]
    table: BlockTable
    num_prompt: int
    max_known: int  # prompt and output, where nothing ends it before
    num_computed: int = 0
    num_planned: int = 0
    num_pending: int = 0
    num_in_flight: int = 0  # steps that have it and are not committed
    num_drafts: int = 0  # that the worker has for its next step
    num_asked: int = 0  # drafts that the last step in flight was asked for
    num_verifying: int = 0  # drafts that the last step in flight has: how many of them it accepts is not known
    num_cached: int | None = None  # set at the first admission
    added_at: float = field(default_factory=time.monotonic)
    seconds_queued: float = 0.0  # until that
    slot: int | None = None  # set while running
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of prompt tokens 1 ..; until they are sent
    followers: list["Sequence"] = field(default_factory=list)  # wait until this prompt is computed
    finish_reason: FinishReason | None = None
    handed_kv: Any = None  # of all its prompt but the last token, computed elsewhere; until it is admitted

    @classmethod
    def from_request(cls, request: GenerateRequest, rank: Rank, handed_kv: Any = None) -> "Sequence":
        stop_ids = request.eos_token_ids.union(request.sampling.stop_token_ids)
        token_ids = list(request.prompt_token_ids)
        num_prompt = len(token_ids)
        table = BlockTable(request.cache_salt, is_reusable=request.pooling is not Pooling.MEAN)
        sequence = cls(request, rank, token_ids, stop_ids, table, num_prompt, num_prompt + request.max_tokens)
        sequence.handed_kv = handed_kv
        return sequence

    @property
    def num_known(self) -> int:
        return len(self.token_ids)

    @property
    def num_expected(self) -> int:
        """Tokens known once the steps in flight have ended."""
        return len(self.token_ids) + self.num_pending

    @property
    def will_end(self) -> bool:
        """The steps in flight sample its last token, whatever they sample."""
        return self.finish_reason is not None or len(self.token_ids) + self.num_pending >= self.max_known

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def max_computed(self) -> int:
        """Tokens whose KV will ever be written: the last one sampled never is."""
        return self.max_known - 1

    @property
    def is_prompt_computed(self) -> bool:
        """Once true, true for good, preempted or not: the step that ends the prompt samples the first token."""
        return len(self.token_ids) > self.num_prompt

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the logits of every prompt row are still needed."""
        return self.request.sampling.prompt_logprobs is not None and not self.is_prompt_computed

    @property
    def needs_every_row(self) -> bool:
        """Whether the rows of the prompt have to be computed, and none may come from the prefix tree."""
        return self.wants_prompt_logprobs or self.request.pooling is Pooling.MEAN

    def take_in(self, step: SequenceStep, outcome: SequenceResult) -> tuple[int, ...]:
        """A step has computed its tokens. Returns those that it adds to the known ones."""
        self.num_pending -= step.sample
        if self.finish_reason is not None:  # aborted meanwhile, or at its end with what the step before sampled
            token_ids: tuple[int, ...] = ()
        else:
            if outcome.prompt_logprobs and self.wants_prompt_logprobs:
                self.prompt_logprobs.extend(outcome.prompt_logprobs)
            token_ids = self._up_to_a_stop(outcome.token_ids)
        start = len(self.token_ids) - 1 if step.late_by else step.start
        self.token_ids += token_ids
        # Of one that was aborted before, the token that the step began with was never taken in.
        num_computed = start + len(step.token_ids) + max(0, len(token_ids) - 1)
        self.num_computed = min(num_computed, len(self.token_ids))
        if step.num_drafts:
            self.num_planned = self.num_computed + (self.num_in_flight > 0)  # a late step has the token after these
        if not self.num_in_flight:
            self.num_verifying = 0
        return token_ids

    def _up_to_a_stop(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Without what was accepted after a token that ends the sequence."""
        for index, token_id in enumerate(token_ids, 1):
            if token_id in self.stop_ids:
                return token_ids[:index]
        return token_ids

    def reason_to_end(self) -> FinishReason | None:
        """Why it ends with its last token. (min_tokens is the sampler's: it does not offer a stop.)"""
        if self.token_ids[-1] in self.stop_ids:
            return FinishReason.STOP
        # The sequence limit needs no look: admission held prompt and max_tokens together to max_seq_len.
        return FinishReason.LENGTH if len(self.token_ids) >= self.max_known else None

    def start_over(self) -> None:
        """Its blocks are gone: all that is known is to be computed again, or found."""
        self.num_computed = self.num_planned = self.num_drafts = 0
        self.prompt_logprobs.clear()
