"""How answers and errors leave: as JSON, as a stream of server-sent events, or not at all where nobody listens."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from slipstream.errors import ModelError, RequestError
from slipstream.serve.connection import EngineDown
from slipstream.serve.frontend import Busy, TimedOut

T = TypeVar("T")

CLIENT_GONE = 499  # nginx's status for its log; nobody receives it


class ClientGone(Exception):
    """The client closed its connection before the answer."""


@dataclass(frozen=True)
class Fault:
    """An error as HTTP has it; each protocol writes its own body."""

    status: int
    message: str
    field_name: str | None = None  # the part of the body at fault
    headers: dict[str, str] = field(default_factory=dict)


def fault_of(error: Exception) -> Fault:
    match error:
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            return Fault(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        case RequestError() | ModelError():
            return Fault(400, str(error))
        case Busy():
            return Fault(429, str(error), headers={"Retry-After": "1"})
        case TimedOut():
            return Fault(504, str(error))
        case EngineDown():
            return Fault(503, str(error), headers={"Retry-After": "5"})
        case _:
            return Fault(500, str(error) or type(error).__name__)


def _invalid(error: RequestValidationError) -> Fault:
    """One sentence on the first thing wrong; of several readings of a field the one that went furthest."""
    found = max(error.errors(), key=lambda each: len(each["loc"]))
    places = [str(each) for each in found["loc"] if each != "body" and "[" not in str(each)]  # not types of unions
    name = ".".join(places)
    match found["type"]:
        case "json_invalid":
            return Fault(400, "The body is not JSON; send an object, with Content-Type: application/json.")
        case "extra_forbidden":
            return Fault(400, f"{name} is not a field of this endpoint; leave it out.", name)
        case "union_tag_invalid":
            tag, known = found["ctx"]["tag"], found["ctx"]["expected_tags"].replace("'", "")
            return Fault(400, f"{name}.type is {tag!r}; it must be one of {known}.", f"{name}.type")
        case "missing":
            return Fault(400, f"{name or 'The body'} is missing; it is required.", name or None)
        case "value_error":
            return Fault(400, found["msg"].removeprefix("Value error, "), name or None)
        case _:
            return Fault(400, f"{name or 'The body'}: {found['msg']}.", name or None)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def server_sent(*values: Any) -> bytes:
    """Events that leave together: each write of its own would take longer than all that is in it."""
    return b"".join(b"data: " + msgspec.json.encode(value) + b"\n\n" for value in values)


class EventStream(StreamingResponse):
    """Server-sent events. Its source is closed whenever the client leaves, which aborts the requests behind it."""

    def __init__(self, source: AsyncGenerator[bytes, None]) -> None:
        super().__init__(source, headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Without the tasks that Starlette's own needs for the same."""
        with suppress(ClientGone):
            await unless_gone(Request(scope, receive), self.stream_response(send))

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self._source):
            await super().stream_response(send)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The work's result; it is cancelled where the client leaves first (ClientGone).

    The work is done in the caller's own task: what it begins with is done at once, before other requests are looked at.
    """
    working = asyncio.current_task()
    assert working is not None
    has_left = is_over = False

    def cancel(leaving: asyncio.Task[None]) -> None:
        nonlocal has_left
        if not is_over and not leaving.cancelled():
            has_left = True
            working.cancel()

    leaving = asyncio.create_task(_leaving(request))
    leaving.add_done_callback(cancel)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and not working.uncancel():  # else somebody else has cancelled it, too
            raise ClientGone from None
        raise
    finally:
        is_over = True
        leaving.cancel()


async def _leaving(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
