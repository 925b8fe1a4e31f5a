"""Requests asked of an LLM in this process: so many at a time, each token stamped as it leaves the engine."""

import queue
import random
import time
from collections.abc import Callable, Sequence
from itertools import islice

from slipstream.api.llm import LLM
from slipstream.bench.dataset import Sample
from slipstream.bench.load import Load
from slipstream.bench.timeline import Run, Timeline
from slipstream.errors import RequestError, SlipstreamError, UsageError
from slipstream.progress import Progress
from slipstream.schema.request import GenerateRequest, TokenEvent
from slipstream.schema.sampling import SamplingParams

ALL_AT_ONCE = Load()


def make_requests(llm: LLM, samples: Sequence[Sample]) -> list[GenerateRequest]:
    """Greedy, and as long as the samples say: an end-of-sequence token is like any other.

    Raises UsageError for one that the engine cannot hold.
    """
    requests = []
    for index, sample in enumerate(samples):
        params = SamplingParams(max_tokens=sample.output_tokens, temperature=0, ignore_eos=True, seed=0)
        try:
            token_ids = llm.request_maker.encode(sample.prompt)
            request = llm.request_maker.request(str(index), token_ids, params)
        except RequestError as error:
            raise UsageError(f"Request {index} cannot be run ({error}); leave it out of the data set.") from None
        if request.max_tokens < sample.output_tokens:
            raise UsageError(
                f"Request {index} wants {len(token_ids)} + {sample.output_tokens} tokens, and a sequence holds "
                f"{llm.runtime_config.max_seq_len}; raise --max_seq_len, or take shorter requests."
            )
        requests.append(request)
    return requests


def ask(
    llm: LLM,
    requests: Sequence[GenerateRequest],
    load: Load = ALL_AT_ONCE,
    progress: Progress = lambda stage, done, total: None,
) -> Run:
    """Those of `concurrency` begin their next when one has ended, on the loop's thread: it is in the next step."""
    ended: queue.SimpleQueue[SlipstreamError | None] = queue.SimpleQueue()
    timelines = list[Timeline]()

    def start(request: GenerateRequest, due: float | None = None) -> None:
        now = time.perf_counter()
        timeline = Timeline(due or now, num_input=len(request.prompt_token_ids), lag=now - (due or now))
        timelines.append(timeline)

        def sink(event: TokenEvent) -> None:
            now = time.perf_counter()
            if event.token_ids:
                timeline.arrivals += [now] * len(event.token_ids)
                timeline.num_output += len(event.token_ids)
                timeline.num_cached = max(timeline.num_cached, event.num_cached_tokens)
            if event.finish_reason is not None:
                timeline.ended, timeline.error = now, event.error
                ended.put(start_following())

        llm.loop.submit(request, sink)

    def start_following() -> SlipstreamError | None:
        following = None if load.rate is not None else next(waiting, None)
        try:
            if following is not None:
                start(following)
        except SlipstreamError as error:
            return error
        return None

    waiting = iter(requests)
    times = load.arrivals(len(requests), random.Random(0))
    if load.rate is None:
        first = list(islice(waiting, len(times)))
        llm.loop.call(lambda: _each(start, first))  # between two steps, so that they begin together
    else:
        begin = time.perf_counter()
        for due, request in zip(times, waiting, strict=True):
            time.sleep(max(0.0, begin + due - time.perf_counter()))
            start(request, begin + due)
    for done in range(len(requests)):
        error = ended.get()
        if error is not None:
            raise error
        progress("generate", done + 1, len(requests))
    return Run(str(load), timelines)


def _each(start: Callable[[GenerateRequest], None], requests: Sequence[GenerateRequest]) -> None:
    for request in requests:
        start(request)
