"""When the tokens of each request came, and what follows from it: TTFT, TPOT, ITL, latency, throughput.

TTFT: from asking to the first token. TPOT: from there to the last, by the tokens that came after the first. ITL:
between one arrival and the next. Latency: from asking to the end. Output tokens a second count the first tokens, too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import ceil, floor
from statistics import fmean

PARTS = (50, 90, 95, 99)


@dataclass
class Timeline:
    """One request, in seconds of one clock."""

    asked: float
    num_input: int = 0  # tokens of the prompt, as far as somebody counted them
    num_cached: int = 0  # of these, found in the prefix cache
    num_output: int = 0
    arrivals: list[float] = field(default_factory=list)  # of each token; of each event, where events are all one sees
    ended: float = 0.0
    error: str | None = None
    lag: float = 0.0  # between when it was to be asked and when it was

    @property
    def is_whole(self) -> bool:
        return self.error is None and bool(self.arrivals)

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.asked

    @property
    def tpot(self) -> float:
        """Of an answer of two tokens at least."""
        return (self.arrivals[-1] - self.arrivals[0]) / (self.num_output - 1)

    @property
    def latency(self) -> float:
        return self.ended - self.asked

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(dict.fromkeys(self.arrivals))]


@dataclass(frozen=True)
class Spread:
    """A sample of numbers, summed up."""

    mean: float
    least: float
    most: float
    percentiles: Mapping[int, float]

    def to_dict(self, scale: float = 1.0) -> dict[str, float]:
        ends = {"mean": self.mean, "min": self.least, "max": self.most}
        return {name: value * scale for name, value in ends.items()} | {
            f"p{part}": value * scale for part, value in self.percentiles.items()
        }


def spread(values: Sequence[float]) -> Spread:
    """Zeros where there are no values."""
    ordered = sorted(values) or [0.0]
    percentiles = {part: percentile(ordered, part) for part in PARTS}
    return Spread(fmean(ordered), ordered[0], ordered[-1], percentiles)


def percentile(ordered: Sequence[float], part: float) -> float:
    """Of sorted values, with the neighbours' mean in between, as NumPy's default."""
    place = (len(ordered) - 1) * part / 100
    low, high = ordered[floor(place)], ordered[ceil(place)]
    return low + (high - low) * (place - floor(place))


@dataclass(frozen=True)
class Run:
    """All requests of one load."""

    load: str  # for people: "8 at a time", "2 requests/s"
    timelines: Sequence[Timeline]

    @cached_property
    def whole(self) -> list[Timeline]:
        return [each for each in self.timelines if each.is_whole]

    @property
    def num_failed(self) -> int:
        return len(self.timelines) - len(self.whole)

    @cached_property
    def seconds(self) -> float:
        """From the first question to the last end."""
        if not self.timelines:
            return 0.0
        return max(each.ended for each in self.timelines) - min(each.asked for each in self.timelines)

    def rate(self, count: Callable[[Timeline], int]) -> float:
        """What is counted of whole answers, a second."""
        return sum(map(count, self.whole)) / self.seconds if self.seconds else 0.0

    @property
    def output_rate(self) -> float:
        return self.rate(lambda each: each.num_output)

    @cached_property
    def ttft(self) -> Spread:
        return spread([each.ttft for each in self.whole])

    @cached_property
    def tpot(self) -> Spread:
        return spread([each.tpot for each in self.whole if each.num_output > 1])

    @cached_property
    def itl(self) -> Spread:
        return spread([gap for each in self.whole for gap in each.gaps])

    @cached_property
    def latency(self) -> Spread:
        return spread([each.latency for each in self.whole])

    def to_dict(self) -> dict[str, object]:
        """Milliseconds, tokens, and their rates a second."""
        return {
            "load": self.load,
            "requests": len(self.timelines),
            "failed": self.num_failed,
            "seconds": self.seconds,
            "input_tokens": sum(each.num_input for each in self.whole),
            "cached_tokens": sum(each.num_cached for each in self.whole),
            "output_tokens": sum(each.num_output for each in self.whole),
            "requests_per_second": self.rate(lambda each: 1),
            "output_tokens_per_second": self.output_rate,
            "total_tokens_per_second": self.rate(lambda each: each.num_input + each.num_output),
            "ttft_ms": self.ttft.to_dict(1e3),
            "tpot_ms": self.tpot.to_dict(1e3),
            "itl_ms": self.itl.to_dict(1e3),
            "latency_ms": self.latency.to_dict(1e3),
        }
