"""Chats: a conversation, whatever protocol it came in, becomes a prompt and the reader of its answer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException

from slipstream.api.answers import AnswerReader
from slipstream.errors import RequestError
from slipstream.schema.sampling import SamplingParams
from slipstream.serve.frontend import Ask, Frontend
from slipstream.text.tools import AnswerFormat

_OWN_NAMES = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"}  # what a template gets anyway


@dataclass(frozen=True, kw_only=True)
class Chat:
    """What is asked; messages, tools and tool_choice in the form of OpenAI's chats."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    template_values: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    priority: int = 0
    cache_salt: str = ""


class Chats:
    """Over one front.

    names: what the model is called here; the first is the one that answers bear.  form: how it writes answers.
    """

    def __init__(self, frontend: Frontend, names: Sequence[str], form: AnswerFormat) -> None:
        self.frontend, self.names, self._form = frontend, names, form

    def checked_name(self, name: str | None) -> str:
        """The name that the answer bears. Raises HTTPException for a model that is not here."""
        if name is not None and name not in self.names:
            raise HTTPException(404, f"There is no model {name!r} here; there is {self.names[0]}.")
        return name or self.names[0]

    def prompt(self, chat: Chat) -> tuple[int, ...]:
        return self._prompt(chat, self._reader(chat))

    def ask(self, chat: Chat, sampling: Callable[[Mapping[str, Any]], SamplingParams]) -> tuple[Ask, AnswerReader]:
        """sampling: what is asked for, given the model's generation_config.json. Raises RequestError."""
        maker = self.frontend.maker
        reader = self._reader(chat)
        token_ids = self._prompt(chat, reader)
        params = reader.sampling(sampling(maker.facts.generation), token_ids, maker.tokenizer)
        return Ask(token_ids, params, None, chat.priority, chat.cache_salt), reader

    def _reader(self, chat: Chat) -> AnswerReader:
        return AnswerReader(self._form, chat.tools or None, chat.tool_choice, parallel=chat.parallel_tool_calls)

    def _prompt(self, chat: Chat, reader: AnswerReader) -> tuple[int, ...]:
        if own := sorted(_OWN_NAMES & chat.template_values.keys()):
            raise RequestError(f"chat_template_kwargs has {own[0]}, which the chat template gets anyway; leave it out.")
        maker = self.frontend.maker
        knows_developers = "developer" in (maker.chat_template or "")
        prompt = maker.chat_prompt(
            [dict(message) if knows_developers else _without_developers(message) for message in chat.messages],
            tools=reader.tools,
            add_generation_prompt=chat.add_generation_prompt,
            **chat.template_values,
        )
        return tuple(prompt)


def _without_developers(message: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's newer name of the system, which few templates have heard of."""
    return {**message, "role": "system"} if message.get("role") == "developer" else dict(message)
