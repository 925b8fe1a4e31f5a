"""Who is faster: contestants measured in turns, compared round by round, and no winner inside the noise.

In a round each contestant gets the same requests, one contestant after the other, in an order that changes. What
disturbs a machine for longer than a turn disturbs both sides of a ratio. The interval of the mean ratio is a bootstrap
over rounds, its percentiles moved out as few rounds need it (T. Hesterberg, The American Statistician 69:4, 2015).
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from statistics import NormalDist, fmean, median
from typing import Protocol

from slipstream.bench.dataset import Sample
from slipstream.bench.timeline import Run, percentile
from slipstream.errors import UsageError

LEAST_ROUNDS = 6  # with fewer, six of six heads in a row would not be rare enough, whatever the sizes
_RESAMPLES = 5000

Turn = Callable[[Sequence[Sample]], Run]

# What is compared: how to read it off a run, and whether more of it is better.
METRICS: Mapping[str, tuple[Callable[[Run], float], bool]] = {
    "tokens/s": (lambda run: run.output_rate, True),
    "TTFT p50": (lambda run: run.ttft.percentiles[50], False),
    "TPOT p50": (lambda run: run.tpot.percentiles[50], False),
}


class Contestant(Protocol):
    name: str

    def turn(self, samples: Sequence[Sample]) -> Run: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Ratio:
    """How many times as fast the first is as the other; 95 % of such intervals hold the true one."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low > 1:
            return "first"
        return "other" if self.high < 1 else "within the noise"


@dataclass(frozen=True)
class Duel:
    """The first contestant beside another one, by one metric."""

    metric: str
    other: str
    ratio: Ratio
    pairs: Sequence[tuple[float, float]]  # (first, other) of each round, in the metric's own unit


def run_rounds(
    contestants: Sequence[Contestant],
    take: Callable[[int], Sequence[Sample]],
    *,
    num_rounds: int,
    num_requests: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Run]]:
    """For each contestant its run of each round. A round before them warms up. Raises UsageError for one that fails."""
    runs: list[list[Run]] = [[] for _ in contestants]
    for round_index in range(-1, num_rounds):
        samples = take(num_requests)
        for index in _order(round_index, len(contestants)):
            run = contestants[index].turn(samples)
            if run.num_failed:
                why = next(each.error for each in run.timelines if not each.is_whole)
                raise UsageError(
                    f"{contestants[index].name} failed {run.num_failed} of {len(samples)} requests ({why}); what it "
                    "did of the others cannot be compared."
                )
            if round_index >= 0:
                runs[index].append(run)
        progress(round_index + 1, num_rounds)
    return runs


def _order(round_index: int, count: int) -> Iterator[int]:
    """Each begins as often as any other, and follows each as often as it comes before it."""
    rotated = [(index + round_index // 2) % count for index in range(count)]
    return iter(rotated if round_index % 2 else rotated[::-1])


def duels_of(names: Sequence[str], runs: Sequence[Sequence[Run]]) -> list[Duel]:
    """The first beside each other one, by every metric that both have."""
    duels = []
    for name, others in zip(names[1:], runs[1:], strict=True):
        for metric, (read, is_rate) in METRICS.items():
            pairs = [(read(first), read(other)) for first, other in zip(runs[0], others, strict=True)]
            if all(a > 0 and b > 0 for a, b in pairs):
                ratios = [a / b if is_rate else b / a for a, b in pairs]
                duels.append(Duel(metric, name, interval(ratios), pairs))
    return duels


def interval(ratios: Sequence[float], seed: int = 0) -> Ratio:
    """Their geometric mean with its 95 % interval."""
    draw, logs, count = random.Random(seed), [log(ratio) for ratio in ratios], len(ratios)
    means = sorted(fmean(draw.choices(logs, k=count)) for _ in range(_RESAMPLES))
    tail = 100 * _tail(count)
    return Ratio(exp(fmean(logs)), exp(percentile(means, tail)), exp(percentile(means, 100 - tail)))


def _tail(count: int) -> float:
    """The part of the bootstrap's means on each side that is left out: less than 2.5 % for a few pairs, as t is wider
    than normal, and as a resample's mean varies by the deviation over n rather than n - 1."""
    z, freedom = NormalDist().inv_cdf(0.975), count - 1
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)  # Cornish and Fisher
    return NormalDist().cdf(-t * sqrt(count / freedom))


def medians(runs: Sequence[Run]) -> dict[str, float]:
    return {metric: median(read(run) for run in runs) for metric, (read, _) in METRICS.items()}
