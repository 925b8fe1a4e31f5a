"""bench compare's judgement: on ratios whose truth is known, and on contestants that are slow by design."""

import random
from collections import Counter
from collections.abc import Sequence
from math import exp

import pytest

from slipstream.bench.compare import duels_of, interval, medians, run_rounds
from slipstream.bench.dataset import Sample
from slipstream.bench.timeline import Run, Timeline
from slipstream.errors import UsageError


@pytest.mark.parametrize("num_rounds", [6, 10])
def test_the_interval_misses_the_truth_as_often_as_it_says(num_rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal contestants, noise of 10 %: 95 of 100 intervals hold 1. The numbers are the same in every run."""
    monkeypatch.setattr("slipstream.bench.compare._RESAMPLES", 500)
    draw = random.Random(0)
    verdicts = Counter(interval([exp(draw.gauss(0, 0.1)) for _ in range(num_rounds)]).verdict for _ in range(300))
    assert 0.92 <= verdicts["within the noise"] / 300 <= 0.985


def test_what_is_beyond_the_noise_is_named() -> None:
    ratios = [1.5, 1.6, 1.4, 1.5, 1.55, 1.45]
    found = interval(ratios)
    assert found.verdict == "first" and 1.4 < found.low < found.mean < found.high < 1.6
    assert interval([1 / ratio for ratio in ratios]).verdict == "other"
    assert interval([2.0, 0.5, 1.2, 0.9, 1.5, 0.8]).verdict == "within the noise"
    assert interval([1.1] * 6).mean == pytest.approx(1.1)


class Clockwork:
    """A contestant whose times are made up: so many seconds a token."""

    def __init__(self, name: str, seconds: float, asked: list[tuple[str, Sequence[Sample]]]) -> None:
        self.name, self._seconds, self._asked = name, seconds, asked

    def turn(self, samples: Sequence[Sample]) -> Run:
        self._asked.append((self.name, samples))
        arrivals = [[self._seconds * (1 + k) for k in range(sample.output_tokens)] for sample in samples]
        return Run("1 at a time", [
            Timeline(0.0, 1, num_output=len(times), arrivals=times, ended=times[-1]) for times in arrivals
        ])  # fmt: skip

    def close(self) -> None:
        pass


def test_rounds_give_each_the_same_requests_in_orders_that_change() -> None:
    asked: list[tuple[str, Sequence[Sample]]] = []
    contestants = [Clockwork(name, seconds, asked) for name, seconds in (("a", 0.1), ("b", 0.2), ("c", 0.1))]
    numbers = iter(range(1000))

    def take(count: int) -> list[Sample]:
        return [Sample([next(numbers)], 4) for _ in range(count)]

    runs = run_rounds(contestants, take, num_rounds=6, num_requests=2)
    assert [len(each) for each in runs] == [6, 6, 6]
    rounds = [asked[index : index + 3] for index in range(0, 21, 3)]  # the first warms up
    assert all(sorted(name for name, _ in each) == ["a", "b", "c"] for each in rounds)
    assert all(samples == each[0][1] for each in rounds for _, samples in each)
    assert len({str(each[0][1]) for each in rounds}) == 7
    assert Counter(each[0][0] for each in rounds[1:]) == {"a": 2, "b": 2, "c": 2}

    duels = {(duel.other, duel.metric): duel.ratio for duel in duels_of(["a", "b", "c"], runs)}
    assert {key: ratio.verdict for key, ratio in duels.items() if key[0] == "b"} == {
        ("b", metric): "first" for metric in ("tokens/s", "TTFT p50", "TPOT p50")
    }
    assert duels["b", "TPOT p50"].mean == pytest.approx(2) and duels["c", "TTFT p50"].verdict == "within the noise"
    assert medians(runs[0]) == pytest.approx({"tokens/s": 8 / 0.4, "TTFT p50": 0.1, "TPOT p50": 0.1})


def test_who_fails_is_not_compared() -> None:
    class Failing(Clockwork):
        def turn(self, samples: Sequence[Sample]) -> Run:
            return Run("1 at a time", [Timeline(0.0, error="no room")])

    with pytest.raises(UsageError, match=r"b failed 1 of 1 requests \(no room\)"):
        run_rounds([Clockwork("a", 1, []), Failing("b", 1, [])], lambda count: [Sample([1], 2)], num_rounds=6,
                   num_requests=1)  # fmt: skip
