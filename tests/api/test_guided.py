"""Guided requests as a caller meets them: beside plain ones, resumed, streamed, on a random model and a real one."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from slipstream import LLM, Guided, SamplingParams
from slipstream.errors import RequestError
from tests.cli.conftest import write_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "is_here": {"type": "boolean"},
        "likes": {"type": "array", "items": {"enum": ["tea", "coffee", "water"]}, "maxItems": 3},
        "address": {
            "type": "object",
            "properties": {"city": {"type": "string", "pattern": "^[A-Z][a-z]{1,5}$"}, "zip": {"type": ["null"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
DATE = Guided(regex=r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-[0-3][0-9]")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama that can spell any text."""
    from slipstream.checkpoint.random import write_random_model
    from slipstream.models.llama import TINY

    folder = tmp_path_factory.mktemp("guided") / "speller"
    write_random_model(folder, TINY | {"vocab_size": 328, "eos_token_id": 1, "max_position_embeddings": 1024})
    write_tokenizer(folder, vocab_size=320)
    return folder


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, max_batch_size=50, max_num_tokens=128, kv_cache_max_tokens=32768) as llm:
        yield llm


def sampling(guided: Guided | None, seed: int = 0, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"guided": guided, "seed": seed, "max_tokens": 900, **fields})


def test_a_schema_is_followed_100_times_of_100(llm: LLM) -> None:
    params = [sampling(Guided(json_schema=PERSON), seed) for seed in range(100)]
    outputs = llm.generate(["Paris"] * 100, params)
    texts = [output.outputs[0].text for output in outputs]
    for output, text in zip(outputs, texts, strict=True):
        assert output.outputs[0].finish_reason == "stop"
        jsonschema.validate(json.loads(text), PERSON)
    assert len(set(texts)) == 100


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_kind_is_followed(llm: LLM, temperature: float) -> None:
    kinds = {
        r"(19|20)\d\d-\d\d-\d\d": DATE,
        "yes|no|perhaps, é": Guided(choice=["yes", "no", "perhaps, é"]),
        "a(b{1,5})c": Guided(grammar='start: "a" b "c"\nb: /b{1,5}/'),
    }
    for pattern, guided in kinds.items():
        for seed in range(5):
            text = llm.generate("The", sampling(guided, seed, temperature=temperature)).outputs[0].text
            assert re.fullmatch(pattern, text), text


def test_any_json_object(llm: LLM) -> None:
    for seed in range(3):
        output = llm.generate("The", sampling(Guided(json_object=True), seed, max_tokens=200)).outputs[0]
        assert output.text.startswith("{")
        assert output.finish_reason == "length" or isinstance(json.loads(output.text), dict)


def test_guided_and_plain_requests_are_each_as_alone(llm: LLM) -> None:
    schema = Guided(json_schema=PERSON)
    params = [
        sampling(guided, seed, max_tokens=60, logprobs=2, **more)
        for seed, (guided, more) in enumerate(
            [
                (None, {}), (schema, {}), (DATE, {"top_k": 5}), (None, {"temperature": 0.0}),
                (schema, {"temperature": 0.7, "top_p": 0.9}), (DATE, {"repetition_penalty": 1.3}),
                (None, {"no_repeat_ngram_size": 2}), (Guided(choice=["yes", "no"]), {"logit_bias": {5: 3.0}}),
            ]
        )
    ]  # fmt: skip
    together = llm.generate(["How do I count to nine"] * len(params), params)
    for each, output in zip(params, together, strict=True):
        (alone,) = llm.generate("How do I count to nine", each).outputs
        assert output.outputs[0].token_ids == alone.token_ids and output.outputs[0].text == alone.text
    assert re.fullmatch(DATE.regex or "", together[5].outputs[0].text)


@pytest.mark.parametrize("block_reuse", [True, False])
def test_what_is_preempted_goes_on_with_its_grammar(llm: LLM, model: Path, block_reuse: bool) -> None:
    params = [sampling(Guided(json_schema=PERSON), seed, max_tokens=100) for seed in range(8)]
    expected = [output.outputs[0].token_ids for output in llm.generate(["Paris"] * 8, params)]
    with LLM(
        model, max_batch_size=8, max_num_tokens=64, kv_cache_max_tokens=256,
        capacity_scheduler_policy="max_utilization", enable_block_reuse=block_reuse,
    ) as small:  # fmt: skip
        outputs = small.generate(["Paris"] * 8, params)
        assert small.stats.num_preemptions > 0
    assert [output.outputs[0].token_ids for output in outputs] == expected


def test_several_of_one_prompt_and_the_best_of_them(llm: LLM) -> None:
    outputs = llm.generate("The", sampling(DATE, n=4, best_of=6)).outputs
    assert len(outputs) == 4 and len({output.text for output in outputs}) > 1
    assert all(re.fullmatch(DATE.regex or "", output.text) for output in outputs)


def test_a_stop_string_and_a_limit_end_it_early(llm: LLM) -> None:
    stopped = llm.generate("The", sampling(DATE, stop="-")).outputs[0]
    assert re.fullmatch(r"(19|20)\d\d", stopped.text) and stopped.stop_reason == "-"
    cut = llm.generate("The", sampling(DATE, max_tokens=2)).outputs[0]
    assert (
        cut.finish_reason == "length" and re.match("19|20", cut.text) and not re.fullmatch(DATE.regex or "", cut.text)
    )


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    prompt = llm.tokenizer.encode("The")
    (guided,) = llm.generate(prompt, sampling(DATE, logprobs=0)).outputs
    assert guided.logprobs is not None
    scored = llm.score([*prompt, *guided.token_ids]).logprobs[len(prompt) :]
    assert [each.logprob for each in guided.logprobs] == pytest.approx(scored, abs=1e-4)


def test_a_stream_is_what_generate_gives(llm: LLM) -> None:
    params = sampling(Guided(json_schema=PERSON), seed=5)
    text = "".join(output.outputs[0].text_diff for output in llm.stream("The", params))
    assert text == llm.generate("The", params).outputs[0].text


def test_a_processor_cannot_allow_what_the_grammar_does_not(llm: LLM) -> None:
    def want_the_letter_q(token_ids: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        logits_V[:] = -1.0
        logits_V[llm.tokenizer.encode("q")] = 50.0
        return logits_V

    text = (
        llm.generate("The", sampling(Guided(regex="[a-r]{5}"), logits_processors=[want_the_letter_q])).outputs[0].text
    )
    assert text == "qqqqq"
    text = (
        llm.generate("The", sampling(Guided(regex="[a-c]{5}"), logits_processors=[want_the_letter_q])).outputs[0].text
    )
    assert re.fullmatch("[a-c]{5}", text)


def test_a_request_whose_bans_leave_nothing_fails_alone(llm: LLM) -> None:
    impossible = sampling(Guided(choice=["yes"]), bad_words=["y", "ye", "yes"])
    failed, fine = llm.generate(["The", "The"], [impossible, sampling(DATE)])
    assert failed.error == (
        "no token can be sampled: bad words, bans, guided or a logits processor left none with a finite logit"
    )
    assert re.fullmatch(DATE.regex or "", fine.outputs[0].text)


def test_a_grammar_that_comes_to_a_dead_end_fails_alone(llm: LLM) -> None:
    dead_end = Guided(grammar='start: "a" b\nb: "c" b')
    special = Guided(choice=["<|im_end|>"])  # its token is no text, and must not end one as if it were complete
    for guided in (dead_end, special):
        failed, fine = llm.generate(["The", "The"], [sampling(guided), sampling(DATE)])
        assert failed.error is not None and failed.error.startswith("guided cannot go on from here: ")
        assert re.fullmatch(DATE.regex or "", fine.outputs[0].text)


def test_a_bad_grammar_is_refused_when_it_is_submitted(llm: LLM) -> None:
    bad = sampling(Guided(regex="[a-z"))
    with pytest.raises(RequestError, match=r"guided.regex cannot be followed: unclosed character class\.$"):
        llm.generate("The", bad)
    refused, fine = llm.generate(["The", "The"], [bad, sampling(DATE)])
    assert refused.error is not None and fine.error is None
    with pytest.raises(RequestError, match="unclosed character class"):
        next(llm.stream("The", bad))


def test_a_model_without_a_tokenizer_says_so(tiny_llm: LLM) -> None:
    with pytest.raises(RequestError, match="guided needs a tokenizer"):
        tiny_llm.generate([1, 2], sampling(DATE))


@pytest.mark.real_model
def test_the_real_model_fills_in_a_schema(smollm2_llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "country": {"enum": ["France", "Germany", "Italy"]},
            "is_capital": {"type": "boolean"},
        },
        "required": ["city", "country", "is_capital"],
        "additionalProperties": False,
    }
    prompt = smollm2_llm.chat_prompt([{"role": "user", "content": "Describe Paris as JSON."}])
    params = [sampling(Guided(json_schema=schema), seed, max_tokens=120) for seed in range(3)]
    for output in smollm2_llm.generate([prompt] * 4, [*params, replace(params[0], temperature=0.0)]):
        jsonschema.validate(json.loads(output.outputs[0].text), schema)
    answers = smollm2_llm.generate([prompt] * 2, sampling(Guided(choice=["Paris", "Rome"]), temperature=0.0))
    assert [output.outputs[0].text for output in answers] == ["Paris", "Paris"]
