"""The grammar of an answer that may call a tool: any text, but what begins as a call goes on as one of these tools'.

Lexemes are read side by side. TEXT never holds what begins a call, and TRIGGER ends with it, at once; so text goes on
freely until that comes, and from there on the grammar says what the call is. HEAD0, HEAD1, … are a call up to its
arguments. Each begins with the blanks before it: apart from it they would be TEXT, and lexemes are as long as can be.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from slipstream.text.tools import reasoning
from slipstream.text.tools.formats import ToolFormat
from slipstream.text.tools.schema import ANY_OBJECT, check_tools

_ANYTHING = "(?s:.*)"
_BLANKS = r"[ \t\r\n]{0,20}"
_BEGINS_THOUGHT = rf"[ \t\r\n]*{reasoning.OPEN}{_ANYTHING}"
# What may be read as a call where no marker came before it: a first one, and a further one.
_BEGINS_CALL = (rf'[ \t\r\n]*\{{[ \t\r\n]*"(name|id|type|arguments|parameters)"{_ANYTHING}', rf"[ \t\r\n]*;{_ANYTHING}")


def any_is_strict(tools: Sequence[Mapping[str, Any]] | None) -> bool:
    """Whether calls have to follow their schemas also where an answer may call or not. Of tools that were checked."""
    return any(tool["function"].get("strict") for tool in tools or ())


def lazy_schema_of(
    tools: Sequence[Mapping[str, Any]],
    form: ToolFormat,
    *,
    parallel: bool = True,
    reasons: bool = False,
    reasoning_in_prompt: bool = False,
    special_ids: Mapping[str, int] | None = None,
) -> str:
    """A grammar (llguidance's Lark) of the answers to tool_choice "auto".

    Arguments of a strict tool follow its schema, those of another are any object.
    Raises RequestError for tools that are none.  The others are as schema_of has them.
    """
    special_ids = special_ids or {}
    may_be_bare = not form.begin  # and then what follows the marker need not be a call
    first, marked = ("calls? ", "calls?") if may_be_bare else ("", "calls")
    heads, calls = _call_rules(tools, form)
    never = [
        *(_BEGINS_CALL if may_be_bare else ()),
        *([_BEGINS_THOUGHT] if reasons and not reasoning_in_prompt else ()),
    ]
    thought = "thought" if reasoning_in_prompt else "thought?"
    return "\n".join(
        [
            f"start: {f'{thought} answer | UNENDED' if reasons else 'answer'}",
            f"answer: {first}(to_call {marked}){'*' if parallel else '?'} text",
            f"calls: {_calls(form, parallel, special_ids)}",
            f"call: {' | '.join(calls)}",
            *heads,
            *_text_rules(form.trigger, never, special_ids),
            *(_thought_rules(reasoning_in_prompt) if reasons else ()),
            "",
        ]
    )


def _call_rules(tools: Sequence[Mapping[str, Any]], form: ToolFormat) -> tuple[list[str], list[str]]:
    """The terminals of the heads, and the calls."""
    heads, calls = [], []
    strict = {tool["function"]["name"] for tool in tools if tool["function"].get("strict")}
    for index, (name, schema) in enumerate(check_tools(tools).items()):
        kind = "(" + _words('"type"', ":", '"function"', ",") + ")?"  # Llama 3 sometimes says so
        named = _words('"name"', ":", json.dumps(name), ",", f'"{form.arguments_key}"', ":")
        heads.append(f"HEAD{index}: " + _regex(_words("{") + kind + named + _BLANKS))
        arguments = json.dumps(schema if name in strict else ANY_OBJECT)
        calls.append(f"HEAD{index} %json {arguments} {_regex(_words('}'))}")
    return heads, calls


def _calls(form: ToolFormat, parallel: bool, special_ids: Mapping[str, int]) -> str:
    """What comes after the trigger."""

    def marks(pieces: Sequence[str]) -> list[str]:
        found = [word for piece in pieces if (word := piece.strip())]
        return [_marker(word, special_ids) or _regex(_words(word)) for word in found]

    further = ["(", *marks(form.between), "call", ")*"] if parallel and form.trigger not in form.between else []
    return " ".join([*marks(form.begin[1:]), "call", *further, *marks(form.end)])


def _text_rules(trigger: str, never: Sequence[str], special_ids: Mapping[str, int]) -> list[str]:
    """Text, with all special tokens but the trigger in it.  never: patterns of what is no text."""
    others = sorted(token_id for token, token_id in special_ids.items() if token != trigger)
    other = f"<[{','.join(map(str, others))}]>"
    rules = [f"text: TEXT ({other} TEXT)*" if others else "text: TEXT"]
    if marker := _marker(trigger, special_ids):
        return [*rules, f"to_call: text {marker}", f"TEXT: {_regex(_ANYTHING, *never)}"]
    up_to_trigger = _ANYTHING + re.escape(trigger)
    return [
        *rules,
        f"to_call: (TEXT {other})* to_trigger" if others else "to_call: to_trigger",
        "to_trigger[lazy]: TRIGGER",
        f"TRIGGER: {_regex(up_to_trigger, *never)}",
        f"TEXT: {_regex(_ANYTHING, *never, up_to_trigger + _ANYTHING)}",
    ]


def _thought_rules(in_prompt: bool) -> list[str]:
    """Reasoning up to its end, in which no call is one, or all of an answer that does not come to it."""
    begun = _ANYTHING if in_prompt else _BEGINS_THOUGHT
    return [
        "thought[lazy]: THOUGHT",
        f"THOUGHT: {_regex(begun + reasoning.CLOSE)}",
        f"UNENDED: {_regex(begun, _ANYTHING + reasoning.CLOSE + _ANYTHING)}",
    ]


def _marker(text: str, special_ids: Mapping[str, int]) -> str | None:
    return f"<[{special_ids[text]}]>" if text in special_ids else None


def _words(*words: str) -> str:
    return "".join(_BLANKS + re.escape(word) for word in words)


def _regex(pattern: str, *excluded: str) -> str:
    """All that matches the pattern as a whole and none of the excluded ones."""
    slash = r"\/"
    return " & ~".join(f"/{each.replace('/', slash)}/" for each in (pattern, *excluded))
