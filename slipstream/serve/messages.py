"""What crosses the borders between the server's processes: these types, nothing pickled.

Fronts and engines speak msgpack over ZeroMQ. The parent speaks to both in lines of JSON on their stdin, which are also
their lifelines: a process whose stdin ends has no parent any more, and ends.
"""

from typing import Any

import msgspec

from slipstream.api.requests import ModelFacts
from slipstream.schema.build import RuntimeConfig
from slipstream.schema.request import EngineStats, FinishReason, GenerateRequest, TokenEvent
from slipstream.serve.measures import Measures

# --- front to engine ---


class Hello(msgspec.Struct, tag=True):
    """A front's first word; answered by Ready once there is an engine."""


class Submit(msgspec.Struct, tag=True):
    """Sequences that belong together: the engine takes all of them or, where they begin a call, none."""

    requests: list[GenerateRequest]
    sent: float  # by time.time(), which the clocks of several machines agree on, more or less
    begins_call: bool  # False for the further rounds of a beam search, which was let in before
    block_keys: list[list[int]]  # of its prompts (router.py), for the other fronts


class Abort(msgspec.Struct, tag=True):
    request_id: str
    reason: FinishReason  # STOP where a stop string was found, which the engine cannot see


class Discard(msgspec.Struct, tag=True):
    """Nobody takes the KV of a prompt any more that the engine may have kept, or fetched."""

    name: str  # of the file


class Profile(msgspec.Struct, tag=True):
    """Answered by Profiled, under the same id."""

    call_id: str
    start: bool  # or stop


# --- engine to front ---


class Ready(msgspec.Struct, tag=True):
    """What a front must know of the engine."""

    facts: ModelFacts
    tokenizer_folder: str | None
    runtime: RuntimeConfig
    dtype: str
    memory: dict[str, int]  # bytes: weights, activations of the largest step, KV cache
    startup_seconds: float
    max_concurrent_requests: int  # sequences that may run and wait
    kv_address: str  # where others find the KV of a prompt that it has computed for them (kv_folder.py)


class Events(msgspec.Struct, tag=True):
    events: list[TokenEvent]


class Beat(msgspec.Struct, tag=True):
    """The engine process is alive; its numbers as of the last step."""

    stats: EngineStats
    measures: Measures
    seconds_stuck: float  # since there was work and the last step ended
    num_elsewhere: int  # sequences in flight that are other fronts'
    block_keys: list[list[int]]  # of what these have sent since the last beat


class Profiled(msgspec.Struct, tag=True):
    call_id: str
    path: str  # of the trace
    error: str | None = None


# --- parent to engine ---


class EngineSetup(msgspec.Struct):
    """The first line."""

    name: str  # no other engine's process has or had it
    options: dict[str, Any]  # of LLM(...)
    replica: int  # of so many engines
    num_replicas: int
    max_queue_size: int
    max_concurrent_requests: int | None
    step_timeout: float  # seconds
    iteration_log: str | None
    profile_dir: str | None
    hands_over: bool = False  # KV goes from some of them to others
    is_placed: bool = False  # it has GPUs or cores of its own already


class FrontGone(msgspec.Struct, tag=True):
    name: str


# --- parent to front ---


class FrontSetup(msgspec.Struct):
    """The first line."""

    name: str  # no other front has or had it
    listener: int  # the file descriptor of the listening socket
    config: dict[str, Any]  # of ServeConfig


class EngineStarted(msgspec.Struct, tag=True):
    """It may be a while until it is ready."""

    replica: int
    address: str


class EngineLeaves(msgspec.Struct, tag=True):
    """It gets no new requests; it ends once no front has any there."""

    replica: int


class EngineEnded(msgspec.Struct, tag=True):
    replica: int
    why: str


# --- front to parent ---


class FrontReady(msgspec.Struct, tag=True):
    """This front takes requests for this engine; a line on its stdout each time that one is ready."""

    replica: int
    engine: Ready


class FrontLoad(msgspec.Struct, tag=True):
    """Every second, where engines come and go with the load."""

    in_flight: dict[int, int]  # sequences of this front's; of each engine that it may send to, or that has some


FromFront = Hello | Submit | Abort | Discard | Profile
FromEngine = Ready | Events | Beat | Profiled
ToFront = EngineStarted | EngineLeaves | EngineEnded
ToParent = FrontReady | FrontLoad

BEAT_SECONDS = 0.5
LOAD_SECONDS = 1.0

encode = msgspec.msgpack.Encoder().encode
decode_from_front = msgspec.msgpack.Decoder(FromFront).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode


def json_line(message: msgspec.Struct) -> bytes:
    return msgspec.json.encode(message) + b"\n"
