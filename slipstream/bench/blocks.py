"""The report of trtllm-bench: ENGINE DETAILS, WORLD + RUNTIME INFORMATION, PERFORMANCE OVERVIEW, DATASET DETAILS."""

from collections.abc import Iterator, Mapping
from typing import Any

from slipstream import __version__
from slipstream.api.llm import LLM
from slipstream.bench.timeline import Run, Spread, spread
from slipstream.engine.folder import open_engine

_RULE = "=" * 59


def text_of(run: Run, llm: LLM, name: str, engine: str, dataset: str, device: str) -> str:
    """name: of the model. engine, dataset: where they are, for people. device: as build/tune.py describes it."""
    whole = run.whole
    first = next(iter(whole), None)
    inputs, outputs = spread([each.num_input for each in whole]), spread([each.num_output for each in whole])
    lines = [
        *_block("ENGINE DETAILS", _engine_rows(llm, name, engine)),
        *_block("WORLD + RUNTIME INFORMATION", _runtime_rows(llm, run, device)),
        *_block("PERFORMANCE OVERVIEW", _overview_rows(run) if first else {}),
        *_breakdown("Per-Request Time-per-Output-Token [TPOT] Breakdown (ms)", "TPOT", run.tpot),
        *_breakdown("Per-Request Time-to-First-Token [TTFT] Breakdown (ms)", "TTFT", run.ttft),
        *_breakdown("Request Latency Breakdown (ms)", "Latency", run.latency),
        *_block("DATASET DETAILS", {"Dataset Path": dataset, "Number of Sequences": len(run.timelines)}),
        *_lengths(inputs, outputs),
    ]
    return "\n".join(lines)


def quantization_of(llm: LLM) -> str:
    """The formats of its packed weights by their ops (linear_w4a16 is w4a16), or None."""
    engine = open_engine(llm.engine_path)
    try:
        ops = engine.graph.count_ops()
    finally:
        engine.close()
    return ", ".join(sorted(op.removeprefix("linear_") for op in ops if op.startswith("linear_"))) or "None"


def _engine_rows(llm: LLM, name: str, engine: str) -> dict[str, Any]:
    manifest = llm.manifest
    return {
        "Model": name,
        "Engine Directory": engine,
        "Slipstream Version": __version__,
        "Dtype": manifest.dtype,
        "KV Cache Dtype": manifest.kv_cache_dtype,
        "Quantization": quantization_of(llm),
        "Max Sequence Length": llm.runtime_config.max_seq_len,
    }


def _runtime_rows(llm: LLM, run: Run, device: str) -> dict[str, Any]:
    config = llm.runtime_config
    return {
        "Device": device,
        "TP Size": 1,
        "PP Size": 1,
        "Max Runtime Batch Size": config.max_batch_size,
        "Max Runtime Tokens": config.max_num_tokens,
        "Scheduling Policy": str(config.capacity_policy).replace("_", " ").title(),
        "KV Cache Tokens": config.num_blocks * config.tokens_per_block,
        "Requests": run.load,
    }


def _overview_rows(run: Run) -> dict[str, Any]:
    whole, each = run.whole, len(run.whole)
    latencies = sum(timeline.latency for timeline in whole)
    return {
        "Number of requests": len(run.timelines),
        "Number of failed requests": run.num_failed,
        "Average Input Length (tokens)": sum(timeline.num_input for timeline in whole) / each,
        "Average Cached Input Length (tokens)": sum(timeline.num_cached for timeline in whole) / each,
        "Average Output Length (tokens)": sum(timeline.num_output for timeline in whole) / each,
        "Request Throughput (req/sec)": run.rate(lambda timeline: 1),
        "Total Output Throughput (tokens/sec)": run.output_rate,
        "Per User Output Throughput (tokens/sec/user)": sum(timeline.num_output for timeline in whole) / latencies,
        "Total Token Throughput (tokens/sec)": run.rate(lambda timeline: timeline.num_input + timeline.num_output),
        "Total Latency (ms)": run.seconds * 1e3,
        "Average request latency (ms)": run.latency.mean * 1e3,
        "Per User Output Speed [1/TPOT] (tokens/sec/user)": 1 / run.tpot.mean if run.tpot.mean else 0.0,
        "Average time-to-first-token [TTFT] (ms)": run.ttft.mean * 1e3,
        "Average time-per-output-token [TPOT] (ms)": run.tpot.mean * 1e3,
    }


def _block(title: str, rows: Mapping[str, Any]) -> Iterator[str]:
    yield from (_RULE, f"= {title}", _RULE)
    width = max((len(name) for name in rows), default=0) + 2
    for name, value in rows.items():
        yield f"{name + ':':<{width}}{value:.4f}" if isinstance(value, float) else f"{name + ':':<{width}}{value}"
    yield ""


def _breakdown(title: str, name: str, values: Spread) -> Iterator[str]:
    yield f"-- {title} ".ljust(len(_RULE), "-")
    for key, value in (("MINIMUM", values.least), ("MAXIMUM", values.most), ("AVERAGE", values.mean)):
        yield f"[{name}] {key}: {value * 1e3:.4f}"
    for part, value in values.percentiles.items():
        yield f"[{name}] {f'P{part}':<7}: {value * 1e3:.4f}"
    yield ""


def _lengths(inputs: Spread, outputs: Spread) -> Iterator[str]:
    yield "-- Percentiles statistics ".ljust(len(_RULE), "-")
    yield f"{'':8}{'Input':<18}Output"
    for (name, size), (_, wanted) in zip(inputs.to_dict().items(), outputs.to_dict().items(), strict=True):
        yield f"{name.upper() + ':':<8}{size:<18.4f}{wanted:.4f}"
