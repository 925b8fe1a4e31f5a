"""A server under load: clients that wait for each other, or requests that come when they come; and what they saw."""

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slipstream.bench.dataset import Sample
from slipstream.bench.gpu import GpuUse, GpuWatch
from slipstream.bench.http_client import Crowd, Exchange, Target
from slipstream.bench.load import Load
from slipstream.bench.protocols import Body, Protocol, events_of
from slipstream.bench.timeline import Run, Spread, Timeline, spread
from slipstream.errors import UsageError
from slipstream.progress import Progress
from slipstream.text.tokenizer import Tokenizer

LATE = 0.02  # seconds; a client that reads or asks later than this, at the 99th percentile, says so


@dataclass(frozen=True)
class Limits:
    """What a good answer keeps, in milliseconds: its TTFT, its TPOT, its latency."""

    ttft: float | None = None
    tpot: float | None = None
    latency: float | None = None

    def are_kept(self, timeline: Timeline) -> bool:
        if not timeline.is_whole:
            return False
        tpot = timeline.tpot if timeline.num_output > 1 else 0.0
        seen = ((self.ttft, timeline.ttft), (self.tpot, tpot), (self.latency, timeline.latency))
        return all(limit is None or value * 1e3 <= limit for limit, value in seen)


@dataclass(frozen=True)
class Measurement:
    """A load, what its requests saw, and how much of that was the client's own doing."""

    run: Run
    read_lag: Spread  # seconds between a piece's coming and its being read
    ask_lag: Spread  # seconds between when a request was due and when it was asked
    client_share: float  # of a core, that the client took
    gpu: GpuUse | None
    limits: Limits | None

    @property
    def num_good(self) -> int:
        return sum(self.limits.are_kept(each) for each in self.run.timelines) if self.limits is not None else 0

    @property
    def was_late(self) -> bool:
        return max(self.read_lag.percentiles[99], self.ask_lag.percentiles[99]) > LATE or self.client_share > 0.9

    def to_dict(self) -> dict[str, Any]:
        values = self.run.to_dict()
        if self.limits is not None:
            good = self.num_good
            values["goodput"] = {
                "limits_ms": {name: limit for name, limit in vars(self.limits).items() if limit is not None},
                "share": good / len(self.run.timelines),
                "requests_per_second": good / self.run.seconds if self.run.seconds else 0.0,
            }
        values["client"] = {
            "read_lag_ms": self.read_lag.to_dict(1e3), "ask_lag_ms": self.ask_lag.to_dict(1e3),
            "share_of_a_core": self.client_share,
        }  # fmt: skip
        return values | ({"gpu": self.gpu.to_dict()} if self.gpu is not None else {})


class Endpoint:
    """A server, how it is asked, and connections to it."""

    def __init__(
        self, target: Target, protocol: Protocol, model: str, more: Mapping[str, Any], tokenizer: Tokenizer | None
    ) -> None:
        """more: fields for each body; None leaves one out. tokenizer: to write token ids as text, and to count
        the tokens of an answer where the server does not."""
        self._target, self._protocol, self._model, self._more = target, protocol, model, more
        self._tokenizer, self._crowd = tokenizer, Crowd(target)

    def measure(
        self, samples: Sequence[Sample], load: Load, *, draw: random.Random, limits: Limits | None = None,
        progress: Progress = lambda stage, done, total: None,
    ) -> Measurement:  # fmt: skip
        """Raises UsageError where the server cannot be reached."""
        requests = [self._request(sample) for sample in samples]
        timelines: list[Timeline] = []

        def on_end(exchange: Exchange) -> None:
            timelines.append(self._timeline(exchange))
            progress("generate", len(timelines), len(samples))

        due = None if load.rate is None else load.arrivals(len(samples), draw)
        with GpuWatch() as watch:
            began, worked = time.monotonic(), time.process_time()
            self._crowd.run(requests, concurrency=load.concurrency, due=due, on_end=on_end)
            share = (time.process_time() - worked) / (time.monotonic() - began)
        asked = spread([timeline.lag for timeline in timelines])
        run = Run(str(load), sorted(timelines, key=lambda each: each.asked))
        return Measurement(run, spread(self._crowd.read_lags), asked, share, watch.use, limits)

    def close(self) -> None:
        self._crowd.close()

    def _request(self, sample: Sample) -> bytes:
        if not isinstance(sample.prompt, str) and not self._protocol.takes_ids:
            if self._tokenizer is None:
                raise UsageError(
                    "The data set has token ids, and this protocol takes texts; give --tokenizer, or --protocol openai."
                )
            sample = Sample(self._tokenizer.decode(sample.prompt), sample.output_tokens)
        body: Body = self._protocol.body(sample, self._model) | dict(self._more)
        text = json.dumps({name: value for name, value in body.items() if value is not None})
        return self._target.post(self._protocol.path.format(model=self._model), text.encode())

    def _timeline(self, exchange: Exchange) -> Timeline:
        timeline = Timeline(exchange.asked, ended=exchange.ended, error=exchange.error, lag=exchange.lag)
        if timeline.error is None and exchange.status != 200:
            timeline.error = f"{exchange.status}: {b''.join(piece for _, piece in exchange.pieces)[:300]!r}"
        if timeline.error is not None:
            return timeline
        text, said = "", None
        for arrived, event in events_of(exchange.pieces):
            news = self._protocol.news(event)
            timeline.error = timeline.error or news.error
            if news.text:
                timeline.arrivals.append(arrived)
                text += news.text
            timeline.num_input = news.num_input or timeline.num_input
            said = said if news.num_output is None else news.num_output
        timeline.num_output = said or self._count(text) or len(timeline.arrivals)
        if not timeline.arrivals and timeline.error is None:
            timeline.error = "no text came"
        return timeline

    def _count(self, text: str) -> int:
        return 0 if self._tokenizer is None else len(self._tokenizer.encode(text, add_special_tokens=False))


def endless(samples: Sequence[Sample]) -> Callable[[int], list[Sample]]:
    """Takes the next `count` of them each time; behind the last comes the first again."""
    place = 0

    def take(count: int) -> list[Sample]:
        nonlocal place
        taken = [samples[(place + index) % len(samples)] for index in range(count)]
        place += count
        return taken

    return take
