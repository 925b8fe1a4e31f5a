"""OpenAI's /v1/responses, with OpenAI's own client."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from slipstream import SamplingParams
from slipstream.serve.openai.response_fields import NOT_HERE
from tests.serve.conftest import Server
from tests.serve.test_openai_tools import COLOUR, LINE, THOUGHT, Place, is_colour

ASKED = "Paint the town."
PAINT: Any = {"type": "function", "name": "paint", "parameters": COLOUR, "strict": True}
NAMED: Any = {"type": "function", "name": "paint"}
GREEDY: dict[str, Any] = {"model": "talker", "temperature": 0, "max_output_tokens": 12}


@pytest.fixture(scope="module")
def client(caller: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{caller.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def fields(no_blanks: dict[str, float]) -> dict[str, Any]:
    return {"model": "talker", "max_output_tokens": 200, "extra_body": {"seed": 1, "logit_bias": no_blanks}}


def said(offline: Any, prompt: str) -> str:
    text: str = offline.generate(prompt, SamplingParams(temperature=0, max_tokens=12)).outputs[0].text
    return text


def test_a_response_is_what_the_engine_says_offline(client: openai.OpenAI, offline: Any) -> None:
    answer = client.responses.create(**GREEDY, input=ASKED, instructions="Be brief.", metadata={"a": "b"})
    assert answer.output_text == said(offline, f"system :|Be brief.;user :|{ASKED};assistant:")
    assert (answer.status, answer.object, answer.metadata) == ("incomplete", "response", {"a": "b"})
    assert answer.incomplete_details is not None and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None and answer.usage.output_tokens == 12
    assert answer.usage.total_tokens == answer.usage.input_tokens + 12
    (message,) = answer.output
    assert (message.type, message.status) == ("message", "incomplete")


def test_earlier_items_are_given_inline(client: openai.OpenAI, offline: Any) -> None:
    items: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": ASKED}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "So."}]},
        {"type": "message", "id": "m", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "Yes.", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "paint", "arguments": '{"colour": "red"}'},
        {"type": "function_call", "call_id": "c2", "name": "paint", "arguments": '{"colour": "blue"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "done"},
    ]  # fmt: skip
    answer = client.responses.create(**GREEDY, input=items)
    assert answer.output_text == said(
        offline,
        f"system :|Be brief.;user :|{ASKED};assistant :So.|Yes.<tool_call>paint red<tool_call>paint blue;"
        "tool paint:|done;assistant:",
    )
    again: Any = [*items, *[item.model_dump() for item in answer.output], {"role": "user", "content": "On."}]
    assert client.responses.create(**GREEDY, input=again).usage.input_tokens > answer.usage.input_tokens  # type: ignore[union-attr]


def test_the_stream_has_the_official_events(client: openai.OpenAI, caller: Server) -> None:
    whole = client.responses.create(**GREEDY, input=ASKED)
    events = list(client.responses.create(**GREEDY, input=ASKED, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last: Any = events[-1]
    assert last.response.output_text == whole.output_text and last.response.usage.output_tokens == 12

    async def later() -> str:
        async with openai.AsyncOpenAI(base_url=f"{caller.url}/v1", api_key="none") as there:
            answer = await there.responses.create(**GREEDY, input=ASKED)
            return answer.output_text

    assert asyncio.run(later()) == whole.output_text


def test_calls_and_schemas_are_enforced(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    answer = client.responses.create(**fields, input=ASKED, tools=[PAINT], tool_choice=NAMED)
    (call,) = answer.output
    assert call.type == "function_call" and call.name == "paint" and is_colour(call.arguments)
    assert (answer.status, call.status) == ("completed", "completed")
    events = list(client.responses.create(**fields, input=ASKED, tools=[PAINT], tool_choice=NAMED, stream=True))
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call.arguments
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert done.arguments == call.arguments
    with client.responses.stream(**fields, input=ASKED, text_format=Place) as stream:
        streamed = stream.get_final_response()
    parsed = client.responses.parse(**fields, input=ASKED, text_format=Place)
    assert isinstance(parsed.output_parsed, Place) and streamed.output_parsed == parsed.output_parsed
    any_: Any = {"format": {"type": "json_object"}}
    assert client.responses.create(**fields, input=ASKED, text=any_).output_text.lstrip().startswith("{")


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_is_not_here_is_refused_by_name(caller: Server, name: str) -> None:
    def ask(value: Any) -> Any:
        body: dict[str, Any] = {"input": [{"role": "user", "content": "x"}], "max_output_tokens": 1}
        if name == "verbosity":
            body["text"] = {name: value}
        elif name == "include_obfuscation":
            body["stream_options"] = {name: value}
        elif name in ("phase", "caller", "namespace", "async", "encrypted_content"):
            body["input"][0] |= {name: value}
        else:
            body[name] = value
        return caller.post("/v1/responses", body)

    answer = ask({"of": "another kind"})
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(f"{name} is refused: ")
    for neutral in (None, *NOT_HERE[name][1]):
        assert ask(neutral).status_code == 200


def test_what_is_wrong_is_said(caller: Server) -> None:
    for fields, named in (
        ({"nonsense": 1}, "nonsense"),
        ({"input": None}, "input"),
        ({"input": []}, "messages"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [PAINT], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"temperature": -1}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"model": "other"}, "'other'"),
        ({"input": [3]}, "input.0"),
    ):
        answer = caller.post("/v1/responses", {"input": "x", **fields})  # type: ignore[dict-item]
        assert answer.status_code in (400, 404) and named in answer.json()["error"]["message"], answer.text
    body, kind = json.dumps({"input": "x", "metadata": {"a": "\ud800"}}), {"Content-Type": "application/json"}
    half = httpx.post(f"{caller.url}/v1/responses", content=body, headers=kind)
    assert half.status_code == 400 and "lone surrogate" in half.json()["error"]["message"]


@pytest.mark.real_model
def test_a_model_that_calls_and_thinks_by_itself(parrot: Server) -> None:
    client = openai.OpenAI(base_url=f"{parrot.url}/v1", api_key="none", max_retries=0)
    fields: dict[str, Any] = {"temperature": 0, "max_output_tokens": 60, "extra_body": {"stop": "\n"}}
    fields["model"] = client.models.list().data[0].id
    now: Any = {"type": "function", "name": "now", "parameters": {"type": "object"}, "strict": None}
    answer = client.responses.create(**fields, input=LINE * 8, tools=[now])
    message, call = answer.output
    assert answer.output_text == "So I ask." and message.type == "message"
    assert call.type == "function_call" and json.loads(call.arguments) == {"zone": "UTC"}
    with client.responses.stream(**fields, input=LINE * 8, tools=[now]) as stream:
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["message", "function_call"]
    assert final.output_text == "So I ask."
    thinking = client.responses.create(**fields, input="<think>" + THOUGHT * 8)
    reasoning, message = thinking.output
    assert reasoning.type == "reasoning" and reasoning.content is not None
    assert (reasoning.content[0].text, thinking.output_text) == ("A colour is asked for.", "Red.")
    assert thinking.usage is not None and thinking.usage.output_tokens_details.reasoning_tokens >= 4
