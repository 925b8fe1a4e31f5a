"""Frontend: the asyncio side of the process border. Starts the engine process, and again when it dies; brings requests
to it and events back.

All of it runs on the event loop of one thread. Whoever asks gets handles (api/handles.py), as offline.
"""

import asyncio
import itertools
import json
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from slipstream.api.handles import Handle, make_handle
from slipstream.api.requests import Prompt, RequestMaker
from slipstream.errors import RequestError, SlipstreamError
from slipstream.schema.build import QueuePolicy
from slipstream.schema.request import EngineStats, FinishReason, GenerateRequest, TokenEvent
from slipstream.schema.sampling import SamplingParams
from slipstream.serve.messages import (
    BEAT_SECONDS,
    Abort,
    Beat,
    Events,
    FromFront,
    Hello,
    Ready,
    Submit,
    decode_from_engine,
    encode,
)  # fmt: skip
from slipstream.text.tokenizer import Tokenizer

Sink = Callable[[TokenEvent], None]

STALE_SECONDS = 8 * BEAT_SECONDS  # without a sign of life: a process that swaps or is stopped
STOP_SECONDS = 10.0  # for the engine process to end by itself
RESTART_SECONDS = (0.0, 1.0, 5.0, 15.0, 30.0)  # between a death and the next start, by how many there were in a row
LONG_TEXT = 20_000  # characters; their tokens are found beside the event loop, not on it


class EngineDown(SlipstreamError):
    """There is no engine to run a request at the moment."""


class Busy(SlipstreamError):
    """More requests wait already than may."""


class RequestFailed(SlipstreamError):
    """A request ended in an error that is not its own fault."""


class StartFailed(SlipstreamError):
    """The first engine process ended before it was ready; it has said why on stderr."""


@dataclass(frozen=True)
class Ask:
    """One prompt of a call."""

    token_ids: tuple[int, ...]
    sampling: SamplingParams
    text: str | None = None  # the prompt as it was given, where it was text
    priority: int = 0
    cache_salt: str = ""


class Frontend:
    """start() it, ask it for as long as you like, close() it."""

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        max_queue_size: int = 1024,
        chat_template: str | None = None,
        step_timeout: float = 120.0,
    ) -> None:
        """options: of LLM(...), plain values.  max_queue_size: sequences that may wait beside a full batch.
        step_timeout: seconds after which an engine that has work and makes no step counts as ill.
        """
        self._options, self._chat_template = dict(options), chat_template
        self._max_queue_size, self._step_timeout = max_queue_size, step_timeout
        self._ids = (f"{secrets.token_hex(4)}-{number}" for number in itertools.count())
        self._sinks: dict[str, Sink] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="slipstream-"))  # of the sockets; nobody else's to enter
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None  # to an engine that is ready
        self._process: asyncio.subprocess.Process | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._has_started: asyncio.Future[None]
        self._is_closing = False
        self._last_beat = self._last_progress = 0.0
        self.stats = EngineStats()
        self.engine: Ready  # these two from when it is
        self.maker: RequestMaker

    async def start(self) -> None:
        """Returns once there is an engine. Raises StartFailed where none comes up."""
        self._has_started = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise())
        await asyncio.wait({self._has_started, self._supervisor}, return_when=asyncio.FIRST_COMPLETED)
        if self._supervisor.done():
            self._supervisor.result()  # a defect of ours
        self._has_started.result()

    async def close(self) -> None:
        """End the engine process; what still runs ends with an error."""
        self._is_closing = True
        process = self._process
        if process is not None and process.returncode is None:
            if process.stdin is not None:
                process.stdin.close()
            if not self._socket:  # it is still opening the model, and would not look
                _signal(process, signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
            except TimeoutError:
                _signal(process, signal.SIGKILL)
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    # --- what it is ---

    @property
    def is_healthy(self) -> bool:
        """There is an engine, it answers, and where it has work it makes steps."""
        now = time.monotonic()
        is_stuck = bool(self._sinks) and now - self._last_progress > self._step_timeout
        return self._socket is not None and now - self._last_beat < STALE_SECONDS and not is_stuck

    @property
    def num_in_flight(self) -> int:
        """Sequences sent to the engine that have not ended."""
        return len(self._sinks)

    @property
    def engine_pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    # --- requests ---

    async def encode(self, prompt: Prompt, add_special_tokens: bool = True) -> tuple[int, ...]:
        if len(prompt) < LONG_TEXT:
            return self.maker.encode(prompt, add_special_tokens)
        return await asyncio.to_thread(self.maker.encode, prompt, add_special_tokens)

    async def generate(self, asks: Sequence[Ask]) -> AsyncGenerator[tuple[int, Handle], None]:
        """Run the prompts of one call together; yields (which prompt, its handle) each time there is news of it.

        Closed early, it aborts what still runs. Raises RequestError, Busy, EngineDown or RequestFailed for all of them.
        """
        news: asyncio.Queue[tuple[int, TokenEvent]] = asyncio.Queue()
        handles = [self._handle(index, ask, news) for index, ask in enumerate(asks)]
        self._check_room(sum(ask.sampling.num_sequences for ask in asks))
        unfinished = set(range(len(handles)))
        try:
            for handle in handles:
                handle.start()
            while unfinished:
                touched = set()
                index, event = await news.get()
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

    def _handle(self, index: int, ask: Ask, news: "asyncio.Queue[tuple[int, TokenEvent]]") -> Handle:
        if ask.priority and self.engine.runtime.queue_policy is not QueuePolicy.PRIORITY:
            raise RequestError(
                f"priority is {ask.priority}, but this server takes requests as they come; leave it out, or start the "
                "server with --queue_policy priority."
            )
        request = self.maker.request(next(self._ids), ask.token_ids, ask.sampling, ask.priority, ask.cache_salt)
        tokenizer = self.maker.optional_tokenizer
        return make_handle(self, tokenizer, ask.text, request, lambda event: news.put_nowait((index, event)))

    def _check_room(self, num_new: int) -> None:
        most = self.engine.runtime.max_batch_size + self._max_queue_size
        if self._sinks and len(self._sinks) + num_new > most:
            raise Busy(
                f"{len(self._sinks)} sequences run or wait and {num_new} more would be above {most}; try again later."
            )

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        """Send one sequence to the engine; the sink is called on the event loop."""
        if self._socket is None or self._is_closing:
            raise EngineDown("The engine is being started; try again in a few seconds.")
        if not self._sinks:
            self._last_progress = time.monotonic()
        self._sinks[request.request_id] = sink
        self._send(self._socket, Submit(request))

    def abort(self, request_id: str) -> None:
        if self._sinks.pop(request_id, None) is not None and self._socket is not None:
            self._send(self._socket, Abort(request_id))

    # --- the engine process ---

    async def _supervise(self) -> None:
        """Have an engine process at all times."""
        num_deaths = 0
        while not self._is_closing:
            ending = await self._live_once()
            num_deaths = num_deaths + 1 if self._socket is None else 1  # that were never ready, in a row
            self._socket = None
            self._fail_all(f"the engine process ended ({ending}); try again in a few seconds.")
            if not self._has_started.done():
                self._has_started.set_exception(StartFailed(f"The engine could not be started ({ending})."))
            if self._is_closing or self._has_started.exception():
                return
            print(f"warning: the engine process ended ({ending}); starting it again.", file=sys.stderr)
            await asyncio.sleep(RESTART_SECONDS[min(num_deaths, len(RESTART_SECONDS)) - 1])

    async def _live_once(self) -> str:
        """Start a process and listen to it until it ends; returns how it ended."""
        with self._context.socket(zmq.DEALER) as socket:
            for limit in (zmq.SNDHWM, zmq.RCVHWM):
                socket.setsockopt(limit, 0)  # none: a dropped message would be a request that never ends
            socket.setsockopt(zmq.LINGER, 0)
            address = f"ipc://{self._folder}/{next(self._ids)}"
            # A session of its own: Ctrl-C is the front's to handle, and ends the engine after the requests.
            process = self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "slipstream.serve.engine_process", address,
                stdin=asyncio.subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
            assert process.stdin is not None
            process.stdin.write(json.dumps(self._options).encode() + b"\n")
            socket.connect(address)
            self._send(socket, Hello())
            reader, exit_ = asyncio.create_task(self._read(socket)), asyncio.create_task(process.wait())
            try:
                await asyncio.wait({reader, exit_}, return_when=asyncio.FIRST_COMPLETED)
                if reader.done():  # a defect: what it says cannot be understood
                    _signal(process, signal.SIGKILL)
                    await exit_
                    reader.result()
                return _ending(exit_.result())
            finally:
                reader.cancel()

    def _send(self, socket: zmq.asyncio.Socket, message: FromFront) -> None:
        socket.send(encode(message))  # at once, without limits to wait for

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            message = decode_from_engine(await socket.recv())
            self._last_beat = time.monotonic()
            match message:
                case Events(events):
                    self._last_progress = self._last_beat
                    for event in events:
                        self._deliver(event)
                case Beat(stats):
                    if stats.num_steps != self.stats.num_steps:
                        self._last_progress = self._last_beat
                    self.stats = stats
                case Ready():
                    await self._note_ready(message, socket)

    async def _note_ready(self, ready: Ready, socket: zmq.asyncio.Socket) -> None:
        self.engine = ready
        folder = ready.tokenizer_folder
        tokenizer = None if folder is None else await asyncio.to_thread(Tokenizer.open, Path(folder))
        self.maker = RequestMaker(ready.facts, tokenizer, self._chat_template)
        self._socket = socket
        if not self._has_started.done():
            self._has_started.set_result(None)

    def _deliver(self, event: TokenEvent) -> None:
        if event.finish_reason is not None:
            sink = self._sinks.pop(event.request_id, None)
        else:
            sink = self._sinks.get(event.request_id)
        if sink is not None:
            sink(event)

    def _fail_all(self, why: str) -> None:
        for request_id in list(self._sinks):
            self._deliver(TokenEvent(request_id, finish_reason=FinishReason.ERROR, error=why))
        self.stats = EngineStats()


def _raise_error(event: TokenEvent) -> None:
    if event.error is not None:
        raise RequestError(event.error) if event.is_refused else RequestFailed(event.error)


def _signal(process: asyncio.subprocess.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except ProcessLookupError:
        return


def _ending(exit_code: int) -> str:
    return f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
