"""/metrics: what the last beat said, as Prometheus reads it. docs/serving/metrics.md is the table for people.

Each number is of one engine, which its label names: sums are Prometheus' part. Counters are the engine process's: they
begin again with it, which Prometheus expects of counters.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate

from fastapi import APIRouter
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.responses import PlainTextResponse, Response

from slipstream.schema.request import EngineStats
from slipstream.serve.frontend import Frontend
from slipstream.serve.measures import Histogram, Measures

PREFIX = "slipstream:"
LABELS = ("model_name", "engine")  # the number of a replica, as vLLM's

COUNTERS = (
    ("num_preemptions", "Sequences sent back to wait, their blocks given to others.", "num_preemptions"),
    ("prompt_tokens", "Tokens of the prompts of sequences that started.", "prompt_tokens"),
    ("generation_tokens", "Tokens generated.", "generated_tokens"),
    ("prefix_cache_queries", "Prompt tokens looked for in the prefix cache.", "prompt_tokens"),
    ("prefix_cache_hits", "Prompt tokens found there.", "prompt_tokens_cached"),
)

HISTOGRAMS = {
    "time_to_first_token_seconds": "From when a front sent a sequence to its first token.",
    "inter_token_latency_seconds": "Between two tokens of a sequence.",
    "e2e_request_latency_seconds": "From when a front sent a sequence to its end.",
    "request_queue_time_seconds": "From when the engine took a sequence to the step that began it.",
    "request_prefill_time_seconds": "From then to its first token or its vector, with the way to the engine.",
    "request_decode_time_seconds": "From a sequence's first token to its last.",
    "request_prompt_tokens": "Tokens of a sequence's prompt.",
    "request_generation_tokens": "Tokens that a sequence generated.",
    "iteration_tokens_total": "Tokens of one step of the engine: of prompts computed, and generated.",
}


class _Numbers(Collector):
    def __init__(self, frontend: Frontend, model_name: str) -> None:
        self._frontend, self._model_name = frontend, model_name
        self._indices: list[int] = []  # of the engines that are shown

    def collect(self) -> Iterator[Metric]:
        self._indices = self._frontend.expected
        engines = [self._frontend.engines[index] for index in self._indices]
        yield from self._of_engines([engine.stats for engine in engines])
        yield from self._of_sequences([engine.measures for engine in engines])

    def _of_engines(self, stats: Sequence[EngineStats]) -> Iterator[Metric]:
        usages = [each.num_blocks_used / max(1, each.num_blocks_total) for each in stats]
        for name, text, values in (
            ("num_requests_running", "Sequences in the running batch.", [each.num_running for each in stats]),
            ("num_requests_waiting", "Sequences that wait to start.", [each.num_waiting for each in stats]),
            ("kv_cache_usage_perc", "Part of the KV blocks that sequences hold; 1 is all.", usages),
            ("kv_cache_blocks", "KV blocks there are; 0 while the engine starts.",
             [each.num_blocks_total for each in stats]),
        ):  # fmt: skip
            yield self._filled(GaugeMetricFamily(PREFIX + name, text, labels=LABELS), values)
        for name, text, field in COUNTERS:
            values = [getattr(each, field) for each in stats]
            yield self._filled(CounterMetricFamily(PREFIX + name, text, labels=LABELS), values)
        if any(each.num_accepted_tokens for each in stats):
            yield from self._of_drafts(stats)

    def _of_drafts(self, stats: Sequence[EngineStats]) -> Iterator[Metric]:
        """Of engines that draft. Tokens a step and sequence: 1 + accepted tokens / drafts."""
        for name, text, values in (
            ("drafts", "Steps of a sequence that verified drafts.", [each.num_drafts for each in stats]),
            ("draft_tokens", "Drafted tokens verified.", [each.num_draft_tokens for each in stats]),
            ("accepted_tokens", "Drafted tokens accepted.", [sum(each.num_accepted_tokens) for each in stats]),
        ):
            family = CounterMetricFamily(f"{PREFIX}spec_decode_num_{name}", text, labels=LABELS)
            yield self._filled(family, values)
        asked = [each.num_drafts_asked / max(1, each.num_running) for each in stats]
        text = "Drafts asked for a running sequence's next step, as many as are worth it now; 0 is plain decoding."
        yield self._filled(GaugeMetricFamily(PREFIX + "spec_decode_draft_length", text, labels=LABELS), asked)
        by_place = CounterMetricFamily(
            PREFIX + "spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens accepted, by place in the draft.",
            labels=[*LABELS, "position"],
        )
        for engine, each in zip(self._indices, stats, strict=True):
            for position, count in enumerate(each.num_accepted_tokens):
                by_place.add_metric([self._model_name, str(engine), str(position)], count)
        yield by_place

    def _of_sequences(self, measures: Sequence[Measures]) -> Iterator[Metric]:
        ends = CounterMetricFamily(
            PREFIX + "request_success", "Sequences that ended, by why.", labels=[*LABELS, "finished_reason"]
        )
        for engine, each in zip(self._indices, measures, strict=True):
            for reason, count in each.request_success.items():
                ends.add_metric([self._model_name, str(engine), reason], count)
        yield ends
        for name, text in HISTOGRAMS.items():
            shown = HistogramMetricFamily(PREFIX + name, text, labels=LABELS)
            for engine, each in zip(self._indices, measures, strict=True):
                histogram: Histogram = getattr(each, name)
                filled = zip([*map(str, histogram.bounds), "+Inf"], accumulate(histogram.counts), strict=True)
                shown.add_metric([self._model_name, str(engine)], [*filled], histogram.total)
            yield shown

    def _filled(self, family: CounterMetricFamily | GaugeMetricFamily, values: Sequence[float]) -> Metric:
        for engine, value in zip(self._indices, values, strict=True):
            family.add_metric([self._model_name, str(engine)], value)
        return family


def metrics_router(frontend: Frontend, model_name: str) -> APIRouter:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Numbers(frontend, model_name))
    router = APIRouter()

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """The engines' numbers, at most half a second old, in Prometheus' text format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router
