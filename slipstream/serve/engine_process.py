"""The engine's process: an LLM behind a ZeroMQ socket.

    python -m slipstream.serve.engine_process ADDRESS      stdin: one line of JSON, what LLM(...) is given

It ends when its stdin does: whatever happens to the front that holds the other end, no engine stays behind.
"""

import json
import os
import shutil
import sys
import time
from collections import deque
from functools import partial
from pathlib import Path

import zmq

from slipstream.api import LLM
from slipstream.errors import RequestError, SlipstreamError
from slipstream.schema.request import FinishReason, GenerateRequest, TokenEvent
from slipstream.serve.messages import (
    BEAT_SECONDS,
    Abort,
    Beat,
    Events,
    FromEngine,
    Hello,
    Ready,
    Submit,
    decode_from_front,
    encode,
)  # fmt: skip

USER_ERROR = 2  # exit code of a start that failed with a sentence, as the command line's


class Outbox:
    """Events on their way from the engine's thread to the one that owns the socket."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[bytes, TokenEvent]] = deque()
        self._is_woken = False
        self.fileno, self._wake = os.pipe()

    def put(self, front: bytes, event: TokenEvent) -> None:
        self._waiting.append((front, event))
        if not self._is_woken:
            self._is_woken = True
            os.write(self._wake, b"!")

    def take(self) -> dict[bytes, list[TokenEvent]]:
        """By front, in their order. Call it where `fileno` can be read."""
        os.read(self.fileno, 64)
        self._is_woken = False  # before looking: what comes now wakes again
        taken: dict[bytes, list[TokenEvent]] = {}
        while self._waiting:
            front, event = self._waiting.popleft()
            taken.setdefault(front, []).append(event)
        return taken


class EngineServer:
    """Fronts on one side, the engine's loop on the other; one thread, that of the socket."""

    def __init__(self, llm: LLM, address: str) -> None:
        self._llm = llm
        self._fronts: set[bytes] = set()
        self._outbox = Outbox()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        for limit in (zmq.SNDHWM, zmq.RCVHWM):
            self._socket.setsockopt(limit, 0)  # none: a dropped message would be a request that never ends
        self._socket.bind(address)

    def run(self) -> None:
        """Until stdin ends, or the engine's loop dies."""
        poller = zmq.Poller()
        lifeline = sys.stdin.fileno()
        for source in (self._socket, self._outbox.fileno, lifeline):
            poller.register(source, zmq.POLLIN)
        next_beat = 0.0
        while self._llm.loop.is_alive:
            ready = dict(poller.poll(int(BEAT_SECONDS * 1000)))
            if lifeline in ready:
                return
            if self._socket in ready:
                self._receive()
            if self._outbox.fileno in ready:
                for front, events in self._outbox.take().items():
                    self._send(front, Events(events))
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + BEAT_SECONDS
                for front in self._fronts:
                    self._send(front, Beat(self._llm.stats))
        sys.exit("error: The engine's loop has died; its traceback is above.")

    def _receive(self) -> None:
        while self._socket.poll(0):
            front, payload = self._socket.recv_multipart()
            match decode_from_front(payload):
                case Hello():
                    self._fronts.add(front)
                    self._send(front, self._ready())
                case Submit(request):
                    self._submit(front, request)
                case Abort(request_id):
                    self._llm.loop.abort(request_id)

    def _submit(self, front: bytes, request: GenerateRequest) -> None:
        try:
            self._llm.loop.submit(request, partial(self._outbox.put, front))
        except SlipstreamError as error:
            event = TokenEvent(
                request.request_id,
                finish_reason=FinishReason.ERROR,
                error=str(error),
                is_refused=isinstance(error, RequestError),
            )
            self._outbox.put(front, event)

    def _send(self, front: bytes, message: FromEngine) -> None:
        self._socket.send_multipart([front, encode(message)])

    def _ready(self) -> Ready:
        llm = self._llm
        runtime = llm.runtime_config
        kv_bytes = runtime.num_blocks * llm.manifest.kv_block_bytes(runtime.kv_groups)
        return Ready(
            llm.request_maker.facts,
            None if llm.tokenizer_folder is None else str(llm.tokenizer_folder),
            runtime,
            llm.manifest.dtype,
            {**llm.manifest.memory, "kv_cache": kv_bytes},
            sum(llm.startup_seconds.values()),
        )


def main() -> None:
    address = sys.argv[1]
    options = json.loads(sys.stdin.buffer.readline())
    try:
        llm = LLM(**options)
    except SlipstreamError as error:
        print("error:", error, file=sys.stderr)
        sys.exit(USER_ERROR)
    with llm:
        EngineServer(llm, address).run()
    shutil.rmtree(Path(address.removeprefix("ipc://")).parent, ignore_errors=True)  # a front that was killed left it


if __name__ == "__main__":
    main()
