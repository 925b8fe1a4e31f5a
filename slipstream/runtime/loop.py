"""EngineLoop: the thread that steps an engine for as long as it has work."""

import atexit
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable

from slipstream.errors import SlipstreamError, in_words
from slipstream.runtime.engine import Engine
from slipstream.schema.request import EngineStats, FinishReason, GenerateRequest, RequestState, TokenEvent

Sink = Callable[[TokenEvent], None]  # called on the loop's thread; must not block


# A request to add, the id of one to abort, or something to call.
Message = tuple[GenerateRequest, Sink] | str | Callable[[], None]


class EngineLoop:
    """Lets any thread submit and abort. Each request's events go to its sink, the last with a finish_reason."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self._sinks: dict[str, Sink] = {}  # touched by the loop's thread only
        self._inbox: deque[Message] = deque()
        self._wake = threading.Condition()
        self._is_closed = False
        self._stats = engine.stats
        self.on_step: Callable[[EngineStats, float], None] = lambda stats, seconds: None  # on the loop's thread
        self._thread = threading.Thread(target=self._run, name="slipstream-engine", daemon=True)
        engine.when_lost(self._wake_up)
        self._thread.start()
        self._process = os.getpid()
        atexit.register(self.close)  # the interpreter must not end around a thread that is inside a kernel

    @property
    def stats(self) -> EngineStats:
        """As of the last step."""
        return self._stats

    @property
    def is_alive(self) -> bool:
        """False once closed, and after a defect that no single request is to blame for."""
        return self._thread.is_alive()

    def prepare(self, request: GenerateRequest) -> None:
        """Compile its grammar, if it has one. It may take a while. Raises RequestError where it cannot be followed."""
        engine = self._engine
        if engine is not None:
            engine.prepare(request)

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        """Prepares it first, where nobody has: that keeps this thread, not the loop's."""
        self.prepare(request)
        self._send((request, sink))

    def abort(self, request_id: str) -> None:
        """Stop a request; its sink hears no more. Unknown and ended ids are ignored, as is all after close()."""
        with contextlib.suppress(SlipstreamError):
            self._send(request_id)

    stop = abort

    def call(self, function: Callable[[], None]) -> None:
        """On the loop's thread, between two steps. It must not raise. Raises SlipstreamError where there is no loop."""
        self._send(function)

    def requests(self) -> list[RequestState]:
        """All that have not ended, as of now, even where a step hangs."""
        engine = self._engine
        return [] if engine is None else engine.requests()

    def close(self) -> None:
        """Stop after the current step; requests still running end with an ABORT event."""
        atexit.unregister(self.close)
        if os.getpid() != self._process:  # a fork has no such thread, and may have inherited a lock that is held
            return
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join()

    def _wake_up(self) -> None:
        with self._wake:
            self._wake.notify()

    def _send(self, message: Message) -> None:
        if os.getpid() != self._process:
            raise SlipstreamError("This engine runs in the process that opened it; open another one in each fork.")
        with self._wake:
            if self._is_closed:
                raise SlipstreamError("The engine is closed; open it again to generate.")
            self._inbox.append(message)
            self._wake.notify()

    def _run(self) -> None:
        assert self._engine is not None
        reason, error = FinishReason.ABORT, ""
        try:
            self._engine.begin()
            while self._receive(self._engine):
                started = time.perf_counter()
                events = self._engine.step()
                self._stats = self._engine.stats
                self.on_step(self._stats, time.perf_counter() - started)
                for event in events:
                    self._deliver(self._engine, event)
        except BaseException as failure:  # a defect of ours: say so to everyone rather than let them wait
            reason, error = FinishReason.ERROR, f"the engine stopped: {in_words(failure)}"
            raise
        finally:
            with self._wake:
                self._is_closed = True  # from here on nothing enters the inbox, where nobody would read it
            self._end_all(reason, error)
            self._engine.close()
            self._engine = None  # weights and KV cache go with it

    def _receive(self, engine: Engine) -> bool:
        """Take in what was sent; wait where there is nothing to do. False when closed."""
        with self._wake:
            while not (self._inbox or engine.has_work or self._is_closed):
                self._wake.wait()
        for _ in range(len(self._inbox)):
            message = self._inbox[0]
            if isinstance(message, str):
                self._sinks.pop(message, None)
                engine.abort(message)
            elif isinstance(message, tuple):
                self._add(engine, *message)
            else:
                message()
            self._inbox.popleft()  # not earlier: if that raised, _end_all still finds the sender here
        return not self._is_closed

    def _add(self, engine: Engine, request: GenerateRequest, sink: Sink) -> None:
        try:
            engine.add(request)
        except SlipstreamError as error:
            reason = FinishReason.ERROR
            _tell(sink, TokenEvent(request.request_id, finish_reason=reason, error=str(error), is_refused=True))
        else:
            self._sinks[request.request_id] = sink

    def _deliver(self, engine: Engine, event: TokenEvent) -> None:
        sink = self._sinks.get(event.request_id)
        if event.finish_reason is not None:
            self._sinks.pop(event.request_id, None)
        if sink is not None and not _tell(sink, event):
            self._sinks.pop(event.request_id, None)
            engine.abort(event.request_id)

    def _end_all(self, reason: FinishReason, error: str) -> None:
        waiting = [(message[0].request_id, message[1]) for message in self._inbox if isinstance(message, tuple)]
        for request_id, sink in [*self._sinks.items(), *waiting]:
            _tell(sink, TokenEvent(request_id, finish_reason=reason, error=error or None))
        self._sinks.clear()
        self._inbox.clear()


def _tell(sink: Sink, event: TokenEvent) -> bool:
    """False where the listener is gone (its asyncio loop was closed, say): that must not end everyone else's engine."""
    try:
        sink(event)
    except Exception:
        return False
    return True
