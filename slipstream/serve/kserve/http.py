"""The protocol over HTTP, with Triton's generate, binary tensor, repository and statistics extensions."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from slipstream.errors import RequestError, SlipstreamError
from slipstream.serve.document import STREAM, Responses, errors_as
from slipstream.serve.kserve.bodies import (
    BINARY_TOO,
    InferFields,
    TensorFields,
    generate_document,
    infer_document,
)  # fmt: skip
from slipstream.serve.kserve.ensemble import INPUTS
from slipstream.serve.kserve.model import VERSION, Call, Model, Outputs
from slipstream.serve.kserve.tensors import Tensor, from_bytes, from_json
from slipstream.serve.replies import EventStream, Fault, fault_of, json_response, server_sent, unless_gone

JSON_LENGTH = "Inference-Header-Content-Length"  # of a body that goes on with the bytes of tensors


_NOT_READY: Responses = {503: {"description": "It is not ready."}}


class ErrorBody(TypedDict):
    error: str


def error_response(fault: Fault) -> Response:
    body: ErrorBody = {"error": fault.message}
    return json_response(body, fault.status, fault.headers)


class KServe:
    """The protocol over one front."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.router = APIRouter(responses=errors_as(ErrorBody))
        self.router.get("/v2/health/live", response_class=Response)(self.live)
        self.router.get("/v2/health/ready", response_class=Response, responses=_NOT_READY)(self.ready)
        self.router.get("/v2")(self.server_metadata)
        self.router.post("/v2/repository/index")(self.repository_index)
        post, generate = self.router.post, generate_document()
        self._route(post, "/infer", self.infer, responses=BINARY_TOO, openapi_extra=infer_document())
        self._route(post, "/generate", self.generate, openapi_extra=generate)
        streams: dict[str, Any] = {"response_class": Response, "responses": STREAM}
        self._route(post, "/generate_stream", self.generate_stream, **streams, openapi_extra=generate)
        self._route(self.router.get, "/ready", self.model_ready, response_class=Response, responses=_NOT_READY)
        self._route(self.router.get, "/config", self.model_config)
        self._route(self.router.get, "/stats", self.model_statistics)
        self._route(self.router.get, "", self.model_metadata)

    def _route(
        self, method: Callable[..., Any], action: str, endpoint: Callable[..., Awaitable[Response]], **said: Any
    ) -> None:
        """With a version and without; a name may hold slashes, so the longer form comes first."""
        for path in ("/v2/models/{name:path}/versions/{version}", "/v2/models/{name:path}"):
            method(path + action, **said)(endpoint)

    async def live(self) -> Response:
        return Response()

    async def ready(self) -> Response:
        return Response(status_code=200 if self._model.is_ready else 503)

    async def server_metadata(self) -> Response:
        return json_response(self._model.server_metadata())

    async def repository_index(self) -> Response:
        return json_response(self._model.index())

    async def model_ready(self, name: str, version: str = "") -> Response:
        self._model.check(name, version)
        return await self.ready()

    async def model_metadata(self, name: str, version: str = "") -> Response:
        self._model.check(name, version)
        return json_response(self._model.metadata(name))

    async def model_config(self, name: str, version: str = "") -> Response:
        self._model.check(name, version)
        return json_response(self._model.config(name))

    async def model_statistics(self, name: str, version: str = "") -> Response:
        self._model.check(name, version)
        return json_response(self._model.statistics(name))

    async def infer(self, request: Request, name: str, version: str = "") -> Response:
        self._model.check(name, version)
        body, rest = await _split_body(request)
        parameters = dict(body.parameters)
        all_binary = parameters.pop("binary_data_output", False)
        wanted = [output.name for output in body.outputs]
        call = await self._model.call(_tensors(body.inputs, rest), parameters, wanted, may_stream=False)
        outputs = await unless_gone(request, self._model.infer(call))
        head = {"model_name": name, "model_version": VERSION} | ({"id": body.id} if body.id else {})
        said = {output.name: output.parameters.binary_data for output in body.outputs}
        binary = [name for output in outputs if _or(said.get(name := output.name), all_binary)]
        return _infer_response(head, outputs, binary)

    async def generate(self, request: Request, name: str, version: str = "") -> Response:
        self._model.check(name, version)
        call, head = await self._generate_call(request, name, may_stream=False)
        return json_response(head | _plain(await unless_gone(request, self._model.infer(call))))

    async def generate_stream(self, request: Request, name: str, version: str = "") -> Response:
        self._model.check(name, version)
        call, head = await self._generate_call(request, name, may_stream=True)
        steps = self._model.run(call)
        first = await unless_gone(request, anext(steps))  # a request that is refused gets a status that says so
        return EventStream(_events(first, steps, head))

    async def _generate_call(self, request: Request, name: str, *, may_stream: bool) -> tuple[Call, dict[str, Any]]:
        """Inputs and parameters of a request, beside each other or in an object called parameters."""
        body = _object(await _body(request))
        request_id, nested = body.pop("id", ""), body.pop("parameters", {})
        if not isinstance(nested, dict) or not isinstance(request_id, str):
            raise RequestError("parameters must be an object and id a string.")
        for twice in body.keys() & nested.keys():
            raise RequestError(f"{twice} is given twice, in the body and in its parameters; give it once.")
        given = body | nested
        tensors = [_tensor(key, given.pop(key)) for key in list(given) if key in INPUTS]
        call = await self._model.call(tensors, given, may_stream=may_stream)
        if len(call.asks) > 1:
            raise RequestError(f"text_input has {len(call.asks)} prompts; send one, or several with infer.")
        head: dict[str, Any] = {"model_name": name, "model_version": VERSION}
        head |= {"sequence_end": False, "sequence_id": 0, "sequence_start": False}
        return call, head | ({"id": request_id} if request_id else {})


async def _body(request: Request) -> bytes:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise HTTPException(415, f"Content-Encoding is {encoding}; send the body as it is.")
    return await request.body()


def _object(raw: bytes) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(raw)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise RequestError("The body is not a JSON object; send one.")
    return body


async def _split_body(request: Request) -> tuple[InferFields, bytes]:
    """What is JSON, and the bytes behind it."""
    raw = await _body(request)
    length = request.headers.get(JSON_LENGTH, str(len(raw)))
    if not length.isdecimal() or int(length) > len(raw):
        raise RequestError(f"{JSON_LENGTH} is {length!r} and the body has {len(raw)} bytes; give how many are JSON.")
    end = int(length)
    try:
        return InferFields.model_validate(_object(raw[:end])), raw[end:]
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def _tensors(inputs: Sequence[TensorFields], rest: bytes) -> list[Tensor]:
    tensors, start = [], 0
    for given in inputs:
        size = given.parameters.binary_data_size
        if (size is None) == (given.data is None):
            raise RequestError(f"{given.name} needs either data or binary_data_size.")
        if size is None:
            tensors.append(from_json(given.name, given.datatype, given.shape, given.data))
            continue
        if size < 0 or start + size > len(rest):
            raise RequestError(f"{given.name} has binary_data_size {size}, but {len(rest) - start} bytes are left.")
        tensors.append(from_bytes(given.name, given.datatype, given.shape, rest[start : start + size]))
        start += size
    if start < len(rest):
        raise RequestError(f"{len(rest) - start} bytes at the end of the body belong to no input; leave them out.")
    return tensors


def _tensor(name: str, value: Any) -> Tensor:
    """Of generate: one value or a list of them, of one prompt."""
    values = value if isinstance(value, list) else [value]
    return Tensor(name, INPUTS[name].datatype, (len(values),), values)


def _or(said: bool | None, default: bool) -> bool:
    return default if said is None else said


def _infer_response(head: dict[str, Any], outputs: Sequence[Tensor], binary: Sequence[str]) -> Response:
    shown, rest = [], b""
    for tensor in outputs:
        entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
        if tensor.name in binary:
            raw = tensor.to_bytes()
            entry["parameters"] = {"binary_data_size": len(raw)}
            rest += raw
        else:
            entry["data"] = tensor.values
        shown.append(entry)
    text = msgspec.json.encode(head | {"outputs": shown})
    if not binary:
        return Response(text, media_type="application/json")
    return Response(text + rest, 200, {JSON_LENGTH: str(len(text))}, "application/octet-stream")


def _plain(outputs: Sequence[Tensor]) -> dict[str, Any]:
    """As generate writes them: one value by itself, several in a list."""
    return {each.name: each.values[0] if len(each.values) == 1 else each.values for each in outputs}


async def _events(
    first: Outputs, steps: AsyncGenerator[Outputs, None], head: dict[str, Any]
) -> AsyncGenerator[bytes, None]:
    async with aclosing(steps):
        try:
            yield server_sent(head | _plain(first[0]))
            async for outputs, _ in steps:
                yield server_sent(head | _plain(outputs))
        except SlipstreamError as error:
            yield server_sent({"error": fault_of(error).message})
