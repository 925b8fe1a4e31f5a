"""tool_choice as a grammar: what it allows is read back as calls, and nothing else is allowed."""

import json
from typing import Any

import pytest

from slipstream.errors import RequestError
from slipstream.text.tools import FORMATS, AnswerFormat, AnswerParser, check_choice, check_tools, schema_of

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}

CITY, NOW = {"city": "Łódź"}, {"zone": [1, "}"]}


def write(format_name: str, *calls: tuple[str, dict[str, Any]]) -> str:
    form = FORMATS[format_name]
    objects = [
        json.dumps({"name": name, form.arguments_key: arguments}, ensure_ascii=False) for name, arguments in calls
    ]
    return "".join(form.begin) + "".join(form.between).join(objects) + "".join(form.end)


def allows(grammar: str, text: str) -> bool:
    llguidance = pytest.importorskip("llguidance")
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(grammar))
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("format_name", FORMATS)
def test_required(format_name: str) -> None:
    grammar = schema_of(TOOLS, "required", FORMATS[format_name])
    for calls in (
        [("weather", CITY)],
        [("now", NOW)],
        [("weather", CITY), ("now", {}), ("weather", {"city": "", "days": 2})],
    ):
        text = write(format_name, *calls)
        assert allows(grammar, text)
        form = AnswerFormat(FORMATS[format_name], reasons=False)
        answer = AnswerParser(form, reasoning_in_prompt=False, names=check_tools(TOOLS)).read(text)
        assert [(call.name, json.loads(call.arguments)) for call in answer.tool_calls] == calls
    for text in ("", "Hello", write(format_name, ("other", {})), write(format_name, ("weather", {"days": 1}))):
        assert not allows(grammar, text)


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_named_function_is_called_once(format_name: str) -> None:
    grammar = schema_of(TOOLS, NAMED, FORMATS[format_name])
    assert allows(grammar, write(format_name, ("weather", CITY)))
    assert not allows(grammar, write(format_name, ("now", {})))
    assert not allows(grammar, write(format_name, ("weather", CITY), ("weather", CITY)))


@pytest.mark.parametrize(
    ("in_prompt", "text", "is_allowed"),
    [
        (False, "", True),
        (False, "<think>\nwhy\n</think>\n\n", True),
        (False, "<think>\nwhy", False),
        (True, "why <tool_call>\n</think>\n\n", True),
        (True, "", False),
    ],
)
def test_an_answer_may_think_first(in_prompt: bool, text: str, is_allowed: bool) -> None:
    grammar = schema_of(TOOLS, "required", FORMATS["hermes"], reasons=True, reasoning_in_prompt=in_prompt)
    assert allows(grammar, text + write("hermes", ("now", {}))) == is_allowed


def test_a_marker_that_is_a_token_is_written_as_its_id() -> None:
    grammar = schema_of(TOOLS, "required", FORMATS["mistral"], special_ids={"[TOOL_CALLS]": 5})
    assert grammar.startswith('start: <[5]> "[" call (", " call)* "]"\n')
    assert '"[TOOL_CALLS]"' not in grammar


def test_what_the_grammar_allows_is_valid_by_the_schema() -> None:
    """The arguments' schema goes in unchanged: the grammar and jsonschema agree."""
    jsonschema = pytest.importorskip("jsonschema")
    grammar = schema_of(TOOLS, NAMED, FORMATS["llama3"])
    for arguments in ({"city": "a"}, {"city": "a", "days": 1}, {"city": 1}, {"days": 1}, {"city": "a", "x": 1}, {}):
        is_valid = jsonschema.Draft202012Validator(WEATHER).is_valid(arguments)
        assert allows(grammar, write("llama3", ("weather", arguments))) == is_valid


def test_tools_by_name() -> None:
    assert check_tools(TOOLS) == {"weather": WEATHER, "now": {"type": "object"}}


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ([], "at least one"),
        ("now", "tools must be a list"),
        ([{"name": "now"}], r"tools\[0\] must be"),
        ([{"type": "function"}], r"tools\[0\] must be"),
        ([{"type": "retrieval", "function": {"name": "now"}}], r"tools\[0\] must be"),
        ([TOOLS[1], {"type": "function", "function": {"name": "a b"}}], r"tools\[1\] has the name 'a b'; use letters"),
        ([{"type": "function", "function": {}}], "has the name None"),
        ([TOOLS[1], TOOLS[1]], "two functions of the name 'now'"),
        ([{"type": "function", "function": {"name": "now", "parameters": []}}], "no JSON schema"),
    ],
)
def test_tools_are_checked(tools: Any, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        check_tools(tools)


def test_the_choice_is_checked() -> None:
    assert [check_choice(TOOLS, choice) for choice in ("auto", "none", "required", NAMED)] == [None] * 3 + ["weather"]
    for choice in ("weather", {"type": "function", "function": {"name": "other"}}, {"type": "function"}, None):
        with pytest.raises(RequestError, match=r"tool_choice is .*\{'name': 'weather'\}\}, one of tools\."):
            check_choice(TOOLS, choice)
