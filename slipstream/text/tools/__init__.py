"""From a model's text to tool calls and reasoning, and from tools to the text it must write.

    parser = AnswerParser(answer_format(template), names=check_tools(tools))
    for piece in stream:
        for delta in parser.push(piece): …
    for delta in parser.finish(): …

`hermes.py`, `llama3.py`, `mistral.py` and `reasoning.py` are the formats, each a generator over a `Scanner`;
`formats.py` lists them and finds a model's own from its chat template. `answer.py` runs them, `deltas.py` is what they
give; `schema.py` checks a request's tools and writes the grammar of an answer that has to call
one, `lazy.py` that of an answer that may.
"""

from slipstream.text.tools.answer import AnswerParser
from slipstream.text.tools.deltas import (
    Answer,
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Delta,
    Reasoning,
    ToolCall,
)
from slipstream.text.tools.formats import FORMATS, AnswerFormat, ToolFormat, answer_format
from slipstream.text.tools.lazy import any_is_strict, lazy_schema_of
from slipstream.text.tools.reasoning import is_begun_by
from slipstream.text.tools.schema import check_choice, check_tools, schema_of

__all__ = [
    "FORMATS",
    "Answer",
    "AnswerFormat",
    "AnswerParser",
    "CallArguments",
    "CallEnd",
    "CallStart",
    "Content",
    "Delta",
    "Reasoning",
    "ToolCall",
    "ToolFormat",
    "answer_format",
    "any_is_strict",
    "check_choice",
    "check_tools",
    "is_begun_by",
    "lazy_schema_of",
    "schema_of",
]
