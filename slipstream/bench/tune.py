"""Finds settings for a load: searched in simulation, where a thousand runs are cheap, and decided by measurement."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from slipstream.api.llm import LLM
from slipstream.bench.costs import StepCosts
from slipstream.bench.dataset import Sample
from slipstream.bench.load import Load
from slipstream.bench.offline import ask, make_requests
from slipstream.bench.serving import Limits
from slipstream.bench.simulate import Prompt, Simulation
from slipstream.bench.timeline import Run
from slipstream.schema.build import RuntimeConfig

Options = Mapping[str, Any]  # of LLM(...)
GOOD_SHARE = 0.95  # of the requests must keep the limits
WORTHWHILE = 1.02  # less is noise, and the defaults stay
# They need no second model and leave texts as they are, so they are tried unasked: few, for texts that seldom repeat
# themselves, and many.
NGRAMS = {f"{count} n-gram drafts": f'{{"method": "ngram", "max_draft_len": {count}}}' for count in (2, 8)}


@dataclass(frozen=True)
class Goal:
    """Most output tokens a second under a load; or, with limits, most requests a second of which 95 % keep them."""

    limits: Limits | None = None
    load: Load = field(default_factory=Load)  # without limits

    @property
    def unit(self) -> str:
        return f"output tokens/s, {self.load}" if self.limits is None else "requests/s within the limits"

    def keeps(self, run: Run) -> bool:
        assert self.limits is not None
        return sum(map(self.limits.are_kept, run.timelines)) >= GOOD_SHARE * len(run.timelines)


@dataclass(frozen=True)
class Found:
    """The best of a search."""

    start: RuntimeConfig
    config: RuntimeConfig
    score: float  # in the goal's unit
    score_before: float  # of the limits that the search began with

    @property
    def changes(self) -> dict[str, int]:
        """Options of LLM(...) that make the one the other."""
        options = {"max_batch_size": self.config.max_batch_size, "max_num_tokens": self.config.max_num_tokens}
        return {name: value for name, value in options.items() if value != getattr(self.start, name)}


class Search:
    """Of max_batch_size and max_num_tokens, below an engine's own."""

    def __init__(self, costs: StepCosts, prompts: Sequence[Prompt], goal: Goal, runs_ahead: bool) -> None:
        self._costs, self._prompts, self._goal, self._runs_ahead = costs, prompts, goal, runs_ahead
        self._scores: dict[RuntimeConfig, float] = {}

    def best(self, start: RuntimeConfig) -> Found:
        """One setting after the other, until neither changes; what is not worthwhile is left as it was."""
        config, before = start, None
        while config != before:
            before = config
            for candidates in (_token_budgets(start, config), _batch_sizes(start, config)):
                better = max(candidates, key=self.score)
                if self.score(better) > self.score(config) * WORTHWHILE:
                    config = better
        return Found(start, config, self.score(config), self.score(start))

    def score(self, config: RuntimeConfig) -> float:
        if config not in self._scores:
            self._scores[config] = self._score(config)
        return self._scores[config]

    def _score(self, config: RuntimeConfig) -> float:
        run = self._run(config, self._goal.load)
        if self._goal.limits is None:
            return run.output_rate
        low, high = 0.0, run.rate(lambda timeline: 1)  # more do not get done, however long they wait
        for _ in range(8):
            middle = (low + high) / 2
            low, high = (middle, high) if self._goal.keeps(self._run(config, Load(rate=middle))) else (low, middle)
        return low

    def _run(self, config: RuntimeConfig, load: Load) -> Run:
        return Simulation(config, self._costs, self._prompts, load, runs_ahead=self._runs_ahead).run().run


def _token_budgets(most: RuntimeConfig, config: RuntimeConfig) -> Iterator[RuntimeConfig]:
    """A step must hold a token of each sequence."""
    size = most.max_num_tokens
    while size >= max(16, config.max_batch_size):
        yield replace(config, max_num_tokens=size)
        size //= 2


def _batch_sizes(most: RuntimeConfig, config: RuntimeConfig) -> Iterator[RuntimeConfig]:
    size = min(most.max_batch_size, config.max_num_tokens)
    while size:
        yield replace(config, max_batch_size=size)
        size //= 2


@dataclass(frozen=True)
class Contender:
    """Options, and the runs that they were measured by."""

    name: str
    options: Options
    runs: list[Run]

    @property
    def output_rate(self) -> float:
        return median(run.output_rate for run in self.runs)

    def share_kept(self, limits: Limits) -> float:
        kept = [limits.are_kept(timeline) for run in self.runs for timeline in run.timelines]
        return sum(kept) / len(kept)

    def score(self, goal: Goal) -> float:
        return self.output_rate if goal.limits is None else self.share_kept(goal.limits)


def with_drafts(plain: Contender, drafts: Mapping[str, str]) -> list[Contender]:
    """Each way to draft beside the same settings."""
    return [
        Contender(f"{plain.name}, {name}", {**plain.options, "speculative": method}, [])
        for name, method in drafts.items()
    ]


def measure(
    contenders: Sequence[Contender],
    opened: Callable[[Options], AbstractContextManager[LLM]],
    samples: Sequence[Sample],
    load: Load,
    rounds: int,
    note: Callable[[str], None] = lambda name: None,
) -> None:
    """In turn, forward and back, so that none has the better times of the machine. One engine is open at a time."""
    for number in range(rounds):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            note(f"{contender.name}, round {number + 1} of {rounds}")
            with opened(contender.options) as llm:
                requests = make_requests(llm, samples)
                ask(llm, [replace(each, max_tokens=2, cache_salt="warm-up") for each in requests[:2]])
                contender.runs.append(ask(llm, requests, load))


def winner(contenders: Sequence[Contender], goal: Goal) -> Contender:
    """The first of them, the defaults, unless another is better by more than noise."""
    best = max(contenders, key=lambda each: each.score(goal))
    return best if best.score(goal) > contenders[0].score(goal) * WORTHWHILE else contenders[0]
