"""What is drawn of runs: throughput against waiting, how waits are spread, and how many were in flight."""

from collections.abc import Callable, Sequence

from slipstream.bench.plots import Plot, Point, Series
from slipstream.bench.timeline import Run, percentile

_STEPS = 100  # of a distribution


def plots_of(runs: Sequence[Run]) -> list[Plot]:
    """runs: one load after the other, of one server."""
    loads = [run.load for run in runs]
    by_load = [
        Series(name, [(run.output_rate, read(run) * 1e3) for run in runs], labels=loads)
        for name, read in (("TTFT p50", _ttft(50)), ("TTFT p99", _ttft(99)))
    ]
    return [
        Plot("Throughput and the wait for it, a point a load", "output tokens/s", "TTFT, ms", by_load),
        Plot("TTFT", "ms", "% of the requests", [_spread(run.load, [each.ttft for each in run.whole]) for run in runs]),
        Plot("Time between arrivals (ITL)", "ms", "% of the gaps",
             [_spread(run.load, [gap for each in run.whole for gap in each.gaps]) for run in runs]),
        Plot("Requests in flight", "s", "requests", [in_flight(run) for run in runs]),
    ]  # fmt: skip


def rounds_of(names: Sequence[str], runs: Sequence[Sequence[Run]]) -> list[Plot]:
    """runs: of each contestant its rounds."""

    def by_round(read: Callable[[Run], float], scale: float) -> list[Series]:
        return [
            Series(name, [(index + 1.0, read(run) * scale) for index, run in enumerate(own)],
                   labels=[f"{name}, round {index + 1}" for index in range(len(own))])
            for name, own in zip(names, runs, strict=True)
        ]  # fmt: skip

    return [
        Plot("Throughput of each round", "round", "output tokens/s", by_round(lambda run: run.output_rate, 1.0)),
        Plot("TTFT p50 of each round", "round", "ms", by_round(_ttft(50), 1e3)),
    ]


def in_flight(run: Run) -> Series:
    """How many requests had been asked and had not ended, over the time of the run."""
    began = min((each.asked for each in run.timelines), default=0.0)
    changes = sorted([(each.asked, 1) for each in run.timelines] + [(each.ended, -1) for each in run.timelines])
    count, points = 0, list[Point]()
    for when, change in changes:
        count += change
        points.append((when - began, float(count)))
    return Series(run.load, points, is_stepped=True)


def _spread(name: str, values: Sequence[float]) -> Series:
    """Its distribution: how many percent are at most so long."""
    ordered = sorted(values)
    parts = [100 * step / _STEPS for step in range(_STEPS + 1)] if ordered else []
    return Series(name, [(percentile(ordered, part) * 1e3, part) for part in parts])


def _ttft(part: int) -> Callable[[Run], float]:
    return lambda run: run.ttft.percentiles[part]
