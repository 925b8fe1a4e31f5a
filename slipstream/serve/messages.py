"""What crosses the border between front and engine process: msgpack of these types, nothing pickled."""

import msgspec

from slipstream.api.requests import ModelFacts
from slipstream.schema.build import RuntimeConfig
from slipstream.schema.request import EngineStats, GenerateRequest, TokenEvent


class Hello(msgspec.Struct, tag=True):
    """A front's first word; answered by Ready once there is an engine."""


class Submit(msgspec.Struct, tag=True):
    request: GenerateRequest


class Abort(msgspec.Struct, tag=True):
    request_id: str


class Ready(msgspec.Struct, tag=True):
    """What a front must know of the engine."""

    facts: ModelFacts
    tokenizer_folder: str | None
    runtime: RuntimeConfig
    dtype: str
    memory: dict[str, int]  # bytes: weights, activations of the largest step, KV cache
    startup_seconds: float


class Events(msgspec.Struct, tag=True):
    events: list[TokenEvent]


class Beat(msgspec.Struct, tag=True):
    """The engine process is alive; its numbers as of the last step."""

    stats: EngineStats


FromFront = Hello | Submit | Abort
FromEngine = Ready | Events | Beat

BEAT_SECONDS = 0.5

encode = msgspec.msgpack.Encoder().encode
decode_from_front = msgspec.msgpack.Decoder(FromFront).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
