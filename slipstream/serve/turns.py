"""Turn: an answer in blocks (text, reasoning, calls), as OpenAI's responses and Anthropic's messages have it."""

from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response

from slipstream.api.answers import AnswerReader
from slipstream.api.handles import Handle
from slipstream.api.outputs import CompletionOutput, RequestOutput
from slipstream.errors import SlipstreamError
from slipstream.schema.request import FinishReason
from slipstream.serve.frontend import Ask, Frontend, Steps, last_output
from slipstream.serve.replies import EventStream, Fault, fault_of, json_response, server_sent, unless_gone
from slipstream.text import tools

Event = dict[str, Any]  # its "type" is its name


@dataclass
class Block:
    """A part of an answer, so far."""

    index: int
    kind: Literal["text", "reasoning", "call"]
    name: str = ""  # these two of a call
    call_id: str = ""
    text: str = ""  # of a call its arguments
    is_whole: bool = False  # it was not cut off; a call that was is none, and its words follow as text


@dataclass(frozen=True)
class Opened:
    block: Block


@dataclass(frozen=True)
class Grown:
    block: Block
    text: str


@dataclass(frozen=True)
class Closed:
    block: Block


Change = Opened | Grown | Closed


class Turn:
    """One answer. Ask for whole() once, or for events() with each output; a protocol says what these are made of."""

    def __init__(self, reader: AnswerReader) -> None:
        self._parser = reader.parser()
        self._has_started = False
        self.blocks: list[Block] = []

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        completion = output.outputs[0]
        for _ in self._changes(completion.text, completion):
            pass
        self.blocks = _without_broken_calls(self.blocks)
        return self.body(output)

    def events(self, output: RequestOutput) -> Iterator[Event]:
        """What is new since the last time."""
        completion = output.outputs[0]
        if not self._has_started:
            self._has_started = True
            yield from self.starting(output)
        for change in self._changes(completion.text_diff, completion):
            yield from self.changing(change)
        if completion.finish_reason is not None:
            yield from self.ending(output)

    def body(self, output: RequestOutput) -> dict[str, Any]:
        raise NotImplementedError

    def starting(self, output: RequestOutput) -> Sequence[Event]:
        raise NotImplementedError

    def changing(self, change: Change) -> Sequence[Event]:
        raise NotImplementedError

    def ending(self, output: RequestOutput) -> Sequence[Event]:
        raise NotImplementedError

    def failing(self, fault: Fault) -> Sequence[Event]:
        """What a stream ends with where the engine did."""
        raise NotImplementedError

    def _changes(self, text: str, completion: CompletionOutput) -> Iterator[Change]:
        is_last = completion.finish_reason is not None
        for delta in self._parser.push(text) + (self._parser.finish() if is_last else []):
            match delta:
                case tools.Content(text):
                    yield from self._grow("text", text)
                case tools.Reasoning(text):
                    yield from self._grow("reasoning", text)
                case tools.CallStart(_, call_id, name):
                    yield from self._open(Block(len(self.blocks), "call", name, call_id))
                case tools.CallArguments(_, text):
                    yield from self._grow("call", text)
                case tools.CallEnd():
                    self._last.is_whole = True
        if is_last:
            yield from self._close(is_whole=completion.finish_reason != FinishReason.LENGTH)

    @property
    def _last(self) -> Block:
        return self.blocks[-1]

    def _grow(self, kind: Literal["text", "reasoning", "call"], text: str) -> Iterator[Change]:
        if not self.blocks or self._last.kind != kind:
            yield from self._open(Block(len(self.blocks), kind))
        self._last.text += text
        yield Grown(self._last, text)

    def _open(self, block: Block) -> Iterator[Change]:
        yield from self._close()
        self.blocks.append(block)
        yield Opened(block)

    def _close(self, is_whole: bool = True) -> Iterator[Change]:
        if self.blocks:
            self._last.is_whole |= is_whole and self._last.kind != "call"
            yield Closed(self._last)


def _without_broken_calls(blocks: Sequence[Block]) -> list[Block]:
    """Their words are in the text that follows, which goes on with the text before them."""
    kept: list[Block] = []
    for block in blocks:
        if block.kind == "call" and not block.is_whole:
            continue
        if kept and kept[-1].kind == block.kind == "text":
            kept[-1].text += block.text
            kept[-1].is_whole = block.is_whole
        else:
            kept.append(block)
    return kept


async def reply(request: Request, frontend: Frontend, ask: Ask, turn: Turn, is_stream: bool) -> Response:
    steps = frontend.generate([ask])
    if not is_stream:
        return json_response(turn.whole(await unless_gone(request, last_output(steps))))
    first = await unless_gone(request, anext(steps))  # a request that is refused gets a status that says so
    return EventStream(_events(first[1], steps, turn))


async def _events(first: Handle, steps: Steps, turn: Turn) -> AsyncGenerator[bytes, None]:
    async with aclosing(steps):
        try:
            yield _named(turn.events(first.output()))
            async for _, handle in steps:
                if events := _named(turn.events(handle.output())):
                    yield events
        except SlipstreamError as error:
            yield _named(turn.failing(fault_of(error)))


def _named(events: Iterable[Event]) -> bytes:
    return b"".join(f"event: {event['type']}\n".encode() + server_sent(event) for event in events)
