"""OpenAI's protocol, asked by OpenAI's own client and by curl: each field has its effect or is refused by name."""

import asyncio
import inspect
import json
import math
import re
import subprocess
from typing import Any

import jsonschema
import openai
import pytest

from slipstream import SamplingParams
from slipstream.serve.openai.fields import NOT_HERE
from tests.serve.conftest import Server

PROMPT = "The capital of France is"
GREEDY = SamplingParams(temperature=0, max_tokens=12)
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The capital of France?"}]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    """A greedy completion of twelve tokens, unless the fields say otherwise; vLLM's go into the body as they are."""
    ours = {"model": "talker", "prompt": PROMPT, "max_tokens": 12, "temperature": 0} | fields
    known = inspect.signature(openai.resources.Completions.create).parameters
    extra = {name: ours.pop(name) for name in list(ours) if name not in known}
    return client.completions.create(**ours, extra_body=extra)


def text_of(client: openai.OpenAI, **fields: Any) -> str:
    text: str = ask(client, **fields).choices[0].text
    return text


def test_models_are_listed(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.object, card.owned_by) == ("talker", "model", "slipstream")
    assert client.models.retrieve("talker") == card
    with pytest.raises(openai.NotFoundError, match=r"'other'.*talker"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="'other'"):
        ask(client, model="other")


def test_a_completion_is_what_the_engine_says_offline(client: openai.OpenAI, offline: Any) -> None:
    expected = offline.generate(PROMPT, GREEDY)
    answer = ask(client)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (expected.outputs[0].text, "length", None)
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert (answer.usage.completion_tokens, answer.object) == (12, "text_completion")


def test_a_chat_is_what_the_engine_says_offline(client: openai.OpenAI, offline: Any) -> None:
    expected = offline.chat(MESSAGES, GREEDY).outputs[0].text
    parts = [MESSAGES[0], {"role": "user", "content": [{"type": "text", "text": MESSAGES[1]["content"]}]}]
    for messages in (MESSAGES, parts):
        answer = client.chat.completions.create(
            model="talker", messages=messages, temperature=0, max_completion_tokens=12
        )
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].message.content == expected
    pieces = client.chat.completions.create(
        model="talker", messages=MESSAGES, temperature=0, max_tokens=12, stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in pieces]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == expected


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"prompt": [PROMPT, "It is"], "n": 2, "temperature": 1.0, "seed": 7, "logprobs": 2}
    whole = ask(client, **fields)
    chunks = list(ask(client, **fields, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 48
    assert len(whole.choices) == 4 and len({choice.text for choice in whole.choices}) > 1
    for choice in whole.choices:
        mine = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(each.text for each in mine) == choice.text
        assert [each.finish_reason for each in mine] == [None] * (len(mine) - 1) + ["length"]
        for column in ("tokens", "text_offset", "token_logprobs", "top_logprobs"):
            streamed = [value for each in mine if each.logprobs for value in getattr(each.logprobs, column)]
            expected = getattr(choice.logprobs, column)
            if column.endswith("logprobs"):  # other neighbours in the batch, other roundings
                expected = [pytest.approx(value, abs=1e-4) for value in expected]
            assert streamed == expected


def test_concurrent_requests_each_get_their_own_answer(server: Server, offline: Any) -> None:
    prompts = [f"{number} {PROMPT}" for number in range(24)]
    expected = [output.outputs[0].text for output in offline.generate(prompts, GREEDY)]

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def one(prompt: str) -> str:
                chunks = await client.completions.create(
                    model="talker", prompt=prompt, max_tokens=12, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in chunks])

            return await asyncio.gather(*map(one, prompts))

    assert asyncio.run(all_of_them()) == expected


def test_logprobs_are_the_engines(client: openai.OpenAI, offline: Any) -> None:
    wanted = SamplingParams(temperature=0, max_tokens=12, logprobs=3, prompt_logprobs=3)
    output = offline.generate(PROMPT, wanted)
    expected = [entry.logprob for entry in output.outputs[0].logprobs]
    found = ask(client, logprobs=3, prompt_logprobs=3).choices[0]
    assert found.logprobs.token_logprobs == pytest.approx(expected, abs=1e-5)
    assert [max(top.values()) for top in found.logprobs.top_logprobs] == pytest.approx(expected, abs=1e-5)
    pieces = [offline.tokenizer.token_bytes(each) for each in output.outputs[0].token_ids]
    assert found.logprobs.tokens == [piece.decode(errors="replace") for piece in pieces]
    listed = found.model_extra["prompt_logprobs"]
    assert listed[0] is None and len(listed) == len(output.prompt_token_ids)
    for entry, by_id in zip(output.prompt_logprobs[1:], listed[1:], strict=True):
        assert by_id[str(entry.token_id)]["logprob"] == pytest.approx(entry.logprob, abs=1e-5)
        assert by_id[str(entry.token_id)]["rank"] == entry.rank
    chat = client.chat.completions.create(
        model="talker", messages=MESSAGES, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2
    )
    (entries,) = [choice.logprobs.content for choice in chat.choices if choice.logprobs]
    assert entries is not None and len(entries) == 3
    for entry in entries:
        assert entry.bytes is not None and bytes(entry.bytes).decode(errors="replace") == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob and len(entry.top_logprobs) == 2


def test_echo_scores_a_prompt(client: openai.OpenAI, offline: Any) -> None:
    """As lm-evaluation-harness asks: nothing generated, the prompt's own logprobs."""
    expected = offline.score(PROMPT)
    for prompt in (PROMPT, expected.token_ids):
        answer = ask(client, prompt=prompt, max_tokens=0, echo=True, logprobs=1)
        (choice,) = answer.choices
        assert choice.text == PROMPT and answer.usage.completion_tokens == 0
        assert choice.logprobs.token_logprobs[0] is None
        assert math.fsum(choice.logprobs.token_logprobs[1:]) == pytest.approx(expected.total_logprob, abs=1e-4)
    both = "".join(chunk.choices[0].text for chunk in ask(client, echo=True, stream=True))
    assert both == PROMPT + text_of(client) == text_of(client, echo=True)


def test_each_sampling_field_has_its_effect(client: openai.OpenAI, offline: Any) -> None:
    greedy = text_of(client)
    drawn = {text_of(client, temperature=1.5, seed=seed) for seed in range(4)}
    assert len(drawn) > 1
    assert text_of(client, temperature=1.5, seed=3) == text_of(client, temperature=1.5, seed=3)
    for name, value in (("top_k", 1), ("min_p", 1.0), ("top_p", 1e-9), ("typical_p", 1.0)):
        found = text_of(client, temperature=1.5, seed=1, **{name: value})
        assert (found == greedy) == (name != "typical_p")
    token_ids = offline.generate(PROMPT, GREEDY).outputs[0].token_ids
    assert text_of(client, logit_bias={"40": 100.0}, max_tokens=4) == offline.tokenizer.decode([40] * 4)
    assert token_ids[0] not in offline.tokenizer.encode(text_of(client, logit_bias={str(token_ids[0]): -100}))
    for penalty in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 5.0}):
        expected = offline.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12, **penalty)).outputs[0].text  # type: ignore[arg-type]
        assert text_of(client, **penalty) == expected
    best = ask(client, temperature=1.0, n=2, best_of=4, seed=5, logprobs=0).choices
    totals = [math.fsum(choice.logprobs.token_logprobs) for choice in best]
    assert len(best) == 2 and totals == sorted(totals, reverse=True)
    beams = SamplingParams(use_beam_search=True, n=2, best_of=3, max_tokens=5)
    expected_beams = [beam.text for beam in offline.generate(PROMPT, beams).outputs]
    found = ask(client, use_beam_search=True, n=2, best_of=3, max_tokens=5, temperature=1.0).choices
    assert [choice.text for choice in found] == expected_beams


def test_an_answer_ends_where_it_is_told_to(client: openai.OpenAI, offline: Any) -> None:
    output = offline.generate(PROMPT, GREEDY).outputs[0]
    stop = output.text[4:6]
    for stops in (stop, ["never", stop]):
        choice = ask(client, stop=stops).choices[0]
        assert choice.text == output.text.partition(stop)[0]
        assert (choice.finish_reason, choice.model_extra["stop_reason"]) == ("stop", stop)
    included = text_of(client, stop=stop, include_stop_str_in_output=True)
    assert included == output.text.partition(stop)[0] + stop
    streamed = "".join(chunk.choices[0].text for chunk in ask(client, stop=stop, stream=True))
    assert streamed == output.text.partition(stop)[0]
    choice = ask(client, stop_token_ids=[output.token_ids[3]]).choices[0]
    assert choice.model_extra["stop_reason"] == output.token_ids[3]
    biased = {"logit_bias": {"1": 100.0}}
    assert ask(client, **biased).choices[0].finish_reason == "stop"
    assert ask(client, **biased, ignore_eos=True).usage.completion_tokens == 12
    assert ask(client, **biased, min_tokens=5).usage.completion_tokens == 6
    assert ask(client, stop_token_ids=[output.token_ids[3]], min_tokens=6).usage.completion_tokens >= 6


SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "rank": {"enum": [1, 2, 3]}},
    "required": ["city", "rank"],
    "additionalProperties": False,
}


def test_an_answer_follows_the_grammar_it_is_given(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
    for seed in range(5):
        chunks = client.chat.completions.create(
            model="talker", messages=MESSAGES, seed=seed, max_tokens=200, response_format=wanted, stream=True
        )
        jsonschema.validate(json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks)), SCHEMA)
        free: dict[str, Any] = {"temperature": 1.0, "seed": seed, "max_tokens": 200}
        jsonschema.validate(json.loads(text_of(client, **free, guided_json=SCHEMA)), SCHEMA)
        assert re.fullmatch("[a-f]{3}-[0-9]{2}", text_of(client, **free, guided_regex="[a-f]{3}-[0-9]{2}"))
        assert text_of(client, **free, guided_choice=["yes", "no"]) in ("yes", "no")
        assert text_of(client, **free, guided_grammar='start: "up" | "down"') in ("up", "down")
    assert text_of(client, response_format={"type": "json_object"}).lstrip().startswith("{")
    assert text_of(client, response_format={"type": "text"}) == text_of(client)


def test_a_salt_keeps_cached_prompts_apart(client: openai.OpenAI) -> None:
    prompt = list(range(100, 164))

    def num_cached(**fields: Any) -> int:
        cached: int = ask(client, prompt=prompt, **fields).usage.prompt_tokens_details.cached_tokens
        return cached

    assert num_cached() == 0
    assert num_cached() > 0
    assert num_cached(cache_salt="mine") == 0
    assert num_cached(cache_salt="mine") > 0


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n is 0"),
        ({"n": 2}, "n=2"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "echo"),
        ({"logprobs": 101}, "logprobs"),
        ({"seed": -1}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [320]}, "320"),
        ({"prompt": [1] * 5000}, "5000 tokens"),
        ({"prompt": None}, "prompt"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias"),
        ({"logit_bias": {"320": 1.0}}, "logit_bias"),
        ({"stop_token_ids": [999]}, "stop_token_ids"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": True}}, "other"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"priority": 1}, "priority"),
        ({"guided_regex": "("}, "regex"),
        ({"guided_json": {"type": "object", "$ref": "#/nowhere"}}, "json_schema"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "regex and choice"),
        ({"guided_choice": ["a"], "response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
    ],
)
def test_a_wrong_value_is_a_400_that_names_it(server: Server, fields: dict[str, Any], named: str) -> None:
    answer = server.post("/v1/completions", {"prompt": PROMPT, "temperature": 0, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert named in error["message"] and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"] and error["message"].endswith(".")


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_is_not_here_is_refused_by_name_and_its_absence_is_not(server: Server, name: str) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1}
    answer = server.post("/v1/chat/completions", body | {name: {"type": "json_object"}})
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(f"{name} is refused: ")
    for neutral in (None, *NOT_HERE[name][1]):
        assert server.post("/v1/chat/completions", body | {name: neutral}).status_code == 200


def test_a_chat_is_refused_by_the_part_at_fault(server: Server) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    for fields, named in (
        ({"messages": [{"role": "user", "content": [image]}]}, "messages.0.content"),
        ({"messages": []}, "messages"),
        ({"messages": [{"content": "x"}]}, "role"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens"),
        ({"prompt": "x"}, "prompt"),
        ({"chat_template_kwargs": {"temperature": 1}}, "temperature"),
    ):
        answer = server.post("/v1/chat/completions", {"messages": MESSAGES, **fields})  # type: ignore[dict-item]
        assert answer.status_code == 400 and named in answer.json()["error"]["message"], answer.text


def test_text_becomes_tokens_and_text_again(server: Server, offline: Any) -> None:
    token_ids = offline.tokenizer.encode(PROMPT)
    answer = server.post("/tokenize", {"prompt": PROMPT, "return_token_strs": True}).json()
    assert (answer["tokens"], answer["count"]) == (token_ids, len(token_ids))
    assert answer["max_model_len"] == offline.runtime_config.max_seq_len
    assert answer["token_strs"] == [offline.tokenizer.token(each) for each in token_ids]
    assert server.post("/detokenize", {"tokens": token_ids}).json() == {"prompt": PROMPT}
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    chat = server.post("/tokenize", {"messages": MESSAGES}).json()["tokens"]
    assert chat == offline.chat_prompt(MESSAGES)
    bare = server.post("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False}).json()["tokens"]
    assert bare == offline.chat_prompt(MESSAGES, add_generation_prompt=False) != chat
    for body in ({}, {"prompt": "x", "messages": MESSAGES}, {"messages": MESSAGES, "add_special_tokens": True}):
        assert server.post("/tokenize", body).status_code == 400
    assert "99999" in server.post("/detokenize", {"tokens": [99999]}).json()["error"]["message"]


def test_curl_gets_server_sent_events(server: Server) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "stream": True})
    command = ["curl", "-sSN", "-H", "Content-Type: application/json", "-d", body, f"{server.url}/v1/completions"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    command = ["curl", "-sS", "-H", "Content-Type: application/json", "-d", "{not", f"{server.url}/v1/completions"]
    error = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["error"]
    assert error["code"] == 400 and "not JSON" in error["message"]


@pytest.mark.real_model
def test_the_real_model_answers(smollm2_gguf: Any) -> None:
    from tests.serve.conftest import serving

    with serving("smollm2", OMP_NUM_THREADS="2") as server:
        assert "SmolLM2" in server.ready_line and "KV cache" in server.ready_line
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
        question: Any = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
        model = client.models.list().data[0].id
        chunks = client.chat.completions.create(
            model=model, messages=question, temperature=0, max_tokens=8, stream=True
        )
        assert "Paris" in "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
