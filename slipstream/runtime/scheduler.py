"""Scheduler: which tokens the next step computes, and what its result means for each request.

    while scheduler.has_work:
        plan = scheduler.plan()              # what to compute
        result = worker.execute(plan)
        events = scheduler.commit(plan, result)   # or fail_step(plan, error)

Where the worker runs by itself (a GPU), plan_ahead makes the next plan while this one is executed: what that one will
sample is PENDING there. A sequence that ends with such a token has a row in the next step for nothing.

Where the worker is a pipeline, as many steps as it has stages are under way at once. Then plan_ahead waits for tokens:
it takes sequences of which no step is to sample one, and of all that run an equal share.

There is one token counter and there are no phases: a sequence has tokens known and tokens computed, and a step closes
part of the gap within a budget. Chunked prefill, prefix hits, decode and recomputation after preemption are all that
one rule.

One order decides everything: a sequence's rank, which is its arrival, after its priority where QueuePolicy.PRIORITY
asks for that. Sequences are served and admitted best rank first, and the worst is preempted. So the best of them can
always go on (`add` refused what could never fit), and whoever goes on comes to its end: no request starves but by
priorities.
"""

import time
from bisect import bisect_left, bisect_right, insort
from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

from slipstream.errors import CapacityError, RequestError
from slipstream.runtime.draft_control import DraftControl, Observed
from slipstream.runtime.kv import KVCacheManager, Match
from slipstream.runtime.queue import WaitingQueue
from slipstream.runtime.sequence import Rank, Sequence
from slipstream.schema.build import CapacityPolicy, QueuePolicy, RuntimeConfig
from slipstream.schema.request import EngineStats, FinishReason, GenerateRequest, RequestState, TokenEvent
from slipstream.schema.step import (
    PENDING,
    BlockCopy,
    BlockLoad,
    BlockSave,
    SequenceResult,
    SequenceStep,
    StepPlan,
    StepResult,
)  # fmt: skip


@dataclass(slots=True)
class _Outline:
    """A plan in the making."""

    budget: int  # tokens that may still be added
    sequences: list[Sequence] = field(default_factory=list)
    steps: list[SequenceStep] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    loads: list[BlockLoad] = field(default_factory=list)
    saves: list[BlockSave] = field(default_factory=list)

    def add(self, sequence: Sequence, end: int, num_drafts: int = 0, *, is_new: bool = False) -> None:
        """Compute the sequence's tokens from num_planned to `end`, and verify drafts of what comes then."""
        assert sequence.slot is not None
        start, sample = sequence.num_planned, end == sequence.num_expected and sequence.request.pooling is None
        token_ids = tuple(sequence.token_ids[start:end])
        if len(token_ids) < end - start:
            token_ids += (PENDING,)
        changes = sequence.table.take_changes()
        step = SequenceStep(sequence.slot, start, token_ids, sample, changes, num_drafts=num_drafts)
        if is_new:
            generated = tuple(sequence.token_ids[sequence.num_prompt :])
            step = step._replace(new=sequence.request, output_token_ids=generated)
        path = sequence.request.kv_to
        if path is not None and sample and end == sequence.num_prompt:
            rows = tuple(map(tuple, sequence.table.rows))
            self.saves.append(BlockSave(len(self.steps), path, end, rows))
        self.sequences.append(sequence)
        self.steps.append(step)
        self.budget -= step.num_tokens
        sequence.num_planned = end
        sequence.num_drafts, sequence.is_verifying = 0, num_drafts > 0
        sequence.num_pending += sample
        sequence.num_in_flight += 1


class Scheduler:
    """Owner of all requests, slots and KV blocks. Plans are executed and committed (or failed) in their order.

    Requests may be added and aborted at any time, between plan and commit too.
    """

    def __init__(self, config: RuntimeConfig) -> None:
        self.config = config
        self._kv = KVCacheManager(
            config.num_blocks, config.tokens_per_block, config.enable_block_reuse, config.kv_groups
        )
        self._sequences: dict[str, Sequence] = {}  # all that have not ended, by request id
        self._waiting = WaitingQueue()  # those that may be admitted; followers wait outside, in their leader's list
        self._running: list[Sequence] = []  # by rank; each has a slot and blocks
        self._in_flight: deque[tuple[StepPlan, list[Sequence]]] = deque()  # the oldest first
        self._free_slots = list(range(config.max_batch_size))  # a heap
        self._freed_slots: list[int] = []  # since the last plan
        self._num_arrivals = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._prompt_tokens = 0
        self._prompt_tokens_computed = 0
        self._prompt_tokens_cached = 0
        self._generated_tokens = 0
        self._control: DraftControl | None = None
        if config.is_adaptive and config.max_draft_len:
            self._control = DraftControl(config.max_draft_len, config.max_batch_size, config.draft_shape)
        self._num_verifications = 0
        self._num_draft_tokens = 0
        self._num_accepted = [0] * config.max_draft_len  # by place in the draft

    # ------------------------------------------------------------------ requests

    def add(self, request: GenerateRequest, handed_kv: Any = None) -> None:
        """Queue a request. RequestError or CapacityError if it could never run.

        handed_kv: what the worker has received of all its prompt but the last token.
        """
        self._check_request(request)
        sequence = Sequence.from_request(request, self._next_rank(request), handed_kv)
        # Only a request that came before can be waited for, so no two wait for each other.
        leader = self._sequences.get(request.after) if request.after is not None else None
        if leader is not None and not leader.is_prompt_computed:
            leader.followers.append(sequence)
        else:
            self._waiting.push(sequence)
        self._sequences[request.request_id] = sequence

    def abort(self, request_id: str) -> bool:
        """End a request without an event: its caller gave up, or found a stop string. False if it is not here.

        If a step is computing it at the moment, that result is dropped and the blocks are released at the commit.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._end(sequence, FinishReason.ABORT)
        if sequence.slot is not None and not sequence.num_in_flight:
            self._release(sequence)
        return True

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._running or self._in_flight)

    def _next_rank(self, request: GenerateRequest) -> Rank:
        self._num_arrivals += 1
        by_priority = self.config.queue_policy is QueuePolicy.PRIORITY
        return (request.priority if by_priority else 0, self._num_arrivals)

    def _check_request(self, request: GenerateRequest) -> None:
        config, num_prompt = self.config, len(request.prompt_token_ids)
        if request.request_id in self._sequences:
            raise RequestError(f"request_id {request.request_id!r} is in use; choose another one.")
        if num_prompt == 0:
            raise RequestError("the prompt has 0 tokens; it needs at least 1.")
        self._check_length(request, num_prompt)
        if not config.enable_chunked_prefill and num_prompt > config.max_num_tokens:
            raise RequestError(
                f"the prompt has {num_prompt} tokens, but without chunked prefill it must fit in one step; "
                f"shorten it to at most {config.max_num_tokens} or set enable_chunked_prefill."
            )
        self._check_capacity(num_prompt, request.max_tokens)

    def _check_length(self, request: GenerateRequest, num_prompt: int) -> None:
        longest = self.config.max_seq_len
        if request.pooling is not None:
            if num_prompt > longest:
                raise RequestError(f"the text has {num_prompt} tokens; shorten it to max_seq_len {longest}.")
            return
        if num_prompt >= longest:
            raise RequestError(
                f"the prompt has {num_prompt} tokens, but prompt and output share max_seq_len {longest}; "
                f"shorten it to at most {longest - 1}."
            )
        room = longest - num_prompt
        if not 1 <= request.max_tokens <= room:
            raise RequestError(
                f"max_tokens is {request.max_tokens}; after {num_prompt} prompt tokens of max_seq_len "
                f"{longest} it must be at least 1 and at most {room}."
            )

    def _check_capacity(self, num_prompt: int, max_tokens: int) -> None:
        def num_needed(num_tokens: int) -> int:
            return self._kv.max_blocks(num_tokens, self._most_in_flight(min(num_prompt, num_tokens), num_tokens))

        if num_needed(num_prompt + max_tokens - 1) <= self._kv.num_total:
            return
        capacity = bisect_right(range(1, self.config.max_seq_len), self._kv.num_total, key=num_needed)
        advice = (
            f"lower max_tokens to {capacity - num_prompt + 1}"
            if num_prompt <= capacity
            else f"shorten the prompt to at most {capacity} tokens"
        )
        raise CapacityError(
            f"the request needs {num_needed(num_prompt + max_tokens - 1)} KV blocks but the pool has "
            f"{self._kv.num_total}; {advice} or raise the KV cache (kv_cache_max_tokens)."
        )

    def _most_in_flight(self, num_to_compute: int, max_computed: int) -> int:
        """Most tokens of a sequence that steps in flight compute from now on.

        Windows move when a step is committed. What was preempted computes all of its tokens again.
        """
        if self.config.capacity_policy is CapacityPolicy.MAX_UTILIZATION:
            num_to_compute = max_computed
        num_steps = max(2, self.config.num_stages)
        return min(num_steps * self.config.max_num_tokens, max(1, num_to_compute) + 1 + self.config.max_draft_len)

    # ------------------------------------------------------------------ plan

    def plan(self) -> StepPlan | None:
        """The next step; None exactly when nothing is left to do."""
        assert not self._in_flight, "the last plan was not committed"
        plan = self._next_plan()
        assert plan is not None or not self._sequences, "requests wait and none can run"
        return plan

    def plan_ahead(self) -> StepPlan | None:
        """The step after those in flight, planned without knowing what they sample.

        None where nothing can be said yet, or only by preempting what is in flight.
        """
        assert self._in_flight, "there is no step in flight"
        # Drafts begin with a step whose start is known.
        return self._next_plan() if self._control is None or self._control.is_idle else None

    def _next_plan(self) -> StepPlan | None:
        outline = _Outline(self.config.max_num_tokens)
        is_closed = self.config.capacity_policy is CapacityPolicy.STATIC_BATCH and bool(self._running)
        has_room = self._continue_running(outline)
        # What was just preempted would otherwise come straight back, to be preempted again.
        if not is_closed and has_room:
            self._admit_waiting(outline)
        if not outline.steps:
            return None
        plan = StepPlan(
            self._num_steps, self._asking_for_drafts(outline.steps), tuple(outline.copies), tuple(self._freed_slots),
            tuple(outline.loads), tuple(outline.saves),
        )  # fmt: skip
        self._in_flight.append((plan, outline.sequences))
        self._freed_slots.clear()
        self._num_steps += 1
        return plan

    def _asking_for_drafts(self, steps: list[SequenceStep]) -> tuple[SequenceStep, ...]:
        max_draft_len = self.config.max_draft_len
        if not max_draft_len:
            return tuple(steps)
        slots = [step.slot for step in steps if step.sample]
        asked = iter([max_draft_len] * len(slots) if self._control is None else self._control.ask(slots))
        return tuple(step._replace(max_drafts=next(asked)) if step.sample else step for step in steps)

    def _continue_running(self, outline: _Outline) -> bool:
        """Give each running sequence its next chunk, best rank first. Returns whether there was room for all."""
        num_preemptions = self._num_preemptions
        index, most = 0, self._share_of(len(self._running))
        # _running shrinks at its end while we go.
        while index < len(self._running) and outline.budget > 0 and len(outline.steps) < most:
            sequence = self._running[index]
            index += 1
            if sequence.will_end or sequence.is_verifying or (self.config.num_stages > 1 and sequence.num_pending):
                continue
            end = self._chunk_end(sequence, sequence.num_planned, outline.budget)
            if end == sequence.num_planned:
                continue
            if end > len(sequence.table.rows) * self.config.tokens_per_block:
                if self._in_flight and not self._kv.can_extend(sequence.table, end):
                    return False
                if not self._make_room(sequence, end):
                    continue
                self._kv.extend(sequence.table, end)
            num_drafts = self._make_room_for_drafts(sequence, end, outline.budget, len(self._running) - index)
            outline.add(sequence, end, num_drafts)
        return self._num_preemptions == num_preemptions

    def _share_of(self, num_sequences: int) -> int:
        """How many of these a step has, so that there are as many steps as stages."""
        return -(-num_sequences // self.config.num_stages)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Preempt from the end until the sequence's table can be extended; False if that hit the sequence itself."""
        while not self._kv.can_extend(sequence.table, num_tokens):
            victim = self._running[-1]  # not in this plan yet: the plan goes through the list in order
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _make_room_for_drafts(self, sequence: Sequence, end: int, budget: int, num_others: int) -> int:
        """How many drafts go along after the token before `end`: others that come after keep a token and a block each.

        Not more than could be of use: of a sequence's last token nothing is computed. So they stay within the blocks
        that were promised to it.
        """
        if not sequence.num_drafts or end != sequence.num_expected:
            return 0
        budget -= end - sequence.num_planned + num_others
        room = min(sequence.num_drafts, budget, sequence.max_computed - end)
        held = len(sequence.table.rows) * self.config.tokens_per_block
        if room > 0 and end + room > held:
            if self._kv.can_extend(sequence.table, end + room, num_spared=num_others):
                self._kv.extend(sequence.table, end + room)
            else:
                room = held - end
        return max(0, room)

    def _preempt(self, sequence: Sequence) -> None:
        assert self.config.capacity_policy is CapacityPolicy.MAX_UTILIZATION, "a guaranteed block is missing"
        self._release(sequence)
        sequence.num_computed = sequence.num_planned = sequence.num_drafts = 0
        sequence.prompt_logprobs.clear()
        self._waiting.push(sequence)
        self._num_preemptions += 1

    def _admit_waiting(self, outline: _Outline) -> None:
        """Start waiting sequences while they fit. Nobody overtakes one that does not, so that it starts some day."""
        if not (self._waiting and self._free_slots and outline.budget):
            return
        is_optimistic = self.config.capacity_policy is CapacityPolicy.MAX_UTILIZATION
        num_promised = 0 if is_optimistic else sum(map(self._promised, self._running))
        most = self.config.max_batch_size
        if self.config.capacity_policy is not CapacityPolicy.STATIC_BATCH:  # which is closed after this step
            most = self._share_of(min(most, len(self._running) + len(self._waiting)))
        while self._free_slots and outline.budget > 0 and len(outline.steps) < most:
            sequence = self._waiting.peek()
            if sequence is None or not self._try_admit(sequence, outline, None if is_optimistic else num_promised):
                return
            num_promised += self._promised(sequence)

    def _promised(self, sequence: Sequence) -> int:
        """Blocks that are a running sequence's, whatever it generates."""
        chunk = 1  # where there is a window, how far it may be behind
        if self._kv.has_windows:
            chunk = self._most_in_flight(sequence.num_known - sequence.num_computed, sequence.max_computed)
        return self._kv.promised(sequence.table, sequence.max_computed, chunk)

    def _try_admit(self, sequence: Sequence, outline: _Outline, num_promised: int | None) -> bool:
        """num_promised: blocks that are others' and must stay so; None where nothing is promised to anybody."""
        for match, num_handed in self._beginnings(sequence):
            start = max(match.num_tokens, num_handed)
            end = self._chunk_end(sequence, start, outline.budget)
            if end > start and self._can_admit(sequence, match, end, num_promised):
                self._admit(sequence, match, num_handed, end, outline)
                return True
        return False

    def _can_admit(self, sequence: Sequence, match: Match, end: int, num_promised: int | None) -> bool:
        if num_promised is None:
            return self._kv.can_admit(match, end)
        chunk = self._most_in_flight(sequence.num_known - match.num_tokens, sequence.max_computed)
        num_reserved = num_promised - self._kv.num_in_windows
        return self._kv.can_promise(match, sequence.max_computed, chunk, num_reserved)

    def _beginnings(self, sequence: Sequence) -> list[tuple[Match, int]]:
        """What need not be computed, best first: from the prefix tree, and so many tokens from another engine."""
        if sequence.needs_every_row:
            return [(Match(), 0)]
        matches = self._matches(sequence)
        found = [(match, 0) for match in matches]
        if sequence.handed_kv is None:
            return found
        num_handed = sequence.num_prompt - 1 - self.config.recomputes_last_found
        if num_handed <= matches[0].num_tokens:
            return found
        return [(matches[-1].without_copy(), num_handed), *found]

    def _matches(self, sequence: Sequence) -> list[Match]:
        """What may be taken from the prefix tree, best first."""
        salt, token_ids = sequence.request.cache_salt, sequence.token_ids
        match = self._kv.match(salt, token_ids)
        if self.config.recomputes_last_found:
            match = self._kv.match(salt, token_ids[: match.num_tokens])
        # The source of a copy is one block more than the request itself needs: in a tight pool, go without it.
        return [match] if match.source is None else [match, match.without_copy()]

    def _admit(self, sequence: Sequence, match: Match, num_handed: int, end: int, outline: _Outline) -> None:
        self._waiting.remove(sequence)
        outline.copies += self._kv.admit(sequence.table, match)
        if num_handed:
            rows = self._kv.receive(sequence.table, num_handed)
            outline.loads.append(BlockLoad(sequence.handed_kv, len(match.path), rows))
        sequence.handed_kv = None
        self._kv.extend(sequence.table, end)
        sequence.num_computed = sequence.num_planned = max(match.num_tokens, num_handed)
        if sequence.num_cached is None:
            sequence.num_cached = match.num_tokens
            sequence.seconds_queued = time.monotonic() - sequence.added_at
            self._prompt_tokens += sequence.num_prompt
            self._prompt_tokens_cached += match.num_tokens
        sequence.slot = heappop(self._free_slots)
        if self._control is not None:
            self._control.start(sequence.slot)
        insort(self._running, sequence, key=_rank)
        outline.add(sequence, end, is_new=True)

    def _chunk_end(self, sequence: Sequence, start: int, budget: int) -> int:
        """Where a chunk from `start` ends, `start` itself if there can be none.

        It reaches the last token or a block border, unless the budget allows neither.
        """
        end, most = start + budget, sequence.num_expected
        if end >= most:
            return most
        # A preempted sequence may have outgrown the budget: it comes back in chunks in any case.
        if not self.config.enable_chunked_prefill and not sequence.is_prompt_computed:
            return start
        border = end - end % self.config.tokens_per_block
        return border if border > start else end

    # ------------------------------------------------------------------ commit

    def commit(self, plan: StepPlan, result: StepResult, seconds: float | None = None) -> list[TokenEvent]:
        """Take in what a step computed. One event for each sequence that got a token or ended.

        seconds: that it took, from the end of the one before, where these follow each other.
        """
        sequences = self._take_in_flight(plan)
        if self._control is not None:
            is_decoding = all(step.sample and len(step.token_ids) == 1 for step in plan.sequences)
            self._control.observe(_drafts_in(plan, result), seconds if is_decoding else None)
        events = []
        for sequence, step, outcome in zip(sequences, plan.sequences, result.sequences, strict=True):
            event = self._commit_sequence(sequence, step, outcome)
            if event is not None:
                events.append(event)
        return events

    def fail_step(self, plan: StepPlan, error: str) -> list[TokenEvent]:
        """The step raised: its sequences end with `error`, and nothing they may have written is reused."""
        events = [self._fail(sequence, error) for sequence in self._take_in_flight(plan)]
        return [event for event in events if event is not None]

    def _take_in_flight(self, plan: StepPlan) -> list[Sequence]:
        assert self._in_flight and self._in_flight[0][0] is plan, (
            f"step {plan.step} is not in flight, or not the oldest"
        )
        sequences = self._in_flight.popleft()[1]
        for sequence in sequences:
            sequence.num_in_flight -= 1
        return sequences

    def _commit_sequence(self, sequence: Sequence, step: SequenceStep, outcome: SequenceResult) -> TokenEvent | None:
        if sequence.slot is None:  # it failed in the step before this one
            return None
        if outcome.error is not None:
            return self._fail(sequence, outcome.error)
        sequence.num_pending -= step.sample
        # Aborted meanwhile, or at its end with what the step before sampled.
        is_over, is_first = sequence.is_finished, not sequence.is_prompt_computed
        if outcome.prompt_logprobs and sequence.wants_prompt_logprobs and not is_over:
            sequence.prompt_logprobs.extend(outcome.prompt_logprobs)
        token_ids = () if is_over else _up_to_a_stop(sequence, outcome.token_ids)
        sequence.token_ids += token_ids
        # Of one that was aborted before, the token that the step began with was never taken in.
        num_computed = step.start + len(step.token_ids) + max(0, len(token_ids) - 1)
        sequence.num_computed = min(num_computed, len(sequence.token_ids))
        if step.start < sequence.num_prompt:
            self._prompt_tokens_computed += min(sequence.num_computed, sequence.num_prompt) - step.start
        self._kv.commit(sequence.table, sequence.token_ids, sequence.num_computed)
        if step.num_drafts:
            sequence.num_planned, sequence.is_verifying = sequence.num_computed, False
            self._count_accepted(step.num_drafts, len(outcome.token_ids) - 1)
        if is_over:
            if not sequence.num_in_flight:
                self._release(sequence)
            return None
        if outcome.vector is not None:
            return self._end_with(sequence, outcome.vector)
        sequence.num_drafts = 0 if sequence.num_in_flight else outcome.num_drafts
        return self._event(sequence, token_ids, outcome, is_first) if step.sample else None

    def _count_accepted(self, num_drafts: int, num_accepted: int) -> None:
        self._num_verifications += 1
        self._num_draft_tokens += num_drafts
        for place in range(num_accepted):
            self._num_accepted[place] += 1

    def _event(
        self, sequence: Sequence, token_ids: tuple[int, ...], outcome: SequenceResult, is_first: bool
    ) -> TokenEvent:
        """The tokens are taken in; is_first: they are the sequence's first."""
        assert token_ids, f"the worker sampled no token for {sequence.request.request_id!r}"
        prompt_logprobs, num_cached, seconds_queued = None, 0, 0.0
        if is_first:
            num_cached, seconds_queued = sequence.num_cached or 0, sequence.seconds_queued
            if sequence.request.sampling.prompt_logprobs is not None:
                prompt_logprobs = (None, *sequence.prompt_logprobs)
                sequence.prompt_logprobs.clear()
            self._free_followers(sequence)
        self._generated_tokens += len(token_ids)
        reason = _finish_reason(sequence)
        if reason is not None:
            self._end_and_release(sequence, reason)
        return TokenEvent(
            request_id=sequence.request.request_id,
            token_ids=token_ids,
            logprobs=outcome.logprobs[: len(token_ids)],
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_token_id=token_ids[-1] if reason is FinishReason.STOP else None,
            num_cached_tokens=num_cached,
            seconds_queued=seconds_queued,
        )

    def _end_with(self, sequence: Sequence, vector: bytes) -> TokenEvent:
        """All tokens of one that pools are computed."""
        self._end_and_release(sequence, FinishReason.STOP)
        return TokenEvent(
            request_id=sequence.request.request_id,
            finish_reason=FinishReason.STOP,
            num_cached_tokens=sequence.num_cached or 0,
            seconds_queued=sequence.seconds_queued,
            vector=vector,
        )

    def _fail(self, sequence: Sequence, error: str) -> TokenEvent | None:
        if sequence.slot is None:
            return None
        self._kv.discard(sequence.table)
        self._leave(sequence)
        if sequence.is_finished:  # aborted meanwhile: nobody listens
            return None
        self._end(sequence, FinishReason.ERROR)
        return TokenEvent(
            request_id=sequence.request.request_id,
            finish_reason=FinishReason.ERROR,
            error=error,
            num_cached_tokens=(sequence.num_cached or 0) if not sequence.is_prompt_computed else 0,
        )

    # ------------------------------------------------------------------ leaving

    def _end_and_release(self, sequence: Sequence, reason: FinishReason) -> None:
        self._end(sequence, reason)
        if not sequence.num_in_flight:
            self._release(sequence)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        """The request is over; its blocks and slot may still be in use."""
        sequence.finish_reason = reason
        del self._sequences[sequence.request.request_id]
        self._waiting.remove(sequence)
        self._free_followers(sequence)

    def _free_followers(self, sequence: Sequence) -> None:
        for follower in sequence.followers:
            if not follower.is_finished:
                self._waiting.push(follower)
        sequence.followers.clear()

    def _release(self, sequence: Sequence) -> None:
        """Stop running. What was computed stays in the prefix tree."""
        self._kv.release(sequence.table, sequence.token_ids, sequence.num_computed)
        self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        if self._control is not None:
            self._control.stop(sequence.slot)
        heappush(self._free_slots, sequence.slot)
        self._freed_slots.append(sequence.slot)
        sequence.slot = None
        del self._running[bisect_left(self._running, sequence.rank, key=_rank)]

    # ------------------------------------------------------------------ looking in

    def requests(self) -> list[RequestState]:
        """All that have not ended. From any thread, also while this one is busy or hangs."""
        return [
            RequestState(request_id, each.slot is not None, each.num_prompt, each.num_computed, each.num_output)
            for request_id, each in list(self._sequences.items())  # copied at once, by Python's lock
        ]

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._sequences) - sum(not sequence.is_finished for sequence in self._running),
            num_blocks_used=self._kv.num_total - self._kv.num_available,
            num_blocks_total=self._kv.num_total,
            num_preemptions=self._num_preemptions,
            num_steps=self._num_steps,
            prompt_tokens=self._prompt_tokens,
            prompt_tokens_computed=self._prompt_tokens_computed,
            prompt_tokens_cached=self._prompt_tokens_cached,
            generated_tokens=self._generated_tokens,
            num_drafts=self._num_verifications,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=tuple(self._num_accepted),
            num_drafts_asked=self._num_drafts_asked(),
        )

    def _num_drafts_asked(self) -> int:
        if self._control is None:
            return len(self._running) * self.config.max_draft_len
        return sum(self._control.draft_lens)

    def check(self) -> None:
        """Prove every invariant, or raise AssertionError. O(everything): for tests and for an idle engine."""
        self._kv.check(sequence.table for sequence in self._running)
        self._check_running()
        self._check_waiting()

    def _check_running(self) -> None:
        slots = [sequence.slot for sequence in self._running if sequence.slot is not None]
        assert len(slots) == len(self._running), "a running sequence has no slot"
        assert sorted(slots + self._free_slots) == list(range(self.config.max_batch_size)), f"slots {slots} in use"
        ranks = [sequence.rank for sequence in self._running]
        assert ranks == sorted(set(ranks)), f"the running sequences are out of order: {ranks}"
        for sequence in self._running:
            steps = sum(sequence in sequences for _, sequences in self._in_flight)
            assert sequence.num_in_flight == steps, f"{sequence.num_in_flight} steps in flight are counted, not {steps}"
            name = sequence.request.request_id
            has_work = sequence.num_computed < sequence.num_known or sequence.is_finished
            assert has_work, f"{name!r} runs and has nothing to compute"
            held = len(sequence.table) * self.config.tokens_per_block
            assert held >= sequence.num_computed, f"{name!r} computed {sequence.num_computed} tokens in {held} places"
            alive = self._sequences.get(name) is sequence
            assert alive or (sequence.is_finished and sequence.num_in_flight), f"{name!r} ended and still runs"
        if self.config.capacity_policy is not CapacityPolicy.MAX_UTILIZATION:
            num_reserved = sum(map(self._promised, self._running)) - self._kv.num_in_windows
            assert 0 <= num_reserved <= self._kv.num_available, f"{num_reserved} blocks are promised, too many"

    def _check_waiting(self) -> None:
        waiting = [sequence for sequence in self._sequences.values() if sequence.slot is None]
        followers = {
            follower
            for leader in self._sequences.values()
            for follower in leader.followers
            if not follower.is_finished and not leader.is_prompt_computed
        }
        assert len(self._waiting) + len(followers) == len(waiting), "a waiting sequence is lost"
        for sequence in waiting:
            name = sequence.request.request_id
            assert (sequence in self._waiting) != (sequence in followers), f"{name!r} is in no queue, or in two"
            assert not sequence.num_computed and not len(sequence.table), f"{name!r} waits and holds KV blocks"


def _rank(sequence: Sequence) -> Rank:
    return sequence.rank


def _drafts_in(plan: StepPlan, result: StepResult) -> list[Observed]:
    return [
        Observed(step.slot, step.num_drafts, outcome.accepted, step.max_drafts, outcome.num_drafts)
        for step, outcome in zip(plan.sequences, result.sequences, strict=True)
    ]


def _up_to_a_stop(sequence: Sequence, token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """Without what was accepted after a token that ends the sequence."""
    for index, token_id in enumerate(token_ids, 1):
        if token_id in sequence.stop_ids:
            return token_ids[:index]
    return token_ids


def _finish_reason(sequence: Sequence) -> FinishReason | None:
    """Why the sequence ends with its last token. (min_tokens is the sampler's: it does not offer a stop.)"""
    if sequence.token_ids[-1] in sequence.stop_ids:
        return FinishReason.STOP
    # The sequence limit needs no look: `add` held prompt and max_tokens together to max_seq_len.
    return FinishReason.LENGTH if len(sequence.token_ids) >= sequence.max_known else None
