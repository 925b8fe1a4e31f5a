"""Scheduler: which tokens the next step computes, and what its result means for each request.

    while scheduler.has_work:
        plan = scheduler.plan()                   # what to compute: worker.begin, launch and collect make its result
        events = scheduler.commit(plan, result)   # or fail_step(plan, error)

There is one token counter and there are no phases: a sequence has tokens known and tokens computed, and a step closes
part of the gap within a budget. Chunked prefill, prefix hits, decode and recomputation after preemption are all that
one rule, which is `_continue_running` and `_chunk_end`.

One order decides everything: a sequence's rank, which is its arrival, after its priority where QueuePolicy.PRIORITY
asks for that. Sequences are served and admitted best rank first, and the worst is preempted. So the best of them can
always go on (`add` refused what could never fit), and whoever goes on comes to its end: no request starves but by
priorities.

    sequence.py    the tokens of one request: known, computed, planned
    queue.py       who waits; running.py: who runs, and in which slot
    admission.py   what can never run, where a sequence may begin, and whether it can now
    kv/            the blocks
    drafting.py    how many drafts are asked for, and what became of them
    outline.py     the plan of a step in the making

Where the worker runs by itself (a GPU), plan_ahead makes the next plan while this one is executed: what that one will
sample is PENDING there. A sequence that ends with such a token has a row in the next step for nothing. Where that one
verifies drafts, the next is late: it has blocks for all of them, and begins where they end (worker/late.py).

Where the worker is a pipeline, as many steps as it has stages are under way at once. Then plan_ahead waits for tokens:
it takes sequences of which no step is to sample one, and of all that run an equal share.
"""

import time
from collections import deque
from typing import Any

from slipstream.errors import RequestError
from slipstream.runtime.admission import Admission, Beginning
from slipstream.runtime.drafting import Drafting
from slipstream.runtime.kv import KVCacheManager
from slipstream.runtime.outline import Outline
from slipstream.runtime.queue import WaitingQueue
from slipstream.runtime.running import RunningList
from slipstream.runtime.sequence import Rank, Sequence
from slipstream.schema.build import CapacityPolicy, QueuePolicy, RuntimeConfig
from slipstream.schema.request import EngineStats, FinishReason, GenerateRequest, RequestState, TokenEvent
from slipstream.schema.step import BlockLoad, SequenceResult, SequenceStep, StepPlan, StepResult


class Scheduler:
    """Owner of all requests, slots and KV blocks. Plans are executed and committed (or failed) in their order.

    Requests may be added and aborted at any time, between plan and commit too.
    """

    def __init__(self, config: RuntimeConfig) -> None:
        self.config = config
        self._kv = KVCacheManager(
            config.num_blocks, config.tokens_per_block, config.enable_block_reuse, config.kv_groups
        )
        self._admission = Admission(config, self._kv)
        self._drafting = Drafting(config)
        self._sequences: dict[str, Sequence] = {}  # all that have not ended, by request id
        self._waiting = WaitingQueue()
        self._running = RunningList(config.max_batch_size)
        self._in_flight: deque[tuple[StepPlan, list[Sequence]]] = deque()  # the oldest first
        self._num_arrivals = 0
        self._num_steps = 0
        self._num_preemptions = 0
        self._prompt_tokens = 0
        self._prompt_tokens_computed = 0
        self._prompt_tokens_cached = 0
        self._generated_tokens = 0

    # ------------------------------------------------------------------ requests

    def add(self, request: GenerateRequest, handed_kv: Any = None) -> None:
        """Queue a request. RequestError or CapacityError if it could never run.

        handed_kv: what the worker has received of all its prompt but the last token.
        """
        if request.request_id in self._sequences:
            raise RequestError(f"request_id {request.request_id!r} is in use; choose another one.")
        self._admission.check_request(request)
        sequence = Sequence.from_request(request, self._next_rank(request), handed_kv)
        leader = self._sequences.get(request.after) if request.after is not None else None
        self._waiting.push_after(leader, sequence)
        self._sequences[request.request_id] = sequence

    def abort(self, request_id: str) -> bool:
        """End a request without an event: its caller gave up, or found a stop string. False if it is not here.

        If a step is computing it at the moment, that result is dropped and the blocks are released at the commit.
        """
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._end_and_release(sequence, FinishReason.ABORT)
        return True

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._running or self._in_flight)

    def _next_rank(self, request: GenerateRequest) -> Rank:
        self._num_arrivals += 1
        by_priority = self.config.queue_policy is QueuePolicy.PRIORITY
        return (request.priority if by_priority else 0, self._num_arrivals)

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
        return self._next_plan() if self._drafting.can_plan_ahead else None

    def _next_plan(self) -> StepPlan | None:
        outline = Outline(self.config.max_num_tokens)
        is_closed = self.config.capacity_policy is CapacityPolicy.STATIC_BATCH and bool(self._running)
        has_room = self._continue_running(outline)
        # What was just preempted would otherwise come straight back, to be preempted again.
        if not is_closed and has_room:
            self._admit_waiting(outline)
        if not outline.steps:
            return None
        plan = StepPlan(
            self._num_steps, self._drafting.asked_of(outline.steps), tuple(outline.copies),
            self._running.take_freed_slots(), tuple(outline.loads), tuple(outline.saves),
        )  # fmt: skip
        for sequence, step in zip(outline.sequences, plan.sequences, strict=True):
            sequence.num_asked = step.max_drafts
        self._in_flight.append((plan, outline.sequences))
        self._num_steps += 1
        return plan

    def _continue_running(self, outline: Outline) -> bool:
        """Give each running sequence its next chunk, best rank first. Returns whether there was room for all."""
        num_preemptions, is_pipeline = self._num_preemptions, self.config.num_stages > 1
        running, size = self._running.sequences, self.config.tokens_per_block
        index, most = 0, self._share_of(len(running))
        # It shrinks at its end while we go.
        while index < len(running) and outline.budget > 0 and len(outline.steps) < most:
            sequence = running[index]
            index += 1
            late_by = sequence.num_verifying
            if sequence.will_end or (is_pipeline and sequence.num_pending) or not self._can_be_late(sequence, late_by):
                continue
            end = self._chunk_end(sequence, sequence.num_planned, outline.budget)
            if end == sequence.num_planned:
                continue
            if end + late_by > len(sequence.table.rows) * size:
                if self._in_flight and not self._kv.can_extend(sequence.table, end + late_by):
                    return False
                if not self._make_room(sequence, end + late_by):
                    continue
                self._kv.extend(sequence.table, end + late_by)
            num_drafts = 0
            if sequence.num_drafts or self._are_made_in_flight(sequence):
                num_drafts = self._make_room_for_drafts(sequence, end, late_by, outline.budget, len(running) - index)
            self._reach_ahead(sequence, end, late_by + num_drafts, len(running) - index)
            outline.add(sequence, end, num_drafts, late_by=late_by)
        return self._num_preemptions == num_preemptions

    def _can_be_late(self, sequence: Sequence, late_by: int) -> bool:
        """Where a step in flight verifies so many drafts of it: whether the next one may be planned already.

        It is not, near the text's end, which may come before its rows.
        """
        if not late_by:
            return True
        is_next = self.config.takes_late_steps and sequence.num_in_flight == 1
        return is_next and sequence.num_expected + late_by <= sequence.max_computed

    def _are_made_in_flight(self, sequence: Sequence) -> bool:
        """Whether the drafts that a step in flight was asked for are there when the next one runs."""
        return self.config.takes_late_steps and sequence.num_in_flight > 0 and sequence.num_asked > 0

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

    def _share_of(self, num_sequences: int) -> int:
        """How many of these a step has, so that there are as many steps as stages."""
        return -(-num_sequences // self.config.num_stages)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Preempt from the end until the sequence's table can be extended; False if that hit the sequence itself."""
        while not self._kv.can_extend(sequence.table, num_tokens):
            victim = self._running.sequences[-1]  # not in this plan yet: the plan goes through the list in order
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _make_room_for_drafts(self, sequence: Sequence, end: int, late_by: int, budget: int, num_others: int) -> int:
        """How many drafts go along after the token before `end`: others that come after keep a token and a block each.

        Not more than could be of use: of a sequence's last token nothing is computed. So they stay within the blocks
        that were promised to it.
        """
        if end != sequence.num_expected:
            return 0
        budget -= end - sequence.num_planned + num_others
        num_drafts, latest = sequence.num_asked if sequence.num_in_flight else sequence.num_drafts, end + late_by
        room = min(num_drafts, budget, sequence.max_computed - latest)
        held = len(sequence.table.rows) * self.config.tokens_per_block
        if room > 0 and latest + room > held:
            if self._kv.can_extend(sequence.table, latest + room, num_spared=num_others):
                self._kv.extend(sequence.table, latest + room)
            else:
                room = held - latest
        return max(0, room)

    def _reach_ahead(self, sequence: Sequence, end: int, num_drafts: int, num_others: int) -> None:
        """Blocks for what a drafter computes behind a text's last token, if there are some that no other needs."""
        reach = min(end + num_drafts + self.config.tokens_ahead, sequence.max_computed)
        is_asked = self.config.tokens_ahead > 0 and end >= sequence.num_expected
        if is_asked and self._kv.can_extend(sequence.table, reach, num_spared=num_others):
            self._kv.extend(sequence.table, reach)

    def _preempt(self, sequence: Sequence) -> None:
        assert self.config.capacity_policy is CapacityPolicy.MAX_UTILIZATION, "a guaranteed block is missing"
        self._release(sequence)
        sequence.start_over()
        self._waiting.push(sequence)
        self._num_preemptions += 1

    def _admit_waiting(self, outline: Outline) -> None:
        """Start waiting sequences while they fit. Nobody overtakes one that does not, so that it starts some day."""
        if not (self._waiting and self._running.has_free_slot and outline.budget):
            return
        num_promised = self._admission.promised(self._running.sequences)
        most = self.config.max_batch_size
        if self.config.capacity_policy is not CapacityPolicy.STATIC_BATCH:  # which is closed after this step
            most = self._share_of(min(most, len(self._running) + len(self._waiting)))
        while self._running.has_free_slot and outline.budget > 0 and len(outline.steps) < most:
            sequence = self._waiting.peek()
            if sequence is None or not self._try_admit(sequence, outline, num_promised):
                return
            num_promised += self._admission.promised([sequence])

    def _try_admit(self, sequence: Sequence, outline: Outline, num_promised: int) -> bool:
        for beginning in self._admission.beginnings(sequence):
            end = self._chunk_end(sequence, beginning.num_tokens, outline.budget)
            if end > beginning.num_tokens and self._admission.can_start(sequence, beginning.match, end, num_promised):
                self._admit(sequence, beginning, end, outline)
                return True
        return False

    def _admit(self, sequence: Sequence, beginning: Beginning, end: int, outline: Outline) -> None:
        match = beginning.match
        self._waiting.remove(sequence)
        outline.copies += self._kv.admit(sequence.table, match)
        if beginning.num_handed:
            rows = self._kv.receive(sequence.table, beginning.num_handed)
            outline.loads.append(BlockLoad(sequence.handed_kv, len(match.path), rows))
        sequence.handed_kv = None
        self._kv.extend(sequence.table, end)
        sequence.num_computed = sequence.num_planned = beginning.num_tokens
        if sequence.num_cached is None:
            sequence.num_cached = match.num_tokens
            sequence.seconds_queued = time.monotonic() - sequence.added_at
            self._prompt_tokens += sequence.num_prompt
            self._prompt_tokens_cached += match.num_tokens
        self._reach_ahead(sequence, end, num_drafts=0, num_others=0)
        self._drafting.start(self._running.enter(sequence))
        outline.add(sequence, end, is_new=True)

    # ------------------------------------------------------------------ commit

    def commit(self, plan: StepPlan, result: StepResult, seconds: float | None = None) -> list[TokenEvent]:
        """Take in what a step computed. One event for each sequence that got a token or ended.

        seconds: that it took, from the end of the one before, where these follow each other.
        """
        sequences = self._take_in_flight(plan)
        is_live = [each.slot is not None and not each.is_finished for each in sequences]
        verified = self._drafting.observe(plan, result, seconds, is_live)
        events = []
        each = zip(sequences, plan.sequences, result.sequences, verified, strict=True)
        for sequence, step, outcome, num_verified in each:
            event = self._commit_sequence(sequence, step, outcome, num_verified)
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

    def _commit_sequence(
        self, sequence: Sequence, step: SequenceStep, outcome: SequenceResult, num_verified: int
    ) -> TokenEvent | None:
        if sequence.slot is None:  # it failed in the step before this one
            return None
        if outcome.error is not None:
            return self._fail(sequence, outcome.error)
        is_first = not sequence.is_prompt_computed
        token_ids = sequence.take_in(step, outcome)
        if step.start < sequence.num_prompt:
            self._prompt_tokens_computed += min(sequence.num_computed, sequence.num_prompt) - step.start
        self._kv.commit(sequence.table, sequence.token_ids, sequence.num_computed)
        if num_verified and token_ids:
            self._drafting.count(num_verified, len(outcome.token_ids) - 1)
        if sequence.is_finished:
            if not sequence.num_in_flight:
                self._release(sequence)
            return None
        if outcome.vector is not None:
            return self._end_with(sequence, outcome.vector)
        sequence.num_drafts = 0 if sequence.num_in_flight else outcome.num_drafts
        return self._event(sequence, token_ids, outcome, is_first) if step.sample else None

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
            self._waiting.push_followers(sequence)
        self._generated_tokens += len(token_ids)
        reason = sequence.reason_to_end()
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
        """What steps in flight write to is released when they are committed."""
        self._end(sequence, reason)
        if sequence.slot is not None and not sequence.num_in_flight:
            self._release(sequence)

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        """The request is over; its blocks and slot may still be in use."""
        sequence.finish_reason = reason
        del self._sequences[sequence.request.request_id]
        self._waiting.remove(sequence)
        self._waiting.push_followers(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Stop running. What was computed stays in the prefix tree."""
        self._kv.release(sequence.table, sequence.token_ids, sequence.num_computed)
        self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self._drafting.stop(sequence.slot)
        self._running.leave(sequence)

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
            num_waiting=len(self._sequences) - sum(not sequence.is_finished for sequence in self._running.sequences),
            num_blocks_used=self._kv.num_total - self._kv.num_available,
            num_blocks_total=self._kv.num_total,
            num_preemptions=self._num_preemptions,
            num_steps=self._num_steps,
            prompt_tokens=self._prompt_tokens,
            prompt_tokens_computed=self._prompt_tokens_computed,
            prompt_tokens_cached=self._prompt_tokens_cached,
            generated_tokens=self._generated_tokens,
            num_drafts=self._drafting.num_verifications,
            num_draft_tokens=self._drafting.num_draft_tokens,
            num_accepted_tokens=tuple(self._drafting.num_accepted),
            num_drafts_asked=self._drafting.num_asked(len(self._running)),
        )

    def check(self) -> None:
        """Prove every invariant, or raise AssertionError. O(everything): for tests and for an idle engine."""
        self._kv.check(sequence.table for sequence in self._running.sequences)
        self._running.check()
        self._waiting.check(self._sequences.values())
        self._admission.check(self._running.sequences)
        for sequence in self._running.sequences:
            self._check_running(sequence)

    def _check_running(self, sequence: Sequence) -> None:
        steps = sum(sequence in sequences for _, sequences in self._in_flight)
        assert sequence.num_in_flight == steps, f"{sequence.num_in_flight} steps in flight are counted, not {steps}"
        name = sequence.request.request_id
        has_work = sequence.num_computed < sequence.num_known or sequence.is_finished
        assert has_work, f"{name!r} runs and has nothing to compute"
        held = len(sequence.table) * self.config.tokens_per_block
        assert held >= sequence.num_computed, f"{name!r} computed {sequence.num_computed} tokens in {held} places"
        alive = self._sequences.get(name) is sequence
        assert alive or (sequence.is_finished and sequence.num_in_flight), f"{name!r} ended and still runs"
