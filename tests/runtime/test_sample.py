"""The Sampler: edits against transformers' processors, draws against the analytic distribution, lone failures."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from slipstream.kernels import sampling as kernels
from slipstream.runtime import logits as logits_module
from slipstream.runtime.logits import PenaltyTable, SequenceState, edit_logits
from slipstream.runtime.worker import sample as sample_module
from slipstream.runtime.worker.inputs import NO_SLOT
from slipstream.runtime.worker.sample import Sampler
from slipstream.schema.request import GenerateRequest
from slipstream.schema.sampling import SamplingParams
from slipstream.schema.step import SequenceResult

VOCAB = 24
P_VALUE = 1e-6


def sample(sampler: Sampler, slots: list[int], logits_RV: Tensor) -> list[SequenceResult]:
    """As the worker does it, where each slot is at the end of its known text."""
    positions = [len(sampler._states[slot].token_ids) for slot in slots]
    row_slots = [NO_SLOT if sampler.is_edited(slot) else slot for slot in slots]
    chosen_R = sampler.slots.choose(logits_RV, *(torch.tensor(each).long() for each in (row_slots, positions)))
    results = sampler.finish(sampler.draw(slots, positions, logits_RV, chosen_R))
    for slot, result in zip(slots, results, strict=True):
        assert result.error or (sampler.slots.last_token[slot],) == result.token_ids
    return results


def request_of(prompt: tuple[int, ...] = (1, 2, 3), *, seed: int = 0, **fields: Any) -> GenerateRequest:
    of_request = {name: fields.pop(name) for name in ("eos_token_ids", "bad_words_ids") if name in fields}
    return GenerateRequest("r", prompt, SamplingParams(**fields), seed, max_tokens=100, **of_request)


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def sample_one(request: GenerateRequest, logits_V: Tensor, outputs: tuple[int, ...] = ()) -> SequenceResult:
    sampler = Sampler(len(logits_V), 1, "cpu")
    sampler.add(0, request, outputs)
    return sample(sampler, [0], logits_V[None])[0]


def edited(request: GenerateRequest, outputs: tuple[int, ...], logits_V: Tensor) -> Tensor:
    """The logits after all edits, in a batch between rows that need others or none."""
    neighbours = [request_of(repetition_penalty=1.9, logit_bias={0: 5.0}), request_of(no_repeat_ngram_size=1)]
    states = [SequenceState(neighbours[0], (4,)), SequenceState(request, outputs), SequenceState(neighbours[1], ())]
    table = PenaltyTable(len(logits_V), torch.device("cpu"))
    slots = [5, 2, 0]
    for slot, state in zip(slots, states, strict=True):
        if state.has_penalty:
            table.add(slot, state)
    logits_RV = logits_V.repeat(3, 1)
    assert not edit_logits(logits_RV, slots, states, table)
    return logits_RV[1]


# ---- edits ----------------------------------------------------------------------------------------------------------

HISTORIES = [((3,), ()), ((1, 2, 3, 1, 2), ()), ((1, 2, 3), (1, 2, 5, 1, 2)), ((7,) * 4, (7, 7, 8, 7, 7))]


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize(
    ("fields", "processor"),
    [
        ({"repetition_penalty": 1.3}, RepetitionPenaltyLogitsProcessor(1.3)),
        ({"repetition_penalty": 0.6}, RepetitionPenaltyLogitsProcessor(0.6)),
        *[({"no_repeat_ngram_size": size}, NoRepeatNGramLogitsProcessor(size)) for size in (1, 2, 3, 20)],
        (
            {"bad_words_ids": ((9,), (1, 2, 3), (2, 4), (7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7), (3, 11))},
            NoBadWordsLogitsProcessor([[9], [1, 2, 3], [2, 4], [7] * 11, [3, 11]]),
        ),
    ],
)
def test_edit_equals_the_transformers_processor(
    history: tuple[tuple[int, ...], tuple[int, ...]], fields: dict[str, Any], processor: Callable[..., Tensor]
) -> None:
    prompt, outputs = history
    logits_V = random_logits(1)[0]
    expected_V = processor(torch.tensor([prompt + outputs]), logits_V[None].clone())[0]
    assert torch.equal(edited(request_of(prompt, **fields), outputs, logits_V), expected_V)


def test_the_ngram_index_grown_token_by_token_is_the_one_built_at_once() -> None:
    generator = random.Random(0)
    tokens = [generator.randrange(4) for _ in range(200)]
    for size in (1, 2, 3, 5):
        request = request_of((0,), no_repeat_ngram_size=size)
        grown = SequenceState(request, ())
        processor = NoRepeatNGramLogitsProcessor(size)
        for end in range(len(tokens)):
            built = SequenceState(request, tuple(tokens[:end]))
            expected = processor(torch.tensor([[0, *tokens[:end]]]), torch.zeros(1, VOCAB))[0].isinf().nonzero()[:, 0]
            assert set(grown.banned()) == set(built.banned()) == set(expected.tolist())
            grown.append(tokens[end])


@pytest.mark.parametrize("num_output", [0, 2, 3, 4])
def test_min_tokens_bans_every_stop_token(num_output: int) -> None:
    request = request_of((1, 2), eos_token_ids=frozenset({4, 5}), stop_token_ids=[6], min_tokens=3)
    processor = MinNewTokensLengthLogitsProcessor(2, 3, [4, 5, 6])
    outputs = (8,) * num_output
    logits_V = random_logits(1)[0]
    expected_V = processor(torch.tensor([[1, 2, *outputs]]), logits_V[None].clone())[0]
    assert torch.equal(edited(request, outputs, logits_V), expected_V)


def test_presence_and_frequency_penalties_count_output_tokens_only() -> None:
    logits_V = random_logits(1)[0]
    request = request_of((1, 2, 2), presence_penalty=0.5, frequency_penalty=-0.25)
    counts_V = torch.zeros(VOCAB)
    counts_V[2], counts_V[9] = 1, 3
    expected_V = logits_V + 0.25 * counts_V - 0.5 * (counts_V > 0)
    torch.testing.assert_close(edited(request, (9, 2, 9, 9), logits_V), expected_V)


def test_all_edits_together_run_in_the_promised_order() -> None:
    seen_by_processor = []

    def processor(token_ids: list[int], logits_V: Tensor) -> Tensor:
        seen_by_processor.append((token_ids, logits_V.clone()))
        return logits_V * 2

    logits_V = random_logits(1)[0].abs() + 1
    request = request_of(
        (1, 2),
        logit_bias={1: -20.0, 9: 3.0},
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        bad_words_ids=((7,),),
        logits_processors=[processor],
    )
    expected_V = logits_V.clone()
    expected_V[1] = (logits_V[1] - 20) * 2  # biased below 0 first, so that the repetition penalty multiplies
    expected_V[2] = logits_V[2] / 2
    expected_V[9] = (logits_V[9] + 3) / 2 - 0.5
    expected_V[7] = -torch.inf
    torch.testing.assert_close(edited(request, (9,), logits_V), expected_V * 2)
    token_ids, processor_logits_V = seen_by_processor[0]
    assert token_ids == [1, 2, 9]
    torch.testing.assert_close(processor_logits_V, expected_V)


def test_penalties_follow_the_tokens_as_they_are_sampled_and_a_slot_can_be_used_again() -> None:
    sampler = Sampler(VOCAB, 8, "cpu")
    logits_1V = torch.zeros(1, VOCAB)
    logits_1V[0, :3] = torch.tensor([3.0, 2.9, 2.8])
    for _ in range(2):
        sampler.add(7, request_of((20,), temperature=0, presence_penalty=1.0), ())
        assert [sample(sampler, [7], logits_1V)[0].token_ids[0] for _ in range(4)] == [0, 1, 2, 0]
        sampler.remove(7)
    sampler.add(7, request_of((20,), temperature=0, presence_penalty=1.0), (0, 1))  # resumed after a preemption
    assert sample(sampler, [7], logits_1V)[0].token_ids == (2,)


# ---- draws ----------------------------------------------------------------------------------------------------------

DISTRIBUTIONS: dict[str, tuple[dict[str, Any], list[Callable[..., Tensor]]]] = {
    "plain": ({}, []),
    "temperature": ({"temperature": 0.6}, [TemperatureLogitsWarper(0.6)]),
    "top_k": ({"top_k": 5}, [TopKLogitsWarper(5)]),
    "top_p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "min_p": ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
    "typical_p": ({"typical_p": 0.6}, [TypicalLogitsWarper(0.6)]),
    "repetition": ({"repetition_penalty": 1.8}, [RepetitionPenaltyLogitsProcessor(1.8)]),
    "all": (
        {"repetition_penalty": 1.3, "temperature": 1.4, "top_k": 15, "typical_p": 0.95, "top_p": 0.9, "min_p": 0.02},
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(1.4),
            TopKLogitsWarper(15),
            TypicalLogitsWarper(0.95),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.02),
        ],
    ),
}


def assert_drawn_from(token_ids: list[int | None], probs: np.ndarray) -> None:
    counts = np.bincount(np.array(token_ids, dtype=np.int64), minlength=len(probs))
    possible = probs > 0
    assert counts[~possible].sum() == 0
    expected = probs[possible] / probs[possible].sum() * len(token_ids)
    assert scipy.stats.chisquare(counts[possible], expected).pvalue > P_VALUE


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_follow_the_distribution(name: str) -> None:
    fields, processors = DISTRIBUTIONS[name]
    num_draws, prompt, outputs = 20_000, (1, 2, 3), (5, 5, 9)
    logits_V = random_logits(1, seed=3)[0]
    sampler = Sampler(VOCAB, num_draws, "cpu")
    for slot in range(num_draws):
        sampler.add(slot, request_of(prompt, seed=slot, **fields), outputs)
    results = sample(sampler, range(num_draws), logits_V.expand(num_draws, -1))

    scores_1V = logits_V[None]
    for processor in processors:
        scores_1V = processor(torch.tensor([[*prompt, *outputs]]), scores_1V)
    assert_drawn_from([result.token_ids[0] for result in results], scores_1V[0].double().softmax(dim=0).numpy())


def test_draws_with_presence_frequency_and_bias_follow_the_distribution() -> None:
    num_draws = 20_000
    logits_V = random_logits(1, seed=4)[0]
    fields = {"presence_penalty": 0.7, "frequency_penalty": 0.3, "logit_bias": {0: 2.0, 4: -100.0}}
    sampler = Sampler(VOCAB, num_draws, "cpu")
    for slot in range(num_draws):
        sampler.add(slot, request_of((1, 2), seed=slot, **fields), (5, 5, 9))
    results = sample(sampler, range(num_draws), logits_V.expand(num_draws, -1))
    expected_V = logits_V.double()
    expected_V[5] -= 0.7 + 2 * 0.3
    expected_V[9] -= 0.7 + 0.3
    expected_V[0] += 2
    expected_V[4] = -torch.inf
    assert_drawn_from([result.token_ids[0] for result in results], expected_V.softmax(dim=0).numpy())


def test_successive_tokens_of_one_seed_are_independent() -> None:
    num_draws, vocab = 30_000, 6
    logits_V = random_logits(1, vocab)[0]
    sampler = Sampler(vocab, num_draws, "cpu")
    for slot in range(num_draws):
        sampler.add(slot, request_of((1, 2), seed=slot))
    first, second = (
        [result.token_ids[0] for result in sample(sampler, range(num_draws), logits_V.expand(num_draws, -1))]
        for _ in range(2)
    )
    probs = logits_V.double().softmax(dim=0).numpy()
    pairs = [one * vocab + other for one, other in zip(first, second, strict=True)]  # type: ignore[operator]
    assert_drawn_from(pairs, np.outer(probs, probs).ravel())


def test_a_seed_gives_its_tokens_alone_and_in_any_batch_and_across_a_preemption() -> None:
    generator = random.Random(0)
    vocab, steps = 200, 6
    logits_TV = random_logits(steps, vocab)
    mine = request_of((1, 2, 3), seed=42, temperature=0.9, top_p=0.95, repetition_penalty=1.1, logprobs=2)

    alone = Sampler(vocab, 1, "cpu")
    alone.add(0, mine)
    expected = [sample(alone, [0], logits_TV[[step]])[0] for step in range(steps)]

    crowd = Sampler(vocab, 31, "cpu")
    choices: list[dict[str, Any]] = [
        {"temperature": 0},
        {"top_k": 3},
        {"typical_p": 0.5},
        {"min_p": 0.2},
        {"logprobs": 5},
    ]
    for slot in range(20):
        crowd.add(slot, request_of(seed=slot, **generator.choice(choices)))
    crowd.add(11, mine)
    for step in range(steps):
        if step == 3:  # preempted, and resumed in another slot with what it had
            crowd.remove(11)
            tokens = tuple(result.token_ids[0] for result in expected[:3])
            crowd.add(30, mine, tokens)
        slot = 11 if step < 3 else 30
        slots = [slot, *generator.sample([other for other in range(20) if other != 11], generator.randrange(19))]
        generator.shuffle(slots)
        logits_RV = random_logits(len(slots), vocab, seed=step + 100)
        logits_RV[slots.index(slot)] = logits_TV[step]
        result = sample(crowd, slots, logits_RV)[slots.index(slot)]
        assert result.token_ids == expected[step].token_ids
        (mine_logprob,), (its_logprob,) = result.logprobs, expected[step].logprobs
        assert mine_logprob.logprob == pytest.approx(its_logprob.logprob, abs=1e-6)


# ---- greedy rows and what they cost ----------------------------------------------------------------------------------


def test_greedy_rows_take_the_lowest_id_of_a_tie_beside_random_rows() -> None:
    sampler = Sampler(VOCAB, 8, "cpu")
    for slot, fields in enumerate([{"temperature": 0}, {"temperature": 1e-9}, {"top_k": 1}, {"seed": 5}]):
        sampler.add(slot, request_of(**fields))
    logits_RV = torch.zeros(4, VOCAB)
    logits_RV[:3, [4, 9, 20]] = 1
    assert [result.token_ids for result in sample(sampler, [0, 1, 2, 3], logits_RV)][:3] == [(4,)] * 3


def test_plain_greedy_rows_do_nothing_but_an_argmax(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(VOCAB, 8, "cpu")
    for slot in range(3):
        sampler.add(slot, request_of(temperature=0, eos_token_ids=frozenset({1})))
    for module, name in [
        (sample_module, "gather_logprobs"),
        (kernels, "sample"),
        (kernels, "apply_filters"),
        (logits_module, "_ban"),
        (Tensor, "clone"),
        (Tensor, "softmax"),
        (Tensor, "log_softmax"),
    ]:
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: pytest.fail(f"called {name}"))
    logits_RV = torch.eye(3, VOCAB)
    assert [result.token_ids[0] for result in sample(sampler, [2, 0, 1], logits_RV)] == [0, 1, 2]


def test_bfloat16_logits_and_an_empty_batch() -> None:
    sampler = Sampler(VOCAB, 8, "cpu")
    assert sample(sampler, [], torch.zeros(0, VOCAB)) == []
    assert sample_one(request_of(logprobs=1), random_logits(1)[0].bfloat16()).error is None


# ---- logprobs -------------------------------------------------------------------------------------------------------


def test_logprobs_are_the_models_own() -> None:
    logits_V = random_logits(1)[0]
    likeliest = int(logits_V.argmax())
    request = request_of(temperature=0, logit_bias={likeliest: -100.0}, repetition_penalty=1.5, logprobs=3)
    result = sample_one(request, logits_V)
    logprobs = logits_V.log_softmax(dim=0)
    order = logprobs.argsort(descending=True).tolist()
    (described,), (token_id,) = result.logprobs, result.token_ids
    assert token_id != likeliest
    assert described.token_id == token_id
    assert described.logprob == pytest.approx(logprobs[token_id].item(), rel=1e-6)
    assert described.rank == order.index(token_id) + 1
    assert [top_id for top_id, _ in described.top] == order[:3]


def test_each_row_gets_as_many_alternatives_as_it_asked_for() -> None:
    sampler = Sampler(VOCAB, 8, "cpu")
    asked = [None, 0, 5, 100]
    for slot, num_top in enumerate(asked):
        sampler.add(slot, request_of(logprobs=num_top, seed=slot))
    results = sample(sampler, [3, 2, 1, 0], random_logits(4))
    lengths = [[len(described.top) for described in result.logprobs] for result in results]
    assert lengths == [[VOCAB], [5], [0], []]


def test_prompt_logprobs_describe_the_token_after_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_module, "_PROMPT_ROWS_AT_ONCE", 3)
    prompt = (4, 8, 15, 16, 23, 2, 7, 1)
    logits_TV = random_logits(len(prompt))
    sampler = Sampler(VOCAB, 8, "cpu")
    sampler.add(0, request_of(prompt, prompt_logprobs=2))
    sampler.add(1, request_of(prompt))
    assert sampler.asks_prompt_logprobs(0) and not sampler.asks_prompt_logprobs(1)

    chunks = [sampler.prompt_logprobs(0, 0, logits_TV[:2]), sampler.prompt_logprobs(0, 2, logits_TV[2:])]
    assert [len(chunk) for chunk in chunks] == [2, 5]  # the last row predicts the first output token
    assert sampler.prompt_logprobs(0, len(prompt) - 1, logits_TV[-1:]) == ()
    sampler.add(2, sampler._states[0].request, output_token_ids=(3,))  # back from a preemption: they were sent before
    assert not sampler.asks_prompt_logprobs(2)
    for position, described in enumerate([*chunks[0], *chunks[1]]):
        logprobs_V = logits_TV[position].log_softmax(dim=0)
        assert described.token_id == prompt[position + 1]
        assert described.logprob == pytest.approx(logprobs_V[described.token_id].item(), rel=1e-6)
        assert [token_id for token_id, _ in described.top] == logprobs_V.topk(2).indices.tolist()


# ---- rows that fail alone -------------------------------------------------------------------------------------------


def raising(token_ids: list[int], logits_V: Tensor) -> Tensor:
    raise LookupError("no such grammar")


def ban_all(token_ids: list[int], logits_V: Tensor) -> Tensor:
    return torch.full_like(logits_V, -torch.inf)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (raising, "LookupError: no such grammar"),
        (lambda token_ids, logits_V: logits_V[:3], r"returned shape \(3,\), not \(24,\)"),
        (lambda token_ids, logits_V: None, "returned NoneType, not a tensor"),
        (lambda token_ids, logits_V: token_ids.clear() or logits_V * torch.nan, "none with a finite logit"),
        (ban_all, "none with a finite logit"),
    ],
)
def test_a_processor_that_fails_fails_its_row_alone(temperature: float, processor: Any, message: str) -> None:
    sampler = Sampler(VOCAB, 8, "cpu")
    for slot in range(3):
        fields = {"logits_processors": [processor]} if slot == 1 else {}
        sampler.add(slot, request_of(temperature=temperature, seed=slot, presence_penalty=0.1, logprobs=1, **fields))
    logits_RV = random_logits(3)
    results = sample(sampler, [0, 1, 2], logits_RV)
    assert results[1].token_ids == () and results[1].logprobs == ()
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(results[1].error)
    for slot in (0, 2):
        assert results[slot] == sample_one(
            request_of(temperature=temperature, seed=slot, presence_penalty=0.1, logprobs=1), logits_RV[slot]
        )


def test_everything_banned_and_nan_fail_their_rows_alone() -> None:
    sampler = Sampler(VOCAB, 8, "cpu")
    sampler.add(0, request_of(bad_words_ids=tuple((token_id,) for token_id in range(VOCAB)), logprobs=1))
    sampler.add(1, request_of(temperature=0, no_repeat_ngram_size=1), tuple(range(VOCAB)))
    sampler.add(2, request_of(top_p=0.5, top_k=3, typical_p=0.4, min_p=0.1, logprobs=1))
    sampler.add(3, request_of(temperature=0))
    sampler.add(4, request_of(temperature=0, logprobs=2))
    logits_RV = random_logits(5)
    logits_RV[2, 5] = torch.nan
    logits_RV[3] = -torch.inf
    results = sample(sampler, range(5), logits_RV)
    assert [result.error is not None for result in results] == [True, True, True, True, False]
    assert all("left none" in str(result.error) for result in results[:2])
    assert all("the model's logits" in str(result.error) for result in results[2:4])
    assert results[4].error is None and len(results[4].logprobs) == 1
