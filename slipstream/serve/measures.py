"""What the engine's process counts of its sequences: plain numbers, which each beat brings to the fronts.

vLLM's names. A histogram costs a search and two additions a value, because each token of each sequence is one.
"""

from bisect import bisect_left

import msgspec

SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKENS = tuple(float(1 << power) for power in range(18))


class Histogram(msgspec.Struct):
    counts: list[int]  # of values up to each bound, not cumulative; the last is of those above them all
    bounds: tuple[float, ...]
    total: float = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


def _histogram(bounds: tuple[float, ...]) -> Histogram:
    return msgspec.field(default_factory=lambda: Histogram([0] * (len(bounds) + 1), bounds))


class Measures(msgspec.Struct):
    """Since the engine process began. What each one means is in metrics.py."""

    time_to_first_token_seconds: Histogram = _histogram(SECONDS)
    inter_token_latency_seconds: Histogram = _histogram(SECONDS)
    e2e_request_latency_seconds: Histogram = _histogram(SECONDS)
    request_queue_time_seconds: Histogram = _histogram(SECONDS)
    request_prefill_time_seconds: Histogram = _histogram(SECONDS)
    request_decode_time_seconds: Histogram = _histogram(SECONDS)
    request_prompt_tokens: Histogram = _histogram(TOKENS)
    request_generation_tokens: Histogram = _histogram(TOKENS)
    iteration_tokens_total: Histogram = _histogram(TOKENS)
    request_success: dict[str, int] = msgspec.field(default_factory=dict)  # by finish reason
