"""The endpoints of TGI's protocol."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from slipstream import __version__
from slipstream.api.handles import Handle
from slipstream.errors import RequestError, SlipstreamError
from slipstream.schema.sampling import MAX_SEQUENCES
from slipstream.serve.document import STREAM, errors_as
from slipstream.serve.frontend import Ask, Frontend, Steps, last_output
from slipstream.serve.replies import EventStream, Fault, fault_of, json_response, server_sent, unless_gone
from slipstream.serve.tgi.answers import Answer
from slipstream.serve.tgi.fields import MAX_STOPS, GenerateFields


class ErrorBody(TypedDict):
    error: str
    error_type: Literal["validation", "generation", "overloaded"]


def error_response(fault: Fault) -> Response:
    """With TGI's statuses: 422 for a request at fault, 424 for one that failed."""
    status = {400: 422, 500: 424, 503: 424, 504: 424}.get(fault.status, fault.status)
    kinds: dict[int, Literal["generation", "overloaded"]] = {424: "generation", 429: "overloaded"}
    body: ErrorBody = {"error": fault.message, "error_type": kinds.get(status, "validation")}
    return json_response(body, status, fault.headers)


class TGI:
    """The protocol over one front, whose model is called `name`. GET / is the web page's."""

    def __init__(self, frontend: Frontend, name: str) -> None:
        self._frontend, self._name = frontend, name
        self.router = APIRouter(responses=errors_as(ErrorBody))
        self.router.post("/", responses=STREAM)(self.generate_or_stream)
        self.router.post("/generate")(self.generate)
        self.router.post("/generate_stream", response_class=Response, responses=STREAM)(self.generate_stream)
        self.router.get("/info")(self.info)

    async def generate_or_stream(self, body: GenerateFields, request: Request) -> Response:
        if body.stream:
            return await self._stream(body, request)
        return await self._whole(body, request, in_list=True)

    async def generate(self, body: GenerateFields, request: Request) -> Response:
        return await self._whole(body, request)

    async def generate_stream(self, body: GenerateFields, request: Request) -> Response:
        return await self._stream(body, request)

    async def info(self) -> Response:
        engine = self._frontend.engine
        return json_response(
            {
                "model_id": self._name,
                "model_sha": None,
                "model_dtype": engine.dtype,
                "model_pipeline_tag": "text-generation",
                "max_concurrent_requests": engine.max_concurrent_requests,
                "max_best_of": MAX_SEQUENCES,
                "max_stop_sequences": MAX_STOPS,
                "max_input_tokens": self._frontend.max_input_len or engine.facts.max_seq_len - 1,
                "max_total_tokens": engine.facts.max_seq_len,
                "max_client_batch_size": 1,
                "router": "slipstream",
                "version": __version__,
                "sha": None,
                "docker_label": None,
            }
        )

    async def _whole(self, body: GenerateFields, request: Request, *, in_list: bool = False) -> Response:
        started = time.monotonic()
        ask, answer = await self._asked(body, streams=False)
        output = await unless_gone(request, last_output(self._frontend.generate([ask])))
        value: Any = answer.whole(output)
        headers = {
            "x-prompt-tokens": str(len(ask.token_ids)),
            "x-generated-tokens": str(sum(len(each.token_ids) for each in output.outputs)),
            "x-total-time": str(round(1000 * (time.monotonic() - started))),  # milliseconds
        }
        return json_response([value] if in_list else value, headers=headers)

    async def _stream(self, body: GenerateFields, request: Request) -> Response:
        ask, answer = await self._asked(body, streams=True)
        steps = self._frontend.generate([ask])
        first = await unless_gone(request, anext(steps))  # a request that is refused gets a status that says so
        return EventStream(_events(first, steps, answer))

    async def _asked(self, body: GenerateFields, *, streams: bool) -> tuple[Ask, Answer]:
        sampling, wanted = body.sampling(streams=streams), body.parameters
        token_ids = await self._frontend.encode(body.inputs)
        if wanted.truncate is not None:
            token_ids = token_ids[-wanted.truncate :]
        longest = self._frontend.maker.facts.max_seq_len
        num_new = sampling.max_tokens or 1
        if len(token_ids) + num_new > longest and wanted.max_new_tokens is not None:
            raise RequestError(
                f"inputs has {len(token_ids)} tokens and max_new_tokens is {num_new}; together they must be at most "
                f"{longest} (--max_seq_len)."
            )
        answer = Answer(body.inputs, wanted, sampling, self._frontend.maker.tokenizer)
        return Ask(token_ids, sampling, body.inputs), answer


async def _events(first: tuple[int, Handle], steps: Steps, answer: Answer) -> AsyncGenerator[bytes, None]:
    """Each token as it comes, until the last."""
    async with aclosing(steps):
        try:
            yield server_sent(*answer.events(first[1].output()))
            async for _, handle in steps:
                if events := server_sent(*answer.events(handle.output())):
                    yield events
        except SlipstreamError as error:
            yield server_sent({"error": fault_of(error).message, "error_type": "incomplete_generation"})
