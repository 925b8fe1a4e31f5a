"""What a search finds where the best is known, and who wins a measurement."""

from dataclasses import replace

import pytest

from slipstream.bench.costs import StepCosts
from slipstream.bench.load import Load
from slipstream.bench.serving import Limits
from slipstream.bench.simulate import Prompt
from slipstream.bench.timeline import Run, Timeline
from slipstream.bench.tune import Contender, Goal, Search, winner, with_drafts
from slipstream.schema.build import RuntimeConfig

BUILT = RuntimeConfig(num_blocks=512, tokens_per_block=16, max_batch_size=16, max_num_tokens=512, max_seq_len=256)
FLAT = StepCosts(0.1, (1, 512), (0.0,), 0.0, 0.0, 0.0)  # weights are read, and the rest is free
LINEAR = StepCosts(0.01, (1, 512), (0.511,), 0.0, 0.0, 0.0)  # a millisecond a token


def prompts(count: int, num_in: int, num_out: int) -> list[Prompt]:
    return [(tuple(range(1000 * index + 1, 1000 * index + 1 + num_in)), num_out) for index in range(count)]


def test_where_tokens_are_free_the_limits_stay() -> None:
    found = Search(FLAT, prompts(16, 64, 8), Goal(), runs_ahead=False).best(BUILT)
    assert found.config == BUILT
    assert found.score == found.score_before
    assert found.changes == {}


def test_where_sequences_slow_each_other_down_fewer_run() -> None:
    """Beyond four a step takes longer than they are worth."""
    costs = StepCosts(0.01, (1, 2, 4, 8, 16, 512), (0.0, 0.0, 1.0, 1.0, 0.0), 0.0, 0.0, 0.0)
    found = Search(costs, prompts(32, 1, 16), Goal(), runs_ahead=False).best(BUILT)
    assert found.config.max_batch_size == 4
    assert found.score > 2 * found.score_before
    assert found.changes == {"max_batch_size": 4}


def test_short_steps_keep_a_limit_on_further_tokens() -> None:
    """Prompts come while others generate: a step of 512 tokens takes half a second, one of 32 a thirtieth."""
    search = Search(LINEAR, prompts(24, 200, 12), Goal(Limits(tpot=40.0)), runs_ahead=False)
    short = search.score(replace(BUILT, max_num_tokens=32))
    assert short > 1.5 * search.score(BUILT)
    assert search.best(BUILT).score >= short  # that fewer sequences run may serve as well


def test_impossible_limits_score_nothing() -> None:
    assert Search(LINEAR, prompts(4, 200, 4), Goal(Limits(ttft=1.0)), runs_ahead=False).best(BUILT).score == 0.0


def test_one_client_is_asked_for_by_the_load() -> None:
    """A token a step of a tenth of a second."""
    goal = Goal(load=Load(concurrency=1))
    assert Search(FLAT, prompts(4, 8, 16), goal, runs_ahead=False).score(BUILT) == pytest.approx(10.0)


def test_drafts_are_tried_beside_what_was_found() -> None:
    found = with_drafts(Contender("tuned", {"max_batch_size": 4}, []), {"2 drafts": "few"})
    assert found == [Contender("tuned, 2 drafts", {"max_batch_size": 4, "speculative": "few"}, [])]


def run_of(seconds: float) -> Run:
    return Run("", [Timeline(0.0, num_input=1, num_output=100, arrivals=[seconds], ended=seconds)])


def test_the_defaults_win_unless_another_is_better_by_more_than_noise() -> None:
    defaults = Contender("defaults", {}, [run_of(1.0), run_of(1.1), run_of(5.0)])
    same = Contender("same", {}, [run_of(1.09)] * 3)
    faster = Contender("faster", {}, [run_of(1.0)] * 3)
    assert winner([defaults, same], Goal()) is defaults
    assert winner([defaults, same, faster], Goal()) is faster
