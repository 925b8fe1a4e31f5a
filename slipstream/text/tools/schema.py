"""The tools of a request (OpenAI's list), and what an answer must look like that has to call one."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from slipstream.errors import RequestError
from slipstream.text.tools import reasoning
from slipstream.text.tools.formats import ToolFormat

_NAME = re.compile(r"[\w.:/-]{1,128}", re.ASCII)
ANY_OBJECT = {"type": "object"}


def check_tools(tools: Any) -> dict[str, Mapping[str, Any]]:
    """The JSON schema of each tool's arguments, by name. Raises RequestError for what is no list of tools."""
    if not isinstance(tools, Sequence) or isinstance(tools, str) or not tools:
        raise RequestError("tools must be a list of at least one {'type': 'function', 'function': {'name': …}}.")
    schemas: dict[str, Mapping[str, Any]] = {}
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping):
            raise RequestError(f"tools[{index}] must be {{'type': 'function', 'function': {{'name': …}}}}.")
        name, parameters = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RequestError(
                f"tools[{index}] has the name {name!r}; use letters, digits and _ - . : / such as 'now'."
            )
        if name in schemas:
            raise RequestError(f"tools has two functions of the name {name!r}; give each its own.")
        if not isinstance(parameters, Mapping | None):
            raise RequestError(f"tools[{index}] has parameters that are no JSON schema; give {{'type': 'object', …}}.")
        schemas[name] = parameters or ANY_OBJECT
    return schemas


def check_choice(tools: Any, choice: Any) -> str | None:
    """The tool that tool_choice names, if it names one. Raises RequestError for what is no choice of these tools."""
    if choice in ("auto", "none", "required"):
        return None
    schemas = check_tools(tools)
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name not in schemas:
        raise RequestError(
            f"tool_choice is {choice!r}; it must be auto, none, required or "
            f"{{'type': 'function', 'function': {{'name': {next(iter(schemas))!r}}}}}, one of tools."
        )
    return name


def schema_of(
    tools: Any,
    choice: Any,
    form: ToolFormat,
    *,
    parallel: bool = True,
    reasons: bool = False,
    reasoning_in_prompt: bool = False,
    special_ids: Mapping[str, int] | None = None,
) -> str:
    """A grammar (llguidance's Lark) of the answers that call a tool: any and often ("required"), or once the named one.

    parallel: any may be called more than once.
    The calls are in the model's own format, so what reads its other answers reads these.
    reasons: the answer may think first.  reasoning_in_prompt: it thinks already, as the prompt ends with <think>.
    special_ids: the ids of tokens that are no text: a marker among them is one token in the grammar, too.
    Raises RequestError for tools or a choice that are none.
    """
    named = check_choice(tools, choice)
    schemas = check_tools(tools)
    objects = [_call_schema(name, schemas[name], form) for name in ([named] if named else schemas)]

    def literals(pieces: Sequence[str]) -> str:
        return " ".join(_literal(piece, special_ids or {}) for piece in pieces)

    more = "" if named or not parallel else f"({literals(form.between)} call)*"
    rules = [
        f"start: {'thought ' if reasons else ''}{literals(form.begin)} call {more} {literals(form.end)}",
        f"call: {' | '.join(f'%json {json.dumps(each)}' for each in objects)}",
    ]
    if reasons:
        thought = r'thinking "\n"*'
        begun = thought if reasoning_in_prompt else f'("{reasoning.OPEN}" {thought})?'
        closing = reasoning.CLOSE.replace("/", r"\/")
        rules += [f"thought: {begun}", f"thinking[lazy]: /(?s:.*){closing}/"]
    return "\n".join(rules) + "\n"


def _call_schema(name: str, arguments: Mapping[str, Any], form: ToolFormat) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, form.arguments_key: arguments},
        "required": ["name", form.arguments_key],
        "additionalProperties": False,
    }


def _literal(text: str, special_ids: Mapping[str, int]) -> str:
    return f"<[{special_ids[text]}]>" if text in special_ids else json.dumps(text)
