"""EngineLoop: the thread that steps an engine for as long as it has work."""

import atexit
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable

from slipstream.errors import SlipstreamError
from slipstream.runtime.engine import Engine
from slipstream.schema.request import EngineStats, FinishReason, GenerateRequest, TokenEvent

Sink = Callable[[TokenEvent], None]  # called on the loop's thread; must not block


class EngineLoop:
    """Lets any thread submit and abort. Each request's events go to its sink, the last with a finish_reason."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self._sinks: dict[str, Sink] = {}  # touched by the loop's thread only
        self._inbox: deque[tuple[GenerateRequest, Sink] | str] = deque()  # a request to add or an id to abort
        self._wake = threading.Condition()
        self._is_closed = False
        self._stats = engine.stats
        self._thread = threading.Thread(target=self._run, name="slipstream-engine", daemon=True)
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

    def submit(self, request: GenerateRequest, sink: Sink) -> None:
        """Raises RequestError for a grammar that cannot be followed; compiling it keeps this thread, not the loop's."""
        engine = self._engine
        if engine is not None:
            engine.prepare(request)
        self._send((request, sink))

    def abort(self, request_id: str) -> None:
        """Stop a request; its sink hears no more. Unknown and ended ids are ignored, as is all after close()."""
        with contextlib.suppress(SlipstreamError):
            self._send(request_id)

    def close(self) -> None:
        """Stop after the current step; requests still running end with an ABORT event."""
        atexit.unregister(self.close)
        if os.getpid() != self._process:  # a fork has no such thread, and may have inherited a lock that is held
            return
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join()

    def _send(self, message: tuple[GenerateRequest, Sink] | str) -> None:
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
            while self._receive(self._engine):
                events = self._engine.step()
                self._stats = self._engine.stats
                for event in events:
                    self._deliver(self._engine, event)
        except BaseException as failure:  # a defect of ours: say so to everyone rather than let them wait
            reason, error = FinishReason.ERROR, f"the engine stopped: {type(failure).__name__}: {failure}"
            raise
        finally:
            with self._wake:
                self._is_closed = True  # from here on nothing enters the inbox, where nobody would read it
            self._end_all(reason, error)
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
            else:
                self._add(engine, *message)
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
        waiting = [(message[0].request_id, message[1]) for message in self._inbox if not isinstance(message, str)]
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
