"""Calls: a caller's prompts become requests of the engine, and its events outputs, in a thread or in a coroutine."""

import contextlib
import itertools
import queue
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple

from slipstream.api.handles import EngineDoor, Handle, make_handle
from slipstream.api.outputs import CompletionOutput, RequestOutput
from slipstream.api.requests import Prompt, RequestMaker
from slipstream.errors import RequestError
from slipstream.progress import progress_bar
from slipstream.schema.request import FinishReason, GenerateRequest, Pooling, TokenEvent
from slipstream.schema.sampling import SamplingParams


class Call(NamedTuple):
    """What a caller asks of one prompt: text that follows it, or a vector."""

    prompt: Prompt
    wanted: SamplingParams | Pooling
    priority: int = 0
    cache_salt: str = ""


class Calls:
    """Of one running engine. Whatever a caller waits for is aborted when it stops waiting."""

    def __init__(self, engine: EngineDoor, maker: RequestMaker) -> None:
        self._engine, self._maker = engine, maker
        self._ids = itertools.count()

    def run(self, calls: Sequence[Call], show_progress: bool = False) -> list[RequestOutput]:
        """All at once, until the last is finished. What is refused comes back with `error` set, the others run on."""
        events: queue.SimpleQueue[tuple[int, TokenEvent]] = queue.SimpleQueue()
        handles: dict[int, Handle] = {}
        outputs: dict[int, RequestOutput] = {}
        try:
            for index, call in enumerate(calls):

                def sink(event: TokenEvent, index: int = index) -> None:
                    events.put((index, event))

                try:
                    handles[index] = self._start(call, sink)
                except RequestError as error:
                    outputs[index] = _refused(call.prompt, str(error))
            with progress_bar(show_progress) as progress:
                while len(outputs) < len(calls):
                    index, event = events.get()
                    handle = handles[index]
                    handle.push(event)
                    if handle.finished and index not in outputs:
                        outputs[index] = handle.output()
                        progress("generate", len(outputs), len(calls))
        finally:
            for handle in handles.values():
                handle.abort()
        return [outputs[index] for index in range(len(calls))]

    def follow(self, call: Call) -> Generator[Handle, None, None]:
        """Its handle after each of its events."""
        events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        handle = self._start(call, events.put)
        try:
            while not handle.finished:
                handle.push(events.get())
                yield handle
        finally:
            handle.abort()

    async def follow_async(self, call: Call) -> AsyncGenerator[Handle, None]:
        """Like follow(), from a coroutine."""
        import asyncio

        here = asyncio.get_running_loop()
        events: asyncio.Queue[TokenEvent] = asyncio.Queue()

        def sink(event: TokenEvent) -> None:
            here.call_soon_threadsafe(events.put_nowait, event)

        handle = self._start(call, sink)
        try:
            while not handle.finished:
                handle.push(await events.get())
                yield handle
        finally:
            handle.abort()

    async def run_async(self, call: Call) -> RequestOutput:
        """Until it is finished, from a coroutine."""
        async with contextlib.aclosing(self.follow_async(call)) as steps:
            async for handle in steps:
                if handle.finished:
                    return handle.output()
        raise AssertionError("a request ended without its last event")

    def _start(self, call: Call, sink: Callable[[TokenEvent], None]) -> Handle:
        """Validate at the edge, once, and hand the request to the engine."""
        text = call.prompt if isinstance(call.prompt, str) else None
        handle = make_handle(self._engine, self._maker.optional_tokenizer, text, self._request(call), sink)
        handle.start()
        return handle

    def _request(self, call: Call) -> GenerateRequest:
        maker, request_id = self._maker, str(next(self._ids))
        token_ids = maker.encode(call.prompt)
        if isinstance(call.wanted, Pooling):
            return maker.pooling_request(request_id, token_ids, call.wanted, call.priority, call.cache_salt)
        return maker.request(request_id, token_ids, call.wanted, call.priority, call.cache_salt)


def _refused(prompt: Any, error: str) -> RequestOutput:
    text = prompt if isinstance(prompt, str) else None
    token_ids = list(prompt) if isinstance(prompt, Iterable) and text is None else []
    failed = CompletionOutput(0, "", [], finish_reason=str(FinishReason.ERROR))
    return RequestOutput("", text, token_ids, [failed], finished=True, error=error)
