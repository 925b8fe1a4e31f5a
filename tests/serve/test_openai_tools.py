"""Tools and reasoning in OpenAI's chats, with OpenAI's own client."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.serve.conftest import Server

COLOUR = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
    "additionalProperties": False,
}
PAINT = {"type": "function", "function": {"name": "paint", "description": "Paints.", "parameters": COLOUR}}
ERASE = {"type": "function", "function": {"name": "erase", "parameters": COLOUR}}
TOOLS: Any = [PAINT, ERASE]
MESSAGES: Any = [{"role": "user", "content": "Paint the town."}]
NAMED: Any = {"type": "function", "function": {"name": "paint"}}


class Place(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]
    rank: Literal[1, 2]


class Now(pydantic.BaseModel):
    zone: Literal["CET", "PST"]


class Paint(pydantic.BaseModel):
    colour: Literal["red", "blue"]


Chat = Callable[..., Any]


@pytest.fixture(scope="module")
def client(caller: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{caller.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def fields(no_blanks: dict[str, float]) -> dict[str, Any]:
    return {"model": "talker", "messages": MESSAGES, "seed": 1, "max_tokens": 200, "logit_bias": no_blanks}


@pytest.fixture(scope="module")
def chat(client: openai.OpenAI, fields: dict[str, Any]) -> Chat:
    def ask(**more: Any) -> Any:
        return client.chat.completions.create(**fields | {"tools": TOOLS} | more)

    return ask


def is_colour(arguments: str) -> bool:
    return json.loads(arguments) in ({"colour": "red"}, {"colour": "blue"})


@pytest.mark.parametrize("seed", range(4))
def test_a_named_call_comes_once_and_follows_its_schema(chat: Chat, seed: int) -> None:
    (choice,) = chat(tool_choice=NAMED, seed=seed).choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert (call.type, call.function.name) == ("function", "paint") and is_colour(call.function.arguments)


def test_calls_are_required_and_not_in_parallel_unless_they_may(chat: Chat, no_blanks: dict[str, float]) -> None:
    names, most = set(), 0
    goes_on = dict.fromkeys(no_blanks, -50.0) | {"1": -100.0}  # rather the newline of another call than the end
    for seed in range(8):
        (choice,) = chat(tool_choice="required", seed=seed, parallel_tool_calls=False).choices
        assert len(choice.message.tool_calls) == 1 and choice.finish_reason == "tool_calls"
        names.add(choice.message.tool_calls[0].function.name)
        (choice,) = chat(tool_choice="required", seed=seed, logit_bias=goes_on).choices
        calls = choice.message.tool_calls or []
        most = max(most, len(calls))
        assert all(is_colour(call.function.arguments) for call in calls)
    assert names == {"paint", "erase"} and most > 1


def test_a_streamed_call_is_the_whole_one_in_pieces(chat: Chat) -> None:
    whole = chat(tool_choice=NAMED, n=2, logprobs=True).choices
    chunks = list(chat(tool_choice=NAMED, n=2, logprobs=True, stream=True))
    for choice in whole:
        mine = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        calls = [call for each in mine for call in each.delta.tool_calls or []]
        (expected,) = choice.message.tool_calls
        assert {call.index for call in calls} == {0}
        assert [call.function.name for call in calls if call.id] == ["paint"] and calls[0].id
        arguments = [call.function.arguments for call in calls if call.function.arguments]
        assert "".join(arguments) == expected.function.arguments
        assert "".join(each.delta.content or "" for each in mine) == ""
        assert [each.finish_reason for each in mine if each.finish_reason] == ["tool_calls"]
        assert len([entry for each in mine for entry in each.logprobs.content]) == len(choice.logprobs.content)


def test_openais_own_helpers_parse_calls_and_answers(
    client: openai.OpenAI, caller: Server, fields: dict[str, Any]
) -> None:
    tool = openai.pydantic_function_tool(Paint)
    named: Any = {"type": "function", "function": {"name": "Paint"}}
    parsed = client.chat.completions.parse(**fields, tools=[tool], tool_choice=named)
    (call,) = parsed.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Paint)
    with client.chat.completions.stream(**fields, tools=[tool], tool_choice=named) as stream:
        final = stream.get_final_completion()
    assert [each.function.parsed_arguments for each in final.choices[0].message.tool_calls or ()] == [
        call.function.parsed_arguments
    ]
    answer = client.chat.completions.parse(**fields, response_format=Place)
    assert isinstance(answer.choices[0].message.parsed, Place)

    async def later() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{caller.url}/v1", api_key="none") as there:
            return await there.chat.completions.parse(**fields, response_format=Place)

    assert asyncio.run(later()).choices[0].message.parsed == answer.choices[0].message.parsed


def test_the_template_gets_tools_calls_and_results(caller: Server, offline: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "paint", "arguments": '{"colour": "red"}'}}
    conversation = [
        {"role": "developer", "content": "Be brief."},
        *MESSAGES,
        {"role": "assistant", "content": None, "refusal": None, "reasoning_content": "So.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "done"}]},
    ]
    answer = caller.post("/tokenize", {"messages": conversation, "tools": TOOLS}).json()
    assert offline.tokenizer.decode(answer["tokens"], skip_special_tokens=False) == (
        "paint,erase,system :|Be brief.;user :|Paint the town.;assistant :So.|<tool_call>paint red;"
        "tool paint:|done;assistant:"
    )
    without = caller.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1}).json()
    hidden = {"messages": MESSAGES, "max_tokens": 1, "tools": TOOLS, "tool_choice": "none"}
    shown = {"messages": MESSAGES, "max_tokens": 1, "tools": TOOLS}
    sizes = [caller.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"] for body in (hidden, shown)]
    assert sizes[0] == without["usage"]["prompt_tokens"] < sizes[1]


def test_what_is_wrong_with_tools_is_said(caller: Server, server: Server) -> None:
    for fields, named in (
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [PAINT, PAINT]}, "'paint'"),
        ({"tools": [], "tool_choice": "required"}, "tools must be"),
        ({"tool_choice": "now"}, "tool_choice is 'now'"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "tool_calls.0.function"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs has tools"),
    ):
        answer = caller.post("/v1/chat/completions", {"messages": MESSAGES, "tools": TOOLS, **fields})  # type: ignore[dict-item]
        assert answer.status_code == 400 and named in answer.json()["error"]["message"], answer.text
    odd = {"messages": MESSAGES, "max_tokens": 1, "chat_template_kwargs": {"self": 1, "template": 2}}
    assert caller.post("/v1/chat/completions", odd).status_code == 200  # names like any
    answer = server.post("/v1/chat/completions", {"messages": MESSAGES, "tools": TOOLS})
    assert answer.status_code == 400 and "hermes, llama3, mistral" in answer.json()["error"]["message"]


LINE = 'So I ask.<tool_call>{"name": "now", "arguments": {"zone": "UTC"}}</tool_call>\n'
NOW: Any = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
THOUGHT = "A colour is asked for.</think>Red.\n<think>"


@pytest.mark.real_model
def test_a_model_that_calls_and_thinks_by_itself(parrot: Server) -> None:
    client = openai.OpenAI(base_url=f"{parrot.url}/v1", api_key="none", max_retries=0)
    fields: dict[str, Any] = {
        "model": client.models.list().data[0].id, "temperature": 0, "max_tokens": 60, "stop": "\n"
    }  # fmt: skip
    asked: Any = [{"role": "user", "content": LINE * 8}]
    (choice,) = client.chat.completions.create(**fields, messages=asked, tools=NOW).choices
    (call,) = choice.message.tool_calls or ()
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "So I ask.")
    assert (call.function.name, json.loads(call.function.arguments)) == ("now", {"zone": "UTC"})  # type: ignore[union-attr]
    with client.chat.completions.stream(**fields, messages=asked, tools=NOW) as stream:
        final = stream.get_final_completion().choices[0]
    assert (final.finish_reason, final.message.content) == ("tool_calls", "So I ask.")
    assert [each.function.arguments for each in final.message.tool_calls or ()] == [call.function.arguments]  # type: ignore[union-attr]
    plain = client.chat.completions.create(**fields, messages=asked).choices[0]
    assert plain.message.tool_calls is None and (plain.message.content or "").startswith("So I ask.<tool_call>{")

    thinking: Any = [{"role": "user", "content": "<think>" + THOUGHT * 8}]
    message: Any = client.chat.completions.create(**fields, messages=thinking).choices[0].message
    assert (message.reasoning_content, message.content) == ("A colour is asked for.", "Red.")
    deltas: Any = [
        each.choices[0].delta for each in client.chat.completions.create(**fields, messages=thinking, stream=True)
    ]
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "A colour is asked for."
    assert "".join(delta.content or "" for delta in deltas) == "Red."
    guided = client.chat.completions.create(**fields, messages=thinking, extra_body={"guided_choice": ["Red", "Blue"]})
    assert guided.choices[0].message.content in ("Red", "Blue")  # at once, as content


@pytest.mark.real_model
def test_a_strict_call_follows_its_schema_though_none_was_asked_for(parrot: Server) -> None:
    """The same line, whose zone is none of the strict tool's."""
    client = openai.OpenAI(base_url=f"{parrot.url}/v1", api_key="none", max_retries=0)
    fields: dict[str, Any] = {
        "model": client.models.list().data[0].id, "temperature": 0, "max_tokens": 60, "stop": "\n"
    }  # fmt: skip
    asked: Any = [{"role": "user", "content": LINE * 8}]
    tool = openai.pydantic_function_tool(Now, name="now")
    assert tool["function"]["strict"] is True
    (choice,) = client.chat.completions.parse(**fields, messages=asked, tools=[tool]).choices
    (call,) = choice.message.tool_calls or ()
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "So I ask.")
    assert call.function.name == "now" and isinstance(call.function.parsed_arguments, Now)
    with client.chat.completions.stream(**fields, messages=asked, tools=[tool]) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert streamed.function.parsed_arguments == call.function.parsed_arguments
    response = client.responses.create(
        model=fields["model"], temperature=0, max_output_tokens=60, extra_body={"stop": "\n"}, input=LINE * 8,
        tools=[{"type": "function", "name": "now", "parameters": tool["function"]["parameters"], "strict": True}],
    )  # fmt: skip
    assert json.loads(response.output[1].arguments) == call.function.parsed_arguments.model_dump()  # type: ignore[union-attr]

    plain: Any = [{"role": "user", "content": "So I ask. Is 1 < 2?\n" * 8}]
    without, beside = (
        client.chat.completions.create(**fields, messages=plain, **more).choices[0].message
        for more in ({}, {"tools": [tool]})
    )
    assert without.content == beside.content == "So I ask. Is 1 < 2?" and beside.tool_calls is None


def test_langchain_calls_and_streams(caller: Server, fields: dict[str, Any]) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        model="talker",
        base_url=f"{caller.url}/v1",
        api_key="none",  # type: ignore[arg-type]
        max_retries=0,
        max_tokens=200,  # type: ignore[call-arg]
        seed=1,
        logit_bias=fields["logit_bias"],
    )
    painter = model.bind_tools([Paint], tool_choice="Paint")
    (call,) = painter.invoke("Paint the town.").tool_calls
    assert call["name"] == "Paint" and call["args"] in ({"colour": "red"}, {"colour": "blue"})
    total: Any = None
    for chunk in painter.stream("Paint the town."):
        total = chunk if total is None else total + chunk
    assert [each["args"] for each in total.tool_calls] == [call["args"]]
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Place, method=method).invoke("Where?"), Place)
    usage = model.bind(max_tokens=5).invoke("Hello").usage_metadata
    assert usage is not None and 1 <= usage["output_tokens"] <= 5
