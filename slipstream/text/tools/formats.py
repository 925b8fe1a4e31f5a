"""FORMATS: how models write calls; which of them a model uses."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from slipstream.errors import UsageError
from slipstream.text.tools import hermes, llama3, mistral, reasoning
from slipstream.text.tools.scanner import Scanner, Steps


@dataclass(frozen=True)
class ToolFormat:
    read: Callable[[Scanner], Steps[None]]
    new_id: Callable[[], str]
    arguments_key: str
    begin: tuple[str, ...]  # what the model writes before the first call, between two, and after the last one
    between: tuple[str, ...]
    end: tuple[str, ...]
    trigger: str  # what begins a call amid other text; where `begin` is empty, a call may also be how an answer begins
    in_template: tuple[str, ...]  # a chat template that holds one of these is of this format, …
    not_in_template: tuple[str, ...] = ()  # … unless it holds one of those


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _mistral_id() -> str:
    return secrets.token_hex(5)[:9]  # its templates refuse any other length


FORMATS = {
    "hermes": ToolFormat(
        hermes.read, _new_id, "arguments", hermes.BEGIN, hermes.BETWEEN, hermes.END, hermes.OPEN,
        in_template=(hermes.OPEN,), not_in_template=("<function=", "<arg_key>"),  # Qwen 3 Coder, GLM: not JSON
    ),
    "llama3": ToolFormat(
        llama3.read, _new_id, "parameters", llama3.BEGIN, llama3.BETWEEN, llama3.END, llama3.TAG,
        in_template=(llama3.TAG, '"parameters": dictionary of argument name'),
    ),
    "mistral": ToolFormat(
        mistral.read, _mistral_id, "arguments", mistral.BEGIN, mistral.BETWEEN, mistral.END, mistral.TAG,
        in_template=(mistral.TAG,),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class AnswerFormat:
    """How a model writes an answer."""

    calls: ToolFormat | None  # None: it knows no tools, or in a format that is not read here
    reasons: bool  # it may begin with <think>


def answer_format(template: str | None, tool_parser: str = "auto", reasoning_parser: str = "auto") -> AnswerFormat:
    """The format of a model with this chat template.

    tool_parser: hermes, llama3, mistral or none.  reasoning_parser: think or none.  auto: what the template says.
    Raises UsageError for another name.
    """
    for name, value, known in [
        ("tool_parser", tool_parser, ("auto", "none", *FORMATS)),
        ("reasoning_parser", reasoning_parser, ("auto", "none", "think")),
    ]:
        if value not in known:
            raise UsageError(f"{name} is {value!r}; it must be one of {', '.join(known)}.")
    template = template or ""
    calls = _named_in(template) if tool_parser == "auto" else FORMATS.get(tool_parser)
    is_known = reasoning.CLOSE in template
    return AnswerFormat(calls, is_known if reasoning_parser == "auto" else reasoning_parser == "think")


def _named_in(template: str) -> ToolFormat | None:
    for each in FORMATS.values():
        if any(sign in template for sign in each.in_template):
            return None if any(sign in template for sign in each.not_in_template) else each
    return None
