"""tool_choice auto with a strict tool, as a grammar: text is free, and what begins as a call goes on as one."""

import json
from typing import Any

import pytest

from slipstream.text.tools import FORMATS, AnswerFormat, AnswerParser, any_is_strict, check_tools, lazy_schema_of
from tests.text.tools.test_schema import CITY, NOW, TOOLS, WEATHER, allows, write

STRICT = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}}, TOOLS[1]]
TEXTS = (
    "",
    "Hello",
    " \n",
    "[1, 2]",
    '{"answer": 3}',
    '{"named": "x"}',
    "<tool_call",
    "a ; b",
    "</tool_call>",
    "Łódź 🙂",
)
BROKEN: Any = [("other", {}), ("weather", {"days": 1}), ("weather", {"city": "a", "x": 1})]


def test_one_strict_tool_makes_the_grammar() -> None:
    assert any_is_strict(STRICT) and not any_is_strict(TOOLS) and not any_is_strict(None)


@pytest.mark.parametrize("format_name", FORMATS)
def test_text_is_free(format_name: str) -> None:
    grammar = lazy_schema_of(STRICT, FORMATS[format_name])
    for text in TEXTS:
        assert allows(grammar, text), text


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("before", ["", "So I ask. "])
def test_what_begins_as_a_call_is_one(format_name: str, before: str) -> None:
    """And is read as that, by the parser that reads all answers."""
    form = FORMATS[format_name]
    if before and not form.begin:
        before += form.trigger
    grammar = lazy_schema_of(STRICT, form)
    for calls in ([("weather", CITY)], [("now", NOW)], [("weather", CITY), ("now", {}), ("weather", {"city": ""})]):
        text = before + write(format_name, *calls)
        assert allows(grammar, text)
        answer = AnswerParser(AnswerFormat(form, reasons=False), names=check_tools(STRICT)).read(text)
        assert [(call.name, json.loads(call.arguments)) for call in answer.tool_calls] == calls
    for call in BROKEN:
        assert not allows(grammar, before + write(format_name, call))
        assert not allows(grammar, before + write(format_name, ("now", {}), call))


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name":"weather","arguments":{"city":"a"}}</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": {"city": "a"}}\n</tool_call>\nand <tool_call>{"name": "now", '
        '"arguments": {}} </tool_call> done',
    ],
)
def test_blanks_are_the_models(text: str) -> None:
    assert allows(lazy_schema_of(STRICT, FORMATS["hermes"]), text)


def test_llama_may_call_its_own_tools_and_say_what_kind_a_call_is() -> None:
    grammar = lazy_schema_of(STRICT, FORMATS["llama3"])
    assert allows(grammar, '<|python_tag|>brave_search.call(query="x")')
    assert allows(grammar, '\n{"type": "function", "name": "weather", "parameters": {"city": "a"}}')
    assert not allows(grammar, '{"type": "function", "name": "weather", "parameters": {"days": 1}}')
    assert not allows(grammar, '{"parameters": {"days": 1}, "name": "weather"}')


def test_one_call_where_they_are_not_parallel() -> None:
    for name in FORMATS:
        grammar = lazy_schema_of(STRICT, FORMATS[name], parallel=False)
        assert allows(grammar, write(name, ("weather", CITY))) and allows(grammar, "Hello")
        assert not allows(grammar, write(name, ("weather", CITY), ("weather", CITY)))


@pytest.mark.parametrize("in_prompt", [False, True])
def test_a_call_that_is_thought_of_is_none(in_prompt: bool) -> None:
    grammar = lazy_schema_of(STRICT, FORMATS["hermes"], reasons=True, reasoning_in_prompt=in_prompt)
    thought = ("" if in_prompt else "<think>\n") + "Perhaps <tool_call>now</tool_call>?\n"
    whole, broken = write("hermes", ("weather", CITY)), write("hermes", ("weather", {"days": 1}))
    assert allows(grammar, thought) and allows(grammar, thought + broken)  # it never comes to an end
    for answer in ("", "\n\nHello", "\n\n" + whole, "Well. " + whole):
        assert allows(grammar, f"{thought}</think>{answer}")
    assert not allows(grammar, f"{thought}</think>\n\n{broken}")
    assert allows(grammar, "Hello" + whole) and allows(grammar, "Hello" + broken) == in_prompt


def test_special_tokens_are_free_in_text_and_one_may_begin_a_call() -> None:
    llguidance = pytest.importorskip("llguidance")
    tokenizer = llguidance.LLTokenizer("byte")
    good, bad = (
        write("mistral", ("weather", each)).removeprefix("[TOOL_CALLS]").encode() for each in (CITY, {"days": 1})
    )

    def takes(form: str, special_ids: dict[str, int], tokens: list[int]) -> bool:
        grammar = lazy_schema_of(STRICT, FORMATS[form], special_ids=special_ids)
        matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(grammar))
        assert not matcher.is_error(), matcher.get_error()
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    special_ids = {"[TOOL_CALLS]": 258, "<|x|>": 260}
    assert takes("mistral", special_ids, [260, *b"So", 260, 260, 258, *good, *b" and", 260])
    assert not takes("mistral", special_ids, [260, *b"So", 258, *bad])
    assert takes("mistral", special_ids, [*b"[TOOL_CALLS]", *bad])  # the text of it is no marker where that is a token
    for tokens in ([260, *b"So", 260], [260, *write("hermes", ("weather", CITY)).encode(), 260]):
        assert takes("hermes", {"<|x|>": 260}, tokens)
    assert not takes("hermes", {"<|x|>": 260}, [260, *write("hermes", ("weather", {})).encode()])
