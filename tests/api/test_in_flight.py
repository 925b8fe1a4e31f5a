"""In-flight batching changes no one's answer: each request gets what it gets alone."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.build.cache import tuned_choices
from slipstream.engine.folder import open_engine
from slipstream.runtime.engine import Engine, start_engine
from slipstream.schema.build import CapacityPolicy
from slipstream.schema.request import FinishReason, GenerateRequest
from slipstream.schema.sampling import SamplingParams


def make_requests(count: int, vocab_size: int, *, longest_prompt: int, longest_output: int) -> list[GenerateRequest]:
    """Mixed lengths; half of them start alike, so that prefix reuse takes part; a third sample with a seed."""
    chooser = random.Random(7)
    shared = [chooser.randrange(vocab_size) for _ in range(longest_prompt)]
    requests = []
    for index in range(count):
        prompt = [chooser.randrange(vocab_size) for _ in range(chooser.randint(1, longest_prompt))]
        if index % 2:
            prompt = shared[: chooser.randint(1, longest_prompt - 1)] + prompt[:1]
        max_tokens = chooser.randint(1, longest_output)
        sampling = SamplingParams(temperature=0.8 if index % 3 == 0 else 0, max_tokens=max_tokens)
        requests.append(GenerateRequest(f"r{index}", tuple(prompt), sampling, seed=index, max_tokens=max_tokens))
    return requests


def run(engine: Engine, requests: list[GenerateRequest], arrivals_per_step: int | None) -> dict[str, list[int]]:
    """Step until all have ended; None adds everything at once."""
    waiting = list(requests)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    ended = set()
    while waiting or engine.has_work:
        for request in waiting[: arrivals_per_step or len(waiting)]:
            engine.add(request)
        waiting = waiting[arrivals_per_step or len(waiting) :]
        for event in engine.step():
            assert event.error is None
            tokens[event.request_id] += event.token_ids
            if event.finish_reason is not None:
                assert event.finish_reason is FinishReason.LENGTH
                ended.add(event.request_id)
    assert ended == set(tokens)
    assert engine.stats.num_blocks_used == 0
    return tokens


def open_(folder: Path, **limits: Any) -> Engine:
    engine = open_engine(folder)
    cpu = torch.device("cpu")
    return start_engine(engine, tuned_choices(engine, cpu), cpu, **limits)


@pytest.mark.real_model
def test_32_requests_in_flight_equal_each_alone(smollm2_llm: Any) -> None:
    folder = smollm2_llm._folder.path
    requests = make_requests(32, 49152, longest_prompt=48, longest_output=24)
    alone: dict[str, list[int]] = {}
    engine = open_(folder, enable_block_reuse=False, kv_cache_max_tokens=4096)
    for request in requests:
        alone |= run(engine, [request], None)
    together = run(open_(folder, kv_cache_max_tokens=4096, max_num_tokens=256), requests, arrivals_per_step=1)
    assert together == alone


Alone = tuple[list[GenerateRequest], dict[str, list[int]]]


@pytest.fixture(scope="module")
def tiny_alone(tiny_llm: Any) -> Alone:
    """Requests, and what each gets with the engine to itself and nothing reused."""
    requests = make_requests(32, 128, longest_prompt=60, longest_output=30)
    engine = open_(tiny_llm._folder.path, enable_block_reuse=False, kv_cache_max_tokens=256)
    return requests, {id_: ids for request in requests for id_, ids in run(engine, [request], None).items()}


@pytest.mark.parametrize("policy", list(CapacityPolicy))
@pytest.mark.parametrize("arrivals_per_step", [1, 3, None])
def test_tiny_in_flight_equals_alone(
    tiny_llm: Any, tiny_alone: Alone, policy: CapacityPolicy, arrivals_per_step: int | None
) -> None:
    """Under pressure: a pool of a few blocks, chunked prompts and, with max_utilization, preemptions."""
    folder = tiny_llm._folder.path
    requests, alone = tiny_alone
    crowded = open_(folder, kv_cache_max_tokens=256, max_num_tokens=40, capacity_policy=policy)
    assert run(crowded, requests, arrivals_per_step) == alone
    if policy is CapacityPolicy.MAX_UTILIZATION and arrivals_per_step is None:
        assert crowded.stats.num_preemptions > 0
    assert crowded.stats.prompt_tokens_cached > 0


def test_a_failing_request_stops_no_other(tiny_llm: Any) -> None:
    def fail(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    good = SamplingParams(temperature=0, max_tokens=8)
    outputs = tiny_llm.generate([[1, 2, 3], [1, 2, 4], [5]], [good, SamplingParams(logits_processors=[fail]), good])
    assert outputs[1].error is not None and "ValueError" in outputs[1].error
    assert [len(output.outputs[0].token_ids) for output in outputs] == [8, 0, 8]
    assert outputs[0].outputs[0].token_ids == tiny_llm.generate([1, 2, 3], good).outputs[0].token_ids
