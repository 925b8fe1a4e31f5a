"""What models write: calls in each format, and tools to call. The other side of slipstream/text/tools."""

import json
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from slipstream.text.tools import FORMATS, Answer, AnswerFormat, AnswerParser, Delta

Call = tuple[str, dict[str, Any]]

NAMES = ("get_weather", "now", "get")

# Texts full of what is nearly a marker.
PIECES = st.sampled_from([
    "<", "<tool", "<tool_call", "</tool_call>", "<think", "</think", "[TOOL", "[TOOL_CALLS", "[ARGS]", "<|python",
    "{", "}", '"', "\\", ";", ",", "]", " ", "\n", "a", "é", "🙂", '{"name": "now"}',
])  # fmt: skip
TEXTS = st.lists(PIECES, max_size=8).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.tuples(st.sampled_from(NAMES), st.dictionaries(TEXTS, VALUES, max_size=3))


def call_json(call: Call, style: int, key: str = "arguments") -> str:
    """One call as an object; the style says in which order and with which white space."""
    name, arguments = call
    members: dict[str, Any] = {"name": name, key: arguments}
    if style % 2:
        members = {"type": "function", key: arguments, "name": name, "id": "abcdefghi"}
    return json.dumps(members, ensure_ascii=style % 3 == 0, indent=(None, 1)[style % 5 == 0])


def hermes(calls: list[Call], style: int) -> str:
    between, tag = ("\n", "")[style % 2], ("\n", "")[style % 3 == 0]
    return between.join(f"<tool_call>{tag}{call_json(call, style)}{tag}</tool_call>" for call in calls)


def llama3(calls: list[Call], style: int) -> str:
    return "<|python_tag|>" + (";", "; ")[style % 2].join(call_json(call, style, "parameters") for call in calls)


def mistral(calls: list[Call], style: int) -> str:
    return f"[TOOL_CALLS]{' ' * (style % 2)}[{', '.join(call_json(call, style) for call in calls)}]"


def mistral_named(calls: list[Call], style: int) -> str:
    middle = ("", "[ARGS]", "[CALL_ID]abc123456[ARGS]")[style % 3]
    return "".join(f"[TOOL_CALLS]{name}{middle}{json.dumps(arguments)}" for name, arguments in calls)


WRITERS = {
    "hermes": ("hermes", hermes),
    "llama3": ("llama3", llama3),
    "mistral": ("mistral", mistral),
    "mistral named": ("mistral", mistral_named),
}
MARKERS = {"hermes": "<tool_call>", "llama3": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}


def parser(format_name: str) -> AnswerParser:
    return AnswerParser(AnswerFormat(FORMATS[format_name], reasons=False), names=NAMES)


def feed(into: AnswerParser, text: str, cuts: list[int]) -> list[Delta]:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    deltas = [delta for start, end in pairwise(borders) for delta in into.push(text[start:end])]
    return deltas + into.finish()


def calls_of(answer: Answer) -> list[Call]:
    return [(call.name, json.loads(call.arguments)) for call in answer.tool_calls]
