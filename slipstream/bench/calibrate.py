"""Measures what an engine's steps take, for a simulation: short runs of made-up requests, each step timed.

The engine does not tell what it put into a step. It need not: the scheduler decides that by the requests alone, so the
same requests, simulated, give the same steps.
"""

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median
from uuid import uuid4

from slipstream.api.llm import LLM
from slipstream.bench.costs import StepCosts, Work, fit
from slipstream.bench.dataset import Sample, random_tokens, uniform_lengths
from slipstream.bench.load import Load
from slipstream.bench.offline import ask, make_requests
from slipstream.bench.simulate import Simulation
from slipstream.errors import SlipstreamError
from slipstream.progress import Progress
from slipstream.schema.request import EngineStats

NUM_DECODES = 24  # steps of each batch size
ROUNDS = 3  # of all loads; a step's time is the median, so that a busy moment of the machine does not count
LONG_CONTEXT = 1024


@dataclass(frozen=True)
class Calibration:
    costs: StepCosts
    num_steps: int
    median_error: float  # of a step, relative
    total_error: float  # of all of them together
    round_seconds: tuple[float, ...]  # the same steps in each: what differs is the machine's


def calibrate(
    llm: LLM,
    runs_ahead: bool,
    progress: Progress = lambda stage, done, total: None,
    *,
    max_sequences: int | None = None,
) -> Calibration:
    """runs_ahead: the engine plans a step while another runs, as it does on a GPU. max_sequences: that a step may have;
    by default as many as the engine takes."""
    most = llm.runtime_config.max_batch_size
    loads = list(_loads(llm, min(max_sequences or most, most)))
    planned = [_planned_steps(llm, *load, runs_ahead) for load in loads]
    _timed_steps(llm, *loads[0], len(planned[0]))  # warm-up
    rounds: list[list[float]] = []
    for turn in range(ROUNDS):
        rounds.append([])
        for done, (load, steps) in enumerate(zip(loads, planned, strict=True), start=1):
            rounds[-1] += _timed_steps(llm, *load, len(steps))
            progress("measure steps", turn * len(loads) + done, ROUNDS * len(loads))
    works, seconds = (
        [work for steps in planned for work in steps],
        [median(times) for times in zip(*rounds, strict=True)],
    )
    costs = fit(works, seconds, llm.runtime_config.max_num_tokens)
    guesses = [costs.seconds(work) for work in works]
    errors = [abs(guess / real - 1) for guess, real in zip(guesses, seconds, strict=True)]
    total_error = sum(guesses) / sum(seconds) - 1
    return Calibration(costs, len(works), median(errors), total_error, tuple(map(sum, rounds)))


def _loads(llm: LLM, max_sequences: int) -> Iterator[tuple[list[Sample], Load]]:
    """Prompts of every size alone, batches of every size, long contexts, and mixtures of chunks and next tokens: of all
    sequences that fit, and of few, as clients that ask again make them."""
    config, vocabulary = llm.runtime_config, range(llm.manifest.vocab_size)
    longest = config.max_seq_len - NUM_DECODES
    draw = random.Random(0)

    def prompts(inputs: list[int], outputs: list[int]) -> list[Sample]:
        return random_tokens(draw, vocabulary, inputs, outputs)

    def mixture(count: int, most: int) -> list[Sample]:
        inputs = uniform_lengths(draw, count, min(8, longest), min(most, longest))
        return prompts(inputs, uniform_lengths(draw, count, 1, NUM_DECODES))

    for size in _powers(min(config.max_num_tokens, longest)):
        yield prompts([size], [2]), Load()
    for batch in _powers(max_sequences):
        yield prompts([min(16, longest)] * batch, [NUM_DECODES] * batch), Load()
    few = min(8, max_sequences)
    for batch in {1, few}:
        yield prompts([min(LONG_CONTEXT, longest)] * batch, [NUM_DECODES] * batch), Load()
    yield mixture(2 * max_sequences, 64), Load(concurrency=max_sequences)
    yield mixture(4 * few, 512), Load(concurrency=few)


def _powers(most: int) -> list[int]:
    """1, 2, 4, …, and `most`."""
    return [*(1 << place for place in range(most.bit_length()) if 1 << place < most), most]


def _timed_steps(llm: LLM, samples: list[Sample], load: Load, planned: int) -> list[float]:
    """Seconds from the end of each step to that of the next; the first from its beginning."""
    turns: list[tuple[int, float, float]] = []  # of the loop: tokens until now, its end, its seconds
    before = llm.loop.on_step
    num_tokens = _tokens_of(llm.stats)
    llm.loop.on_step = lambda stats, seconds: turns.append((_tokens_of(stats), time.perf_counter(), seconds))
    try:
        requests = [replace(each, cache_salt=str(uuid4())) for each in make_requests(llm, samples)]  # nothing is found
        ask(llm, requests, load)
    finally:
        llm.loop.on_step = before
    steps, end = [], None
    for tokens, now, seconds in turns:
        if tokens > num_tokens:  # else requests came, and nothing else
            steps.append(seconds if end is None else now - end)
            num_tokens, end = tokens, now
    if len(steps) != planned:
        raise SlipstreamError(
            f"The engine took {len(steps)} steps for what the scheduler plans in {planned}; "
            "it runs something else beside, or drafts, which a simulation does not know."
        )
    return steps


def _tokens_of(stats: EngineStats) -> int:
    return stats.prompt_tokens_computed + stats.generated_tokens


def _planned_steps(llm: LLM, samples: list[Sample], load: Load, runs_ahead: bool) -> list[Work]:
    prompts = [(tuple(each.prompt), each.output_tokens) for each in samples if not isinstance(each.prompt, str)]
    nothing = StepCosts(0.0, (1, llm.runtime_config.max_num_tokens + 1), (0.0,), 0.0, 0.0, 0.0)
    config = replace(llm.runtime_config, enable_block_reuse=False)
    return Simulation(config, nothing, prompts, load, runs_ahead=runs_ahead).run().steps
