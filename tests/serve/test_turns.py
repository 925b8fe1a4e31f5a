"""Answers in blocks where something goes wrong on the way: a call that is cut off or none, an engine that dies."""

from typing import Any

import pytest

from slipstream.api.answers import AnswerReader
from slipstream.api.outputs import CompletionOutput, RequestOutput
from slipstream.serve.anthropic.answers import MessageTurn
from slipstream.serve.openai.response_fields import CreateFields
from slipstream.serve.openai.responses import ResponseTurn
from slipstream.serve.replies import Fault
from slipstream.serve.turns import Turn
from slipstream.text.tools import FORMATS, AnswerFormat

TOOLS = [{"type": "function", "function": {"name": "now"}}]
BEGUN = 'Well.<tool_call>{"name": "now", "arguments": {"zone": '


def reader() -> AnswerReader:
    return AnswerReader(AnswerFormat(FORMATS["hermes"], reasons=False), TOOLS, "auto")


def message_turn() -> Turn:
    return MessageTurn("talker", reader())


def response_turn() -> Turn:
    from slipstream import SamplingParams

    return ResponseTurn(CreateFields(input="?"), SamplingParams(), None, "talker", reader())  # type: ignore[arg-type]


def output(text: str, text_diff: str, finish_reason: str | None) -> RequestOutput:
    completion = CompletionOutput(0, text, [1, 2], finish_reason=finish_reason, text_diff=text_diff)
    return RequestOutput("1", None, [3], [completion])


def streamed(turn: Turn, pieces: list[str], finish_reason: str) -> list[dict[str, Any]]:
    events = [event for piece in pieces for event in turn.events(output("", piece, None))]
    return events + list(turn.events(output("", "", finish_reason)))


def test_a_message_whose_call_was_cut_off() -> None:
    whole = message_turn().whole(output(BEGUN, BEGUN, "length"))
    assert whole["content"] == [{"type": "text", "text": BEGUN}] and whole["stop_reason"] == "max_tokens"
    events = streamed(message_turn(), [BEGUN[:9], BEGUN[9:]], "length")
    opened = [event for event in events if event["type"] == "content_block_start"]
    closed = [event["index"] for event in events if event["type"] == "content_block_stop"]
    assert [event["content_block"]["type"] for event in opened] == ["text", "tool_use", "text"]
    assert [event["index"] for event in opened] == closed == [0, 1, 2]
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"


def test_a_response_whose_call_is_none() -> None:
    text = BEGUN + "}}"
    whole = response_turn().whole(output(text, text, "stop"))
    (message,) = whole["output"]
    assert (message["content"][0]["text"], whole["status"]) == (text, "completed")
    events = streamed(response_turn(), [text[:9], text[9:]], "stop")
    items = events[-1]["response"]["output"]
    assert [(item["type"], item["status"]) for item in items] == [
        ("message", "completed"), ("function_call", "incomplete"), ("message", "completed")
    ]  # fmt: skip
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == items


@pytest.mark.parametrize(
    ("turn", "last"),
    [(message_turn, "error"), (response_turn, "response.failed")],
)
def test_a_stream_ends_with_its_protocols_error(turn: Any, last: str) -> None:
    one = turn()
    assert list(one.events(output("", "Well.", None)))
    (event,) = one.failing(Fault(503, "The engine died."))
    error = event["response"]["error"] if "response" in event else event["error"]
    assert (event["type"], error["message"]) == (last, "The engine died.")
