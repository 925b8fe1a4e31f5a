"""BeamSearch against transformers' generate(num_beams=...), with a fake engine that runs the same tiny model."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slipstream.errors import RequestError
from slipstream.kernels.sampling import gather_logprobs
from slipstream.runtime.beam import Beam, BeamSearch
from slipstream.schema.request import FinishReason, GenerateRequest, TokenEvent, TokenLogprobs
from slipstream.schema.sampling import SamplingParams

VOCAB, PAD = 32, 31
PROMPT = (3, 14, 15, 9)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.6,  # sharp enough that beams differ and end at different lengths
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).double().eval()


class FakeEngine:
    """Answers each request with the model's next-token logprobs, a few requests at a time, in any order."""

    def __init__(self, model: LlamaForCausalLM, at_once: int = 100) -> None:
        self.model = model
        self.at_once = at_once
        self.waiting: list[GenerateRequest] = []
        self.served: list[GenerateRequest] = []

    @torch.no_grad()
    def step(self) -> list[TokenEvent]:
        batch, self.waiting = self.waiting[-self.at_once :], self.waiting[: -self.at_once]
        self.served += batch
        return [self.answer(request) for request in reversed(batch)]

    def answer(self, request: GenerateRequest) -> TokenEvent:
        logits_1V = self.model(torch.tensor([request.prompt_token_ids])).logits[:, -1].float()
        token_id = int(logits_1V.argmax())
        _, _, top, top_logprobs = gather_logprobs(logits_1V, torch.tensor([token_id]), request.sampling.logprobs or 0)
        pairs = tuple(zip(top[0].tolist(), top_logprobs[0].tolist(), strict=True))
        logprobs = TokenLogprobs(token_id, pairs[0][1], 1, pairs)
        return TokenEvent(request.request_id, (token_id,), (logprobs,), finish_reason=FinishReason.LENGTH)


def run(search: BeamSearch, engine: FakeEngine) -> list[Beam]:
    while not search.done:
        engine.waiting += search.requests()
        assert not search.requests()  # each request is handed out once
        search.observe(engine.step())
    return search.results()


CASES = [
    # width, n, length_penalty, early_stopping, stop ids
    *itertools.product([2, 4], [1], [0.0, 1.0, -1.0], [False, True], [(5,), (5, 7, 11), ()]),
    *itertools.product([3, 7], [3], [0.6, 2.0], [False, True], [(8,), (2, 13, 20, 21, 22)]),
]


@pytest.mark.parametrize(("width", "n", "length_penalty", "early_stopping", "stop_ids"), CASES)
def test_beams_equal_those_of_transformers(
    model: LlamaForCausalLM, width: int, n: int, length_penalty: float, early_stopping: bool, stop_ids: tuple[int, ...]
) -> None:
    max_tokens = 12
    for prompt in (PROMPT, (1,), (30, 2, 6)):
        expected = model.generate(
            torch.tensor([prompt]),
            num_beams=width,
            num_return_sequences=n,
            do_sample=False,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            max_new_tokens=max_tokens,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=PAD,
            return_dict_in_generate=True,
            output_scores=True,
        )
        sampling = SamplingParams(
            n=n,
            best_of=width,
            use_beam_search=True,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            stop_token_ids=stop_ids[1:],
        )
        search = BeamSearch("b", prompt, sampling, frozenset(stop_ids[:1]), max_tokens)
        results = run(search, FakeEngine(model))
        assert len(results) == n
        for beam, sequence, score in zip(results, expected.sequences, expected.sequences_scores, strict=True):
            output = sequence[len(prompt) :].tolist()
            assert list(beam.token_ids) == output[: len(beam.token_ids)]
            assert set(output[len(beam.token_ids) :]) <= {PAD}
            assert beam.cumulative_logprob / len(beam.token_ids) ** length_penalty == pytest.approx(
                score.item(), rel=1e-4
            )
            ended = beam.token_ids[-1] in stop_ids
            assert beam.finish_reason == (FinishReason.STOP if ended else FinishReason.LENGTH)
            assert sum(logprobs.logprob for logprobs in beam.logprobs) == pytest.approx(beam.cumulative_logprob)


def test_the_cases_above_end_both_early_and_at_the_limit(model: LlamaForCausalLM) -> None:
    def reasons(stop_ids: frozenset[int]) -> Iterator[FinishReason | None]:
        sampling = SamplingParams(n=4, use_beam_search=True)
        for beam in run(BeamSearch("b", PROMPT, sampling, stop_ids, 12), FakeEngine(model)):
            yield beam.finish_reason

    assert FinishReason.STOP in set(reasons(frozenset({5, 7, 11})))
    assert set(reasons(frozenset())) == {FinishReason.LENGTH}


def test_a_round_may_take_many_steps_in_any_order(model: LlamaForCausalLM) -> None:
    sampling = SamplingParams(n=3, use_beam_search=True)
    at_once, one_by_one = (
        run(BeamSearch("b", PROMPT, sampling, frozenset({5}), 8), FakeEngine(model, size)) for size in (100, 1)
    )
    assert at_once == one_by_one


def test_requests_are_plain_greedy_ones_of_one_token(model: LlamaForCausalLM) -> None:
    engine = FakeEngine(model)
    sampling = SamplingParams(n=2, best_of=3, use_beam_search=True, logprobs=2, prompt_logprobs=1)
    search = BeamSearch("b", PROMPT, sampling, frozenset({5, 6}), 5, priority=-3, cache_salt="tenant")
    results = run(search, engine)
    assert len({request.request_id for request in engine.served}) == len(engine.served)
    for request in engine.served:
        assert request.sampling == SamplingParams(
            max_tokens=1, temperature=0, logprobs=5, prompt_logprobs=1 if request is engine.served[0] else None
        )
        assert (request.max_tokens, request.priority, request.cache_salt) == (1, -3, "tenant")
        assert request.prompt_token_ids[: len(PROMPT)] == PROMPT
    for beam in results:
        for logprobs in beam.logprobs:
            assert len(logprobs.top) == 2
            if logprobs.rank <= 2:
                assert logprobs.top[logprobs.rank - 1] == (logprobs.token_id, logprobs.logprob)


def answer_of(request: GenerateRequest, *top: tuple[int, float]) -> TokenEvent:
    return TokenEvent(request.request_id, (top[0][0],), (TokenLogprobs(*top[0], 1, top),))


def test_equal_candidates_keep_the_order_of_their_beams() -> None:
    search = BeamSearch("b", (1,), SamplingParams(n=2, use_beam_search=True), frozenset(), 2)
    search.observe([answer_of(request, (4, -1.0), (6, -1.0)) for request in search.requests()])
    search.observe([answer_of(request, (8, -1.0), (9, -1.0)) for request in search.requests()])
    assert [beam.token_ids for beam in search.results()] == [(4, 8), (4, 9)]


@pytest.mark.parametrize("length_penalty", [-100.0, 100.0])
def test_extreme_length_penalties_do_not_overflow(length_penalty: float) -> None:
    long, short = Beam((1,) * 4000, -5000.0), Beam((1,) * 2, -0.5)
    better = long if length_penalty > 0 else short
    assert max([long, short], key=lambda beam: beam.score(length_penalty)) is better
    assert Beam((1,), 0.0).score(length_penalty) > short.score(length_penalty)


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.ABORT])
def test_a_failed_request_fails_the_search(reason: FinishReason) -> None:
    search = BeamSearch("b", (1,), SamplingParams(n=2, use_beam_search=True), frozenset(), 2)
    (request,) = search.requests()
    search.observe([TokenEvent("another request", finish_reason=reason)])
    assert not search.done
    search.observe([TokenEvent(request.request_id, finish_reason=reason, error="why")])
    search.fail(FinishReason.ABORT)  # too late to change it
    assert search.done
    assert (search.failure, search.error) == (reason, "why")
    assert search.results() == search.requests() == []


@pytest.mark.parametrize(
    ("width", "stops", "allowed"), [(100, 0, True), (99, 1, True), (101, 0, False), (100, 1, False)]
)
def test_more_beams_than_the_engine_reports_alternatives_are_refused(width: int, stops: int, allowed: bool) -> None:
    def search(**fields: Any) -> BeamSearch:
        return BeamSearch("b", (1,), SamplingParams(use_beam_search=True, **fields), frozenset(range(stops)), 4)

    if allowed:
        search(n=width)
    else:
        with pytest.raises(RequestError, match=f"best_of is {width}.*at most {100 - stops} beams"):
            search(n=width)
