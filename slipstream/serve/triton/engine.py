"""The model `tensorrt_llm`: an LLM in the server's process for it, with the keys of NVIDIA's config.pbtxt."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slipstream.errors import RequestError, UsageError
from slipstream.schema.request import EngineStats
from slipstream.serve.triton.ask import read_ask
from slipstream.serve.triton.desk import Desk
from slipstream.serve.triton.wire import Gauge, Inputs, Reply, is_decoupled, parameters

_POLICIES = {  # batching_strategy: capacity_scheduler_policy
    "inflight_fused_batching": "guaranteed_no_evict",
    "inflight_batching": "guaranteed_no_evict",
    "V1": "static_batch",
}


class TritonPythonModel:
    def initialize(self, args: Mapping[str, str]) -> None:
        values = parameters(args)
        self._decoupled = is_decoupled(args)
        self._max_beam_width = _number(values, "max_beam_width", int) or 1
        options = llm_options(values)
        from slipstream.api import LLM

        self._llm = LLM(**options, show_progress=False)
        self._desk = Desk(
            self._llm,
            step_timeout=_number(values, "step_timeout", float) or 120.0,
            exclude_input=_switch(values, "exclude_input_in_output", True),
            on_stats=_Gauges().show,
            give_up=_end_process,
        )

    def execute(self, requests: Sequence[Any]) -> None:
        """Returns at once; the desk's thread answers. So requests join the batch that runs."""
        for request in requests:
            self._take(Inputs(request), Reply(request))

    def finalize(self) -> None:
        self._desk.close()
        self._llm.close()
        del self._desk  # and its gauges: later, when the server listens no more, their end would crash this process

    def _take(self, inputs: Inputs, reply: Reply) -> None:
        try:
            if inputs.one("stop"):
                if not inputs.request_id:
                    raise RequestError("stop is true, but there is no request id; give that of the request to end.")
                self._desk.stop(inputs.request_id, reply)
                return
            ask = read_ask(
                inputs, self._llm.request_maker, max_beam_width=self._max_beam_width, decoupled=self._decoupled
            )
        except Exception as error:  # of this request; the others go on
            reply.fail(error)
        else:
            self._desk.take(ask, reply)


class _Gauges:
    """The engine's numbers among the server's metrics, under the names that `slipstream serve` has for them."""

    def __init__(self) -> None:
        self._gauges = {
            name: Gauge(f"slipstream:{name}", text)
            for name, text in (
                ("num_requests_running", "Sequences in the running batch"),
                ("num_requests_waiting", "Sequences that wait for room in it"),
                ("kv_cache_usage_perc", "Part of the KV blocks that sequences hold"),
                ("generation_tokens_total", "Tokens generated since the start"),
            )
        }

    def show(self, stats: EngineStats) -> None:
        self._gauges["num_requests_running"].set(stats.num_running)
        self._gauges["num_requests_waiting"].set(stats.num_waiting)
        self._gauges["kv_cache_usage_perc"].set(stats.num_blocks_used / max(1, stats.num_blocks_total))
        self._gauges["generation_tokens_total"].set(stats.generated_tokens)


def _end_process() -> None:
    """So that the launcher sees it: Triton itself would call a model ready whose engine is lost."""
    os._exit(1)


def llm_options(values: Mapping[str, str]) -> dict[str, Any]:
    """What LLM(...) is given, from the parameters of tensorrt_llm/config.pbtxt. Raises UsageError."""
    strategy = values.get("batching_strategy") or "inflight_fused_batching"
    if strategy not in _POLICIES:
        raise UsageError(f"batching_strategy is {strategy!r}; it must be one of {', '.join(_POLICIES)}.")
    return {
        "model": values["engine_dir"],
        "kv_cache_max_tokens": _number(values, "max_tokens_in_paged_kv_cache", int),
        "max_attention_window_size": _number(values, "max_attention_window_size", int),
        "kv_cache_free_memory_fraction": _number(values, "kv_cache_free_gpu_mem_fraction", float) or 0.9,
        "enable_block_reuse": _switch(values, "enable_kv_cache_reuse", True),
        "capacity_scheduler_policy": _POLICIES[strategy],
    }


def _number(values: Mapping[str, str], key: str, kind: Callable[[str], Any]) -> Any:
    """None where it was filled in with nothing."""
    text = values.get(key, "").strip()
    try:
        return kind(text) if text else None
    except ValueError:
        raise UsageError(f"{key} is {text!r}; it must be a number, or empty for the default.") from None


def _switch(values: Mapping[str, str], key: str, default: bool) -> bool:
    text = values.get(key, "").strip().lower()
    if text not in ("", "true", "false"):
        raise UsageError(f"{key} is {values[key]!r}; it must be True or False.")
    return text == "true" if text else default
