"""Model: the one that is served, as this protocol sees it, whether over HTTP or gRPC."""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException

from slipstream import __version__
from slipstream.errors import RequestError, SlipstreamError
from slipstream.serve.frontend import Ask, Frontend
from slipstream.serve.kserve.ensemble import (
    INPUTS,
    MAX_PROMPTS,
    OUTPUTS,
    check_outputs,
    news_of,
    outputs_of,
    rows_of,
    sampling_of,
    selected,
)  # fmt: skip
from slipstream.serve.kserve.tensors import Tensor

ENSEMBLE = "ensemble"  # what TensorRT-LLM's clients call it, beside its own names
VERSION = "1"
EXTENSIONS = ("generate", "binary_tensor_data", "model_repository", "model_configuration", "statistics")

# Of a request; why others than these values are refused.
_NEUTRAL_PARAMETERS: dict[str, tuple[tuple[Any, ...], str]] = {
    "sequence_id": ((0, ""), "no state is kept between requests"),
    "sequence_start": ((False,), "no state is kept between requests"),
    "sequence_end": ((False,), "no state is kept between requests"),
    "triton_enable_empty_final_response": ((False, True), ""),  # the last response says that it is
}

Outputs = tuple[list[Tensor], bool]  # and whether these are the last


@dataclass(frozen=True)
class Call:
    asks: Sequence[Ask]
    streams: bool
    wanted: Sequence[str]  # outputs


class Model:
    def __init__(self, frontend: Frontend, names: Sequence[str]) -> None:
        self._frontend = frontend
        self.names = list(dict.fromkeys((*names, ENSEMBLE)))
        self._counts = {"success": [0, 0], "fail": [0, 0]}  # calls, and nanoseconds of them all
        self._last_call = 0  # milliseconds of Unix time

    @property
    def is_ready(self) -> bool:
        return self._frontend.is_healthy

    def check(self, name: str, version: str = "") -> None:
        """Raises HTTPException for a model that is not here."""
        if name not in self.names or version not in ("", VERSION):
            of_version = f" of version {version!r}" if version else ""
            raise HTTPException(
                404, f"There is no model {name!r}{of_version} here; there is {self.names[0]}, version {VERSION}."
            )

    # --- what it says of itself; field names are those of the messages, too ---

    def server_metadata(self) -> dict[str, Any]:
        return {"name": "slipstream", "version": __version__, "extensions": list(EXTENSIONS)}

    def metadata(self, name: str) -> dict[str, Any]:
        inputs = [
            {"name": each, "datatype": it.datatype, "shape": [-1, -1 if it.is_list else 1]}
            for each, it in INPUTS.items()
        ]
        outputs = [
            {"name": each, "datatype": datatype, "shape": [-1, *_dims(each)]} for each, datatype in OUTPUTS.items()
        ]
        return {"name": name, "versions": [VERSION], "platform": "slipstream", "inputs": inputs, "outputs": outputs}

    def config(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "platform": "slipstream",
            "backend": "slipstream",
            "version_policy": {"latest": {"num_versions": 1}},
            "max_batch_size": MAX_PROMPTS,
            "input": [
                {
                    "name": each,
                    "data_type": _type(it.datatype),
                    "dims": [-1 if it.is_list else 1],
                    "optional": it.is_optional,
                }
                for each, it in INPUTS.items()
            ],
            "output": [
                {"name": each, "data_type": _type(datatype), "dims": _dims(each)} for each, datatype in OUTPUTS.items()
            ],
            "model_transaction_policy": {"decoupled": False},
        }

    def statistics(self, name: str) -> dict[str, Any]:
        """Of this front."""
        counts = {kind: {"count": count, "ns": nanoseconds} for kind, (count, nanoseconds) in self._counts.items()}
        num_done = self._counts["success"][0]
        stats = {
            "name": name,
            "version": VERSION,
            "last_inference": self._last_call,
            "inference_count": num_done,
            "execution_count": num_done,
            "inference_stats": counts,
        }
        return {"model_stats": [stats]}

    def index(self) -> list[dict[str, Any]]:
        state = "READY" if self.is_ready else "UNAVAILABLE"
        return [{"name": name, "version": VERSION, "state": state, "reason": ""} for name in self.names]

    # --- inference ---

    async def call(
        self, tensors: Sequence[Tensor], parameters: Mapping[str, Any], wanted: Sequence[str] = (), *, may_stream: bool
    ) -> Call:
        """Raises RequestError for anything in it that cannot be honoured."""
        priority, microseconds = _whole_numbers(parameters)
        timeout = microseconds / 1e6 if microseconds else None
        rows = rows_of(tensors)
        streams = bool(rows[0].get("stream"))
        if streams and not may_stream:
            raise RequestError("stream is true; ask with generate_stream or ModelStreamInfer, or set it to false.")
        if streams and len(rows) > 1:
            raise RequestError(f"stream is true for {len(rows)} prompts; stream one a call.")
        check_outputs(wanted, rows[0])
        tokenizer = self._frontend.maker.tokenizer
        asks = []
        for row in rows:
            text, sampling = row["text_input"], sampling_of(row, tokenizer)
            asks.append(Ask(await self._frontend.encode(text), sampling, text, priority, timeout=timeout))
        if len({(ask.sampling.n, ask.sampling.logprobs) for ask in asks}) > 1:
            raise RequestError("beam_width and return_log_probs shape the outputs; give all prompts the same.")
        return Call(asks, streams, wanted)

    async def run(self, call: Call) -> AsyncGenerator[Outputs, None]:
        """What is new each time where the call streams, else all at the end. Closed early, it aborts the call."""
        started = time.monotonic_ns()
        try:
            steps = self._stream(call) if call.streams else self._whole(call)
            async with aclosing(steps):
                async for outputs, is_last in steps:
                    yield selected(outputs, call.wanted), is_last
        except SlipstreamError:
            self._note("fail", started)
            raise
        self._note("success", started)

    async def infer(self, call: Call) -> list[Tensor]:
        """The outputs of a call that does not stream."""
        async with aclosing(self.run(call)) as steps:
            found = [outputs async for outputs, _ in steps]
        return found[0]

    async def _whole(self, call: Call) -> AsyncGenerator[Outputs, None]:
        results = {}
        async with aclosing(self._frontend.generate(call.asks)) as steps:
            async for index, handle in steps:
                if handle.finished:
                    results[index] = handle.output()
        yield outputs_of([results[index] for index in range(len(call.asks))]), True

    async def _stream(self, call: Call) -> AsyncGenerator[Outputs, None]:
        num_known = [0] * call.asks[0].sampling.n
        async with aclosing(self._frontend.generate(call.asks)) as steps:
            async for _, handle in steps:
                result = handle.output()
                yield outputs_of([news_of(result, num_known)]), handle.finished
                num_known = [len(completion.token_ids) for completion in result.outputs]

    def _note(self, kind: str, started: int) -> None:
        self._counts[kind][0] += 1
        self._counts[kind][1] += time.monotonic_ns() - started
        self._last_call = time.time_ns() // 1_000_000


def _whole_numbers(parameters: Mapping[str, Any]) -> tuple[int, int]:
    """priority and timeout, the parameters that are honoured. Raises RequestError for others that ask for something."""
    for name, value in parameters.items():
        if name in ("priority", "timeout"):
            if type(value) is not int or value < 0:
                raise RequestError(f"{name} is {value!r}; it must be a whole number of at least 0.")
        elif name not in _NEUTRAL_PARAMETERS:
            raise RequestError(f"{name} is no input of this model and no parameter of a request; leave it out.")
        elif value not in _NEUTRAL_PARAMETERS[name][0]:
            raise RequestError(f"{name} is refused: {_NEUTRAL_PARAMETERS[name][1]}; leave it out.")
    return parameters.get("priority", 0), parameters.get("timeout", 0)


def _dims(output: str) -> list[int]:
    return [-1, -1] if output == "output_log_probs" else [-1]


def _type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
