"""Random histories of the scheduler against a worker that checks every KV cell it reads (fake_worker.py).

Each history is a small engine life: a random configuration with few, small blocks and a tiny alphabet (so that prefixes
collide all the time), random requests, and between the steps, and within them, aborts, failing steps and new arrivals.
After each move `Scheduler.check()` proves the bookkeeping. At the end every request has the output it has when alone.

    SLIPSTREAM_HISTORIES=200000 pytest tests/runtime/test_properties.py
"""

import os
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slipstream.errors import CapacityError, RequestError
from slipstream.runtime.scheduler import Scheduler
from slipstream.schema.build import CapacityPolicy, DraftShape, QueuePolicy, RuntimeConfig
from slipstream.schema.kv import KVGroup
from slipstream.schema.request import EngineStats, FinishReason, GenerateRequest, Pooling, TokenEvent
from slipstream.schema.sampling import SamplingParams
from slipstream.schema.step import StepPlan, StepResult

from .fake_worker import FakeWorker, expected_output, expected_vector, fold_all, make_request, prompt_logprob

NUM_HISTORIES = int(os.environ.get("SLIPSTREAM_HISTORIES", "10000"))
MAX_STEPS = 2000  # far more than any history needs: reaching it is a livelock


def random_config(rng: random.Random) -> RuntimeConfig:
    kv_groups = random_groups(rng)
    return RuntimeConfig(
        num_blocks=rng.randint(4, 14) * len(kv_groups),
        kv_groups=kv_groups,
        tokens_per_block=rng.randint(1, 4),
        max_batch_size=rng.randint(1, 5),
        max_num_tokens=rng.randint(1, 14),
        max_seq_len=rng.randint(8, 20),
        capacity_policy=rng.choice([*CapacityPolicy, CapacityPolicy.MAX_UTILIZATION]),
        queue_policy=rng.choice(list(QueuePolicy)),
        enable_chunked_prefill=rng.random() < 0.7,
        enable_block_reuse=rng.random() < 0.9,
        max_draft_len=rng.choice((0, 0, 1, 3, 6)),
        tokens_ahead=rng.choice((0, 0, 1, 6)),
        draft_shape=rng.choice(list(DraftShape)),
        is_adaptive=rng.random() < 0.7,
        takes_late_steps=rng.random() < 0.5,
    )


def pipelined_config(rng: random.Random) -> RuntimeConfig:
    return replace(random_config(rng), num_stages=rng.randint(2, 4), max_draft_len=0)


def crowded_config(rng: random.Random) -> RuntimeConfig:
    """A window with sinks, with or without a group that sees all, and hardly more blocks than one sequence needs."""
    window = rng.randint(2, 8)
    groups = (KVGroup(), KVGroup(window=window, sink_tokens=rng.randrange(1, window)))[rng.randrange(2) :]
    return replace(
        random_config(rng),
        num_blocks=rng.randint(6, 9) * len(groups),
        kv_groups=groups,
        tokens_per_block=2,
        max_batch_size=5,
        max_seq_len=20,
        capacity_policy=CapacityPolicy.MAX_UTILIZATION,
        enable_block_reuse=True,
    )


def random_groups(rng: random.Random) -> tuple[KVGroup, ...]:
    """One that sees everything, in half of the histories; otherwise up to three, with windows, with sinks."""
    if rng.random() < 0.5:
        return (KVGroup(),)
    windows = [rng.choice((0, rng.randint(1, 10))) for _ in range(rng.randint(1, 3))]
    return tuple(KVGroup(window=window, sink_tokens=rng.choice((0, rng.randrange(window or 1)))) for window in windows)


@dataclass
class Story:
    """One request and what its caller has seen of it."""

    request: GenerateRequest
    leader: "Story | None" = None  # whose prompt must be computed first
    token_ids: list[int] = field(default_factory=list)
    first_event: TokenEvent | None = None
    finish_reason: FinishReason | None = None

    def take(self, event: TokenEvent) -> None:
        assert self.finish_reason is None, f"{event} came after the end"
        if self.first_event is None:
            self.first_event = event
        else:
            assert event.prompt_logprobs is None and event.num_cached_tokens == 0
        assert event.token_ids or event.error or event.vector
        self.token_ids += event.token_ids
        self.finish_reason = event.finish_reason

    def check(self, num_tokens: int) -> None:
        if self.request.pooling is not None:
            self.check_vector()
            return
        expected = expected_output(self.request, num_tokens)
        if self.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            expected = expected[: len(self.token_ids)]
        else:
            stop_ids = {*self.request.eos_token_ids, *self.request.sampling.stop_token_ids}
            stopped = expected[-1] in stop_ids
            assert self.finish_reason == (FinishReason.STOP if stopped else FinishReason.LENGTH)
        assert tuple(self.token_ids) == expected
        if self.token_ids and self.request.sampling.prompt_logprobs is not None:
            rest = (prompt_logprob(self.request, i) for i in range(1, len(self.request.prompt_token_ids)))
            assert self.first_event is not None and self.first_event.prompt_logprobs == (None, *rest)
            assert self.first_event.num_cached_tokens == 0

    def check_vector(self) -> None:
        assert not self.token_ids
        if self.finish_reason is FinishReason.STOP:
            assert self.first_event is not None and self.first_event.vector == expected_vector(self.request)
            assert self.request.pooling is not Pooling.MEAN or self.first_event.num_cached_tokens == 0
        else:
            assert self.finish_reason in (FinishReason.ABORT, FinishReason.ERROR)


class History:
    def __init__(self, rng: random.Random, config: RuntimeConfig) -> None:
        self.rng, self.config = rng, config
        self.num_tokens = rng.randint(2, 3)
        self.scheduler = Scheduler(self.config)
        self.worker = FakeWorker(self.config, self.num_tokens)
        self.stories: dict[str, Story] = {}
        self.num_to_come = rng.randint(2, 12)
        self.is_rough = rng.random() < 0.5  # aborts and failures happen
        self.how_often_ahead = rng.choice((0.0, 0.5, 1.0))  # steps are planned before the one before is committed
        self.how_often_handed = rng.choice((0.0, 0.3, 0.9))  # prompts come with KV that another engine has computed
        self.num_ahead = 0
        self.flights: deque[tuple[StepPlan, StepResult | None]] = deque()  # run, and not committed

    def run(self) -> None:
        self.arrive()
        for _ in range(MAX_STEPS):
            if not self.scheduler.has_work and not self.num_to_come:
                break
            self.arrive()
            self.maybe_abort()
            self.step()
        self.check_end()

    def arrive(self) -> None:
        while self.num_to_come and self.rng.random() < 0.5:
            self.num_to_come -= 1
            request = self.random_request()
            try:
                self.scheduler.add(request, self.handed_kv(request))
            except (RequestError, CapacityError) as error:
                assert str(error).endswith(".")
            else:
                leader = self.stories.get(request.after or "")
                self.stories[request.request_id] = Story(request, leader)
            self.scheduler.check()

    def handed_kv(self, request: GenerateRequest) -> list[int] | None:
        """Of some: that another engine has computed all but the last token."""
        before = request.prompt_token_ids[:-1]
        return fold_all(request, list(before)) if before and self.rng.random() < self.how_often_handed else None

    def random_request(self) -> GenerateRequest:
        rng = self.rng
        others = [story for story in self.stories.values() if story.token_ids]
        if others and rng.random() < 0.3:  # a conversation goes on
            story = rng.choice(others)
            prompt = (*story.request.prompt_token_ids, *story.token_ids)[: self.config.max_seq_len - 1]
        else:
            prompt = tuple(rng.randrange(self.num_tokens) for _ in range(rng.randint(1, 9)))
        pooling = rng.choice((None, None, None, *Pooling))
        sampling = SamplingParams(
            stop_token_ids=(0,) if rng.random() < 0.1 else (),
            prompt_logprobs=0 if rng.random() < 0.15 else None,
        )
        return make_request(
            f"r{self.num_to_come}",
            prompt,
            max_tokens=1 if pooling else rng.randint(1, 8),
            sampling=sampling,
            seed=rng.randrange(3),
            eos_token_ids=frozenset({1}) if rng.random() < 0.2 else frozenset(),
            priority=rng.randrange(3),
            cache_salt=rng.choice(("", "", "", "other")),
            after=rng.choice([*self.stories, None, "unknown"]) if rng.random() < 0.4 else None,
            pooling=pooling,
            kv_to=f"{self.num_to_come}.kv" if rng.random() < 0.2 and not pooling else None,
        )

    def maybe_abort(self) -> None:
        if not self.is_rough or not self.stories or self.rng.random() > 0.1:
            return
        story = self.rng.choice(list(self.stories.values()))
        was_alive = story.finish_reason is None
        assert self.scheduler.abort(story.request.request_id) == was_alive
        if was_alive:
            story.finish_reason = FinishReason.ABORT
        self.scheduler.check()

    def step(self) -> None:
        """As runtime/engine.py does it: the step after may be planned, and run, before this one is committed."""
        if not self.flights:
            plan = self.scheduler.plan()
            self.scheduler.check()
            assert (plan is not None) == self.scheduler.has_work
            if plan is None:
                return
            self.launch(plan)
        while len(self.flights) < max(2, self.config.num_stages) and self.rng.random() < self.how_often_ahead:
            ahead = self.scheduler.plan_ahead()
            self.scheduler.check()
            if ahead is None:
                break
            self.num_ahead += 1
            self.launch(ahead)
        plan, result = self.flights.popleft()
        if result is None:
            events = self.scheduler.fail_step(plan, "out of memory")
        else:
            events = self.scheduler.commit(
                plan, result, self.rng.choice((None, self.rng.random(), len(self.flights) + 1.0))
            )
        for event in events:
            self.stories[event.request_id].take(event)
        self.scheduler.check()

    def launch(self, plan: StepPlan) -> None:
        """Run the step; what happens in the meantime happens before it is committed."""
        for step in plan.sequences:
            leader = self.stories[step.new.request_id].leader if step.new is not None else None
            assert leader is None or leader.token_ids or leader.finish_reason is not None, "a follower overtook"
        result: StepResult | None = None
        if self.is_rough and self.rng.random() < 0.03:
            self.worker.crash(plan)
        else:
            failing = frozenset({0}) if self.is_rough and self.rng.random() < 0.03 else frozenset()
            result = self.worker.execute(plan, failing)
        self.flights.append((plan, result))
        self.meddle()

    def meddle(self) -> None:
        """Things that happen while the step is under way."""
        self.maybe_abort()
        self.arrive()

    def check_end(self) -> None:
        assert not self.scheduler.has_work and self.scheduler.plan() is None, "livelock"
        for story in self.stories.values():
            story.check(self.num_tokens)
        stats = self.scheduler.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_blocks_used) == (0, 0, 0)
        assert stats.num_preemptions == 0 or self.config.capacity_policy is CapacityPolicy.MAX_UTILIZATION


Configure = Callable[[random.Random], RuntimeConfig]


def run_history(seed: int, configure: Configure) -> EngineStats:
    rng = random.Random(seed)
    try:
        history = History(rng, configure(rng))
        history.run()
    except BaseException as error:
        error.add_note(f"run_history({seed}, {configure.__name__})")
        raise
    return history.scheduler.stats()


def test_random_histories():
    for seed in range(NUM_HISTORIES):
        run_history(seed, random_config)


def test_several_steps_of_a_pipeline_are_under_way():
    for seed in range(NUM_HISTORIES // 5):
        run_history(seed, pipelined_config)


def test_crowded_windows_with_sinks_are_preempted_and_reuse_prefixes():
    num_seeds = NUM_HISTORIES // 10
    stats = [run_history(seed, crowded_config) for seed in range(num_seeds)]
    assert sum(each.num_preemptions > 0 and each.prompt_tokens_cached > 0 for each in stats) > num_seeds // 10


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False), st.sampled_from([random_config, crowded_config, pipelined_config]))
def test_random_histories_that_shrink(rng: random.Random, configure: Configure):
    History(rng, configure(rng)).run()
