"""The endpoints of OpenAI's protocol, and vLLM's /tokenize and /detokenize."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from slipstream.api.handles import Handle
from slipstream.errors import RequestError, SlipstreamError
from slipstream.serve.frontend import Ask, Frontend
from slipstream.serve.openai.answers import Answer, ChatAnswer, CompletionAnswer
from slipstream.serve.openai.fields import (
    ChatFields,
    CompletionFields,
    DetokenizeFields,
    MessageFields,
    SamplingFields,
    TemplateFields,
    TokenizeFields,
)  # fmt: skip
from slipstream.serve.replies import EventStream, Fault, fault_of, json_response, server_sent, unless_gone

Steps = AsyncGenerator[tuple[int, Handle], None]

_KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(fault: Fault) -> dict[str, Any]:
    kind = _KINDS.get(fault.status, "invalid_request_error" if fault.status < 500 else "server_error")
    return {"error": {"message": fault.message, "type": kind, "param": fault.field_name, "code": fault.status}}


class OpenAI:
    """The protocol over one front.

    names: what the model is called here; the first is the one that answers bear.  started: in Unix time.
    """

    def __init__(self, frontend: Frontend, names: Sequence[str], started: int) -> None:
        self._frontend, self._names, self._started = frontend, names, started
        self.router = APIRouter()
        self.router.get("/v1/models")(self.list_models)
        self.router.get("/v1/models/{name:path}")(self.show_model)
        self.router.post("/v1/completions")(self.complete)
        self.router.post("/v1/chat/completions")(self.chat)
        self.router.post("/tokenize")(self.tokenize)
        self.router.post("/detokenize")(self.detokenize)

    async def list_models(self) -> Response:
        return json_response({"object": "list", "data": [self._card(name) for name in self._names]})

    async def show_model(self, name: str) -> Response:
        return json_response(self._card(self._checked(name)))

    async def complete(self, body: CompletionFields, request: Request) -> Response:
        name, maker = self._checked(body.model), self._frontend.maker
        sampling = body.params(maker.facts.generation)
        asks = []
        for prompt in body.prompts():
            token_ids = await self._frontend.encode(prompt, body.add_special_tokens)
            text = prompt if isinstance(prompt, str) else None
            asks.append(Ask(token_ids, sampling, text, body.priority, body.cache_salt))
        return await self._answer(request, asks, CompletionAnswer(body, maker.optional_tokenizer, name))

    async def chat(self, body: ChatFields, request: Request) -> Response:
        name, maker = self._checked(body.model), self._frontend.maker
        sampling = body.params(maker.facts.generation)
        ask = Ask(self._chat_prompt(body.messages, body), sampling, None, body.priority, body.cache_salt)
        return await self._answer(request, [ask], ChatAnswer(body, maker.tokenizer, name))

    async def tokenize(self, body: TokenizeFields) -> Response:
        self._checked(body.model)
        tokenizer = self._frontend.maker.tokenizer
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("Give either prompt or messages to tokenize.")
        if body.messages is None:
            token_ids: Sequence[int] = tokenizer.encode(body.prompt or "", body.add_special_tokens is not False)
        elif body.add_special_tokens is None:
            token_ids = self._chat_prompt(body.messages, body)
        else:
            raise RequestError("add_special_tokens is for a prompt; a chat template writes its own, so leave it out.")
        shown = [tokenizer.token(each) for each in token_ids] if body.return_token_strs else None
        longest = self._frontend.maker.facts.max_seq_len
        return json_response(
            {"count": len(token_ids), "max_model_len": longest, "tokens": token_ids, "token_strs": shown}
        )

    async def detokenize(self, body: DetokenizeFields) -> Response:
        self._checked(body.model)
        maker = self._frontend.maker
        token_ids = maker.encode(body.tokens) if body.tokens else ()
        return json_response({"prompt": maker.tokenizer.decode(token_ids, skip_special_tokens=False)})

    async def _answer(self, request: Request, asks: Sequence[Ask], answer: Answer[Any]) -> Response:
        steps = self._frontend.generate(asks)
        if not answer.body.stream:
            return json_response(await unless_gone(request, _whole(steps, answer)))
        first = await unless_gone(request, anext(steps))  # a request that is refused gets a status that says so
        return EventStream(_events(first, steps, answer))

    def _checked(self, name: str | None) -> str:
        """The name that the answer bears. Raises HTTPException for a model that is not here."""
        if name is not None and name not in self._names:
            raise HTTPException(404, f"There is no model {name!r} here; there is {self._names[0]}.")
        return name or self._names[0]

    def _card(self, name: str) -> dict[str, Any]:
        longest = self._frontend.maker.facts.max_seq_len
        card = {"id": name, "object": "model", "created": self._started, "owned_by": "slipstream"}
        return card | {"max_model_len": longest}

    def _chat_prompt(self, messages: Sequence[MessageFields], template: TemplateFields) -> tuple[int, ...]:
        plain = [message.for_template() for message in messages]
        return tuple(self._frontend.maker.chat_prompt(plain, **template.template_values()))


async def _whole(steps: Steps, answer: Answer[SamplingFields]) -> dict[str, Any]:
    async with aclosing(steps):
        async for index, handle in steps:
            if handle.finished:
                answer.note(index, handle.output())
    return answer.whole()


async def _events(
    first: tuple[int, Handle], steps: Steps, answer: Answer[SamplingFields]
) -> AsyncGenerator[bytes, None]:
    """What is new after each step, until all have ended."""

    async def all_steps() -> Steps:
        yield first
        async for step in steps:
            yield step

    async with aclosing(steps):
        try:
            async for index, handle in all_steps():
                answer.note(index, handle.output())
                for chunk in answer.chunks(index):
                    yield server_sent(chunk)
            if answer.body.include_usage:
                yield server_sent(answer.usage_chunk())
        except SlipstreamError as error:
            yield server_sent(error_body(fault_of(error)))
        yield b"data: [DONE]\n\n"
