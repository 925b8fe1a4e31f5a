"""The endpoints of Anthropic's protocol."""

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from slipstream.serve.anthropic.answers import ErrorBody, MessageTurn
from slipstream.serve.anthropic.fields import CountFields, CreateFields
from slipstream.serve.chats import Chats
from slipstream.serve.document import STREAM, errors_as
from slipstream.serve.replies import json_response
from slipstream.serve.turns import reply


class Count(TypedDict):
    input_tokens: int


class Anthropic:
    """The protocol over one front."""

    def __init__(self, chats: Chats) -> None:
        self._chats = chats
        self.router = APIRouter(responses=errors_as(ErrorBody))
        self.router.post("/v1/messages", responses=STREAM)(self.create)
        self.router.post("/v1/messages/count_tokens", response_model=Count)(self.count)

    async def create(self, body: CreateFields, request: Request) -> Response:
        name = self._chats.checked_name(body.model)
        ask, reader = self._chats.ask(body.chat(), body.params)
        return await reply(request, self._chats.frontend, ask, MessageTurn(name, reader), bool(body.stream))

    async def count(self, body: CountFields) -> Response:
        self._chats.checked_name(body.model)
        count: Count = {"input_tokens": len(self._chats.prompt(body.chat()))}
        return json_response(count)
