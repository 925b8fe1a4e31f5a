"""OpenTelemetry: a span a request, in the caller's trace where its headers name one.

Attributes are those of the semantic conventions for generative AI; no text is in them. The SDK's own environment
variables (OTEL_SERVICE_NAME, OTEL_BSP_SCHEDULE_DELAY, …) are heeded.
"""

import os
import time
from collections.abc import Sequence
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Receive, Scope, Send

from slipstream.api.handles import Handle
from slipstream.schema.sampling import SamplingParams
from slipstream.serve.frontend import Ask, Steps

CHATS = ("/chat/completions", "/messages", "/responses")  # what their paths end with

_caller: ContextVar[tuple[str, dict[str, str]]] = ContextVar("caller", default=("", {}))  # path and headers


class Caller:
    """Lets the spans of a request know where it comes from."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            _caller.set((scope["path"], headers))
        await self._app(scope, receive, send)


class Tracing:
    def __init__(self, endpoint: str, model_name: str) -> None:
        """endpoint: of OTLP over HTTP, such as http://localhost:4318. Spans are sent now and then, and at the exit."""
        self._model_name = model_name
        resource = Resource.create({SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME", "slipstream")})
        provider = TracerProvider(resource=resource)
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = provider.get_tracer("slipstream")

    async def watch(self, asks: Sequence[Ask], steps: Steps) -> Steps:
        """The same steps of a call; each ask is a span."""
        spans = [self._begin(ask) for ask in asks]
        started = time.monotonic()
        handles: dict[int, Handle] = {}
        try:
            async with aclosing(steps):
                async for index, handle in steps:
                    if index not in handles:
                        seconds = time.monotonic() - started
                        spans[index].set_attribute("gen_ai.response.time_to_first_chunk", seconds)
                    handles[index] = handle
                    yield index, handle
        except Exception as error:
            for span in spans:
                span.record_exception(error)
                span.set_status(Status(StatusCode.ERROR, str(error)))
            raise
        finally:
            for index, span in enumerate(spans):
                if index in handles:
                    _note_output(span, handles[index])
                span.end()

    def _begin(self, ask: Ask) -> Span:
        path, headers = _caller.get()
        operation = "chat" if path.endswith(CHATS) else "text_completion"
        attributes: dict[str, Any] = _of_sampling(ask.sampling)
        if ask.pooling is not None:
            operation, attributes = "embeddings", {}
        attributes |= {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "slipstream",
            "gen_ai.request.model": self._model_name,
            "gen_ai.response.model": self._model_name,
            "gen_ai.usage.input_tokens": len(ask.token_ids),
        }
        return self._tracer.start_span(
            f"{operation} {self._model_name}",
            context=TraceContextTextMapPropagator().extract(headers),
            kind=SpanKind.SERVER,
            attributes={name: value for name, value in attributes.items() if value is not None},
        )


def _of_sampling(sampling: SamplingParams) -> dict[str, Any]:
    return {
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k or None,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.choice.count": sampling.n if sampling.n > 1 else None,
    }


def _note_output(span: Span, handle: Handle) -> None:
    """Once its reader has had all that it will have."""
    output = handle.output()
    reasons = [each.finish_reason or "abort" for each in output.outputs]
    span.set_attribute("gen_ai.response.id", output.request_id)
    span.set_attribute("gen_ai.response.finish_reasons", reasons)
    span.set_attribute("gen_ai.usage.output_tokens", sum(len(each.token_ids) for each in output.outputs))
    span.set_attribute("gen_ai.usage.cache_read.input_tokens", output.num_cached_tokens)
