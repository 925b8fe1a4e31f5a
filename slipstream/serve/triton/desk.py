"""Desk: the requests that the model `tensorrt_llm` has in flight, over the loop of an LLM.

One thread owns them all. Whoever has news (Triton, with a request or a stop; the engine's thread, with an event) puts
a job into its queue; it starts, follows, answers and ends, and looks after who has left and whether steps are made.
"""

import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Protocol

import numpy as np

from slipstream.api.handles import Handle, make_handle
from slipstream.api.outputs import RequestOutput
from slipstream.errors import RequestError, SlipstreamError
from slipstream.schema.request import EngineStats, TokenEvent
from slipstream.serve.triton.ask import Ask
from slipstream.serve.triton.groups import TokenGroups
from slipstream.serve.triton.wire import Tensors

if TYPE_CHECKING:
    from slipstream.api import LLM

LOOK_SECONDS = 0.1  # between two looks at who has left: each asks the server of every request


class Answerer(Protocol):
    """The way back of one request (wire.py: Reply)."""

    @property
    def is_cancelled(self) -> bool: ...

    def send(self, values: Tensors, is_last: bool) -> None: ...

    def fail(self, error: Exception) -> None: ...

    def close(self) -> None: ...


class Desk:
    def __init__(
        self,
        llm: "LLM",
        *,
        step_timeout: float,
        exclude_input: bool,
        on_stats: Callable[[EngineStats], None],
        give_up: Callable[[], None],
    ) -> None:
        """step_timeout: seconds.  on_stats: called some times a second.  give_up: called once all is lost."""
        self._llm, self._step_timeout, self._exclude_input = llm, step_timeout, exclude_input
        self._on_stats, self._give_up = on_stats, give_up
        self._ids = map(str, count())
        self._in_flight: dict[str, _InFlight] = {}
        self._news: set[str] = set()  # in flight, and something to send
        self._last_progress, self._last_steps = time.monotonic(), 0
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="slipstream-desk", daemon=True)
        self._thread.start()

    # --- from any thread ---

    def take(self, ask: Ask, reply: Answerer) -> None:
        self._jobs.put(partial(self._start, ask, reply))

    def stop(self, name: str, reply: Answerer) -> None:
        """End what runs under Triton's request id `name` with what it has so far; it may have ended already."""
        self._jobs.put(partial(self._stop, name, reply))

    def close(self) -> None:
        """What still runs ends with an error."""
        self._jobs.put(self._close)
        self._thread.join()

    # --- the thread ---

    def _run(self) -> None:
        next_look = 0.0
        try:
            while self._is_open:
                self._work()
                if time.monotonic() >= next_look:
                    next_look = time.monotonic() + LOOK_SECONDS
                    self._look_after()
        except Exception as defect:  # nobody else would answer: say so to everyone
            traceback.print_exc()
            self._lose_all(f"the model tensorrt_llm stopped: {type(defect).__name__}: {defect}")

    def _work(self) -> None:
        """All jobs there are, then one response for each request that they brought forward."""
        try:
            job = self._jobs.get(timeout=LOOK_SECONDS)
            while True:
                job()
                job = self._jobs.get_nowait()
        except queue.Empty:
            pass
        for request_id in list(self._news):
            self._answer(request_id)
        self._news.clear()

    def _start(self, ask: Ask, reply: Answerer) -> None:
        request_id = next(self._ids)
        tokenizer = self._llm.request_maker.optional_tokenizer

        def note_later(event: TokenEvent) -> None:
            self._jobs.put(partial(self._note, request_id, event))

        try:
            request = ask.make(request_id)
            handle = make_handle(self._llm.loop, tokenizer, None, request, note_later)
            handle.start()
        except SlipstreamError as error:
            reply.fail(error)
            return
        if not self._in_flight:
            self._last_progress = time.monotonic()
        lead = () if self._exclude_input else request.prompt_token_ids
        groups = [TokenGroups(tokenizer, request.prompt_token_ids) for _ in range(request.sampling.n)]
        self._in_flight[request_id] = _InFlight(ask, reply, handle, groups, lead)

    def _note(self, request_id: str, event: TokenEvent) -> None:
        flight = self._in_flight.get(request_id)
        if flight is None:
            return
        if event.error is not None:
            self._end(request_id)
            flight.reply.fail((RequestError if event.is_refused else SlipstreamError)(event.error))
            return
        flight.handle.push(event)
        if flight.handle.finished or (flight.ask.streaming and flight.handle.has_news):
            self._news.add(request_id)

    def _answer(self, request_id: str) -> None:
        flight = self._in_flight.get(request_id)
        if flight is None:
            return
        is_last = flight.handle.finished
        if is_last:
            self._end(request_id)
        flight.send(is_last)

    def _stop(self, name: str, reply: Answerer) -> None:
        for request_id in [each for each, flight in self._in_flight.items() if name and flight.ask.name == name]:
            flight = self._in_flight[request_id]
            self._end(request_id)
            flight.send(is_last=True)
        reply.send(_no_tokens(), is_last=True)

    def _close(self) -> None:
        self._is_open = False
        self._fail_all("the server is being stopped.")

    def _end(self, request_id: str) -> None:
        self._news.discard(request_id)
        self._in_flight.pop(request_id).handle.abort()

    def _fail_all(self, why: str) -> None:
        for request_id, flight in list(self._in_flight.items()):
            self._end(request_id)
            flight.reply.fail(SlipstreamError(why))

    # --- what nobody brings news of ---

    def _look_after(self) -> None:
        for request_id, flight in list(self._in_flight.items()):
            if flight.reply.is_cancelled:
                self._end(request_id)
                flight.reply.close()
        stats = self._llm.stats
        self._on_stats(stats)
        now, num_steps = time.monotonic(), stats.num_steps
        if num_steps != self._last_steps or not self._in_flight:
            self._last_progress, self._last_steps = now, num_steps
        if not self._llm.loop.is_alive:
            self._lose_all("the engine's loop has died; its traceback is in the server's log.")
        elif now - self._last_progress > self._step_timeout:
            self._lose_all(f"the engine has made no step for {self._step_timeout:g} seconds (step_timeout).")

    def _lose_all(self, why: str) -> None:
        print(f"error: {why} {len(self._in_flight)} requests were in flight:", file=sys.stderr)
        for request_id, flight in self._in_flight.items():
            print(f"error:   {request_id}: {flight.describe()}", file=sys.stderr)
        sys.stderr.flush()
        self._is_open = False
        self._fail_all(why)
        self._give_up()


class _InFlight:
    """One request: its way back, what it has said, and what of that has been sent."""

    def __init__(
        self, ask: Ask, reply: Answerer, handle: Handle, groups: list[TokenGroups], lead: tuple[int, ...]
    ) -> None:
        """groups: one a sequence.  lead: tokens that go before the first ones."""
        self.ask, self.reply, self.handle = ask, reply, handle
        self._groups, self._lead = groups, list(lead)
        self._num_sent = 0  # tokens; of the only sequence there is where anything is streamed
        self._has_sent = False

    def send(self, is_last: bool) -> None:
        """The tokens that are new; a request that streams may have nothing to send, but the last response is sent."""
        output = self.handle.output()
        rows = [groups.take(each) for groups, each in zip(self._groups, output.outputs, strict=False)]
        if any(rows) or (is_last and not self._has_sent):
            self.reply.send(self._tensors(rows, output), is_last)
            self._has_sent = True
        elif is_last:
            self.reply.close()

    def describe(self) -> str:
        output = self.handle.output()
        lengths = [len(each.token_ids) for each in output.outputs]
        return f"request id {self.ask.name!r}, {len(output.prompt_token_ids)} prompt tokens, {lengths} generated"

    def _tensors(self, rows: list[list[int]], output: RequestOutput) -> Tensors:
        lead, self._lead = self._lead, []
        start, longest = self._num_sent, max(map(len, rows), default=0)
        self._num_sent += longest
        shape = (1, len(rows), len(lead) + longest)
        output_ids, log_probs = np.full(shape, self.ask.pad_id, np.int32), np.zeros(shape, np.float32)
        for index, row in enumerate(rows):
            output_ids[0, index, : len(lead) + len(row)] = lead + row
            known = (output.outputs[index].logprobs or [])[start : start + len(row)]
            log_probs[0, index, len(lead) : len(lead) + len(known)] = [entry.logprob for entry in known]
        cumulative = [each.cumulative_logprob or 0.0 for each in output.outputs]
        return {
            "output_ids": output_ids,
            "sequence_length": np.array([[len(lead) + len(row) for row in rows]], np.int32),
            "cum_log_probs": np.array([cumulative], np.float32),
            "output_log_probs": log_probs,
        }


def _no_tokens() -> Tensors:
    """The answer to a stop."""
    return {
        "output_ids": np.zeros([1, 1, 0], np.int32),
        "sequence_length": np.zeros([1, 1], np.int32),
        "cum_log_probs": np.zeros([1, 1], np.float32),
        "output_log_probs": np.zeros([1, 1, 0], np.float32),
    }
