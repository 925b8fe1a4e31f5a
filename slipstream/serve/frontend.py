"""Frontend: the asyncio side of the process border. Chooses the engine of each prompt, and brings it there.

All of it runs on the event loop of one thread. Whoever asks gets handles (api/handles.py), as offline.
"""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import zmq

from slipstream.api.handles import Handle, make_handle
from slipstream.api.outputs import RequestOutput
from slipstream.api.requests import Prompt, RequestMaker
from slipstream.errors import RequestError, SlipstreamError
from slipstream.schema.build import QueuePolicy
from slipstream.schema.request import GenerateRequest, Pooling, TokenEvent
from slipstream.schema.sampling import SamplingParams
from slipstream.serve.connection import EngineConnection, EngineDown
from slipstream.serve.handover import Handover, is_worth_it
from slipstream.serve.messages import Ready
from slipstream.serve.router import Choice, Room, Router
from slipstream.text.tokenizer import Tokenizer

T = TypeVar("T")

LONG_TEXT = 20_000  # characters; their tokens are found beside the event loop, not on it


class Busy(SlipstreamError):
    """More requests wait already than may."""


class TimedOut(SlipstreamError):
    """A call took longer than it may."""


class RequestFailed(SlipstreamError):
    """A request ended in an error that is not its own fault."""


@dataclass(frozen=True)
class Ask:
    """One prompt of a call."""

    token_ids: tuple[int, ...]
    sampling: SamplingParams
    text: str | None = None  # the prompt as it was given, where it was text
    priority: int = 0
    cache_salt: str = ""
    timeout: float | None = None  # seconds; None: as long as the server lets a request take
    pooling: Pooling | None = None  # then it ends with a vector, and sampling says nothing


Steps = AsyncGenerator[tuple[int, Handle], None]  # of a call: which ask, and its handle, which has news


class Frontend:
    """attach() it to an engine's process whenever there is a new one; ask it for as long as you like; close() it."""

    def __init__(
        self,
        name: str,
        *,
        on_ready: Callable[[int, Ready], None],
        num_replicas: int = 1,
        max_replicas: int | None = None,
        num_prefill_replicas: int = 0,
        max_input_len: int | None = None,
        chat_template: str | None = None,
        request_timeout: float | None = None,
        step_timeout: float = 120.0,
    ) -> None:
        """name: no other front has it.  on_ready: called whenever an engine, with its number, can take requests.
        num_replicas: engines that run the same model and answer.  max_replicas: with those that come and go.
        num_prefill_replicas: those that compute prompts for them, whose numbers follow theirs.
        max_input_len: tokens of a prompt, where it has a limit beside that of a whole sequence.
        request_timeout: seconds that a call may take whose Ask says nothing of it.
        step_timeout: seconds after which an engine that has work and makes no step counts as ill.
        """
        self._on_ready, self._chat_template = on_ready, chat_template
        self._request_timeout, self.max_input_len = request_timeout, max_input_len
        self._ids = (f"{name}-{number}" for number in itertools.count())
        self._context = zmq.Context()
        self._router, self._num_decoding = Router(), max_replicas or num_replicas
        self._num_staying, self._num_prefilling = num_replicas, num_prefill_replicas
        self._leaving: set[int] = set()
        self._in_flight: Counter[int] = Counter()  # sequences of the calls that an engine was chosen for
        self.engines: Sequence[EngineConnection] = [
            EngineConnection(
                name,
                self._context,
                partial(self._note_ready, replica),
                partial(self._router.note, replica),
                step_timeout,
            )
            for replica in range(self._num_decoding + num_prefill_replicas)
        ]
        self.watch: Callable[[Sequence[Ask], Steps], Steps] | None = None  # passes on the steps of each call
        self.engine: Ready  # what the newest one is, as they all are; these two from when one is
        self.maker: RequestMaker

    def attach(self, replica: int, address: str) -> None:
        """There is a new engine process; requests go to it from when it is ready."""
        self._leaving.discard(replica)
        self.engines[replica].attach(address)

    def leave(self, replica: int) -> None:
        """No new requests go there."""
        self._leaving.add(replica)

    async def detach(self, replica: int, why: str) -> None:
        """There is none any more; what was in flight there ends with an error."""
        self._router.leave(replica)
        await self.engines[replica].detach(why)

    async def detach_all(self) -> None:
        for replica in range(len(self.engines)):
            await self.detach(replica, "the server ended.")

    async def close(self) -> None:
        await self.detach_all()
        self._context.term()

    async def _note_ready(self, replica: int, ready: Ready) -> None:
        folder = ready.tokenizer_folder
        tokenizer = None if folder is None else await asyncio.to_thread(Tokenizer.open, Path(folder))
        self.engine, self.maker = ready, RequestMaker(ready.facts, tokenizer, self._chat_template)
        self._router.join(replica, Room.of(ready.runtime, ready.max_concurrent_requests))
        self._on_ready(replica, ready)

    @property
    def is_healthy(self) -> bool:
        """There is an engine that would answer."""
        return bool(self._healthy(range(self._num_decoding)))

    @property
    def expected(self) -> list[int]:
        """Engines that are there, or should be."""
        may_be_gone = range(self._num_staying, self._num_decoding)
        return [index for index, each in enumerate(self.engines) if index not in may_be_gone or each.is_attached]

    def in_flight(self) -> dict[int, int]:
        """Sequences of this front's; of each engine that they may be sent to, or that has some."""
        decoding = self.engines[: self._num_decoding]
        may_send = {index for index, each in enumerate(decoding) if each.is_attached} - self._leaving
        return dict.fromkeys(sorted(may_send), 0) | {index: count for index, count in self._in_flight.items() if count}

    # --- requests ---

    async def encode(self, prompt: Prompt) -> tuple[int, ...]:
        [token_ids] = await self.encode_all([prompt])
        return token_ids

    async def encode_all(self, prompts: Sequence[Prompt], add_special_tokens: bool = True) -> list[tuple[int, ...]]:
        def encoded() -> list[tuple[int, ...]]:
            return [self.maker.encode(prompt, add_special_tokens) for prompt in prompts]

        return encoded() if sum(map(len, prompts)) < LONG_TEXT else await asyncio.to_thread(encoded)

    def generate(self, asks: Sequence[Ask]) -> Steps:
        """Run the prompts of one call together; yields (which prompt, its handle) each time there is news of it.

        Closed early, it aborts what still runs. The shortest timeout is that of the call. Raises RequestError, Busy,
        EngineDown, TimedOut or RequestFailed for all of them.
        """
        steps = self._generate(asks)
        return steps if self.watch is None else self.watch(asks, steps)

    async def _generate(self, asks: Sequence[Ask]) -> Steps:
        clock = Clock(filter(None, [ask.timeout or self._request_timeout for ask in asks]))
        asked = time.time()
        news: asyncio.Queue[tuple[int, TokenEvent]] = asyncio.Queue()
        choices = self._choose(asks)
        counts = Counter[int]()
        for choice, ask in zip(choices, asks, strict=True):
            counts[choice.replica] += ask.sampling.num_sequences
        requests, handles = [self._request(ask) for ask in asks], list[Handle]()
        handover = Handover()
        self._in_flight += counts
        try:
            if self._num_prefilling:
                requests = await clock.limit(self._prefill(handover, requests, choices, asked))
            handles += [
                make_handle(
                    self.engines[choice.replica], self.maker.optional_tokenizer, ask.text, request,
                    partial(_put, news, index),
                )
                for index, (choice, ask, request) in enumerate(zip(choices, asks, requests, strict=True))
            ]  # fmt: skip
            unfinished = set(range(len(handles)))
            with ExitStack() as stack:
                for replica in {choice.replica for choice in choices}:
                    block_keys = [choice.block_keys for choice in choices if choice.replica == replica]
                    stack.enter_context(self.engines[replica].together(block_keys, asked))
                for handle in handles:
                    handle.start()
            while unfinished:
                touched = set()
                index, event = await clock.limit(news.get())
                while True:  # all that has come while somebody read slowly
                    _raise_error(event)
                    handles[index].push(event)
                    touched.add(index)
                    if news.empty():
                        break
                    index, event = news.get_nowait()
                for index in unfinished & touched:
                    if handles[index].finished:
                        unfinished.discard(index)
                    if handles[index].finished or handles[index].has_news:
                        yield index, handles[index]
        finally:
            for handle in handles:
                handle.abort()
            handover.end()
            self._in_flight -= counts

    async def _prefill(
        self, handover: Handover, requests: Sequence[GenerateRequest], choices: Sequence[Choice], asked: float
    ) -> list[GenerateRequest]:
        """With the KV of their prompts, where a prefill engine has computed that."""

        async def prefilled(request: GenerateRequest, choice: Choice) -> GenerateRequest:
            engines = self._healthy(range(self._num_decoding, len(self.engines)))
            if not engines or not is_worth_it(request, choice.num_known):
                return request
            loads = {index: self.engines[index].num_sequences for index in engines}
            chosen = self._router.choose(request.prompt_token_ids, loads, cache_salt=request.cache_salt)
            engine, to = self.engines[chosen.replica], self.engines[choice.replica]
            return await handover.prefill(request, to, engine, chosen.block_keys, asked)

        return await asyncio.gather(*map(prefilled, requests, choices))

    def _healthy(self, indices: Iterable[int]) -> list[int]:
        return [index for index in indices if self.engines[index].is_healthy and index not in self._leaving]

    def _choose(self, asks: Sequence[Ask]) -> Sequence[Choice]:
        """One for each. Raises EngineDown where there is none."""
        decoding = range(self._num_decoding)
        ready = self._healthy(decoding)
        ready = ready or [index for index in decoding if self.engines[index].is_ready and index not in self._leaving]
        if not ready:
            raise EngineDown
        if len(self.engines) == 1:
            return [Choice(0, [])] * len(asks)
        loads = {index: self.engines[index].num_sequences for index in ready}
        choices = []
        for ask in asks:
            num_sequences = ask.sampling.num_sequences
            token_ids = ask.token_ids if ask.pooling is None else ()  # whose KV is not kept
            choice = self._router.choose(token_ids, loads, cache_salt=ask.cache_salt, num_sequences=num_sequences)
            loads[choice.replica] += num_sequences
            choices.append(choice)
        return choices

    def _request(self, ask: Ask) -> GenerateRequest:
        if ask.priority and self.engine.runtime.queue_policy is not QueuePolicy.PRIORITY:
            raise RequestError(
                f"priority is {ask.priority}, but this server takes requests as they come; leave it out, or start the "
                "server with --queue_policy priority."
            )
        if self.max_input_len is not None and len(ask.token_ids) > self.max_input_len:
            raise RequestError(
                f"The prompt has {len(ask.token_ids)} tokens and may have {self.max_input_len} (--max_input_len); "
                "shorten it."
            )
        asked = (next(self._ids), ask.token_ids)
        if ask.pooling is None:
            return self.maker.request(*asked, ask.sampling, ask.priority, ask.cache_salt)
        return self.maker.pooling_request(*asked, ask.pooling, ask.priority, ask.cache_salt)

    async def profile(self, start: bool) -> list[str]:
        """Where the traces of the engines' steps are, or will be; one each, of those that can.

        Raises RequestError, or EngineDown, where none can.
        """
        asked = [engine.profile(next(self._ids), start) for engine in self.engines]
        said = await asyncio.gather(*asked, return_exceptions=True)
        paths = [each for each in said if isinstance(each, str)]
        if not paths:
            raise next(each for each in said if isinstance(each, BaseException))
        return paths


async def last_output(steps: Steps) -> RequestOutput:
    """The whole answer to a call of one prompt."""
    async with aclosing(steps):
        async for _, handle in steps:
            if handle.finished:
                return handle.output()
    raise AssertionError("a call ends with a handle that has finished")


class Clock:
    """The time that a call has."""

    def __init__(self, timeouts: Iterable[float]) -> None:
        """It runs from now, for the shortest of these seconds; for ever where there are none."""
        self._seconds = min(timeouts, default=None)
        self._end = None if self._seconds is None else asyncio.get_running_loop().time() + self._seconds

    async def limit(self, waiting: Coroutine[Any, Any, T]) -> T:
        """Raises TimedOut, also where there is nothing to wait for."""
        try:
            async with asyncio.timeout_at(self._end):
                result = await waiting
        except TimeoutError:
            pass
        else:
            if self._end is None or asyncio.get_running_loop().time() < self._end:
                return result
        raise TimedOut(f"The request took longer than {self._seconds:g} seconds; ask for less, or try again later.")


def _put(news: "asyncio.Queue[tuple[int, TokenEvent]]", index: int, event: TokenEvent) -> None:
    news.put_nowait((index, event))


def _raise_error(event: TokenEvent) -> None:
    if event.error is not None:
        kind = Busy if event.is_busy else RequestError if event.is_refused else RequestFailed
        raise kind(event.error)
