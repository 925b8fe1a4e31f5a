"""What Anthropic's protocol says of an answer: whole, or as events."""

import json
from collections.abc import Sequence
from typing import Any, Literal
from uuid import uuid4

from starlette.responses import Response
from typing_extensions import TypedDict

from slipstream.api.answers import AnswerReader
from slipstream.api.outputs import RequestOutput
from slipstream.schema.request import FinishReason
from slipstream.serve.replies import Fault, json_response
from slipstream.serve.turns import Block, Change, Closed, Event, Grown, Opened, Turn

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_DELTAS = {
    "text": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}


class ErrorOfBody(TypedDict):
    type: str
    message: str


class ErrorBody(TypedDict):
    type: Literal["error"]
    error: ErrorOfBody


def error_body(fault: Fault) -> ErrorBody:
    kind = _KINDS.get(fault.status, "invalid_request_error" if fault.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": fault.message}}


def error_response(fault: Fault) -> Response:
    return json_response(error_body(fault), fault.status, fault.headers)


class MessageTurn(Turn):
    def __init__(self, model: str, reader: AnswerReader) -> None:
        super().__init__(reader)
        self._head = {"id": f"msg_{uuid4().hex}", "type": "message", "role": "assistant", "model": model}

    def body(self, output: RequestOutput) -> dict[str, Any]:
        content = [_shown(block) for block in self.blocks]
        return {**self._head, "content": content, **self._stop(output), "usage": _usage(output)}

    def starting(self, output: RequestOutput) -> Sequence[Event]:
        nothing: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        return [{"type": "message_start", "message": {**self._head, **nothing, "usage": _usage(output)}}]

    def changing(self, change: Change) -> Sequence[Event]:
        index = change.block.index
        match change:
            case Opened(block):
                return [{"type": "content_block_start", "index": index, "content_block": _shown(block, is_open=True)}]
            case Grown(block, text):
                kind, field = _DELTAS[block.kind]
                return [{"type": "content_block_delta", "index": index, "delta": {"type": kind, field: text}}]
            case Closed():
                return [{"type": "content_block_stop", "index": index}]

    def ending(self, output: RequestOutput) -> Sequence[Event]:
        return [
            {"type": "message_delta", "delta": self._stop(output), "usage": _usage(output)},
            {"type": "message_stop"},
        ]

    def failing(self, fault: Fault) -> Sequence[Event]:
        return [{**error_body(fault)}]

    def _stop(self, output: RequestOutput) -> dict[str, Any]:
        completion = output.outputs[0]
        if completion.finish_reason == FinishReason.LENGTH:
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if isinstance(completion.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": completion.stop_reason}
        has_called = any(block.kind == "call" and block.is_whole for block in self.blocks)
        return {"stop_reason": "tool_use" if has_called else "end_turn", "stop_sequence": None}


def _shown(block: Block, is_open: bool = False) -> dict[str, Any]:
    match block.kind:
        case "text":
            return {"type": "text", "text": block.text}
        case "reasoning":
            return {"type": "thinking", "thinking": block.text, "signature": ""}
        case "call":
            arguments = {} if is_open else json.loads(block.text)
            return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": arguments}


def _usage(output: RequestOutput) -> dict[str, Any]:
    return {
        "input_tokens": len(output.prompt_token_ids) - output.num_cached_tokens,
        "cache_read_input_tokens": output.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": len(output.outputs[0].token_ids),
    }
