"""OpenAI's /v1/responses, without a memory of earlier ones."""

import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from slipstream.api.answers import AnswerReader
from slipstream.api.outputs import RequestOutput
from slipstream.errors import RequestError
from slipstream.schema.request import FinishReason
from slipstream.schema.sampling import SamplingParams
from slipstream.serve.chats import Chats
from slipstream.serve.document import STREAM, errors_as
from slipstream.serve.openai.response_fields import CreateFields
from slipstream.serve.openai.routes import ErrorBody
from slipstream.serve.replies import Fault
from slipstream.serve.turns import Block, Change, Closed, Event, Grown, Opened, Turn, reply
from slipstream.text.tokenizer import Tokenizer

_ID_STARTS = {"text": "msg", "reasoning": "rs", "call": "fc"}


class Responses:
    """The endpoint over one front."""

    def __init__(self, chats: Chats) -> None:
        self._chats = chats
        self.router = APIRouter(responses=errors_as(ErrorBody))
        self.router.post("/v1/responses", responses=STREAM)(self.create)

    async def create(self, body: CreateFields, request: Request) -> Response:
        name = self._chats.checked_name(body.model)
        ask, reader = self._chats.ask(body.chat(), body.params)
        turn = ResponseTurn(body, ask.sampling, self._chats.frontend.maker.tokenizer, name, reader)
        return await reply(request, self._chats.frontend, ask, turn, bool(body.stream))


class ResponseTurn(Turn):
    def __init__(
        self, body: CreateFields, sampling: SamplingParams, tokenizer: Tokenizer, model: str, reader: AnswerReader
    ) -> None:
        super().__init__(reader)
        self._tokenizer = tokenizer
        self._num_events = 0
        self._id = uuid4().hex
        shown = body.model_dump(by_alias=True, include={"instructions", "max_output_tokens", "metadata", "user"})
        text_format = None if body.text is None else body.text.format
        self._head = {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            **shown,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "text": {"format": {"type": "text"} if text_format is None else text_format.model_dump(by_alias=True)},
            "tools": [tool.model_dump() for tool in body.tools or []],
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "background": False,
            "store": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "truncation": "disabled",
        }
        _check_text(self._head)

    def body(self, output: RequestOutput) -> dict[str, Any]:
        is_cut = output.outputs[0].finish_reason == FinishReason.LENGTH
        return self._response(
            "incomplete" if is_cut else "completed",
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            usage=self._usage(output),
        )

    def starting(self, output: RequestOutput) -> Sequence[Event]:
        response = self._response("in_progress")
        return [self._event(f"response.{name}", response=response) for name in ("created", "in_progress")]

    def changing(self, change: Change) -> Sequence[Event]:
        match change:
            case Opened(block):
                return self._opened(block)
            case Grown(block, text):
                return [self._block_event(block, f"{_words(block)}.delta", delta=text)]
            case Closed(block):
                return self._closed(block)

    def ending(self, output: RequestOutput) -> Sequence[Event]:
        response = self.body(output)
        return [self._event(f"response.{response['status']}", response=response)]

    def failing(self, fault: Fault) -> Sequence[Event]:
        error = {"code": "server_error", "message": fault.message}
        return [self._event("response.failed", response=self._response("failed", error=error))]

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        output = [] if status == "in_progress" else [self._item(block) for block in self.blocks]
        nothing = {"error": None, "incomplete_details": None, "usage": None}
        return self._head | {"status": status, "output": output} | nothing | more

    def _opened(self, block: Block) -> list[Event]:
        item = self._item(block, is_open=True)
        events = [self._event("response.output_item.added", output_index=block.index, item=item)]
        if block.kind != "call":
            events.append(self._block_event(block, "content_part.added", part=_part(block)))
        return events

    def _closed(self, block: Block) -> list[Event]:
        field = "arguments" if block.kind == "call" else "text"
        events = [self._block_event(block, f"{_words(block)}.done", **{field: block.text})]
        if block.kind != "call":
            events.append(self._block_event(block, "content_part.done", part=_part(block)))
        return [
            *events,
            self._event("response.output_item.done", output_index=block.index, item=self._item(block)),
        ]

    def _block_event(self, block: Block, name: str, **more: Any) -> Event:
        if block.kind != "call":
            more["content_index"] = 0
        if name.startswith("output_text"):
            more["logprobs"] = []
        return self._event(f"response.{name}", item_id=self._item_id(block), output_index=block.index, **more)

    def _event(self, name: str, **values: Any) -> Event:
        self._num_events += 1
        return {"type": name, "sequence_number": self._num_events - 1, **values}

    def _item_id(self, block: Block) -> str:
        return f"{_ID_STARTS[block.kind]}_{self._id}{block.index}"

    def _item(self, block: Block, is_open: bool = False) -> dict[str, Any]:
        status = "in_progress" if is_open else "completed" if block.is_whole else "incomplete"
        head = {"id": self._item_id(block), "status": status}
        content = [] if is_open else [_part(block)]
        match block.kind:
            case "text":
                return {**head, "type": "message", "role": "assistant", "content": content}
            case "reasoning":
                return {**head, "type": "reasoning", "summary": [], "content": content}
            case "call":
                call = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
                return {**head, "type": "function_call", **call}

    def _usage(self, output: RequestOutput) -> dict[str, Any]:
        num_prompt, num_output = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
        thoughts = "".join(block.text for block in self.blocks if block.kind == "reasoning")
        num_thinking = len(self._tokenizer.encode(thoughts, add_special_tokens=False)) if thoughts else 0
        return {
            "input_tokens": num_prompt,
            "input_tokens_details": {"cached_tokens": output.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": num_thinking},
            "total_tokens": num_prompt + num_output,
        }


def _check_text(head: dict[str, Any]) -> None:
    """What is given back has to be text. Raises RequestError."""
    try:
        msgspec.json.encode(head)
    except UnicodeEncodeError:
        raise RequestError("The body holds a lone surrogate, which no text can have; send valid Unicode.") from None


def _words(block: Block) -> str:
    """What a block is made of, as its events call it."""
    return {"text": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}[block.kind]


def _part(block: Block) -> dict[str, Any]:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}
