"""LLM.embed: the vectors of transformers, whatever runs beside them and however a text is cut."""

import asyncio
import random
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.api.embeddings import EmbeddingOutput
from slipstream.api.handles import PoolingHandle
from slipstream.errors import RequestError, SlipstreamError
from slipstream.runtime.engine import Engine
from slipstream.runtime.worker.pool import Pooler
from slipstream.schema.build import CapacityPolicy
from slipstream.schema.request import FinishReason, GenerateRequest, Pooling, TokenEvent
from slipstream.schema.step import SequenceStep, StepPlan
from tests.api.test_in_flight import make_requests, open_
from tests.oracle import pooled

TOLERANCE = 1e-5
TEXTS = ["What is the capital of France?", "Paris", "def f(x):\n    return x\n" * 12, "Le chat est assis. " * 40]
CHOOSER = random.Random(3)
LISTS = [[CHOOSER.randrange(128) for _ in range(length)] for length in (1, 5, 33, 64, 150, 200)]


def close(vector: Any, expected: Any) -> None:
    np.testing.assert_allclose(vector, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.real_model
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_of_the_real_model_equal_transformers(smollm2_llm: LLM, smollm2_reference: Any, pooling: str) -> None:
    outputs = smollm2_llm.embed(TEXTS, pooling=pooling)
    for text, output in zip(TEXTS, outputs, strict=True):
        assert output.token_ids == smollm2_llm.tokenizer.encode(text)
        with torch.no_grad():
            states = smollm2_reference.base_model(torch.tensor([output.token_ids])).last_hidden_state
        assert output.embedding.dtype == np.float32
        close(output.embedding, pooled(states[0], pooling))


@pytest.mark.parametrize("policy", [CapacityPolicy.GUARANTEED_NO_EVICT, CapacityPolicy.MAX_UTILIZATION])
def test_vectors_and_tokens_are_the_same_in_flight_together(tiny_llm: LLM, policy: CapacityPolicy) -> None:
    """Under pressure: 40 tokens a step, so that texts come in pieces, and few blocks."""
    folder = tiny_llm._folder.path
    generating = make_requests(24, 128, longest_prompt=60, longest_output=30)
    pooling = [
        GenerateRequest(f"v{index}", tuple(LISTS[index % 6]), SamplingParams(), 0, 1, pooling=list(Pooling)[index // 6])
        for index in range(12)
    ]
    engine = open_(folder, enable_block_reuse=False, kv_cache_max_tokens=256)
    alone = {each.request_id: run(engine, [each])[each.request_id] for each in (*generating, *pooling)}
    crowded = open_(folder, kv_cache_max_tokens=256, max_num_tokens=40, max_batch_size=16, capacity_policy=policy)
    mixed = [each for pair in zip(generating[::2], pooling, generating[1::2], strict=True) for each in pair]
    together = run(crowded, mixed)
    assert together.keys() == alone.keys()
    for name, expected in alone.items():
        if name.startswith("v"):
            close(together[name], expected)
        else:
            assert together[name] == expected
    stats = crowded.stats
    assert stats.prompt_tokens_cached > 0 and stats.num_blocks_used == 0
    assert (stats.num_preemptions > 0) == (policy is CapacityPolicy.MAX_UTILIZATION)


def run(engine: Engine, requests: list[GenerateRequest]) -> dict[str, Any]:
    """All at once, to their ends: the tokens of each, or its vector."""
    made: dict[str, Any] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            made[event.request_id] += event.token_ids
            if event.vector is not None:
                assert event.finish_reason is FinishReason.STOP
                made[event.request_id] = np.frombuffer(event.vector, "<f4")
    return made


def test_mean_and_last_are_two_vectors_and_both_have_length_1(tiny_llm: LLM) -> None:
    mean, last = (tiny_llm.embed(LISTS[2], pooling=pooling).embedding for pooling in Pooling)
    assert abs(mean - last).max() > 0.01
    assert np.linalg.norm(mean) == pytest.approx(1) == np.linalg.norm(last)
    assert (tiny_llm.embed(LISTS[2]).embedding == mean).all()


def test_dimensions_are_the_first_numbers_brought_to_length_1(tiny_llm: LLM) -> None:
    whole, short = (tiny_llm.embed(LISTS[2], dimensions=size).embedding for size in (64, 8))
    close(whole, tiny_llm.embed(LISTS[2]).embedding)
    close(short, whole[:8] / np.linalg.norm(whole[:8]))


def test_coroutines_share_the_batch(tiny_llm: LLM) -> None:
    async def several() -> list[EmbeddingOutput]:
        return await asyncio.gather(*(tiny_llm.embed_async(each, pooling="last", dimensions=9) for each in LISTS))

    for output, token_ids in zip(asyncio.run(several()), LISTS, strict=True):
        assert output.token_ids == token_ids
        close(output.embedding, tiny_llm.embed(token_ids, pooling="last", dimensions=9).embedding)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompts": []}, None),
        ({"prompts": [[]]}, "empty"),
        ({"prompts": [1] * 257}, "The text has 257 tokens and a sequence holds 256; shorten it"),
        ({"prompts": [128]}, "vocabulary"),
        ({"pooling": "cls"}, "pooling is 'cls'; it must be one of mean, last"),
        ({"dimensions": 65}, "dimensions is 65; .* 1 to 64"),
        ({"dimensions": 0}, "dimensions is 0"),
        ({"dimensions": True}, "dimensions is True"),
        ({"priority": "high"}, "priority"),
        ({"cache_salt": 5}, "cache_salt"),
    ],
)
def test_a_bad_value_is_one_sentence(tiny_llm: LLM, fields: dict[str, Any], words: str | None) -> None:
    if words is None:
        assert tiny_llm.embed(**fields) == []
        return
    with pytest.raises(RequestError, match=words):
        tiny_llm.embed(**{"prompts": [1, 2], **fields})


def test_a_text_may_fill_a_whole_sequence(tiny_llm: LLM) -> None:
    assert tiny_llm.embed([1] * 256).embedding.shape == (64,)


def test_an_engine_of_an_older_build_generates_and_says_why_it_does_not_embed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slipstream.build import build
    from slipstream.checkpoint import open_checkpoint, resolve

    monkeypatch.setattr(import_module("slipstream.build.capture"), "_hidden_states", lambda graph: ())
    build(open_checkpoint(resolve(tiny_model)), tmp_path / "engine")
    with LLM(tmp_path / "engine", kv_cache_max_tokens=64) as llm:
        assert len(llm.generate([1, 2], SamplingParams(max_tokens=3, ignore_eos=True)).outputs[0].token_ids) == 3
        with pytest.raises(RequestError, match=r"gives logits alone, .* build it again"):
            llm.embed([1, 2])


def test_an_engine_that_is_closed_meanwhile_gives_an_error_and_no_vector() -> None:
    class Loop:
        def submit(self, request: Any, sink: Any) -> None: ...

        def abort(self, request_id: str) -> None: ...

        stop = abort

    request = GenerateRequest("r", (1,), SamplingParams(), seed=0, max_tokens=1, pooling=Pooling.MEAN)
    handle = PoolingHandle(Loop(), None, None, request, print)
    handle.start()
    handle.push(TokenEvent("r", finish_reason=FinishReason.ABORT))
    assert handle.finished and handle.output().vector is None and "closed" in str(handle.output().error)


def test_closing_ends_what_runs(tiny_model: Path) -> None:
    llm = LLM(tiny_model, max_num_tokens=8, max_batch_size=1, kv_cache_max_tokens=256)
    with llm:
        stream = llm.stream([1], SamplingParams(max_tokens=200, ignore_eos=True))  # the batch is full
        next(stream)
        caught: list[BaseException] = []

        def embed() -> None:
            try:
                llm.embed([1, 2, 3])
            except SlipstreamError as error:
                caught.append(error)

        thread = threading.Thread(target=embed)
        thread.start()
    thread.join()
    assert len(caught) == 1 and "closed" in str(caught[0])


def test_rows_that_are_no_numbers_fail_their_text_alone() -> None:
    pooler = Pooler()
    for slot, pooling in enumerate((Pooling.MEAN, Pooling.LAST)):
        request = GenerateRequest(str(slot), (1, 2), SamplingParams(), seed=0, max_tokens=1, pooling=pooling)
        pooler.add(slot, request)
    hidden_TH = torch.tensor([[torch.nan, 1.0], [1.0, 2.0], [torch.inf, 1.0], [3.0, 4.0]])
    plan = StepPlan(0, (SequenceStep(0, 0, (1, 2), sample=False), SequenceStep(1, 0, (1, 2), sample=False)))
    vectors = pooler.pool(plan, hidden_TH)
    assert vectors is not None
    (_, failed), (_, fine) = vectors.results()
    assert failed.error is not None and "NaN" in failed.error and failed.vector is None
    assert fine.error is None and np.frombuffer(fine.vector or b"", "<f4").tolist() == [3.0, 4.0]


def test_drafts_of_others_are_rows_of_the_step_too() -> None:
    pooler = Pooler()
    pooler.add(1, GenerateRequest("1", (1, 2), SamplingParams(), seed=0, max_tokens=1, pooling=Pooling.MEAN))
    steps = SequenceStep(0, 7, (5,), sample=True, num_drafts=2), SequenceStep(1, 0, (1, 2), sample=False)
    vectors = pooler.pool(StepPlan(0, steps), torch.tensor([[9.0], [9.0], [9.0], [1.0], [3.0]]))
    assert vectors is not None
    ((index, result),) = vectors.results()
    assert index == 1 and np.frombuffer(result.vector or b"", "<f4").tolist() == [2.0]
