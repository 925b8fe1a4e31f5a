"""chat() with tools: SmolLM2 goes on with what a template shows it many times, and that is read."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM, Guided, SamplingParams
from slipstream.errors import RequestError

pytestmark = pytest.mark.real_model

TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
LINE = 'So I ask.<tool_call>{"name": "now", "arguments": {"zone": "UTC"}}</tool_call>\n'
THOUGHT = "A colour is asked for.</think>Red.\n<think>"
TEMPLATE = "{{ messages[0].content }}{# <tool_call> </think> #}"
SAMPLING = SamplingParams(temperature=0, max_tokens=40, stop="\n")


@pytest.fixture(scope="module")
def llm(smollm2_gguf: Path) -> Iterator[LLM]:
    with LLM(smollm2_gguf, max_batch_size=2, max_num_tokens=512, chat_template=TEMPLATE) as opened:
        yield opened


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_calls_are_read(llm: LLM) -> None:
    output = llm.chat(user(LINE * 8), SAMPLING, tools=TOOLS).outputs[0]
    assert output.text == LINE.strip()
    assert (output.content, output.reasoning) == ("So I ask.", None)
    (call,) = output.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("now", {"zone": "UTC"})
    again = asyncio.run(llm.chat_async(user(LINE * 8), SAMPLING, tools=TOOLS)).outputs[0]
    assert [each.arguments for each in again.tool_calls] == [call.arguments]


def test_without_tools_nothing_is_a_call(llm: LLM) -> None:
    output = llm.chat(user(LINE * 8), SAMPLING).outputs[0]
    assert (output.content, output.tool_calls) == (output.text, [])


@pytest.mark.parametrize("tool_choice", ["required", {"type": "function", "function": {"name": "paint"}}])
def test_a_call_can_be_required(llm: LLM, tool_choice: Any) -> None:
    colour = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    schema = {**colour, "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "paint", "parameters": schema}}]
    output = llm.chat(
        user("Hello!"), SamplingParams(temperature=0, max_tokens=60), tools=tools, tool_choice=tool_choice
    )
    calls = output.outputs[0].tool_calls
    assert calls and {call.name for call in calls} == {"paint"}
    assert all(json.loads(call.arguments) in ({"colour": "red"}, {"colour": "blue"}) for call in calls)


def test_choice_none_shows_no_tools(smollm2_gguf: Path) -> None:
    shown = "{{ messages[0].content }}{{ tools }}{# <tool_call> #}"
    with LLM(smollm2_gguf, max_batch_size=2, max_num_tokens=512, chat_template=shown) as llm:
        prompts = [
            llm.chat(user("Hi"), SAMPLING, **options).prompt_token_ids
            for options in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": TOOLS})
        ]
    assert prompts[0] == prompts[1] != prompts[2]


def test_reasoning_that_the_prompt_began_is_read(llm: LLM) -> None:
    output = llm.chat(user("<think>" + THOUGHT * 8), SAMPLING).outputs[0]
    assert (output.reasoning, output.content) == ("A colour is asked for.", "Red.")


def test_tools_that_nobody_would_read_are_refused(smollm2_gguf: Path, llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"tools\[0\] must be"):
        llm.chat(user("Hi"), tools=[{"name": "now"}])
    with pytest.raises(RequestError, match="tools must be a list"):
        llm.chat(user("Hi"), tool_choice="required")
    with pytest.raises(RequestError, match="tool_choice is 'now'; it must be"):
        llm.chat(user("Hi"), tools=TOOLS, tool_choice="now")
    with pytest.raises(RequestError, match="tools and a grammar"):
        llm.chat(user("Hi"), SamplingParams(guided=Guided(json_object=True)), tools=TOOLS, tool_choice="required")
    with (
        LLM(smollm2_gguf, max_batch_size=2, max_num_tokens=512) as plain,
        pytest.raises(RequestError, match=r"tools has no effect: .* hermes, llama3, mistral"),
    ):
        plain.chat(user("Hi"), tools=TOOLS)
