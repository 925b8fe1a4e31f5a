"""Whatever a text is cut into: its calls are found, the rest is content, and nothing waits without need."""

import json
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slipstream.errors import UsageError
from slipstream.text.tools import (
    FORMATS,
    Answer,
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Delta,
    Reasoning,
    answer_format,
)
from tests.text.tools.writers import CALLS, MARKERS, TEXTS, WRITERS, Call, calls_of, feed, parser

CUTS = st.lists(st.integers(0, 300), max_size=12)


def merged(deltas: list[Delta]) -> list[Any]:
    """Neighbours of one kind joined, and no ids, which are random."""
    result: list[Any] = []
    for delta in deltas:
        match delta:
            case CallStart(index, _, name):
                piece: Any = ("start", index, name)
            case CallArguments(index, text):
                piece = ("arguments", index, text)
            case CallEnd(index):
                piece = ("end", index, "")
            case Content(text) | Reasoning(text):
                piece = (type(delta), 0, text)
        if result and result[-1][:2] == piece[:2]:
            piece = (*piece[:2], result.pop()[2] + piece[2])
        result.append(piece)
    return result


@pytest.mark.parametrize("writer", WRITERS)
@settings(max_examples=150, deadline=None)
@given(
    before=TEXTS,
    calls=st.lists(CALLS, min_size=1, max_size=3),
    after=TEXTS.map(lambda text: f"x{text}") | st.just(""),
    style=st.integers(0, 29),
    cuts=CUTS,
)
def test_calls_between_texts(
    writer: str, before: str, calls: list[Call], after: str, style: int, cuts: list[int]
) -> None:
    format_name, write = WRITERS[writer]
    before = f"a{before}"  # Llama: a text that begins with an object is another case
    assume(MARKERS[format_name] not in before + after)
    text = before + write(calls, style) + after
    deltas = feed(parser(format_name), text, cuts)
    answer = Answer.of(deltas)
    assert calls_of(answer) == calls
    assert answer.content == before + after
    assert merged(deltas) == merged(feed(parser(format_name), text, [])), "another cutting, another answer"
    assert [delta.index for delta in deltas if isinstance(delta, CallStart)] == list(range(len(calls)))


@pytest.mark.parametrize("writer", WRITERS)
@settings(max_examples=150, deadline=None)
@given(
    calls=st.lists(CALLS, min_size=1, max_size=2),
    style=st.integers(0, 29),
    at=st.integers(0, 300),
    removed=st.integers(0, 40),
    put=TEXTS,
    cuts=CUTS,
)
def test_damaged_calls_are_never_lost(
    writer: str, calls: list[Call], style: int, at: int, removed: int, put: str, cuts: list[int]
) -> None:
    format_name, write = WRITERS[writer]
    text = write(calls, style)
    at %= len(text)
    text = text[:at] + put + text[at + removed :]
    deltas = feed(parser(format_name), text, cuts)
    assert merged(deltas) == merged(feed(parser(format_name), text, list(range(len(text)))))
    answer = Answer.of(deltas)
    if not answer.tool_calls:
        assert answer.content == text
    for call in answer.tool_calls:
        assert isinstance(json.loads(call.arguments), dict)
        assert call.arguments in text


@pytest.mark.parametrize("format_name", FORMATS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_text_without_calls_passes_unchanged_and_at_once(format_name: str, text: str) -> None:
    text, marker = f"a{text}", MARKERS[format_name]
    assume(marker not in text)
    stream, shown = parser(format_name), ""
    for count, character in enumerate(text, 1):
        shown += Answer.of(stream.push(character)).content
        held = text[len(shown) : count]
        assert text.startswith(shown)
        assert marker.startswith(held), f"{held!r} is held back"
    assert shown + Answer.of(stream.finish()).content == text


CALL = '{"name": "now", "arguments": {"zone": "UTC"}}'
NOW = ("now", {"zone": "UTC"})


@pytest.mark.parametrize(
    ("format_name", "text", "content", "calls"),
    [
        ("hermes", f"<tool_call>\n{CALL}", "", [NOW]),  # the end came before the closing tag
        ("hermes", f"<tool_call>{CALL}}}</tool_call>", "}</tool_call>", [NOW]),
        ("hermes", f"<tool_call>\n<tool_call>{CALL}</tool_call>", "<tool_call>\n", [NOW]),
        ("hermes", f"<tool_call>{CALL}</tool_call>\n\n", "", [NOW]),
        ("hermes", f"<tool_call>{CALL}</tool_call>\n\nDone.", "\n\nDone.", [NOW]),
        ("hermes", '<tool_call>{"name": "now"}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": "now", "arguments": []}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": "now", "arguments": {}, "parameters": {}}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 1', None, []),
        ("hermes", "Use <tool_call> and </tool_call>.", None, []),
        ("llama3", CALL, "", [NOW]),
        ("llama3", f"\n {CALL};\n{CALL}", "", [NOW, NOW]),
        ("llama3", f"<|python_tag|>{CALL} <|python_tag|>{CALL}", "", [NOW, NOW]),
        ("llama3", '<|python_tag|>brave_search.call(query="x")', None, []),
        ("llama3", f"Sure: {CALL}", None, []),  # bare objects count at the beginning alone
        ("llama3", '{"answer": {"name": "now"}}', None, []),
        ("llama3", "", "", []),
        ("mistral", f"[TOOL_CALLS] [{CALL}, {CALL}] ", "", [NOW, NOW]),
        ("mistral", f"[TOOL_CALLS][{CALL}, 5] ok", ", 5] ok", [NOW]),
        ("mistral", "[TOOL_CALLS][]", None, []),
        ("mistral", "[TOOL_CALLS]unknown{}", None, []),
        ("mistral", "[TOOL_CALLS] now, really", None, []),
        ("mistral", '[TOOL_CALLS]now {"zone": "UTC"}[TOOL_CALLS]now[ARGS]{"zone": "UTC"}', "", [NOW, NOW]),
    ],
)
def test_examples(format_name: str, text: str, content: str | None, calls: list[Call]) -> None:
    for cuts in ([], list(range(len(text)))):
        answer = Answer.of(feed(parser(format_name), text, cuts))
        assert calls_of(answer) == calls
        assert answer.content == (text if content is None else content)


def test_a_call_streams() -> None:
    stream = parser("hermes")
    assert stream.push('Hm <tool_call>{"name": "no') == [Content("Hm ")]
    assert stream.push('w", "arguments": ') == []
    start, *arguments = stream.push('{"zone": ')
    assert start == CallStart(0, start.id, "now") and arguments == [CallArguments(0, '{"zone": ')]
    assert stream.push('"UTC"}}') == [CallArguments(0, '"UTC"}'), CallEnd(0)]
    assert stream.push("\n</tool_call>") + stream.finish() == []


def test_a_call_that_breaks_after_its_start_comes_back_as_content() -> None:
    text = '<tool_call>{"name": "now", "arguments": {"zone": UTC}}'
    stream = parser("hermes")
    deltas = [*stream.push(text), *stream.finish()]
    assert merged(deltas)[:2] == [("start", 0, "now"), ("arguments", 0, '{"zone": ')]
    assert Answer.of(deltas) == Answer(content=text)


def test_ids_are_new_and_of_the_length_that_mistral_wants() -> None:
    for name, length in (("hermes", 29), ("mistral", 9)):
        calls = Answer.of(
            feed(parser(name), f"{MARKERS[name]}" + {"hermes": CALL, "mistral": f"[{CALL},{CALL}]"}[name], [])
        )
        ids = [call.id for call in calls.tool_calls]
        assert len(set(ids)) == len(ids) and {len(each) for each in ids} == {length}


@pytest.mark.parametrize(
    ("template", "calls", "reasons"),
    [
        ("{{ tools }}<tool_call>", "hermes", False),
        ("<tool_call> … </think>", "hermes", True),
        ("<tool_call>\n<function=f>", None, False),
        ("<|python_tag|>", "llama3", False),
        ('Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.',
         "llama3", False),
        ("[TOOL_CALLS]", "mistral", False),
        ("{{ messages }}", None, False),
        (None, None, False),
    ],
)  # fmt: skip
def test_the_template_says_the_format(template: str | None, calls: str | None, reasons: bool) -> None:
    form = answer_format(template)
    assert form.calls is (None if calls is None else FORMATS[calls])
    assert form.reasons == reasons


def test_the_format_can_be_named() -> None:
    form = answer_format("<tool_call></think>", tool_parser="mistral", reasoning_parser="none")
    assert form.calls is FORMATS["mistral"] and not form.reasons
    assert answer_format("<tool_call>", tool_parser="none", reasoning_parser="think").calls is None
    with pytest.raises(UsageError, match="tool_parser is 'x'; it must be one of auto, none, hermes"):
        answer_format(None, tool_parser="x")
    with pytest.raises(UsageError, match="reasoning_parser"):
        answer_format(None, reasoning_parser="x")
