"""The server as a whole: the protocols of this folder over one engine, its gate, its start and its end."""

import asyncio
import hmac
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream import __version__
from slipstream.errors import SlipstreamError, UsageError
from slipstream.serve.frontend import Frontend
from slipstream.serve.messages import Ready
from slipstream.serve.openai.routes import OpenAI, error_body
from slipstream.serve.replies import CLIENT_GONE, ClientGone, Fault, fault_of, json_response

OPEN_PATHS = ("/health",)  # for probes, which have no key


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What a server is told beside its model."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0 takes any that is free
    served_model_names: Sequence[str] = ()  # default: the model's own
    api_keys: Sequence[str] = ()  # any of them opens; none: everybody may
    cors_origins: Sequence[str] = ()
    max_body_bytes: int = 32 << 20
    max_queue_size: int = 1024
    chat_template: str | None = None
    step_timeout: float = 120.0  # seconds
    drain_timeout: float = 30.0  # seconds that requests in flight get after SIGTERM
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None


def run_server(options: Mapping[str, Any], config: ServeConfig, on_ready: Callable[[Ready, str], None]) -> None:
    """Serve until SIGTERM or SIGINT, then let the requests in flight finish.

    options: of LLM(...), plain values.  on_ready: called with what the engine is and the server's address.
    Raises UsageError for an address that cannot be had, StartFailed where the engine does not come up.
    """
    with _listen(config) as listener:
        asyncio.run(_serve(options, config, listener, on_ready))


def make_app(frontend: Frontend, config: ServeConfig) -> FastAPI:
    """The web application over a front that is ready."""
    app = FastAPI(title="Slipstream", version=__version__, redoc_url=None)
    names = list(config.served_model_names) or [frontend.maker.facts.name]
    app.include_router(OpenAI(frontend, names, started=int(time.time())).router)

    @app.get("/health")
    async def health() -> Response:
        """200 while the engine makes progress; its numbers with it."""
        is_healthy = frontend.is_healthy
        body = {"status": "ok" if is_healthy else "unhealthy", "engine": asdict(frontend.stats)}
        return json_response(body, 200 if is_healthy else 503)

    for kind in (SlipstreamError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _reply_with_fault)
    app.add_exception_handler(ClientGone, _reply_to_nobody)
    app.add_middleware(Gate, config=config)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


class Gate:
    """Before any endpoint: who may come in, and with how large a body."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._app = app
        self._keys = [key.encode() for key in config.api_keys]
        self._max_body_bytes = config.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not self._is_known(headers.get(b"authorization", b"")) and scope["path"] not in OPEN_PATHS:
            fault = Fault(401, "The API key is missing or not known; send Authorization: Bearer KEY.")
            await _fault_response(fault)(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            await _fault_response(self._too_large())(scope, receive, send)
            return
        await self._app(scope, self._counting(receive), send)

    def _is_known(self, authorization: bytes) -> bool:
        if not self._keys:
            return True
        kind, _, given = authorization.partition(b" ")
        found = [hmac.compare_digest(given.strip(), key) for key in self._keys]  # all of them, at equal cost
        return kind.lower() == b"bearer" and any(found)

    def _counting(self, receive: Receive) -> Receive:
        """A body without a length is cut off where it grows too large."""
        num_bytes = 0

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise HTTPException(413, self._too_large().message)
            return message

        return counted

    def _too_large(self) -> Fault:
        return Fault(413, f"The body has more than {self._max_body_bytes} bytes; send less (--max_body_size).")


def _fault_response(fault: Fault) -> Response:
    return json_response(error_body(fault), fault.status, fault.headers)


async def _reply_with_fault(_request: Request, error: Exception) -> Response:
    return _fault_response(fault_of(error))


async def _reply_to_nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _serve(
    options: Mapping[str, Any],
    config: ServeConfig,
    listener: socket.socket,
    on_ready: Callable[[Ready, str], None],
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    frontend = Frontend(
        options,
        max_queue_size=config.max_queue_size,
        chat_template=config.chat_template,
        step_timeout=config.step_timeout,
    )
    starting = asyncio.create_task(frontend.start())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            return
        await starting
        server = _Server(_uvicorn_config(make_app(frontend, config), config))
        serving = asyncio.create_task(server.serve([listener]))
        on_ready(frontend.engine, _url(config, listener))
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True  # takes no new connections, and waits for those in use
        await serving
    finally:
        for task in (starting, stopping):
            task.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)
        await frontend.close()


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours: uvicorn would raise them again once it has stopped, and the engine has to be ended."""
        yield


def _uvicorn_config(app: FastAPI, config: ServeConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=max(1, round(config.drain_timeout)),
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
    )


def _listen(config: ServeConfig) -> socket.socket:
    """Before the engine starts: an address that is taken shows at once."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{config.host}:{config.port} cannot be listened on ({reason}); give another --host or --port."
        ) from None


def _url(config: ServeConfig, listener: socket.socket) -> str:
    scheme = "https" if config.ssl_certfile else "http"
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"{scheme}://{host}:{listener.getsockname()[1]}"
