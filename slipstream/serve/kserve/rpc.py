"""The protocol over gRPC. Its messages are those of tritonclient, which NVIDIA makes from the public .proto files:
there is no copy of ours to keep in step, and nothing to clash with where a program imports both.
"""
# ruff: noqa: N802 - the names of the service's methods

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import wraps
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from starlette.exceptions import HTTPException
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc as service

from slipstream.errors import RequestError, SlipstreamError
from slipstream.serve.app import ServeConfig
from slipstream.serve.keys import UNKNOWN, Keys
from slipstream.serve.kserve.model import VERSION, Model, Outputs
from slipstream.serve.kserve.tensors import Tensor, from_bytes, text_of
from slipstream.serve.replies import fault_of

_PREFIX = "/inference.GRPCInferenceService/"
OPEN_METHODS = (f"{_PREFIX}ServerLive", f"{_PREFIX}ServerReady")  # for probes, which have no key
MAX_UNSENT = 64  # responses of a stream whose reader is slow; then its requests wait with theirs

_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


async def start_rpc(model: Model, config: ServeConfig) -> grpc.aio.Server:
    """A server that listens on config.grpc_port; end it with its stop(seconds)."""
    server = grpc.aio.server(
        interceptors=[Gate(Keys(config.api_keys))],
        options=[
            ("grpc.so_reuseport", 1),  # every front listens on the port that the parent holds
            ("grpc.max_receive_message_length", config.max_body_bytes),
        ],
    )
    service.add_GRPCInferenceServiceServicer_to_server(Service(model), server)
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"{host}:{config.grpc_port}"
    if config.ssl_certfile and config.ssl_keyfile:
        pair = (Path(config.ssl_keyfile).read_bytes(), Path(config.ssl_certfile).read_bytes())
        server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    else:
        server.add_insecure_port(address)
    await server.start()
    return server


class Gate(grpc.aio.ServerInterceptor):
    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    async def intercept_service(self, continuation: Callable[..., Awaitable[Any]], details: Any) -> Any:
        if details.method in OPEN_METHODS or self._keys.open(_headers(details.invocation_metadata)):
            return await continuation(details)
        return grpc.stream_stream_rpc_method_handler(_refuse)  # a stream of one is what a single message is


def _headers(metadata: Sequence[tuple[str, str | bytes]]) -> Mapping[bytes, bytes]:
    return {name.encode(): value.encode() if isinstance(value, str) else value for name, value in metadata}


async def _refuse(_requests: Any, context: Any) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, UNKNOWN)


def _with_status(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Errors of ours leave as the status they mean."""

    @wraps(method)
    async def answered(self: "Service", request: Any, context: Any) -> Any:
        try:
            return await method(self, request, context)
        except (SlipstreamError, HTTPException) as error:
            fault = fault_of(error)
        return await context.abort(_STATUS.get(fault.status, grpc.StatusCode.INTERNAL), fault.message)

    return answered


class Service(service.GRPCInferenceServiceServicer):
    """What it does not define (loading models, shared memory, traces) answers UNIMPLEMENTED.

    A call whose client leaves, or whose deadline passes, is cancelled by grpc, which aborts what runs for it.
    """

    def __init__(self, model: Model) -> None:
        self._model = model

    async def ServerLive(self, _request: Any, _context: Any) -> Any:
        return messages.ServerLiveResponse(live=True)

    async def ServerReady(self, _request: Any, _context: Any) -> Any:
        return messages.ServerReadyResponse(ready=self._model.is_ready)

    async def ServerMetadata(self, _request: Any, _context: Any) -> Any:
        return ParseDict(self._model.server_metadata(), messages.ServerMetadataResponse())

    async def RepositoryIndex(self, _request: Any, _context: Any) -> Any:
        return ParseDict({"models": self._model.index()}, messages.RepositoryIndexResponse())

    @_with_status
    async def ModelReady(self, request: Any, _context: Any) -> Any:
        self._model.check(request.name, request.version)
        return messages.ModelReadyResponse(ready=self._model.is_ready)

    @_with_status
    async def ModelMetadata(self, request: Any, _context: Any) -> Any:
        self._model.check(request.name, request.version)
        return ParseDict(self._model.metadata(request.name), messages.ModelMetadataResponse())

    @_with_status
    async def ModelConfig(self, request: Any, _context: Any) -> Any:
        self._model.check(request.name, request.version)
        return ParseDict({"config": self._model.config(request.name)}, messages.ModelConfigResponse())

    @_with_status
    async def ModelStatistics(self, request: Any, _context: Any) -> Any:
        name = request.name or self._model.names[0]
        self._model.check(name, request.version)
        return ParseDict(self._model.statistics(name), messages.ModelStatisticsResponse())

    @_with_status
    async def ModelInfer(self, request: Any, _context: Any) -> Any:
        async with aclosing(self._run(request, may_stream=False)) as steps:
            responses = [_response(request, step) async for step in steps]
        return responses[0]

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], _context: Any) -> AsyncIterator[Any]:
        """The requests of one stream run side by side; what is answered bears its request's id."""
        responses: asyncio.Queue[Any] = asyncio.Queue(MAX_UNSENT)
        reader = asyncio.create_task(self._answer_all(requests, responses))
        try:
            while (response := await responses.get()) is not None:
                yield response
            await reader  # a defect of ours, where there was one
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _answer_all(self, requests: AsyncIterator[Any], responses: asyncio.Queue[Any]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                async for request in requests:
                    group.create_task(self._answer(request, responses))
        finally:
            await responses.put(None)

    async def _answer(self, request: Any, responses: asyncio.Queue[Any]) -> None:
        try:
            async with aclosing(self._run(request, may_stream=True)) as steps:
                async for step in steps:
                    response = _response(request, step)
                    response.parameters["triton_final_response"].bool_param = step[1]
                    await responses.put(messages.ModelStreamInferResponse(infer_response=response))
        except (SlipstreamError, HTTPException) as error:
            head = messages.ModelInferResponse(model_name=request.model_name, model_version=VERSION, id=request.id)
            await responses.put(
                messages.ModelStreamInferResponse(error_message=fault_of(error).message, infer_response=head)
            )

    async def _run(self, request: Any, *, may_stream: bool) -> Any:
        self._model.check(request.model_name, request.model_version)
        parameters = {
            name: getattr(value, value.WhichOneof("parameter_choice") or "int64_param")
            for name, value in request.parameters.items()
        }
        for output in request.outputs:
            _refuse_parameters(output)
        wanted = [output.name for output in request.outputs]
        call = await self._model.call(_tensors(request), parameters, wanted, may_stream=may_stream)
        async with aclosing(self._model.run(call)) as steps:
            async for step in steps:
                yield step


def _refuse_parameters(tensor: Any) -> None:
    for name in tensor.parameters:
        raise RequestError(f"{tensor.name} has the parameter {name}, which is not honoured here; leave it out.")


def _tensors(request: Any) -> list[Tensor]:
    raws = request.raw_input_contents
    if raws and len(raws) != len(request.inputs):
        raise RequestError(
            f"raw_input_contents has {len(raws)} entries for {len(request.inputs)} inputs; give one for each."
        )
    tensors = []
    for index, given in enumerate(request.inputs):
        _refuse_parameters(given)
        if raws:
            tensors.append(from_bytes(given.name, given.datatype, given.shape, raws[index]))
            continue
        values = getattr(given.contents, _CONTENTS.get(given.datatype, "bytes_contents"))
        if given.datatype == "BYTES":
            values = [text_of(given.name, value) for value in values]
        tensors.append(Tensor(given.name, given.datatype, tuple(given.shape), list(values)))
    return tensors


def _response(request: Any, step: Outputs) -> Any:
    response = messages.ModelInferResponse(model_name=request.model_name, model_version=VERSION, id=request.id)
    for tensor in step[0]:
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        response.raw_output_contents.append(tensor.to_bytes())
    return response
