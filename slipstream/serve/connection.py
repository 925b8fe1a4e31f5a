"""EngineConnection: one engine's process as a front has it. Requests go there, events come back.

All of it runs on the event loop of one thread.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import zmq

from slipstream.errors import RequestError, SlipstreamError
from slipstream.schema.request import EngineStats, FinishReason, GenerateRequest, TokenEvent
from slipstream.serve.measures import Measures
from slipstream.serve.messages import (
    BEAT_SECONDS,
    Abort,
    Beat,
    Discard,
    Events,
    FromEngine,
    FromFront,
    Hello,
    Profile,
    Profiled,
    Ready,
    Submit,
    decode_from_engine,
    encode,
)  # fmt: skip

Sink = Callable[[TokenEvent], None]

STALE_SECONDS = 8 * BEAT_SECONDS  # without a sign of life: a process that swaps or is stopped
EVENTS_AT_ONCE = 8  # are delivered before whatever else came meanwhile: a millisecond's work


class EngineDown(SlipstreamError):
    """There is no engine to run a request at the moment."""

    def __init__(self, why: str = "The engine is being started; try again in a few seconds.") -> None:
        super().__init__(why)


class EngineConnection:
    """attach() it to an engine's process whenever there is a new one; detach() it when that has ended.

    Handles have it as their engine (api/handles.py: EngineDoor).
    """

    def __init__(
        self,
        front: str,
        context: "zmq.Context[zmq.Socket[bytes]]",
        on_ready: Callable[[Ready], Awaitable[None]],
        on_sent_elsewhere: Callable[[list[int]], None],
        step_timeout: float = 120.0,
    ) -> None:
        """front: its name.  on_ready: what has to be done before the engine gets requests.
        on_sent_elsewhere: gets the block keys of each prompt that another front has sent there.
        step_timeout: seconds after which an engine that has work and makes no step counts as ill.
        """
        self._front, self._context, self._step_timeout = front, context, step_timeout
        self._on_ready, self._on_sent_elsewhere = on_ready, on_sent_elsewhere
        self._sinks: dict[str, Sink] = {}
        self._profiling: dict[str, asyncio.Future[str]] = {}
        self._together: list[GenerateRequest] | None = None  # what the beginning of a call has submitted so far
        self._reader: asyncio.Task[None] | None = None
        self._may_have_come = asyncio.Event()  # something on the reader's socket
        self._socket: zmq.Socket[bytes] | None = None  # to an engine that is ready
        self._last_beat = self._seconds_stuck = 0.0
        self._num_elsewhere = 0
        self.kv_address = ""  # of an engine that is ready
        self.stats, self.measures = EngineStats(), Measures()

    def attach(self, address: str) -> None:
        """There is a new engine process; requests go to it from when it is ready."""
        self._reader = asyncio.create_task(self._read(address))
        self._reader.add_done_callback(self._note_defect)

    async def detach(self, why: str) -> None:
        """There is none any more; what was in flight ends with an error."""
        reader, self._socket, self._reader = self._reader, None, None
        if reader is not None:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        self._fail_all(why)

    # --- what it is ---

    @property
    def is_attached(self) -> bool:
        """There is an engine process, ready or not."""
        return self._reader is not None

    @property
    def is_ready(self) -> bool:
        return self._socket is not None

    @property
    def is_healthy(self) -> bool:
        """There is an engine, it answers, and where it has work it makes steps."""
        is_stale = time.monotonic() - self._last_beat > STALE_SECONDS
        return self.is_ready and not is_stale and self._seconds_stuck < self._step_timeout

    @property
    def num_sequences(self) -> int:
        """In flight; those of other fronts as of the last beat."""
        return len(self._sinks) + self._num_elsewhere

    # --- requests ---

    @contextmanager
    def together(self, block_keys: list[list[int]], asked: float) -> Iterator[None]:
        """What is submitted meanwhile begins a call: it goes in one message, of which the engine takes all or none.

        block_keys: of its prompts.  asked: when the call came, by time.time().  Raises EngineDown.
        """
        if self._socket is None:
            raise EngineDown
        self._together = []
        try:
            yield
            requests = self._together
        finally:
            self._together = None
        self._send(self._socket, Submit(requests, asked, begins_call=True, block_keys=block_keys))

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        """Send one sequence to the engine; the sink is called on the event loop."""
        if self._socket is None:
            raise EngineDown
        self._sinks[request.request_id] = sink
        if self._together is None:
            self._send(self._socket, Submit([request], time.time(), begins_call=False, block_keys=[]))
        else:
            self._together.append(request)

    def abort(self, request_id: str) -> None:
        self._abort(request_id, FinishReason.ABORT)

    def stop(self, request_id: str) -> None:
        self._abort(request_id, FinishReason.STOP)

    def _abort(self, request_id: str, reason: FinishReason) -> None:
        if self._sinks.pop(request_id, None) is not None and self._socket is not None:
            self._send(self._socket, Abort(request_id, reason))

    def discard(self, name: str) -> None:
        """Nobody takes the KV of a prompt in a file of this name any more."""
        if self._socket is not None:
            self._send(self._socket, Discard(name))

    async def profile(self, call_id: str, start: bool) -> str:
        """Where the trace of the engine's steps is, or will be. Raises RequestError, or EngineDown."""
        if self._socket is None:
            raise EngineDown
        said = self._profiling[call_id] = asyncio.get_running_loop().create_future()
        try:
            self._send(self._socket, Profile(call_id, start))
            return await said
        finally:
            del self._profiling[call_id]

    # --- the engine's process ---

    def _send(self, socket: zmq.Socket[bytes], message: FromFront) -> None:
        socket.send(encode(message))  # at once, without limits to wait for
        self._may_have_come.set()  # the descriptor tells of a change once, and sending may have been who heard it

    async def _read(self, address: str) -> None:
        with self._context.socket(zmq.DEALER) as socket:
            for limit in (zmq.SNDHWM, zmq.RCVHWM):
                socket.setsockopt(limit, 0)  # none: a dropped message would be a request that never ends
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.ROUTING_ID, self._front.encode())
            socket.connect(address)
            self._send(socket, Hello())
            with _watched(socket, self._may_have_come.set):
                while True:
                    await self._may_have_come.wait()
                    self._may_have_come.clear()
                    while socket.poll(0):
                        await self._receive(decode_from_engine(socket.recv()), socket)

    async def _receive(self, message: FromEngine, socket: zmq.Socket[bytes]) -> None:
        self._last_beat = time.monotonic()
        match message:
            case Events(events):
                await self._deliver_all(events)
            case Beat():
                self.stats, self.measures = message.stats, message.measures
                self._seconds_stuck, self._num_elsewhere = message.seconds_stuck, message.num_elsewhere
                for keys in message.block_keys:
                    self._on_sent_elsewhere(keys)
            case Profiled(call_id, path, error):
                self._note_profiled(call_id, path, error)
            case Ready():
                self.kv_address = message.kv_address
                await self._on_ready(message)
                self._socket = socket

    async def _deliver_all(self, events: list[TokenEvent]) -> None:
        """A step's: first tokens first, which are waited for the most; new requests are looked at in between."""
        for number, event in enumerate(sorted(events, key=lambda event: not event.seconds_queued), start=1):
            self._deliver(event)
            if number % EVENTS_AT_ONCE == 0:
                await asyncio.sleep(0)

    def _note_profiled(self, call_id: str, path: str, error: str | None) -> None:
        said = self._profiling.get(call_id)
        if said is not None and not said.done():
            said.set_exception(RequestError(error)) if error else said.set_result(path)

    def _note_defect(self, reader: asyncio.Task[None]) -> None:
        """What the engine says cannot be understood: nothing can be asked of it."""
        if not reader.cancelled() and (defect := reader.exception()) is not None:
            self._socket = None
            self._fail_all(f"the engine cannot be understood: {defect}")
            raise defect

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
        for said in self._profiling.values():
            if not said.done():
                said.set_exception(EngineDown(why))
        self.stats, self.measures = EngineStats(), Measures()
        self._num_elsewhere, self._seconds_stuck = 0, 0.0


@contextmanager
def _watched(socket: zmq.Socket[bytes], call: Callable[[], None]) -> Iterator[None]:
    """The event loop calls it when there may be something on the socket.

    zmq.asyncio would do, at a third of a front's time: it makes futures and asks for flags at each message.
    """
    loop, descriptor = asyncio.get_running_loop(), socket.fileno()
    loop.add_reader(descriptor, call)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
