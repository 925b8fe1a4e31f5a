"""The engine's process: an LLM behind a ZeroMQ socket.

    python -m slipstream.serve.engine_process ADDRESS      stdin: lines of JSON from the parent (messages.py)

It ends when its stdin does: whatever happens to the parent that holds the other end, no engine stays behind.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
import zmq

from slipstream.api import LLM
from slipstream.api.replicas import num_ranks, place_replica
from slipstream.errors import RequestError, SlipstreamError, UsageError
from slipstream.schema.request import EngineStats, FinishReason, GenerateRequest, TokenEvent
from slipstream.serve.engine_diagnostics import Profiler, StepLog, Watchdog
from slipstream.serve.kv_folder import FETCH_SECONDS, KVFolder, is_elsewhere
from slipstream.serve.ledger import Ledger
from slipstream.serve.messages import (
    BEAT_SECONDS,
    Abort,
    Beat,
    Discard,
    EngineSetup,
    Events,
    FromEngine,
    FrontGone,
    Hello,
    Profile,
    Profiled,
    Ready,
    Submit,
    decode_from_front,
    encode,
)  # fmt: skip

T = TypeVar("T")

SWITCH_SECONDS = 0.0005  # of the interpreter: the socket's thread waits no longer for the one that plans steps
FETCHES_AT_ONCE = 16  # of KV from other machines; a thread waits for each
USER_ERROR = 2  # exit code of a start that failed with a sentence, as the command line's


class Mailbox(Generic[T]):
    """What other threads have for the one that owns the socket."""

    def __init__(self) -> None:
        self._waiting: deque[T] = deque()
        self._is_woken = False
        self.fileno, self._wake = os.pipe()

    def put(self, item: T) -> None:
        self._waiting.append(item)
        if not self._is_woken:
            self._is_woken = True
            os.write(self._wake, b"!")

    def take(self) -> list[T]:
        """In their order. Call it where `fileno` can be read."""
        os.read(self.fileno, 64)
        self._is_woken = False  # before looking: what comes now wakes again
        return [self._waiting.popleft() for _ in range(len(self._waiting))]


class EngineServer:
    """Fronts on one side, the engine's loop on the other; one thread, that of the socket."""

    def __init__(self, llm: LLM, address: str, setup: EngineSetup, kv_folder: KVFolder) -> None:
        self._llm, self._kv_folder = llm, kv_folder
        runtime = llm.runtime_config
        self._kv_bytes = runtime.num_blocks * llm.manifest.kv_block_bytes(runtime.kv_groups)
        self._fronts: set[bytes] = set()
        self._gone_fronts: set[bytes] = set()
        self._sent_elsewhere: dict[bytes, list[list[int]]] = {}  # what a front is told of the others with the next beat
        batch_and_queue = runtime.max_batch_size + setup.max_queue_size
        self._most = setup.max_concurrent_requests or batch_and_queue
        self._ledger = Ledger(self._most)
        self._outbox: Mailbox[tuple[bytes, TokenEvent]] = Mailbox()
        self._prepared: Mailbox[tuple[bytes, GenerateRequest, SlipstreamError | None]] = Mailbox()
        self._compilers = ThreadPoolExecutor(max_workers=2)  # of grammars
        self._fetchers = ThreadPoolExecutor(max_workers=FETCHES_AT_ONCE)
        self._num_tokens = 0  # of all steps so far
        self._step_log = None if setup.iteration_log is None else StepLog(_own_log(setup, setup.iteration_log))
        self._watchdog = Watchdog(llm.loop.requests, setup.step_timeout)
        self._profiler = Profiler(setup.profile_dir or "")
        self._profiled: Mailbox[tuple[bytes, Profiled]] = Mailbox()
        llm.loop.on_step = self._note_step
        self._last_progress, self._num_steps = 0.0, 0
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        for limit in (zmq.SNDHWM, zmq.RCVHWM):
            self._socket.setsockopt(limit, 0)  # none: a dropped message would be a request that never ends
        self._socket.bind(address)

    def run(self) -> None:
        """Until stdin ends, or the engine's loop dies."""
        poller = zmq.Poller()
        lifeline = sys.stdin.fileno()
        for source in (self._socket, self._outbox.fileno, self._prepared.fileno, self._profiled.fileno, lifeline):
            poller.register(source, zmq.POLLIN)
        next_beat = 0.0
        while self._llm.loop.is_alive:
            ready = dict(poller.poll(int(BEAT_SECONDS * 1000)))
            if lifeline in ready and not self._obey_parent():
                return
            if self._socket in ready:
                self._receive()
            if self._prepared.fileno in ready:
                for prepared in self._prepared.take():
                    self._start(*prepared)
            if self._profiled.fileno in ready:
                for front, profiled in self._profiled.take():
                    self._send(front, profiled)
            if self._outbox.fileno in ready:
                self._send_events()
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + BEAT_SECONDS
                self._beat()
        sys.exit("error: The engine's loop has died; its traceback is above.")

    def close(self) -> None:
        """What has not begun to be fetched would keep the process from ending."""
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    def _obey_parent(self) -> bool:
        """False where there is none any more."""
        line = _line_from_parent()
        if line:
            front = msgspec.json.decode(line, type=FrontGone).name.encode()
            self._gone_fronts.add(front)
            self._fronts.discard(front)
            self._sent_elsewhere.pop(front, None)
            self._kv_folder.discard_all_of(front.decode())
            for request_id in self._ledger.of_front(front):
                self._abort(request_id, FinishReason.ABORT)
        return bool(line)

    def _receive(self) -> None:
        while self._socket.poll(0):
            front, payload = self._socket.recv_multipart()
            if front in self._gone_fronts:  # its last words
                continue
            match decode_from_front(payload):
                case Hello():
                    self._fronts.add(front)
                    self._send(front, self._ready())
                case Submit() as submit:
                    self._submit(front, submit)
                case Abort(request_id, reason):
                    self._abort(request_id, reason)
                case Discard(name):
                    self._kv_folder.discard([name])
                case Profile(call_id, start):
                    self._llm.loop.call(partial(self._profile, front, call_id, start))

    def _submit(self, front: bytes, submit: Submit) -> None:
        if not len(self._ledger):
            self._last_progress = time.monotonic()
        why = self._ledger.why_busy(len(submit.requests)) if submit.begins_call else None
        if why is not None:
            for request in submit.requests:
                self._refuse(front, request, why, is_busy=True)
            return
        for other in self._fronts - {front}:
            self._sent_elsewhere.setdefault(other, []).extend(submit.block_keys)
        sent = time.monotonic() - max(0.0, time.time() - submit.sent)
        for request in submit.requests:
            is_measured = submit.begins_call and request.kv_to is None  # the one that goes on measures the whole
            self._ledger.open(request, front, sent, is_measured)
        if any(is_elsewhere(request.kv_from) for request in submit.requests):
            self._fetchers.submit(self._prepare, front, submit.requests, time.monotonic() + FETCH_SECONDS)
        elif any(request.sampling.guided is not None for request in submit.requests):
            self._compilers.submit(self._prepare, front, submit.requests)
        else:
            for request in submit.requests:
                self._start(front, request)

    def _prepare(self, front: bytes, requests: Sequence[GenerateRequest], until: float = 0.0) -> None:
        """On a thread of its own: fetch KV, until then, and compile grammars, which keeps nobody else waiting."""
        for request in requests:
            if request.kv_from is not None and is_elsewhere(request.kv_from):
                most = 2 * self._kv_bytes  # with a drafter's
                request = replace(request, kv_from=self._kv_folder.fetch(request.kv_from, until, most))
            error: SlipstreamError | None = None
            try:
                self._llm.loop.prepare(request)
            except SlipstreamError as refusal:
                error = refusal
            except Exception as defect:  # a future would keep it to itself, and the request would never end
                error = SlipstreamError(f"the grammar could not be compiled: {type(defect).__name__}: {defect}")
            self._prepared.put((front, request, error))

    def _start(self, front: bytes, request: GenerateRequest, error: SlipstreamError | None = None) -> None:
        if request.request_id not in self._ledger:  # aborted meanwhile
            self._kv_folder.discard([Path(request.kv_from).name] if request.kv_from else ())
            return
        if request.kv_to is not None:  # a name, so far
            request = replace(request, kv_to=self._kv_folder.expect(request.kv_to))
        if request.kv_from is not None:
            request = replace(request, kv_from=self._kv_folder.near(request.kv_from))
        try:
            if error is not None:
                raise error
            self._llm.loop.submit(request, lambda event: self._outbox.put((front, event)))
        except SlipstreamError as refusal:
            self._refuse(front, request, str(refusal), is_refused=isinstance(refusal, RequestError))

    def _refuse(self, front: bytes, request: GenerateRequest, why: str, **kind: bool) -> None:
        event = TokenEvent(request.request_id, finish_reason=FinishReason.ERROR, error=why, **kind)  # type: ignore[arg-type]
        self._outbox.put((front, event))

    def _abort(self, request_id: str, reason: FinishReason) -> None:
        self._ledger.close(request_id, reason)
        self._llm.loop.abort(request_id)

    def _send_events(self) -> None:
        self._last_progress = time.monotonic()
        by_front: dict[bytes, list[TokenEvent]] = {}
        for front, event in self._outbox.take():
            self._ledger.note(event)
            by_front.setdefault(front, []).append(event)
        for front, events in by_front.items():
            self._send(front, Events(events))

    def _profile(self, front: bytes, call_id: str, start: bool) -> None:
        """On the engine's thread, which is the one that is profiled."""
        try:
            profiled = Profiled(call_id, self._profiler.start() if start else self._profiler.stop())
        except (SlipstreamError, OSError, RuntimeError) as error:
            profiled = Profiled(call_id, "", str(error))
        self._profiled.put((front, profiled))

    def _note_step(self, stats: EngineStats, seconds: float) -> None:
        """On the engine's thread."""
        num_tokens = stats.prompt_tokens_computed + stats.generated_tokens - self._num_tokens
        self._num_tokens += num_tokens
        self._ledger.measures.iteration_tokens_total.add(num_tokens)
        if self._step_log is not None:
            self._step_log.note(stats, num_tokens, seconds)

    def _beat(self) -> None:
        stats = self._llm.stats
        if stats.num_steps != self._num_steps:
            self._num_steps, self._last_progress = stats.num_steps, time.monotonic()
        seconds_stuck = time.monotonic() - self._last_progress if len(self._ledger) else 0.0
        self._watchdog.look(seconds_stuck)
        for front in self._fronts:
            num_elsewhere = len(self._ledger) - len(self._ledger.of_front(front))
            block_keys = self._sent_elsewhere.pop(front, [])
            self._send(front, Beat(stats, self._ledger.measures, seconds_stuck, num_elsewhere, block_keys))

    def _send(self, front: bytes, message: FromEngine) -> None:
        self._socket.send_multipart([front, encode(message)])

    def _ready(self) -> Ready:
        llm = self._llm
        return Ready(
            llm.request_maker.facts,
            None if llm.tokenizer_folder is None else str(llm.tokenizer_folder),
            llm.runtime_config,
            llm.manifest.dtype,
            {**llm.manifest.memory, "kv_cache": self._kv_bytes},
            sum(llm.startup_seconds.values()),
            self._most,
            self._kv_folder.address,
        )


def _own_log(setup: EngineSetup, path: str) -> str:
    """Of several replicas the second's steps.jsonl is steps-1.jsonl."""
    return str(Path(path).with_stem(f"{Path(path).stem}-{setup.replica}")) if setup.num_replicas > 1 else path


def _line_from_parent() -> bytes:
    """Unbuffered: what a buffer held would not wake the poller."""
    with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as stdin:
        return stdin.readline()


def main() -> None:
    address = sys.argv[1]
    setup = msgspec.json.decode(_line_from_parent(), type=EngineSetup)
    kv_folder = KVFolder(setup.name)
    try:
        _serve(address, setup, kv_folder)
    except SlipstreamError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(USER_ERROR)
    finally:
        kv_folder.remove()
    if address.startswith("ipc://"):
        socket = Path(address.removeprefix("ipc://"))
        socket.unlink(missing_ok=True)
        with suppress(OSError):  # others have theirs there; of a parent that was killed the last one removes the folder
            socket.parent.rmdir()


def _serve(address: str, setup: EngineSetup, kv_folder: KVFolder) -> None:
    if setup.hands_over:
        if num_ranks(setup.options) > 1:
            raise UsageError(
                "--prefill_replicas is for engines of one rank so far; leave it out, or --tp_size and --pp_size."
            )
        kv_folder.make()
        if address.startswith("tcp://"):
            kv_folder.listen(address.removeprefix("tcp://").rpartition(":")[0])
    num_here = 1 if setup.is_placed else setup.num_replicas
    llm = LLM(**place_replica(setup.options, setup.replica, num_here))
    with llm, closing(EngineServer(llm, address, setup, kv_folder)) as server:
        sys.setswitchinterval(SWITCH_SECONDS)
        server.run()


if __name__ == "__main__":
    main()
