"""The web application of a front: the protocols of this folder over its engines, and the gate before them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slipstream import __version__
from slipstream.errors import SlipstreamError
from slipstream.serve.anthropic.answers import error_response as anthropic_error
from slipstream.serve.anthropic.routes import Anthropic
from slipstream.serve.chats import Chats
from slipstream.serve.frontend import Frontend
from slipstream.serve.keys import UNKNOWN, Keys
from slipstream.serve.kserve import http as kserve
from slipstream.serve.kserve.http import KServe
from slipstream.serve.kserve.model import Model
from slipstream.serve.metrics import metrics_router
from slipstream.serve.openai.embeddings import Embeddings
from slipstream.serve.openai.responses import Responses
from slipstream.serve.openai.routes import OpenAI, error_body
from slipstream.serve.operation import operation_router
from slipstream.serve.replies import CLIENT_GONE, ClientGone, Fault, fault_of, json_response
from slipstream.serve.tgi import routes as tgi
from slipstream.serve.tgi.routes import TGI
from slipstream.serve.web.routes import PATHS, web_router
from slipstream.text.tools import answer_format

OPEN_PATHS = ("/health", "/v2/health/live", "/v2/health/ready")  # for probes, which have no key

# Of what begins with this; OpenAI's is that of all else.
ERROR_FORMS = dict.fromkeys(("", "generate", "generate_stream", "info"), tgi.error_response) | {
    "v2": kserve.error_response,
    "v1/messages": anthropic_error,
}


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """What a server is told beside its model."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0 takes any that is free
    grpc_port: int | None = None  # of KServe's gRPC; alike
    replicas: int = 1  # engines that answer, each with devices or cores of its own
    max_replicas: int | None = None  # with those that are there while the load asks for them; default: no others
    upscale_delay: float = 10.0  # seconds that the load has to ask for one more
    downscale_delay: float = 300.0  # or has to need one fewer
    prefill_replicas: int = 0  # engines beside them that compute prompts
    num_fronts: int = 1  # processes that speak HTTP
    served_model_names: Sequence[str] = ()  # default: the model's own
    api_keys: Sequence[str] = ()  # any of them opens; none: everybody may
    cors_origins: Sequence[str] = ()
    max_body_bytes: int = 32 << 20
    max_queue_size: int = 1024
    max_concurrent_requests: int | None = None  # sequences that may run and wait; default: a batch and that queue
    max_input_len: int | None = None  # tokens of a prompt
    chat_template: str | None = None
    tool_parser: str = "auto"  # this and the next as text/tools/formats.py: answer_format has them
    reasoning_parser: str = "auto"
    request_timeout: float | None = None  # seconds, of requests that bring none of their own
    step_timeout: float = 120.0  # seconds
    iteration_log: str | None = None
    profile_dir: str | None = None
    otlp_endpoint: str | None = None
    drain_timeout: float = 30.0  # seconds that requests in flight get after SIGTERM
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    @property
    def most_replicas(self) -> int:
        return self.max_replicas or self.replicas

    @property
    def num_engines(self) -> int:
        """At most."""
        return self.most_replicas + self.prefill_replicas


def make_app(frontend: Frontend, config: ServeConfig) -> FastAPI:
    """The web application over a front that is ready."""
    # No pages of FastAPI's over /openapi.json: their scripts come from other servers.
    app = FastAPI(title="Slipstream", version=__version__, docs_url=None, redoc_url=None)
    names = list(config.served_model_names) or [frontend.maker.facts.name]
    chats = Chats(
        frontend, names, answer_format(frontend.maker.chat_template, config.tool_parser, config.reasoning_parser)
    )
    app.include_router(OpenAI(chats, started=int(time.time())).router)
    app.include_router(Embeddings(chats).router)
    app.include_router(Responses(chats).router)
    app.include_router(Anthropic(chats).router)
    app.include_router(TGI(frontend, names[0]).router)
    app.state.kserve = Model(frontend, names)  # gRPC has it, too
    app.include_router(KServe(app.state.kserve).router)
    app.include_router(metrics_router(frontend, names[0]))
    app.include_router(operation_router(frontend, may_profile=config.profile_dir is not None))
    app.include_router(web_router())

    if config.otlp_endpoint is not None:
        from slipstream.serve.tracing import Caller, Tracing  # needs an extra of its own

        frontend.watch = Tracing(config.otlp_endpoint, names[0]).watch
        app.add_middleware(Caller)
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
        self._keys = Keys(config.api_keys)
        self._max_body_bytes = config.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if not self._keys.open(headers) and not _needs_no_key(scope):
            await _fault_response(scope["path"], Fault(401, UNKNOWN))(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            await _fault_response(scope["path"], self._too_large())(scope, receive, send)
            return
        await self._app(scope, self._counting(receive), send)

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


def _needs_no_key(scope: Scope) -> bool:
    """POST / is TGI's, and GET the page's."""
    return scope["path"] in OPEN_PATHS or (scope["path"] in PATHS and scope["method"] in ("GET", "HEAD"))


def _fault_response(path: str, fault: Fault) -> Response:
    """In the form of the protocol that the path belongs to."""
    first, *more = path.strip("/").split("/")
    form = ERROR_FORMS.get("/".join([first, *more[:1]])) or ERROR_FORMS.get(first)
    return form(fault) if form else json_response(error_body(fault), fault.status, fault.headers)


async def _reply_with_fault(request: Request, error: Exception) -> Response:
    return _fault_response(request.url.path, fault_of(error))


async def _reply_to_nobody(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)
