"""The endpoints of OpenAI's protocol, and vLLM's /tokenize and /detokenize."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from slipstream.api.handles import Handle
from slipstream.errors import RequestError, SlipstreamError
from slipstream.serve.chats import Chats
from slipstream.serve.document import STREAM, errors_as
from slipstream.serve.frontend import Ask, Steps
from slipstream.serve.openai.answers import Answer, ChatAnswer, CompletionAnswer
from slipstream.serve.openai.fields import (
    ChatFields,
    CompletionFields,
    DetokenizeFields,
    SamplingFields,
    TokenizeFields,
    prompts_of,
)  # fmt: skip
from slipstream.serve.replies import EventStream, Fault, fault_of, json_response, server_sent, unless_gone

_KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ErrorOfBody(TypedDict):
    message: str
    type: str
    param: str | None  # the part of the body at fault
    code: int  # the status


class ErrorBody(TypedDict):
    error: ErrorOfBody


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int  # in Unix time
    owned_by: str
    max_model_len: int


class Models(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Tokens(TypedDict):
    count: int
    max_model_len: int
    tokens: Sequence[int]
    token_strs: list[str] | None


class Text(TypedDict):
    prompt: str


def error_body(fault: Fault) -> ErrorBody:
    kind = _KINDS.get(fault.status, "invalid_request_error" if fault.status < 500 else "server_error")
    return {"error": {"message": fault.message, "type": kind, "param": fault.field_name, "code": fault.status}}


class OpenAI:
    """The protocol over one front.  started: in Unix time."""

    def __init__(self, chats: Chats, started: int) -> None:
        self._chats, self._frontend, self._started = chats, chats.frontend, started
        self.router = APIRouter(responses=errors_as(ErrorBody))
        self.router.get("/v1/models", response_model=Models)(self.list_models)
        self.router.get("/v1/models/{name:path}", response_model=Model)(self.show_model)
        self.router.post("/v1/completions", responses=STREAM)(self.complete)
        self.router.post("/v1/chat/completions", responses=STREAM)(self.chat)
        self.router.post("/tokenize", response_model=Tokens)(self.tokenize)
        self.router.post("/detokenize", response_model=Text)(self.detokenize)

    async def list_models(self) -> Response:
        models: Models = {"object": "list", "data": [self._card(name) for name in self._chats.names]}
        return json_response(models)

    async def show_model(self, name: str) -> Response:
        return json_response(self._card(self._chats.checked_name(name)))

    async def complete(self, body: CompletionFields, request: Request) -> Response:
        name, maker = self._chats.checked_name(body.model), self._frontend.maker
        sampling = body.params(maker.facts.generation)
        prompts = prompts_of("prompt", body.prompt)
        encoded = await self._frontend.encode_all(prompts, body.add_special_tokens)
        asks = []
        for prompt, token_ids in zip(prompts, encoded, strict=True):
            text = prompt if isinstance(prompt, str) else None
            asks.append(Ask(token_ids, sampling, text, body.priority, body.cache_salt))
        return await self._answer(request, asks, CompletionAnswer(body, maker.optional_tokenizer, name))

    async def chat(self, body: ChatFields, request: Request) -> Response:
        name = self._chats.checked_name(body.model)
        ask, reader = self._chats.ask(body.chat(), body.params)
        return await self._answer(request, [ask], ChatAnswer(body, self._frontend.maker.tokenizer, name, reader))

    async def tokenize(self, body: TokenizeFields) -> Response:
        self._chats.checked_name(body.model)
        tokenizer = self._frontend.maker.tokenizer
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("Give either prompt or messages to tokenize.")
        if body.messages is None:
            token_ids: Sequence[int] = tokenizer.encode(body.prompt or "", body.add_special_tokens is not False)
        elif body.add_special_tokens is None:
            token_ids = self._chats.prompt(body.chat_of(body.messages))
        else:
            raise RequestError("add_special_tokens is for a prompt; a chat template writes its own, so leave it out.")
        shown = [tokenizer.token(each) for each in token_ids] if body.return_token_strs else None
        longest = self._frontend.maker.facts.max_seq_len
        tokens: Tokens = {
            "count": len(token_ids), "max_model_len": longest, "tokens": token_ids, "token_strs": shown
        }  # fmt: skip
        return json_response(tokens)

    async def detokenize(self, body: DetokenizeFields) -> Response:
        self._chats.checked_name(body.model)
        maker = self._frontend.maker
        token_ids = maker.encode(body.tokens) if body.tokens else ()
        text: Text = {"prompt": maker.tokenizer.decode(token_ids, skip_special_tokens=False)}
        return json_response(text)

    async def _answer(self, request: Request, asks: Sequence[Ask], answer: Answer[Any]) -> Response:
        steps = self._frontend.generate(asks)
        if not answer.body.stream:
            return json_response(await unless_gone(request, _whole(steps, answer)))
        first = await unless_gone(request, anext(steps))  # a request that is refused gets a status that says so
        return EventStream(_events(first, steps, answer))

    def _card(self, name: str) -> Model:
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "slipstream",
            "max_model_len": self._frontend.maker.facts.max_seq_len,
        }


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
                if chunks := server_sent(*answer.chunks(index)):
                    yield chunks
            if answer.body.include_usage:
                yield server_sent(answer.usage_chunk())
        except SlipstreamError as error:
            yield server_sent(error_body(fault_of(error)))
        yield b"data: [DONE]\n\n"
