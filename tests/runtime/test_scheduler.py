"""The scheduler's rules, one at a time. Blocks hold 4 tokens unless a test says otherwise."""

import pytest

from slipstream.errors import CapacityError, RequestError
from slipstream.runtime.queue import WaitingQueue
from slipstream.runtime.scheduler import Scheduler
from slipstream.runtime.sequence import Sequence
from slipstream.schema.build import CapacityPolicy, QueuePolicy, RuntimeConfig
from slipstream.schema.request import FinishReason, GenerateRequest, Pooling, TokenEvent
from slipstream.schema.sampling import SamplingParams
from slipstream.schema.step import SequenceResult, StepPlan, StepResult

from .fake_worker import FakeWorker, expected_output, expected_vector, make_request, prompt_logprob


class Engine:
    """A scheduler and a worker that runs its plans."""

    def __init__(self, **config) -> None:
        defaults = {"num_blocks": 65, "tokens_per_block": 4, "max_batch_size": 8, "max_num_tokens": 32}
        self.config = RuntimeConfig(**{**defaults, "max_seq_len": 64, **config})
        self.scheduler = Scheduler(self.config)
        self.worker = FakeWorker(self.config)
        self.events: dict[str, list[TokenEvent]] = {}

    def add(self, *requests: GenerateRequest) -> None:
        for request in requests:
            self.scheduler.add(request)

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan()
        assert plan is not None
        self.scheduler.check()
        return plan

    def step(self) -> dict[str, tuple[int, int]]:
        """Run a step. For each request in it: the interval of tokens computed."""
        plan = self.plan()
        self.commit(plan)
        return self.spans(plan)

    def commit(self, plan: StepPlan) -> None:
        self.take(self.scheduler.commit(plan, self.worker.execute(plan)))

    def take(self, events: list[TokenEvent]) -> None:
        self.scheduler.check()
        for event in events:
            self.events.setdefault(event.request_id, []).append(event)

    def spans(self, plan: StepPlan) -> dict[str, tuple[int, int]]:
        names = {step.slot: self.worker.rows[step.slot].request.request_id for step in plan.sequences}
        return {names[step.slot]: (step.start, step.start + len(step.token_ids)) for step in plan.sequences}

    def run(self) -> None:
        while self.scheduler.has_work:
            self.step()

    def output(self, request_id: str) -> tuple[int, ...]:
        return tuple(token_id for event in self.events[request_id] for token_id in event.token_ids)


def prompt_of(length: int, first: int = 100) -> tuple[int, ...]:
    return tuple(range(first, first + length))


# ---------------------------------------------------------------------- one request


def test_a_prompt_then_one_token_a_step():
    engine = Engine()
    request = make_request("a", prompt_of(5), max_tokens=3)
    engine.add(request)
    assert [engine.step(), engine.step(), engine.step()] == [{"a": (0, 5)}, {"a": (5, 6)}, {"a": (6, 7)}]
    assert not engine.scheduler.has_work and engine.scheduler.plan() is None
    assert engine.output("a") == expected_output(request, 3)
    assert [event.finish_reason for event in engine.events["a"]] == [None, None, FinishReason.LENGTH]


@pytest.mark.parametrize("kind", ["eos", "stop_token_ids"])
def test_a_stop_token_ends_the_sequence_and_is_in_its_output(kind: str):
    engine = Engine()
    token_id = expected_output(make_request("a"), 3)[0]
    if kind == "eos":
        engine.add(make_request("a", eos_token_ids=frozenset({token_id})))
    else:
        engine.add(make_request("a", sampling=SamplingParams(stop_token_ids=[token_id])))
    engine.run()
    (event,) = engine.events["a"]
    assert (event.token_ids, event.stop_token_id) == ((token_id,), token_id)
    assert event.finish_reason is FinishReason.STOP


def test_new_is_sent_once_and_freed_slots_with_the_next_plan():
    engine = Engine()
    engine.add(make_request("a", max_tokens=2))
    first, second = engine.plan(), None
    assert first.sequences[0].new is not None
    engine.commit(first)
    second = engine.plan()
    assert second.sequences[0].new is None and second.freed_slots == ()
    engine.commit(second)
    engine.add(make_request("b"))
    third = engine.plan()
    assert third.freed_slots == (0,) and third.sequences[0].slot == 0  # freed first, then given out again


# ---------------------------------------------------------------------- budget and chunks


def test_chunks_end_on_block_borders_until_the_prompt_ends():
    engine = Engine(max_num_tokens=10)
    engine.add(make_request("a", prompt_of(21)))
    assert [engine.step() for _ in range(4)] == [{"a": (0, 8)}, {"a": (8, 16)}, {"a": (16, 21)}, {"a": (21, 22)}]
    assert len(engine.events["a"]) == 2  # nothing was sampled before the prompt was done


def test_a_budget_below_a_block_still_goes_on():
    engine = Engine(max_num_tokens=3)
    engine.add(make_request("a", prompt_of(7)))
    assert [engine.step() for _ in range(3)] == [{"a": (0, 3)}, {"a": (3, 4)}, {"a": (4, 7)}]


def test_decodes_come_before_prefills_and_those_before_admissions():
    engine = Engine(max_num_tokens=10)
    engine.add(
        make_request("a", prompt_of(2)), make_request("b", prompt_of(15, 200)), make_request("c", prompt_of(3, 300))
    )
    assert engine.step() == {"a": (0, 2), "b": (0, 8)}
    assert engine.step() == {"a": (2, 3), "b": (8, 15), "c": (0, 2)}
    assert engine.step() == {"a": (3, 4), "b": (15, 16), "c": (2, 3)}


def test_without_chunking_a_prompt_waits_for_a_step_that_takes_it_whole():
    engine = Engine(max_num_tokens=10, enable_chunked_prefill=False)
    engine.add(make_request("a", prompt_of(6)), make_request("b", prompt_of(9, 200)), make_request("c", (1,)))
    assert engine.step() == {"a": (0, 6)}  # and c does not overtake b
    assert engine.step() == {"a": (6, 7), "b": (0, 9)}
    assert engine.step() == {"a": (7, 8), "b": (9, 10), "c": (0, 1)}


# ---------------------------------------------------------------------- prefix reuse


def test_cached_tokens_are_reported_with_the_first_event():
    engine = Engine()
    engine.add(make_request("a", prompt_of(10), max_tokens=3))
    engine.run()
    engine.add(make_request("b", prompt_of(10) + engine.output("a") + (7,), max_tokens=2))
    assert engine.step() == {"b": (12, 14)}  # a's last token was sampled, never computed
    engine.run()
    assert [event.num_cached_tokens for event in engine.events["b"]] == [12, 0]
    assert engine.scheduler.stats().prompt_tokens_cached == 12


def test_a_salt_keeps_requests_apart():
    engine = Engine()
    for request_id, salt in [("a", "x"), ("b", "y"), ("c", "x")]:
        engine.add(make_request(request_id, prompt_of(9), cache_salt=salt))
        engine.run()
    assert [engine.events[name][0].num_cached_tokens for name in "abc"] == [0, 0, 8]


def test_prompt_logprobs_are_gathered_over_the_chunks_and_sent_once():
    engine = Engine(max_num_tokens=4)
    request = make_request("a", prompt_of(10), sampling=SamplingParams(prompt_logprobs=0))
    engine.add(make_request("warm", prompt_of(10)))
    engine.run()
    engine.add(request)
    engine.run()
    first, *rest = engine.events["a"]
    assert first.prompt_logprobs == (None, *(prompt_logprob(request, i) for i in range(1, 10)))
    assert all(event.prompt_logprobs is None for event in rest)
    assert first.num_cached_tokens == 0  # each row's logits are wanted, so each row is computed


def test_a_mean_computes_every_token_once_and_leaves_nothing_to_reuse():
    engine = Engine(max_num_tokens=8)
    engine.add(make_request("a", prompt_of(14), max_tokens=1))
    engine.run()
    mean = make_request("mean", prompt_of(20), max_tokens=1, pooling=Pooling.MEAN)
    engine.add(mean)
    assert [engine.step() for _ in range(3)] == [{"mean": (0, 8)}, {"mean": (8, 16)}, {"mean": (16, 20)}]
    (event,) = engine.events["mean"]
    assert (event.vector, event.finish_reason) == (expected_vector(mean), FinishReason.STOP)
    assert not event.token_ids and not event.num_cached_tokens
    engine.add(make_request("b", prompt_of(24)))
    engine.run()
    assert engine.events["b"][0].num_cached_tokens == 14  # of "a", as if "mean" had not been


def test_a_last_token_is_all_that_its_vector_needs():
    engine = Engine()
    for name in ("first", "again"):
        engine.add(request := make_request(name, prompt_of(12), max_tokens=1, pooling=Pooling.LAST))
        engine.run()
        assert engine.events[name][0].vector == expected_vector(request)
    assert [engine.events[name][0].num_cached_tokens for name in ("first", "again")] == [0, 11]


def test_a_text_that_pools_may_fill_a_whole_sequence_and_pool():
    engine = Engine(num_blocks=17, max_num_tokens=10)
    with pytest.raises(RequestError, match="has 65 tokens; shorten it to max_seq_len 64"):
        engine.add(make_request("a", prompt_of(65), max_tokens=1, pooling=Pooling.MEAN))
    engine.add(make_request("a", prompt_of(64), max_tokens=1, pooling=Pooling.MEAN))
    engine.run()
    assert engine.events["a"][0].vector
    with pytest.raises(CapacityError, match="shorten the prompt to at most 60 tokens"):
        Engine(num_blocks=16).add(make_request("a", prompt_of(64), max_tokens=1, pooling=Pooling.LAST))


def test_a_follower_waits_for_the_prompt_and_shares_it():
    engine = Engine(max_num_tokens=8)
    engine.add(make_request("a", prompt_of(13)), make_request("b", prompt_of(13), after="a", seed=1))
    engine.add(make_request("c", (1, 2)))  # not held up by b
    assert engine.step() == {"a": (0, 8)}
    assert engine.scheduler.stats().num_waiting == 2
    assert engine.step() == {"a": (8, 13), "c": (0, 2)}
    assert engine.step()["b"] == (12, 13)


@pytest.mark.parametrize("after", ["nobody", "b"])
def test_following_nobody_or_oneself_is_not_waiting(after: str):
    engine = Engine()
    engine.add(make_request("b", after=after))
    assert engine.step() == {"b": (0, 3)}


def test_a_follower_goes_on_when_its_leader_is_aborted():
    engine = Engine()
    engine.add(make_request("a"), make_request("b", after="a"))
    engine.scheduler.abort("a")
    assert engine.step() == {"b": (0, 3)}


# ---------------------------------------------------------------------- capacity and order


def test_no_evict_admits_only_what_is_certain_to_end():
    engine = Engine(num_blocks=6)  # 5 usable; each request needs 3 in the end
    engine.add(make_request("a", prompt_of(4), max_tokens=9), make_request("b", prompt_of(4, 200), max_tokens=9))
    assert engine.step() == {"a": (0, 4)}
    assert "b" not in engine.step()
    engine.run()
    assert engine.scheduler.stats().num_preemptions == 0


def test_max_utilization_admits_early_and_preempts_the_newest():
    engine = Engine(num_blocks=6, capacity_policy=CapacityPolicy.MAX_UTILIZATION)
    requests = [make_request(name, prompt_of(4, 100 * i), max_tokens=13) for i, name in enumerate("ab")]
    engine.add(*requests)
    assert engine.step() == {"a": (0, 4), "b": (0, 4)}
    for _ in range(4):
        assert len(engine.step()) == 2
    plan = engine.plan()  # a takes the fifth block, b finds none
    assert len(plan.sequences) == 1 and plan.freed_slots == (1,)
    assert engine.scheduler.stats().num_preemptions == 1
    engine.commit(plan)
    engine.run()
    for request in requests:
        assert engine.output(request.request_id) == expected_output(request, 3)


def test_a_preempted_sequence_returns_with_its_output_and_finds_its_blocks():
    engine = Engine(num_blocks=6, capacity_policy=CapacityPolicy.MAX_UTILIZATION)
    engine.add(make_request("a", prompt_of(4), max_tokens=7), make_request("b", prompt_of(4, 200), max_tokens=13))
    while not engine.scheduler.stats().num_preemptions:
        engine.step()
    b_so_far = engine.output("b")
    while True:
        plan = engine.plan()
        new = [step for step in plan.sequences if step.new is not None]
        engine.commit(plan)
        if new:
            break
    assert new[0].new is not None and new[0].new.request_id == "b"
    assert new[0].output_token_ids == b_so_far
    assert new[0].start == 4 + len(b_so_far) - 1  # one token to recompute, no more
    assert sum(event.num_cached_tokens for event in engine.events["b"]) == 0  # its own blocks are no cache hit


def test_nothing_is_admitted_in_a_plan_that_preempted():
    """Else the preempted one, whose first chunk fits once more, would come straight back."""
    engine = Engine(
        num_blocks=5, max_num_tokens=8, capacity_policy=CapacityPolicy.MAX_UTILIZATION, enable_block_reuse=False
    )
    engine.add(make_request("a", prompt_of(4)), make_request("b", prompt_of(8, 200)))
    assert engine.step() == {"a": (0, 4), "b": (0, 4)}
    assert engine.step() == {"a": (4, 5), "b": (4, 8)}
    assert engine.step() == {"a": (5, 6)}  # b needs a fifth block, is preempted, and two blocks are free again
    assert engine.step() == {"a": (6, 7), "b": (0, 4)}
    engine.run()


def test_without_chunking_a_preempted_sequence_that_outgrew_the_budget_returns_in_chunks():
    engine = Engine(
        num_blocks=7,
        max_num_tokens=4,
        enable_chunked_prefill=False,
        enable_block_reuse=False,
        capacity_policy=CapacityPolicy.MAX_UTILIZATION,
    )
    engine.add(make_request("a", prompt_of(2), max_tokens=20), make_request("b", prompt_of(2, 200), max_tokens=20))
    engine.run()
    assert engine.scheduler.stats().num_preemptions > 0
    assert len(engine.output("b")) == 20


def test_static_batch_is_closed_while_it_runs():
    engine = Engine(capacity_policy=CapacityPolicy.STATIC_BATCH)
    engine.add(make_request("a", max_tokens=2))
    engine.step()
    engine.add(make_request("b", max_tokens=1))
    assert list(engine.step()) == ["a"]
    assert list(engine.step()) == ["b"]


def test_fifo_does_not_let_the_small_overtake_the_large():
    engine = Engine(num_blocks=6)
    engine.add(make_request("a", prompt_of(8)), make_request("large", prompt_of(12, 200)), make_request("small", (1,)))
    assert list(engine.step()) == ["a"]
    assert "small" not in engine.step()


def test_priority_decides_who_is_admitted_first():
    engine = Engine(max_batch_size=1, queue_policy=QueuePolicy.PRIORITY)
    for name, priority in [("low", 5), ("high", -1), ("also low", 5)]:
        engine.add(make_request(name, max_tokens=1, priority=priority))
    assert [next(iter(engine.step())) for _ in range(3)] == ["high", "low", "also low"]


def test_priority_decides_who_is_preempted():
    engine = Engine(
        num_blocks=6, capacity_policy=CapacityPolicy.MAX_UTILIZATION, queue_policy=QueuePolicy.PRIORITY, max_seq_len=20
    )
    engine.add(make_request("low", prompt_of(4), max_tokens=13, priority=1))
    engine.step()
    engine.add(make_request("high", prompt_of(4, 200), max_tokens=13, priority=0))
    while not engine.scheduler.stats().num_preemptions:
        spans = engine.step()
    assert list(spans) == ["high"]  # though low is the older one
    engine.run()


def test_the_batch_never_exceeds_its_slots():
    engine = Engine(max_batch_size=2)
    engine.add(*(make_request(name) for name in "abc"))
    assert list(engine.step()) == ["a", "b"]


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (make_request("a", ()), "the prompt has 0 tokens; it needs at least 1."),
        (make_request("a", prompt_of(64)), "the prompt has 64 tokens, .* max_seq_len 64; shorten it to at most 63."),
        (make_request("a", prompt_of(60), max_tokens=5), "max_tokens is 5; .* at least 1 and at most 4."),
        (make_request("a", prompt_of(60), max_tokens=0), "max_tokens is 0; .* at least 1 and at most 4."),
        (make_request("used"), "request_id 'used' is in use; choose another one."),
    ],
)
def test_a_request_out_of_range_is_refused(request_: GenerateRequest, message: str):
    engine = Engine()
    engine.add(make_request("used"))
    with pytest.raises(RequestError, match=message):
        engine.add(request_)


def test_a_prompt_that_fits_in_no_step_is_refused_without_chunking():
    engine = Engine(max_num_tokens=8, enable_chunked_prefill=False)
    with pytest.raises(RequestError, match=r"has 9 tokens, .* at most 8 or set enable_chunked_prefill."):
        engine.add(make_request("a", prompt_of(9)))


def test_a_request_that_fits_in_no_pool_is_refused_with_a_value_that_fits():
    engine = Engine(num_blocks=4)
    message = (
        r"needs 4 KV blocks but the pool has 3; lower max_tokens to 3 or raise the KV cache \(kv_cache_max_tokens\)."
    )
    with pytest.raises(CapacityError, match=message):
        engine.add(make_request("a", prompt_of(10), max_tokens=4))
    with pytest.raises(CapacityError, match="shorten the prompt to at most 12 tokens"):
        engine.add(make_request("a", prompt_of(13), max_tokens=1))
    engine.add(make_request("a", prompt_of(10), max_tokens=3), make_request("b", prompt_of(12), max_tokens=1))
    engine.run()


# ---------------------------------------------------------------------- aborts and failures


def test_abort_says_whether_there_was_something_to_abort():
    engine = Engine(max_batch_size=1)
    engine.add(make_request("running"), make_request("waiting"))
    engine.step()
    assert engine.scheduler.abort("running") and engine.scheduler.abort("waiting")
    assert not engine.scheduler.abort("waiting") and not engine.scheduler.abort("unknown")
    assert not engine.scheduler.has_work
    assert engine.scheduler.stats().num_blocks_used == 0


def test_an_abort_during_a_step_takes_effect_at_its_commit():
    engine = Engine()
    engine.add(make_request("a"), make_request("b"))
    plan = engine.plan()
    assert engine.scheduler.abort("a")
    assert engine.scheduler.has_work and engine.scheduler.stats().num_blocks_used == 2  # the step writes to them
    engine.add(make_request("a"))  # the name is free at once
    engine.commit(plan)
    assert list(engine.events) == ["b"]
    engine.run()
    assert engine.output("a") == expected_output(make_request("a"), 3)


def test_a_failed_sequence_does_not_disturb_the_others():
    engine = Engine()
    engine.add(make_request("a"), make_request("b"))
    plan = engine.plan()
    engine.take(engine.scheduler.commit(plan, engine.worker.execute(plan, failing=frozenset({0}))))
    (event,) = engine.events["a"]
    assert (event.finish_reason, event.error) == (FinishReason.ERROR, "broken logits processor")
    engine.run()
    assert engine.output("b") == expected_output(make_request("b"), 3)


def test_a_failed_step_ends_its_sequences_and_leaves_nothing_to_reuse():
    engine = Engine(max_batch_size=1)
    engine.add(make_request("a", prompt_of(9)), make_request("b", prompt_of(9)))
    plan = engine.plan()
    engine.worker.crash(plan)
    (event,) = engine.scheduler.fail_step(plan, "out of memory")
    assert (event.request_id, event.finish_reason, event.error) == ("a", FinishReason.ERROR, "out of memory")
    assert engine.step() == {"b": (0, 9)}


def test_plans_and_commits_alternate():
    engine = Engine()
    engine.add(make_request("a"))
    plan = engine.plan()
    with pytest.raises(AssertionError, match="not committed"):
        engine.scheduler.plan()
    engine.commit(plan)
    with pytest.raises(AssertionError, match="step 0 is not in flight"):
        engine.scheduler.commit(plan, StepResult((SequenceResult((0,)),)))


def test_a_pipeline_has_a_step_for_each_stage_with_a_share_of_the_requests():
    engine = Engine(num_stages=2)
    engine.add(*(make_request(name, prompt_of(3, 100 * place), max_tokens=3) for place, name in enumerate("abcd", 1)))
    first, second = engine.plan(), engine.scheduler.plan_ahead()
    assert second is not None and engine.scheduler.plan_ahead() is None, "tokens come first"
    results = [engine.worker.execute(plan) for plan in (first, second)]
    assert engine.spans(first) == {"a": (0, 3), "b": (0, 3)}
    assert engine.spans(second) == {"c": (0, 3), "d": (0, 3)}
    engine.take(engine.scheduler.commit(first, results[0]))
    third = engine.scheduler.plan_ahead()
    assert third is not None and engine.spans(third) == {"a": (3, 4), "b": (3, 4)}


def test_chunks_of_a_prompt_follow_each_other_through_a_pipeline():
    engine = Engine(num_stages=3, max_num_tokens=16)
    engine.add(make_request("a", prompt_of(40), max_tokens=2))
    plans = [engine.plan(), engine.scheduler.plan_ahead(), engine.scheduler.plan_ahead()]
    assert [(step.start, step.sample) for plan in plans if plan is not None for step in plan.sequences] == [
        (0, False), (16, False), (32, True)
    ]  # fmt: skip


def test_stats_add_up():
    engine = Engine()
    engine.add(make_request("a", prompt_of(9), max_tokens=3))
    engine.step()
    stats = engine.scheduler.stats()
    assert (stats.num_running, stats.num_blocks_used, stats.num_blocks_total) == (1, 3, 64)
    engine.run()
    stats = engine.scheduler.stats()
    assert (stats.num_running, stats.num_blocks_used, stats.num_steps) == (0, 0, 3)
    assert (stats.prompt_tokens_computed, stats.generated_tokens) == (9, 3)


# ---------------------------------------------------------------------- the queue


def test_the_queue_forgets_removed_members():
    queue = WaitingQueue()
    head = Sequence.from_request(make_request("head"), (0, 0))
    queue.push(head)
    for arrival in range(1, 1000):  # clients that give up while the head does not fit
        sequence = Sequence.from_request(make_request("x"), (0, arrival))
        queue.push(sequence)
        queue.remove(sequence)
    assert queue.peek() is head and len(queue) == 1
    assert len(queue._heap) < 100
