"""With drafts every text is the one that it is without: greedy or sampled, edited or not, in any company."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.api.outputs import RequestOutput
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import EngineError, RequestError, UsageError
from slipstream.models import gemma3_text, llama, qwen3
from slipstream.runtime import engine
from slipstream.runtime.worker.worker import Begun, Flight, Worker
from slipstream.schema.guided import Guided
from slipstream.speculative.drafter import Draft
from tests.speculative.parrot import Babbler, Parrot, offered

LIMITS: dict[str, Any] = {"max_batch_size": 16, "max_num_tokens": 64, "kv_cache_max_tokens": 4096}
PARROT = {"method": "parrot", "max_draft_len": 5, "adaptive": False}
BUSH = {"method": "bush", "max_draft_len": 12, "adaptive": False}
NGRAM = {"method": "ngram", "max_draft_len": 6, "min_ngram": 1, "adaptive": False}
LOOKAHEAD = {"method": "lookahead", "window": 4, "ngram": 4, "guesses": 3, "adaptive": False}


@pytest.fixture(scope="module", autouse=True)
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch, offered(
        tmp_path_factory.mktemp("site"), monkeypatch,
        parrot="tests.speculative.parrot:Parrot", bush="tests.speculative.parrot:Bush",
        babbler="tests.speculative.parrot:Babbler", nothing="tests.speculative.parrot:NoDrafter", gone="nowhere:Gone",
        echo="tests.speculative.parrot:Echo", half="tests.speculative.parrot:HalfADrafter",
    ):  # fmt: skip
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random ones of three architectures; gemma's layers have windows, all but one in six."""
    tiny = {"llama": llama.TINY, "gemma3_text": gemma3_text.TINY, "qwen3": qwen3.TINY}
    return {name: write_random_model(tmp_path_factory.mktemp(name), values) for name, values in tiny.items()}


def add_one(token_ids: list[int], logits_V: torch.Tensor) -> torch.Tensor:
    """A user's processor that depends on what was said before."""
    logits_V[(token_ids[-1] + 1) % len(logits_V)] += 2.0
    return logits_V


# Each as a request has it; texts of random models are long walks, so that everything happens in some of them.
REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 3},
    {"seed": 1},
    {"temperature": 0.5, "seed": 2, "top_p": 0.9, "logprobs": 0},
    {"temperature": 0.7, "seed": 3, "top_k": 5, "min_p": 0.05},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3},
    {"temperature": 0.8, "seed": 4, "frequency_penalty": 0.9, "logprobs": 2},
    {"temperature": 0.0, "no_repeat_ngram_size": 2},
    {"temperature": 0.6, "seed": 5, "no_repeat_ngram_size": 3, "repetition_penalty": 0.7},
    {"temperature": 0.0, "logit_bias": {3: 2.0, 7: 1.0}},
    {"temperature": 0.3, "seed": 6, "stop_token_ids": tuple(range(0, 128, 9))},
    {"temperature": 0.3, "seed": 7, "stop_token_ids": tuple(range(0, 128, 3)), "min_tokens": 6},
    {"temperature": 0.0, "prompt_logprobs": 1},
    {"temperature": 0.0, "logits_processors": [add_one]},
    {"temperature": 0.9, "seed": 8, "n": 3},
    {"temperature": 0.0, "max_tokens": 1},
]


def prompts(vocab_size: int) -> list[list[int]]:
    """Of all lengths to some chunks, some of which begin alike."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(vocab_size, (40,), generator=generator).tolist()
    lengths = [1, 2, 3, 5, 8, 13, 21, 30, 40, 60, 75, 17, 16, 33, 9, 4]
    drawn = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]
    return [start + prompt if index % 4 == 3 else prompt for index, prompt in enumerate(drawn)]


def assert_same(found: Sequence[RequestOutput], expected: Sequence[RequestOutput]) -> None:
    for index, (mine, its) in enumerate(zip(found, expected, strict=True)):
        assert mine.error == its.error
        for one, other in zip(mine.outputs, its.outputs, strict=True):
            blank: dict[str, Any] = {"logprobs": None, "cumulative_logprob": None}
            assert replace(one, **blank) == replace(other, **blank), f"request {index}"
            for a, b in zip(one.logprobs or (), other.logprobs or (), strict=True):
                assert (a.token_id, a.rank) == (b.token_id, b.rank)
                assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
        lists = [[each and each.logprob for each in output.prompt_logprobs or ()] for output in (mine, its)]
        assert lists[0] == pytest.approx(lists[1], abs=1e-4)


def texts_of(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [[*each.prompt_token_ids, *one.token_ids] for each in outputs for one in each.outputs]


def run(model: Path, requests: Sequence[dict[str, Any]], **options: Any) -> tuple[list[RequestOutput], Any]:
    with LLM(model, **{**LIMITS, **options}) as llm:
        asked = [SamplingParams(**{"max_tokens": 40, **each}) for each in requests]
        outputs = llm.generate(prompts(llm.manifest.vocab_size)[: len(requests)], asked)
        return outputs, llm.stats


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3"])
def test_each_request_in_a_mixed_batch_has_the_text_that_it_has_without_drafts(
    name: str, models: dict[str, Path]
) -> None:
    expected, plain = run(models[name], REQUESTS)
    Parrot.texts = texts_of(expected)
    for method in (PARROT, BUSH):
        found, stats = run(models[name], REQUESTS, speculative=method)
        assert_same(found, expected)
        assert 0 < sum(stats.num_accepted_tokens) < stats.num_draft_tokens
        assert stats.generated_tokens == plain.generated_tokens
    # What plain decoding takes one step a token for.
    assert max(len(output.token_ids) for each in expected for output in each.outputs) == 40


@pytest.mark.parametrize(
    "options",
    [
        {"max_batch_size": 1},
        {"max_num_tokens": 16, "max_batch_size": 3},
        {"max_num_tokens": 7, "max_batch_size": 5},
        {"enable_block_reuse": False},
        {"max_num_tokens": 128, "enable_chunked_prefill": False, "capacity_scheduler_policy": "static_batch"},
        {"kv_cache_max_tokens": 240, "capacity_scheduler_policy": "max_utilization"},
        {"kv_cache_max_tokens": 240},
        {"max_attention_window_size": 12},
        {"max_attention_window_size": [5, 0x7FFF, 9]},
        {"max_attention_window_size": 20, "sink_token_length": 3},
        {"max_attention_window_size": 12, "kv_cache_max_tokens": 320, "capacity_scheduler_policy": "max_utilization"},
    ],
    ids=str,
)
def test_however_the_engine_runs(options: dict[str, Any], models: dict[str, Path]) -> None:
    """Batches of one, chunks, prefixes, preemption, windows: compared with the same without drafts."""
    expected, plain = run(models["llama"], REQUESTS, **options)
    Parrot.texts = texts_of(expected)
    method = PARROT if "sink_token_length" in options else BUSH
    found, stats = run(models["llama"], REQUESTS, **options, speculative=method)
    assert_same(found, expected)
    assert sum(stats.num_accepted_tokens) > 0
    assert stats.num_blocks_used == 0
    if options.get("capacity_scheduler_policy") == "max_utilization":
        assert plain.num_preemptions > 0 and stats.num_preemptions > 0


def test_the_second_of_two_like_prompts_finds_what_the_first_accepted(models: dict[str, Path]) -> None:
    """Rejected drafts are in no block that others find."""
    with LLM(models["llama"], **LIMITS) as llm:
        prompt = prompts(llm.manifest.vocab_size)[7]
        asked = SamplingParams(max_tokens=60, temperature=0)
        first = llm.generate(prompt, asked)
        longer = [*prompt, *first.outputs[0].token_ids[:50]]
        expected = llm.generate(longer, asked)
    Parrot.texts = [*texts_of([first]), *texts_of([expected])]
    with LLM(models["llama"], **LIMITS, speculative=PARROT) as llm:
        assert_same([llm.generate(prompt, asked)], [first])
        found = llm.generate(longer, asked)
        assert_same([found], [expected])
        assert found.num_cached_tokens > len(prompt)


def test_branches_and_sinks_are_not_for_each_other(models: dict[str, Path]) -> None:
    with pytest.raises(EngineError, match="branch, which sink_token_length cannot; take another"):
        LLM(models["llama"], **LIMITS, speculative=BUSH, max_attention_window_size=20, sink_token_length=3)


def test_drafts_that_cost_more_than_they_bring_are_given_up(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the engine's clock, where each row of a step takes a second."""
    now, launch = [0.0], Worker.launch

    def take_time(self: Worker, begun: Begun) -> Flight:
        now[0] += begun.plan.num_tokens
        return launch(self, begun)

    monkeypatch.setattr(engine, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(Worker, "launch", take_time)
    monkeypatch.setattr(Babbler, "drafts", Draft([7, 8]))
    asked, found = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True), []
    for adaptive in (False, True):
        babbler = {"method": "babbler", "max_draft_len": 2, "adaptive": adaptive}
        with LLM(models["llama"], **LIMITS, speculative=babbler) as llm:
            found.append((llm.generate([1, 2, 3], asked), llm.stats.num_drafts))
    assert_same([found[1][0]], [found[0][0]])
    assert found[0][1] > 100 and 0 < found[1][1] < 30


TEXTS = [
    "The capital of France is Paris. The capital of Germany is Berlin. The capital of France is",
    "one two three four one two three four one two three",
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return",
    "Name: Alice, age: 31. Name: Bob, age: 42. Name:",
]
PERSON = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
OF_TEXT: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "stop": ["three four one", " Paris"]},
    {"temperature": 0.8, "seed": 3, "stop": ["\n\n"], "include_stop_str_in_output": True, "logprobs": 1},
    {"temperature": 0.0, "guided": Guided(regex=r" [A-Z][a-z]+, age: [0-9]{2}\. Name: [A-Z][a-z]{2,8}")},
    {"temperature": 0.7, "seed": 9, "guided": Guided(json_schema=PERSON)},
    {"temperature": 0.0, "guided": Guided(choice=(" four five", " four one", " five"))},
    {"temperature": 0.0, "bad_words": ["capital", " return", " four"]},
]  # fmt: skip


def test_the_real_model_says_what_it_says_without_drafts(smollm2_llm: LLM) -> None:
    texts = [TEXTS[index % len(TEXTS)] for index in range(len(OF_TEXT))]
    asked = [SamplingParams(max_tokens=24, **each) for each in OF_TEXT]
    expected = smollm2_llm.generate(texts, asked)
    Parrot.texts = texts_of(expected)
    for method in (PARROT, BUSH, NGRAM, LOOKAHEAD):
        with LLM("smollm2", dtype="float32", speculative=method, max_batch_size=16) as llm:
            assert_same(llm.generate(texts, asked), expected)
            stats = llm.stats
        assert 0 < sum(stats.num_accepted_tokens) < stats.num_draft_tokens


def test_a_drafter_on_the_device_needs_no_hidden_states(models: dict[str, Path]) -> None:
    """As many drafts are verified as it means, one or two of four; what is no token becomes one."""
    expected, _ = run(models["llama"], REQUESTS)
    for draft_len in (1, 4):
        speculative = {"method": "echo", "max_draft_len": draft_len, "adaptive": False}
        found, stats = run(models["llama"], REQUESTS, speculative=speculative)
        assert_same(found, expected)
        assert stats.num_drafts <= stats.num_draft_tokens <= stats.num_drafts * min(draft_len, 2)
        assert stats.num_drafts > 50 and (draft_len == 1) == (stats.num_drafts == stats.num_draft_tokens)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"method": "nothing"}, "must be a class derived from Drafter"),
        ({"method": "half"}, "must be a class derived from Drafter or DeviceDrafter"),
        ({"method": "gone"}, "cannot be imported"),
        ({"method": "hearsay"}, "not there; there are: .*ngram.*parrot"),
        ("ngram", "is no JSON"),
    ],
)
def test_a_method_that_is_none_is_refused(given: Any, sentence: str, models: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=sentence):
        LLM(models["llama"], **LIMITS, speculative=given)


@pytest.mark.parametrize(
    ("draft", "sentence"),
    [
        (Draft([1, 2, 3]), "proposed 3 tokens, more than 2"),
        (Draft([1, 128]), "proposed token 128; the vocabulary is 0 to 127"),
        (Draft([-1]), "proposed token -1; the vocabulary is 0 to 127"),
        (Draft([1, 2], [0, 2]), "a parent comes before its children"),
        (Draft([1, 2], [0, 0]), "proposed branches; its class must say can_branch = True"),
        (Draft([1, 2], [0]), "proposed 2 tokens and 1 parents"),
    ],
)
def test_what_a_drafter_may_not_propose_fails_its_step_in_a_sentence(
    draft: Draft, sentence: str, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(models["llama"], **LIMITS, speculative={"method": "babbler", "max_draft_len": 2}) as llm:
        asked = SamplingParams(max_tokens=5, temperature=0)
        monkeypatch.setattr(Babbler, "drafts", draft)
        with pytest.raises(RequestError, match=sentence):
            llm.generate([1, 2, 3], asked)
        monkeypatch.setattr(Babbler, "drafts", Draft([7, 8], [0, 1]))
        assert len(llm.generate([1, 2, 3], asked).outputs[0].token_ids) == 5
        assert llm.stats.num_blocks_used == 0
