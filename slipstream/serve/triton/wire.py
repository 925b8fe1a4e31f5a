"""Triton's requests, tensors and responses as plain values: all that knows the module of its Python backend.

That module exists only in a process of the server; so it is imported when first used.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from slipstream.errors import RequestError, SlipstreamError

Tensors = Mapping[str, np.ndarray]


def _backend() -> Any:
    import triton_python_backend_utils

    return triton_python_backend_utils


# --- what comes in ---


def parameters(args: Mapping[str, str]) -> dict[str, str]:
    """The `parameters` of a model's config.pbtxt, from what its initialize() is given."""
    found = json.loads(args["model_config"]).get("parameters", {})
    return {name: value["string_value"] for name, value in found.items()}


def is_decoupled(args: Mapping[str, str]) -> bool:
    return bool(json.loads(args["model_config"]).get("model_transaction_policy", {}).get("decoupled"))


class Inputs:
    """The input tensors of one request. Every reader raises RequestError for what has no meaning."""

    def __init__(self, request: Any) -> None:
        self._request = request

    @property
    def request_id(self) -> str:
        return str(self._request.request_id())

    def given(self) -> dict[str, np.ndarray]:
        return {tensor.name(): tensor.as_numpy() for tensor in self._request.inputs()}

    def array(self, name: str) -> np.ndarray | None:
        tensor = _backend().get_input_tensor_by_name(self._request, name)
        return None if tensor is None else np.asarray(tensor.as_numpy())

    def one(self, name: str) -> Any:
        """The only value of a tensor as Python's own; None where the tensor was not sent."""
        values = self.array(name)
        if values is None:
            return None
        if values.size != 1:
            raise RequestError(
                f"{name} holds {values.size} values; send one prompt a request, they are batched in flight."
            )
        value = values.reshape(-1)[0]
        if isinstance(value, np.floating):
            return float(str(value))  # 0.9 as it was written, not 0.8999999761581421
        return value.item() if isinstance(value, np.generic) else value

    def texts(self, name: str) -> list[str]:
        """Strings of any number, without the empty ones, which stand for none."""
        values = self.array(name)
        return [] if values is None else [text for text in map(_decode, values.reshape(-1)) if text]

    def text(self, name: str) -> str:
        return _decode(self.one(name))

    def refuse_parameters(self) -> None:
        """What is no input of the model comes as a parameter of the request: there are none that mean something."""
        for name in json.loads(self._request.parameters() or "{}"):
            raise RequestError(f"{name} is no input of this model; leave it out.")


def _decode(value: Any) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        raise RequestError("A text is not valid UTF-8; send it encoded so.") from None


# --- what goes out ---


def _tensors(values: Tensors) -> list[Any]:
    return [_backend().Tensor(name, np.ascontiguousarray(array)) for name, array in values.items()]


def _error(error: Exception) -> Any:
    kind = _backend().TritonError
    code = kind.INVALID_ARG if isinstance(error, RequestError) else kind.INTERNAL
    return kind(str(error) or type(error).__name__, code)


class Reply:
    """The way back of one request. Closed once its last response has been sent; for any number of threads.

    Asked whether a closed one was cancelled, the server would crash: it has forgotten the request by then.
    """

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()
        self.is_closed = False

    @property
    def is_cancelled(self) -> bool:
        """The client has left, as far as Triton tells: an ensemble passes it on to none of its steps."""
        with self._lock:
            return not self.is_closed and bool(self._sender.is_cancelled())

    def send(self, values: Tensors, is_last: bool) -> None:
        self._send(_backend().InferenceResponse(_tensors(values)), is_last)

    def fail(self, error: Exception) -> None:
        self._send(_backend().InferenceResponse(error=_error(error)), is_last=True)

    def close(self) -> None:
        """After the last response was sent as any other; once more does nothing."""
        self._send(None, is_last=True)

    def _send(self, response: Any, is_last: bool) -> None:
        with self._lock:
            if self.is_closed:
                return
            self.is_closed = is_last
            self._sender.send(response, flags=_backend().TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0)


def answer_each(requests: Sequence[Any], answer: Callable[[Inputs], Tensors]) -> list[Any]:
    """Responses of a model that answers at once; a request that fails leaves the others alone."""
    return [_answer(request, answer) for request in requests]


def _answer(request: Any, answer: Callable[[Inputs], Tensors]) -> Any:
    try:
        return _backend().InferenceResponse(_tensors(answer(Inputs(request))))
    except SlipstreamError as error:
        return _backend().InferenceResponse(error=_error(error))


class Gauge:
    """A number among the server's metrics."""

    def __init__(self, name: str, description: str) -> None:
        self._family = _backend().MetricFamily(name=name, description=description, kind=_backend().MetricFamily.GAUGE)
        self._metric = self._family.Metric(labels={})
        self._value: float | None = None

    def set(self, value: float) -> None:
        if value != self._value:  # each is a message to the server
            self._value = value
            self._metric.set(value)


# --- calling other models of the server ---


class CallFailed(SlipstreamError):
    """Another model of the server answered with an error."""


def call(model: str, values: Tensors, outputs: Sequence[str]) -> dict[str, np.ndarray]:
    """The response of another model. Raises CallFailed."""
    return _outputs(_request(model, values, outputs, "").exec())


def stream(model: str, values: Tensors, outputs: Sequence[str], request_id: str) -> Iterator[dict[str, np.ndarray]]:
    """The responses of another model, as they come, however many. Raises CallFailed."""
    for response in _request(model, values, outputs, request_id).exec(decoupled=True):
        tensors = _outputs(response)
        if tensors:  # the last response of a stream may be empty
            yield tensors


def _request(model: str, values: Tensors, outputs: Sequence[str], request_id: str) -> Any:
    return _backend().InferenceRequest(
        model_name=model, inputs=_tensors(values), requested_output_names=list(outputs), request_id=request_id
    )


def _outputs(response: Any) -> dict[str, np.ndarray]:
    if response.has_error():
        raise CallFailed(response.error().message())
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
