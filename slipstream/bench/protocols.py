"""How each protocol is asked for a stream, and what an event of its answer says."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from slipstream.bench.dataset import Sample

Body = dict[str, Any]


@dataclass(frozen=True)
class News:
    """What an event brought: a text (perhaps empty), and counts of tokens where the server gives them."""

    text: str = ""
    num_input: int | None = None
    num_output: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Protocol:
    """path: below the server's URL, {model} put in. default_model: None where the server is asked for its name."""

    path: str
    body: Callable[[Sample, str], Body]
    news: Callable[[Mapping[str, Any]], News]
    takes_ids: bool = False
    counts_tokens: bool = True  # of the answer, in one of its events
    default_model: str | None = ""


# Fields that keep an answer going to its length, and that not every server of the protocol knows.
_OPENAI = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}


def _completions_body(sample: Sample, model: str) -> Body:
    return {"model": model, "prompt": sample.prompt, "max_tokens": sample.output_tokens, **_OPENAI}


def _chat_body(sample: Sample, model: str) -> Body:
    messages = [{"role": "user", "content": sample.prompt}]
    return {"model": model, "messages": messages, "max_tokens": sample.output_tokens, **_OPENAI}


def _tgi_body(sample: Sample, model: str) -> Body:
    return {"inputs": sample.prompt, "parameters": {"max_new_tokens": sample.output_tokens, "details": True}}


def _triton_body(sample: Sample, model: str) -> Body:
    size = sample.output_tokens
    return {"text_input": sample.prompt, "max_tokens": size, "min_length": size, "stream": True}


def _openai_news(event: Mapping[str, Any]) -> News:
    usage = event.get("usage") or {}
    text = ""
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        parts = (choice.get("text"), delta.get("content"), delta.get("reasoning_content"), delta.get("reasoning"))
        text += "".join(filter(None, parts))
    return News(text, usage.get("prompt_tokens"), usage.get("completion_tokens"), _error_of(event))


def _tgi_news(event: Mapping[str, Any]) -> News:
    count = (event.get("details") or {}).get("generated_tokens")
    return News((event.get("token") or {}).get("text") or "", None, count, _error_of(event))


def _triton_news(event: Mapping[str, Any]) -> News:
    return News(event.get("text_output") or "", error=_error_of(event))


def _error_of(event: Mapping[str, Any]) -> str | None:
    error = event.get("error")
    return error.get("message") if isinstance(error, dict) else error


PROTOCOLS = {
    "openai": Protocol("/v1/completions", _completions_body, _openai_news, takes_ids=True, default_model=None),
    "openai-chat": Protocol("/v1/chat/completions", _chat_body, _openai_news, default_model=None),
    "tgi": Protocol("/generate_stream", _tgi_body, _tgi_news),
    "triton": Protocol(
        "/v2/models/{model}/generate_stream", _triton_body, _triton_news, counts_tokens=False, default_model="ensemble"
    ),
}


def events_of(pieces: list[tuple[float, bytes]]) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """The JSON objects of a stream of server-sent events, each with when its last byte came."""
    rest = b""
    for arrived, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and line[5:].strip() not in (b"", b"[DONE]"):
                event = json.loads(line[5:])
                if isinstance(event, dict):
                    yield arrived, event
