"""The line of TensorRT-LLM's benchmarks/python/benchmark.py (seed 004): one batch, timed again and again.

    [BENCHMARK] model_name … tokens_per_sec 60.95 … latency(ms) 820.348 … generation_tokens_per_second 61.369

tokens_per_sec = batch_size × output_length ÷ latency. generation_time is what is left of the latency once each
sequence has its first token, total_generated_tokens what comes in it, and generation_tokens_per_second their quotient.
Means over the runs; gpu_peak_mem is what torch reserved on the device at most.
"""

import csv
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

from slipstream.api.llm import LLM
from slipstream.bench.dataset import Sample, random_tokens
from slipstream.bench.offline import ask, make_requests
from slipstream.bench.timeline import percentile
from slipstream.engine.manifest import Manifest
from slipstream.errors import RequestError

Line = dict[str, str | int | float]


@dataclass(frozen=True)
class Case:
    batch_size: int
    input_length: int
    output_length: int


@dataclass(frozen=True)
class Timing:
    """Seconds, one of each run."""

    latencies: Sequence[float]
    generation_times: Sequence[float]
    generated: Sequence[int]


def time_case(llm: LLM, case: Case, *, warm_up: int, num_runs: int, duration: float) -> Timing:
    """num_runs at least, more until `duration` seconds have passed. Each has prompts of its own: none is cached."""
    draw = random.Random(0)
    latencies, generation_times, generated = list[float](), list[float](), list[int]()
    for _ in range(warm_up):
        _run(llm, case, draw)
    started = time.perf_counter()
    while len(latencies) < num_runs or time.perf_counter() - started < duration:
        latency, generation_time, num_tokens = _run(llm, case, draw)
        latencies.append(latency)
        generation_times.append(generation_time)
        generated.append(num_tokens)
    return Timing(latencies, generation_times, generated)


def _run(llm: LLM, case: Case, draw: random.Random) -> tuple[float, float, int]:
    vocabulary = range(llm.manifest.vocab_size)
    inputs, outputs = ([size] * case.batch_size for size in (case.input_length, case.output_length))
    samples: list[Sample] = random_tokens(draw, vocabulary, inputs, outputs)
    run = ask(llm, make_requests(llm, samples))
    for timeline in run.timelines:
        if timeline.error is not None:
            raise RequestError(timeline.error)
    all_began = max(timeline.arrivals[0] for timeline in run.timelines)
    after = sum(arrived > all_began for timeline in run.timelines for arrived in timeline.arrivals)
    return run.seconds, max(timeline.ended for timeline in run.timelines) - all_began, after


def line_of(
    name: str, case: Case, timing: Timing, manifest: Manifest, device: torch.device, build_seconds: float
) -> Line:
    ordered = sorted(timing.latencies)
    latency, generation_time = fmean(ordered), fmean(timing.generation_times)
    generated = fmean(timing.generated)
    return {
        "model_name": name,
        "world_size": 1,
        "num_heads": manifest.num_heads,
        "num_kv_heads": manifest.num_kv_heads,
        "num_layers": manifest.num_layers,
        "hidden_size": manifest.hidden_size,
        "vocab_size": manifest.vocab_size,
        "precision": manifest.dtype,
        "batch_size": case.batch_size,
        "input_length": case.input_length,
        "output_length": case.output_length,
        "gpu_peak_mem(gb)": round(torch.cuda.max_memory_reserved(device) / 2**30, 3) if device.type == "cuda" else 0.0,
        "build_time(s)": round(build_seconds, 2) if build_seconds else 0,
        "tokens_per_sec": round(case.batch_size * case.output_length / latency, 2),
        "percentile95(ms)": round(percentile(ordered, 95) * 1e3, 3),
        "percentile99(ms)": round(percentile(ordered, 99) * 1e3, 3),
        "latency(ms)": round(latency * 1e3, 3),
        "compute_cap": compute_cap(device),
        "generation_time(ms)": round(generation_time * 1e3, 3),
        "total_generated_tokens": generated,
        "generation_tokens_per_second": round(generated / generation_time, 3) if generation_time else 0.0,
    }


def text_of(line: Line) -> str:
    return " ".join(["[BENCHMARK]", *(f"{key} {value}" for key, value in line.items())])


def compute_cap(device: torch.device) -> str:
    """sm86 of a GPU; a CPU has none."""
    return "sm{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "cpu"


def write_csv(folder: Path, lines: Sequence[Line], quantization: str, uses_fp8: bool) -> Path:
    """A file of these lines, called as benchmark.py calls it."""
    first = lines[0]
    name = "{model_name}_{precision}_tp{world_size}_plugin_fp8linear".format_map(first).replace("/", "-")
    path = folder / f"{name}{int(uses_fp8)}_{first['compute_cap']}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*first, "quantization"])
        writer.writeheader()
        writer.writerows(line | {"quantization": quantization} for line in lines)
    return path
