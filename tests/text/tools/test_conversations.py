"""Conversations with tools through chat templates: the prompt is transformers', and what it shows can be read back."""

import json
from typing import Any

import pytest

from slipstream.errors import RequestError
from slipstream.text.chat import render_chat
from slipstream.text.tools import FORMATS, AnswerParser, answer_format, check_tools
from tests.text.tools.templates import TEMPLATES

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a day",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
USER = {"role": "user", "content": "Weather in Łódź & <here>?"}
ARGUMENTS = {"city": 'Łódź "&" <b>\'', "days": 2}


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "abcDEF123", "type": "function", "function": function}],
    }


RESULT = {"role": "tool", "tool_call_id": "abcDEF123", "name": "get_weather", "content": '{"celsius": -3}'}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [USER, call(ARGUMENTS), RESULT],
    [USER, call(ARGUMENTS), RESULT, {"role": "assistant", "content": "Cold."}, {"role": "user", "content": "And now?"}],
]


def render(template: str, messages: list[dict[str, Any]], tools: Any = TOOLS, **extra: Any) -> str:
    return render_chat(template, messages, tools=tools, bos_token="<s>", eos_token="</s>", **extra)


def expected(template: str, messages: list[dict[str, Any]], tools: Any = TOOLS, **extra: Any) -> str:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    options = {"tokenize": False, "add_generation_prompt": True, "chat_template": template, **extra}
    return oracle.apply_chat_template(messages, tools=tools, **options)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("tools", [TOOLS, None])
def test_equals_transformers(name: str, messages: list[dict[str, Any]], tools: Any) -> None:
    assert render(TEMPLATES[name], messages, tools) == expected(TEMPLATES[name], messages, tools)


@pytest.mark.parametrize("name", TEMPLATES)
def test_openai_messages_give_the_same_prompt(name: str) -> None:
    """Arguments as JSON text, a result without a name, null tool_calls: what OpenAI's clients send back."""
    answer = {"role": "assistant", "content": "Cold.", "tool_calls": None}
    asked = {"role": "user", "content": "And now?"}
    result = {key: value for key, value in RESULT.items() if key != "name"}
    openai = [USER, call(json.dumps(ARGUMENTS)), result, answer, asked]
    assert render(TEMPLATES[name], openai) == expected(TEMPLATES[name], CONVERSATIONS[3])
    assert openai[1]["tool_calls"][0]["function"]["arguments"] == json.dumps(ARGUMENTS)  # the caller's stay as they are


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_call_that_a_template_shows_is_read_back(name: str) -> None:
    """Parser and template agree on the format: the history's call, taken from the prompt, is an answer with a call."""
    form = answer_format(TEMPLATES[name])
    assert form.calls is FORMATS["hermes" if name == "qwen" else name]
    before, after = (render(TEMPLATES[name], CONVERSATIONS[2][:count]) for count in (1, 2))
    prefix = {"qwen": "<|im_start|>assistant\n", "hermes": "<|im_start|>assistant\n", "llama3": "", "mistral": ""}[name]
    shared = before.removesuffix(prefix)
    written = after.removeprefix(shared).removeprefix(prefix)
    end = {"qwen": "<|im_end|>", "hermes": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>"}[name]
    answer = AnswerParser(form, reasoning_in_prompt=False, names=check_tools(TOOLS)).read(written.partition(end)[0])
    assert [(each.name, json.loads(each.arguments)) for each in answer.tool_calls] == [("get_weather", ARGUMENTS)]
    assert answer.content == ""


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        (["x"], "The chat template cannot render these messages"),
        (
            [{"function": {"name": "now", "arguments": "{"}}],
            r"messages\[1\] has a tool call whose arguments are no JSON",
        ),
        (5, r"messages\[1\]\['tool_calls'\] must be a list"),
    ],
)
def test_calls_are_checked(calls: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        render(TEMPLATES["qwen"], [USER, {"role": "assistant", "tool_calls": calls}])
