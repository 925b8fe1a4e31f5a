"""Spans, as a collector receives them over its socket."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.serve.conftest import Server, eventually, serving

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
spans: list[Any] = []


class Collector(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        spans.extend(span for resource in sent.resource_spans for scope in resource.scope_spans for span in scope.spans)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def traced(patient_engine: Path) -> Iterator[Server]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        told = ["--otlp_endpoint", f"http://127.0.0.1:{collector.server_port}", "--served_model_name", "talker"]
        with serving(patient_engine, *told, "--request_timeout", 5, OTEL_BSP_SCHEDULE_DELAY="100") as server:
            yield server
        collector.shutdown()


def span_of(num_before: int) -> tuple[Any, dict[str, Any]]:
    eventually(lambda: len(spans) > num_before)
    [span] = spans[num_before:]
    values = {each.key: each.value for each in span.attributes}
    kinds = {name: value.WhichOneof("value") for name, value in values.items()}
    return span, {name: getattr(value, kinds[name]) for name, value in values.items()}


def test_a_request_is_a_span_in_its_callers_trace(traced: Server) -> None:
    num_before = len(spans)
    body = {"prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True, "temperature": 0.5, "top_k": 7}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    usage = traced.post("/v1/completions", body, headers=headers).json()["usage"]
    span, values = span_of(num_before)
    assert span.name == "text_completion talker" == f"{values['gen_ai.operation.name']} talker"
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert values["gen_ai.request.model"] == "talker" and values["gen_ai.request.max_tokens"] == 5
    assert values["gen_ai.request.temperature"] == 0.5 and values["gen_ai.request.top_k"] == 7
    assert values["gen_ai.usage.input_tokens"] == usage["prompt_tokens"] == 3
    assert values["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 5
    assert [each.string_value for each in values["gen_ai.response.finish_reasons"].values] == ["length"]
    seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
    assert 0 < values["gen_ai.response.time_to_first_chunk"] < seconds < 30


def test_a_streamed_chat_is_one_too_and_the_stream_is_whole(traced: Server) -> None:
    num_before = len(spans)
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "seed": 3, "stream": True,
            "ignore_eos": True}  # fmt: skip
    with httpx.stream("POST", f"{traced.url}/v1/chat/completions", json=body, timeout=30) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: {") for line in lines[:-1])
    span, values = span_of(num_before)
    assert span.name == "chat talker" and not span.parent_span_id
    assert values["gen_ai.request.seed"] == 3 and values["gen_ai.usage.output_tokens"] == 6


def test_an_error_and_a_client_that_leaves_show(traced: Server) -> None:
    num_before = len(spans)
    endless = {"prompt": [1, 2, 3], "max_tokens": 8000, "ignore_eos": True, "stream": True, "n": 2}
    with httpx.stream("POST", f"{traced.url}/v1/completions", json=endless, timeout=30) as stream:
        lines = stream.iter_lines()
        next(lines)
    _, values = span_of(num_before)
    assert [each.string_value for each in values["gen_ai.response.finish_reasons"].values] == ["abort", "abort"]
    assert values["gen_ai.request.choice.count"] == 2
    num_before = len(spans)
    assert traced.post("/v1/completions", {"prompt": [1], "guided_regex": "(", "max_tokens": 2}).status_code == 400
    span, _ = span_of(num_before)
    assert span.status.code == 2 and "guided.regex" in span.status.message


def test_texts_that_become_vectors_are_spans_without_sampling(traced: Server) -> None:
    num_before = len(spans)
    assert traced.post("/v1/embeddings", {"input": [1, 2, 3], "pooling": "last"}).status_code == 200
    span, values = span_of(num_before)
    assert span.name == "embeddings talker" and values["gen_ai.usage.input_tokens"] == 3
    assert values["gen_ai.usage.output_tokens"] == 0 and "gen_ai.request.temperature" not in values
