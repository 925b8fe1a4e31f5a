"""Anthropic's protocol, with Anthropic's own client."""

import asyncio
import json
from typing import Any

import anthropic
import httpx
import jsonschema
import pytest

from slipstream import SamplingParams
from slipstream.serve.anthropic.fields import NOT_HERE
from tests.serve.conftest import Server, serving
from tests.serve.test_openai_tools import COLOUR, LINE, THOUGHT

ASKED: Any = [{"role": "user", "content": "Paint the town."}]
PAINT: Any = {"name": "paint", "description": "Paints.", "input_schema": COLOUR}
# Newer versions of the client have no sampling fields; in older ones the body is the same.
COLD: Any = {"temperature": 0}
GREEDY: dict[str, Any] = {"model": "talker", "max_tokens": 12, "extra_body": COLD}


@pytest.fixture(scope="module")
def client(caller: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=caller.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def talkative(parrot: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=parrot.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def fields(parrot: Server) -> dict[str, Any]:
    name = httpx.get(f"{parrot.url}/v1/models").json()["data"][0]["id"]
    return {"model": name, "max_tokens": 60, "extra_body": COLD}


def said(offline: Any, prompt: str) -> str:
    text: str = offline.generate(prompt, SamplingParams(temperature=0, max_tokens=12)).outputs[0].text
    return text


def text_of(message: Any) -> str:
    assert all(block.type == "text" for block in message.content)
    return "".join(block.text for block in message.content)  # no block where the first token is the last


def test_a_message_is_what_the_engine_says_offline(client: anthropic.Anthropic, offline: Any) -> None:
    prompt = "system :|Be brief.;user :|Paint the town.;assistant:"
    cached: Any = {"type": "ephemeral"}
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Paint the town.", "cache_control": cached}]}]
    systems: Any = ("Be brief.", [{"type": "text", "text": "Be brief."}])
    for messages, system in zip((ASKED, parts), systems, strict=True):
        message = client.messages.create(**GREEDY, messages=messages, system=system, metadata={"user_id": "me"})
        assert text_of(message) == said(offline, prompt)
        assert (message.stop_reason, message.stop_sequence, message.role) == ("max_tokens", None, "assistant")
        usage = message.usage
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == len(offline.tokenizer.encode(prompt))
        assert usage.output_tokens == 12
    counted = client.messages.count_tokens(model="talker", messages=ASKED, system="Be brief.")
    assert counted.input_tokens == len(offline.tokenizer.encode(prompt))


def test_sampling_fields_have_their_effect(client: anthropic.Anthropic, offline: Any) -> None:
    def ask(**fields: Any) -> Any:
        return client.messages.create(**GREEDY | {"messages": ASKED} | fields)

    greedy = text_of(ask())
    stop = greedy[4:6]
    stopped = ask(stop_sequences=["never", stop])
    assert text_of(stopped) == greedy.partition(stop)[0]
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}):
        assert text_of(ask(extra_body={"temperature": 1.0, **narrow})) == greedy
    assert len({text_of(ask(extra_body={"temperature": 1.0})) for _ in range(6)}) > 1


def test_earlier_turns_with_tools_reach_the_template(client: anthropic.Anthropic, offline: Any) -> None:
    dry = {"type": "text", "text": "dry"}
    messages: Any = [
        *ASKED,
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "So.", "signature": ""},
            {"type": "text", "text": "Yes."},
            {"type": "tool_use", "id": "c1", "name": "paint", "input": {"colour": "red"}},
            {"type": "tool_use", "id": "c2", "name": "paint", "input": {"colour": "blue"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": "done"},
            {"type": "tool_result", "tool_use_id": "c2", "content": [dry], "is_error": True},
            {"type": "text", "text": "On."},
        ]},
    ]  # fmt: skip
    prompt = (
        "paint,user :|Paint the town.;assistant :So.|Yes.<tool_call>paint red<tool_call>paint blue;"
        "tool paint:|done;tool paint:|Error: dry;user :|On.;assistant:"
    )
    assert client.messages.count_tokens(model="talker", messages=messages, tools=[PAINT]).input_tokens == len(
        offline.tokenizer.encode(prompt)
    )
    message = client.messages.create(**GREEDY, messages=messages)
    assert text_of(message) == said(offline, prompt.removeprefix("paint,"))


def test_tools_are_not_shown_where_none_may_be_called(client: anthropic.Anthropic) -> None:
    hidden = client.messages.create(**GREEDY, messages=ASKED, tools=[PAINT], tool_choice={"type": "none"})
    assert text_of(hidden) == text_of(client.messages.create(**GREEDY, messages=ASKED))


@pytest.mark.real_model
def test_calls_and_schemas_are_enforced(talkative: anthropic.Anthropic, fields: dict[str, Any]) -> None:
    client, fields = talkative, fields | {"messages": ASKED, "tools": [PAINT]}
    for choice in ({"type": "tool", "name": "paint"}, {"type": "any", "disable_parallel_tool_use": True}):
        message = client.messages.create(**fields, tool_choice=choice)
        (block,) = message.content
        assert block.type == "tool_use" and block.name == "paint" and block.input["colour"] in ("red", "blue")
        assert message.stop_reason == "tool_use"
    with client.messages.stream(**fields, tool_choice={"type": "tool", "name": "paint"}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    (block,) = final.content
    assert block.type == "tool_use" and block.input in ({"colour": "red"}, {"colour": "blue"})
    assert kinds.count("input_json") > 1 and final.stop_reason == "tool_use"
    wanted: Any = {"format": {"type": "json_schema", "schema": COLOUR}}
    answer = client.messages.create(**fields | {"tools": []}, output_config=wanted)
    jsonschema.validate(json.loads(text_of(answer)), COLOUR)


def test_the_stream_has_the_official_events(client: anthropic.Anthropic, caller: Server) -> None:
    whole = client.messages.create(**GREEDY, messages=ASKED)
    events: Any = list(client.messages.create(**GREEDY, messages=ASKED, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert "".join(event.delta.text for event in events[2:-3]) == text_of(whole)
    assert (events[-2].delta.stop_reason, events[-2].usage.output_tokens) == ("max_tokens", 12)

    async def later() -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=caller.url, api_key="none") as there,
            there.messages.stream(**GREEDY, messages=ASKED) as stream,
        ):
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(later()) == text_of(whole)


INSIDE: dict[str, tuple[str, ...]] = {  # the fields that are not of the body itself
    "effort": ("output_config",),
    "budget_tokens": ("thinking",),
    "display": ("thinking",),
    "citations": ("content",),
    "caller": ("use",),
    "toolset_name": ("use",),
    **dict.fromkeys(
        ("allowed_callers", "defer_loading", "eager_input_streaming", "input_examples", "strict"), ("tool",)
    ),
}


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_is_not_here_is_refused_by_name(caller: Server, name: str) -> None:
    def ask(value: Any) -> Any:
        text: dict[str, Any] = {"type": "text", "text": "x"}
        use: dict[str, Any] = {"type": "tool_use", "id": "c", "name": "paint", "input": {"colour": "red"}}
        tool: dict[str, Any] = dict(PAINT)
        body: dict[str, Any] = {"max_tokens": 1, "output_config": {}, "thinking": {"type": "adaptive"}}
        places = {
            "content": text,
            "use": use,
            "tool": tool,
            "output_config": body["output_config"],
            "thinking": body["thinking"],
        }
        (place,) = INSIDE.get(name, ("body",))
        places.get(place, body)[name] = value
        body["messages"] = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [text]}]
        return caller.post("/v1/messages", body | {"tools": [tool]})

    answer = ask({"of": "another kind"})
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(f"{name} is refused: ")
    for neutral in (None, *NOT_HERE[name][1]):
        assert ask(neutral).status_code == 200, neutral


def test_errors_have_anthropics_form(client: anthropic.Anthropic, caller: Server) -> None:
    for fields, named in (
        ({"nonsense": 1}, "nonsense"),
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "The"}]}, "assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}]}, "thinking"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type"),
        ({"tools": [PAINT], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [PAINT], "tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}}, "tools"),
        ({"temperature": -1}, "temperature"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "budget_tokens"),
    ):
        answer = caller.post("/v1/messages", {"max_tokens": 3, "messages": ASKED, **fields})  # type: ignore[dict-item]
        body = answer.json()
        assert (answer.status_code, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
        assert named in body["error"]["message"], body
    with pytest.raises(anthropic.NotFoundError, match="'other'"):
        client.messages.create(**GREEDY | {"model": "other"}, messages=ASKED)
    unknown = caller.post("/v1/messages/batches", {})
    assert unknown.status_code in (404, 405) and unknown.json()["type"] == "error"


def test_a_key_may_come_in_anthropics_header(engine: Any) -> None:
    with serving(engine, "--api_key", "secret") as server:
        for key in ("wrong", "secret"):
            client = anthropic.Anthropic(base_url=server.url, api_key=key, max_retries=0)
            if key == "secret":
                assert client.messages.create(**GREEDY, messages=ASKED).stop_reason == "max_tokens"
            else:
                with pytest.raises(anthropic.AuthenticationError) as caught:
                    client.messages.create(**GREEDY, messages=ASKED)
                assert caught.value.body["error"]["type"] == "authentication_error"  # type: ignore[index,call-overload]


@pytest.mark.real_model
def test_a_model_that_calls_and_thinks_by_itself(talkative: anthropic.Anthropic, fields: dict[str, Any]) -> None:
    client, fields = talkative, fields | {"stop_sequences": ["\n"]}
    now: Any = {"name": "now", "input_schema": {"type": "object"}}
    asked: Any = [{"role": "user", "content": LINE * 8}]
    message = client.messages.create(**fields, messages=asked, tools=[now])
    text, call = message.content
    assert text.type == "text" and text.text == "So I ask."
    assert call.type == "tool_use" and (call.name, call.input) == ("now", {"zone": "UTC"})
    with client.messages.stream(**fields, messages=asked, tools=[now]) as stream:
        assert [block.type for block in stream.get_final_message().content] == ["text", "tool_use"]
    thinking: Any = [{"role": "user", "content": "<think>" + THOUGHT * 8}]
    with client.messages.stream(**fields, messages=thinking) as stream:
        streamed = stream.get_final_message()
    whole = client.messages.create(**fields, messages=thinking)
    for answer in (whole, streamed):
        reasoning, text = answer.content
        assert reasoning.type == "thinking" and reasoning.thinking == "A colour is asked for."
        assert text.type == "text" and text.text == "Red."
    assert whole.stop_sequence == "\n"
