"""Renders chat messages into a prompt with the model's Jinja template (run in the sandbox of `sandbox.py`)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from slipstream.errors import ModelError, RequestError


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    /,
    *,
    bos_token: str | None,
    eos_token: str | None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **extra: Any,
) -> str:
    """Returns the prompt, equal to transformers' `apply_chat_template(tokenize=False)`.

    messages: dicts with `role` (str) and `content` (str, None or a list of parts); other keys reach the template too.
    tool_calls and results may be as OpenAI's clients send them (`_as_templates_expect`).  tools: OpenAI's list.
    add_generation_prompt: end with the words that start an answer.  extra: further names for the template, such as
    `enable_thinking` or `documents`.  Encode the result with `add_special_tokens=False`: templates write their own.

    Raises ModelError where the model has no template, RequestError for messages or a template that cannot be rendered.
    """
    if template is None:
        raise ModelError("The model has no chat template; give one with --chat_template FILE, or send a plain prompt.")
    _check_messages(messages)
    special = {"bos_token": bos_token, "eos_token": eos_token}
    context = {
        "documents": None,
        **{name: token for name, token in special.items() if token is not None},  # an unknown name renders as ""
        **extra,
        "messages": _as_templates_expect(messages),
        "tools": tools,
        "add_generation_prompt": add_generation_prompt,
    }
    from slipstream.text.sandbox import render

    try:
        # A copy made of plain values only: no method of a caller's class can be reached from the template.
        return render(template, json.loads(json.dumps(context)))
    except Exception as error:  # a template can raise anything: TypeError, OverflowError, RecursionError, …
        reason = " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__
        raise RequestError(f"The chat template cannot render these messages: {reason}.") from error


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError("messages must be a list of at least one {'role': …, 'content': …}.")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{index}] must be a dict with a role such as 'user'.")
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if not (content is None or isinstance(content, str | list)) or any(
            not isinstance(p, str | dict) for p in parts
        ):
            raise RequestError(f"messages[{index}]['content'] must be a string, null or a list of content parts.")


def _as_templates_expect(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Arguments that are JSON text become objects; a tool's result gets its function's name; no empty tool_calls."""
    names: dict[str, Any] = {}  # of functions, by the id of their call
    result = []
    for index, message in enumerate(messages):
        message = dict(message)
        calls = message.pop("tool_calls", None)
        if not isinstance(calls, list | None):
            raise RequestError(f"messages[{index}]['tool_calls'] must be a list.")
        if calls:
            message["tool_calls"] = [_with_object(call, index) for call in calls]
            names.update((str(call.get("id")), _function(call).get("name")) for call in calls if _function(call))
        if message["role"] == "tool" and message.get("name") is None and str(message.get("tool_call_id")) in names:
            message["name"] = names[str(message["tool_call_id"])]
        result.append(message)
    return result


def _with_object(call: Any, index: int) -> Any:
    function = _function(call)
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(arguments)}}
    except (ValueError, RecursionError):
        raise RequestError(
            f"messages[{index}] has a tool call whose arguments are no JSON: {arguments[:200]!r}."
        ) from None


def _function(call: Any) -> Mapping[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    return function if isinstance(function, Mapping) else {}
