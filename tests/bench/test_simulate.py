"""Simulated engines: the real scheduler on a clock, and costs fitted to steps."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream import LLM
from slipstream.bench.calibrate import calibrate
from slipstream.bench.costs import StepCosts, Work, fit
from slipstream.bench.load import Load
from slipstream.bench.simulate import Prompt, Simulation
from slipstream.errors import UsageError
from slipstream.schema.build import CapacityPolicy, RuntimeConfig

CONFIG = RuntimeConfig(num_blocks=64, tokens_per_block=4, max_batch_size=4, max_num_tokens=16, max_seq_len=64)
A_SECOND = StepCosts(1.0, (1, 16), (0.0,), 0.0, 0.0, 0.0)  # whatever a step does


def prompts(*sizes: tuple[int, int]) -> list[Prompt]:
    """Of so many tokens in and out; no two begin alike."""
    return [
        (tuple(range(100 * index + 1, 100 * index + 1 + num_in)), num_out)
        for index, (num_in, num_out) in enumerate(sizes)
    ]


def test_one_request_takes_a_step_a_chunk_and_one_a_token() -> None:
    outcome = Simulation(CONFIG, A_SECOND, prompts((40, 5)), Load()).run()
    [timeline] = outcome.run.timelines
    assert timeline.arrivals == [3.0, 4.0, 5.0, 6.0, 7.0]  # chunks of 16, 16, 8
    assert outcome.steps == [Work(16, 1, 16, 136), Work(16, 1, 32, 392), Work(8, 1, 40, 292),
                             *(Work(1, 1, end, 0) for end in (41, 42, 43, 44))]  # fmt: skip
    assert outcome.busy_seconds == outcome.run.seconds == 7.0


def test_who_comes_during_a_step_is_in_the_next_and_ahead_in_the_one_after() -> None:
    for runs_ahead, first in ((False, 2.0), (True, 3.0)):
        simulation = Simulation(CONFIG, A_SECOND, prompts((4, 6), (4, 2)), Load(rate=1e9), runs_ahead=runs_ahead)
        early, late = simulation.run().run.timelines
        assert early.arrivals == pytest.approx([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        assert late.arrivals[0] == pytest.approx(first)


def test_the_next_client_begins_when_one_has_ended() -> None:
    outcome = Simulation(CONFIG, A_SECOND, prompts((4, 3), (4, 3), (4, 3)), Load(concurrency=1)).run()
    assert [(each.asked, each.ended) for each in outcome.run.timelines] == [(0.0, 3.0), (3.0, 6.0), (6.0, 9.0)]


def test_prefixes_are_found_and_replicas_share_the_load() -> None:
    shared = tuple(range(1, 13))
    asked: list[Prompt] = [((*shared, 50 + index), 2) for index in range(4)]
    one = Simulation(CONFIG, A_SECOND, asked, Load(concurrency=1)).run()
    assert [each.num_cached for each in one.run.timelines] == [0, 12, 12, 12]
    two = Simulation(CONFIG, A_SECOND, asked, Load(concurrency=2), num_replicas=2).run()
    assert two.run.seconds == one.run.seconds / 2
    assert [each.num_cached for each in two.run.timelines] == [0, 0, 12, 12]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 24)), min_size=1, max_size=24),
    st.sampled_from([Load(), Load(concurrency=3), Load(rate=0.3), Load(rate=1e4)]),
    st.sampled_from([CapacityPolicy.GUARANTEED_NO_EVICT, CapacityPolicy.MAX_UTILIZATION]),
    st.booleans(),
    st.integers(1, 3),
)
def test_every_request_ends_with_all_its_tokens(
    sizes: list[tuple[int, int]], load: Load, policy: CapacityPolicy, runs_ahead: bool, num_replicas: int
) -> None:
    config = RuntimeConfig(num_blocks=20, tokens_per_block=4, max_batch_size=4, max_num_tokens=16, max_seq_len=64,
                           capacity_policy=policy)  # fmt: skip
    costs = StepCosts(0.5, (1, 2, 16), (0.0, 1.0), 0.25, 0.0, 0.0)
    asked = prompts(*sizes)
    outcome = Simulation(config, costs, asked, load, runs_ahead=runs_ahead, num_replicas=num_replicas).run()
    assert [each.num_output for each in outcome.run.timelines] == [num_out for _, num_out in sizes]
    assert all(each.asked < each.arrivals[0] and each.ended == each.arrivals[-1] for each in outcome.run.timelines)
    assert outcome.busy_seconds == pytest.approx(sum(map(costs.seconds, outcome.steps)))
    assert outcome.busy_seconds <= num_replicas * outcome.run.seconds + 1e-6


def test_costs_are_found_in_steps_that_follow_them() -> None:
    planted = StepCosts(0.01, (1, 2, 4, 8, 16, 32, 64), (0.0, 0.0, 0.001, 0.002, 0.02, 0.04), 1e-4, 1e-6, 3e-7)
    works = [Work(tokens, sequences, read, pairs) for tokens in (1, 2, 3, 6, 8, 13, 16, 24, 32, 50, 64)
             for sequences in (1, min(4, tokens)) for read in (10, 4000) for pairs in (0, 9000)]  # fmt: skip
    found = fit(works, list(map(planted.seconds, works)), 64)
    for work in works:
        assert found.seconds(work) == pytest.approx(planted.seconds(work), rel=1e-3)


def test_a_larger_step_than_was_measured_is_refused_and_so_is_a_request_that_fits_nowhere() -> None:
    small = StepCosts(1.0, (1, 8), (0.0,), 0.0, 0.0, 0.0)
    with pytest.raises(UsageError, match=r"up to 8 tokens; lower it"):
        Simulation(CONFIG, small, prompts((4, 2)), Load())
    with pytest.raises(UsageError, match="Request 1 cannot be run"):
        Simulation(CONFIG, A_SECOND, prompts((4, 2), (80, 2)), Load()).run()


def test_a_real_engine_takes_the_steps_that_are_planned(tiny_model: Path) -> None:
    """calibrate() refuses an engine whose steps are others than the simulation's."""
    with LLM(tiny_model, max_batch_size=4, max_num_tokens=32, max_seq_len=64, kv_cache_max_tokens=512) as llm:
        found = calibrate(llm, runs_ahead=False)
    assert found.num_steps > 100
    assert found.costs.seconds(Work(1, 1, 8, 0)) > 0
