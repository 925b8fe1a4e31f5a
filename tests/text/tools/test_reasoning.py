"""<think>…</think>: with the opening tag in the answer or in the prompt."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.text.tools import FORMATS, Answer, AnswerFormat, AnswerParser, is_begun_by
from tests.text.tools.writers import CALLS, NAMES, TEXTS, Call, calls_of, feed, hermes

BOTH = AnswerFormat(FORMATS["hermes"], reasons=True)


@settings(max_examples=200, deadline=None)
@given(
    reasoning=TEXTS.map(lambda text: text.strip("\n")).filter(lambda text: "</think>" not in text),
    content=TEXTS.map(lambda text: text.lstrip("\n")),
    calls=st.lists(CALLS, max_size=2),
    in_prompt=st.booleans(),
    newlines=st.integers(0, 3),
    cuts=st.lists(st.integers(0, 300), max_size=12),
)
def test_reasoning_content_and_calls(
    reasoning: str, content: str, calls: list[Call], in_prompt: bool, newlines: int, cuts: list[int]
) -> None:
    opening = "" if in_prompt else "<think>"
    text = f"{opening}{chr(10) * newlines}{reasoning}\n</think>{chr(10) * newlines}{content}{hermes(calls, 0)}"
    deltas = feed(AnswerParser(BOTH, reasoning_in_prompt=in_prompt, names=NAMES), text, cuts)
    answer = Answer.of(deltas)
    assert (answer.reasoning, answer.content, calls_of(answer)) == (reasoning, content, calls)


@pytest.mark.parametrize(
    ("text", "in_prompt", "expected"),
    [
        ("Hello", False, Answer("Hello")),
        ("  Hello", False, Answer("  Hello")),
        ("Hello <think>a</think>", False, Answer("Hello <think>a</think>")),
        ("\n<think>a", False, Answer(reasoning="a")),  # cut off while it thinks
        ("a\n", True, Answer(reasoning="a\n")),
        ("</think>Hi", True, Answer("Hi")),
        ("<think>\n\n</think>\n\nHi", False, Answer("Hi")),
        ("a\n\nb\n</think>c</think>", True, Answer("c</think>", "a\n\nb")),
        (
            "<tool_call>" + hermes([("now", {})], 0) + "</think>x",
            True,
            Answer("x", "<tool_call>" + hermes([("now", {})], 0)),
        ),
    ],
)
def test_examples(text: str, in_prompt: bool, expected: Answer) -> None:
    for cuts in ([], list(range(len(text)))):
        deltas = feed(AnswerParser(BOTH, reasoning_in_prompt=in_prompt, names=NAMES), text, cuts)
        assert Answer.of(deltas) == expected
    assert AnswerParser(BOTH, reasoning_in_prompt=in_prompt, names=NAMES).read(text) == expected


def test_reasoning_waits_only_for_its_end() -> None:
    stream = AnswerParser(BOTH, reasoning_in_prompt=True)
    assert [Answer.of(stream.push(piece)).reasoning for piece in ("a", "\n", "b", "</th", "ing")] == [
        "a", "", "\nb", "", "</thing",
    ]  # fmt: skip


def test_without_formats_text_is_content() -> None:
    stream = AnswerParser(AnswerFormat(None, reasons=False), names=NAMES)
    assert Answer.of([*stream.push("<think><tool_call>"), *stream.finish()]) == Answer("<think><tool_call>")


def test_the_prompt_may_have_opened_it() -> None:
    assert is_begun_by("<|im_start|>assistant\n<think>\n")
    assert not is_begun_by("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not is_begun_by("<|im_start|>assistant\n")
