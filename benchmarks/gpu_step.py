"""Decode, prefill and throughput of an engine on one GPU, beside the time that its bytes alone take.

    python benchmarks/gpu_step.py --shape llama-3-8b --format bf16 [--parts decode,prefill,throughput,idle,profile]

The model has random weights of the real shapes. First what the card can do (reads, copies, a matrix product), then each
row: medians of several runs, through LLM.generate with token ids, greedy, 128 tokens in and 256 out.
"""

import argparse
import gc
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipstream import LLM, SamplingParams
from slipstream.build import build
from slipstream.checkpoint.folder import Checkpoint
from slipstream.checkpoint.layouts import renamed
from slipstream.engine.choices import ROW_BUCKETS
from slipstream.models import read_config
from slipstream.runtime.worker.worker import Worker
from slipstream.schema.build import BuildConfig
from slipstream.schema.format import WeightFormat

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "baichuan2-7b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 125696, "max_position_embeddings": 4096,
    },
    "llama-3.3-70b": {
        "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    },
    "llama-3.2-1b": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    },
    "llama-3.2-3b": {
        "model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rope_theta": 500000.0,
    },
    "tiny": {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 8192,
    },
}  # fmt: skip
FORMATS = {
    "bf16": None,
    "fp8": WeightFormat(kind="fp8"),
    "fp8-static": WeightFormat(kind="fp8", input_scale=0.05),
    "fp8-static-head": WeightFormat(kind="fp8", input_scale=0.05),  # the last product, too
    "int8": WeightFormat(kind="w8a16"),
    "int8-head": WeightFormat(kind="w8a16"),
    "int4": WeightFormat(kind="w4a16", group_size=128, scale_dtype="bfloat16"),
    "int4-head": WeightFormat(kind="w4a16", group_size=128, scale_dtype="bfloat16"),
}


class RandomWeights:
    """Every tensor is drawn on the GPU when it is read; a packed weight by its parts."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], formats: dict[str, WeightFormat]) -> None:
        self._kinds = {name: (shape, "bfloat16") for name, shape in shapes.items()}
        for name, each in formats.items():
            self._kinds |= {f"{name}.{part}": kind for part, kind in each.parts(*shapes[name]).items()}

    def names(self) -> list[str]:
        return list(self._kinds)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._kinds[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return getattr(torch, self._kinds[name][1])

    def read(self, name: str) -> Tensor:
        shape, dtype = self._kinds[name][0], self.dtype(name)
        if name.endswith(".scale"):
            return (torch.rand(shape, device=DEVICE) * 1e-3 + 1e-4).to(dtype).cpu()
        if dtype in (torch.int8, torch.uint8):
            return torch.randint(0, 120, shape, dtype=dtype, device=DEVICE).cpu()
        values = torch.randn(shape, device=DEVICE)
        if len(shape) == 1:
            values = 1 + 0.1 * values
        elif dtype == torch.bfloat16:
            values *= shape[-1] ** -0.5
        return values.to(dtype).cpu()

    def close(self) -> None:
        pass


def checkpoint_of(shape: str, format: str) -> Checkpoint:
    options = SHAPES[shape] | {"torch_dtype": "bfloat16"}
    model, config = read_config(dict(options), shape)
    with torch.device("meta"):
        shapes = {name: tuple(each.shape) for name, each in model.Model(config).named_parameters()}
    chosen = FORMATS[format]
    parts = ("_proj.", "lm_head.") if format.endswith("-head") else ("_proj.",)
    packed = [name for name in shapes if any(part in name for part in parts)] if chosen is not None else []
    formats = {name: chosen for name in packed if chosen is not None}
    recipes = {name: renamed(name, size) for name, size in shapes.items()}
    return Checkpoint(
        name=f"{shape}-{format}", options=options, config=config, model=model, dtype="bfloat16", generation={},
        weights=RandomWeights(shapes, formats), shapes=shapes, recipes=recipes,
        write_tokenizer=lambda folder: None, formats=formats,
    )  # fmt: skip


def median_seconds(call: Callable[[], Any], times: int) -> float:
    call()
    seconds = [0.0] * (times == 0)
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def card() -> float:
    """Print what the card can do; -> bytes a second of a copy, read and written."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device=DEVICE).random_(0, 255)
    target = torch.empty_like(source)

    def event_seconds(call: Callable[[], Any], times: int = 20) -> float:
        call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / times / 1e3

    copy = 2 * source.nbytes / event_seconds(lambda: target.copy_(source))
    x = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    product = 2 * 8192**3 / event_seconds(lambda: x @ x)
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e12:.2f} TB/s, bf16 product {product / 1e12:.0f} TFLOP/s")
    return copy


def prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    return torch.randint(3, vocab_size, (count, length)).tolist()


def generate_seconds(llm: LLM, count: int, num_in: int, num_out: int, times: int = 3) -> float:
    sampling = SamplingParams(temperature=0, max_tokens=num_out, ignore_eos=True)

    def call() -> None:
        outputs = llm.generate(prompts(count, num_in, llm.manifest.vocab_size), sampling)
        assert all(len(each.outputs[0].token_ids) == num_out for each in outputs), outputs[0].error

    return median_seconds(call, times)


def free_memory() -> None:
    """Of engines that are closed, whose workers are parts of cycles."""
    gc.collect()
    torch.cuda.empty_cache()


def print_choices(engine: Path) -> None:
    """The kernels that were measured to be fastest, by rows."""
    for key, names in json.loads((engine / "model.cache").read_text())["kernels"].items():
        if len(set(names)) > 1:
            chosen = ", ".join(f"{rows} {name}" for rows, name in zip(ROW_BUCKETS, names, strict=True))
            print(f"  {key[:100]}: {chosen}")


def decode(llm: LLM, bandwidth: float, batches: list[int], times: int) -> None:
    weights = step_bytes(llm)
    print("| batch | tok/s | ms a step | floor ms | of the floor |\n| --- | --- | --- | --- | --- |")
    for batch in batches:
        one = generate_seconds(llm, batch, 128, 1, times)
        whole = generate_seconds(llm, batch, 128, 257, times)
        step = (whole - one) / 256
        floor = (weights + batch * kv_bytes(llm, 256)) / bandwidth
        row = f"{batch} | {batch / step:,.0f} | {1e3 * step:.2f} | {1e3 * floor:.2f} | {100 * floor / step:.0f} %"
        print(f"| {row} |", flush=True)


def step_bytes(llm: LLM) -> int:
    """Weights that a step reads, of one rank: all but its part of the embedding table."""
    manifest = llm.manifest
    return manifest.memory["weights"] - manifest.vocab_size * manifest.hidden_size * 2 // manifest.mapping.tp_size


def kv_bytes(llm: LLM, num_tokens: int) -> int:
    manifest = llm.manifest
    item_size = getattr(torch, manifest.kv_dtype).itemsize
    return 2 * num_tokens * manifest.num_layers * manifest.num_kv_heads * manifest.head_dim * item_size


def prefill(llm: LLM, times: int) -> None:
    """And what of it comes before the launch, in it, after it until the token is there, and after that."""
    marks: list[float] = []
    launch, collect = Worker.launch, Worker.collect

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*arguments: Any) -> Any:
            marks.append(time.perf_counter())
            result = call(*arguments)
            marks.append(time.perf_counter())
            return result

        return timed_call

    Worker.launch, Worker.collect = timed(launch), timed(collect)
    rows = []
    for _ in range(times + 2):
        marks.clear()
        start = time.perf_counter()
        generate_seconds(llm, 1, 2048, 1, 0)
        whole = [start, *marks, time.perf_counter()]
        rows.append([1e3 * (after - before) for before, after in pairwise(whole)])
    Worker.launch, Worker.collect = launch, collect
    before, launching, between, waiting, after = (statistics.median(column) for column in zip(*rows, strict=True))
    total = statistics.median(map(sum, rows))
    print(f"prefill of 2,048 tokens: {total:.1f} ms: {before:.1f} until the launch, {launching:.1f} launching, "
          f"{between + waiting:.1f} until the token is there, {after:.1f} after", flush=True)  # fmt: skip


def throughput(llm: LLM) -> None:
    seconds = generate_seconds(llm, 256, 512, 128, 1)
    print(f"256 requests 512→128 at once: {256 * 128 / seconds:,.0f} out tok/s", flush=True)


def idle(llm: LLM) -> None:
    """The time between the end of a recorded step and the start of the next, which the GPU has nothing to do."""
    replay = torch.cuda.CUDAGraph.replay
    for batch in (1, 64, 256):
        generate_seconds(llm, batch, 128, 65, 1)
        pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

        def timed(graph: torch.cuda.CUDAGraph, pairs: list[Any] = pairs) -> None:
            pairs.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            pairs[-1][0].record()
            replay(graph)
            pairs[-1][1].record()

        torch.cuda.CUDAGraph.replay = timed
        generate_seconds(llm, batch, 128, 65, 1)
        torch.cuda.CUDAGraph.replay = replay
        torch.cuda.synchronize()
        last = pairs[-48:]
        busy = [start.elapsed_time(end) for start, end in last]
        gaps = [before[1].elapsed_time(after[0]) for before, after in pairwise(last)]
        share = 100 * sum(gaps) / (sum(gaps) + sum(busy))
        middle, most = 1e3 * statistics.median(gaps), 1e3 * max(gaps)
        print(f"batch {batch}: a step {statistics.median(busy):.2f} ms, idle {share:.1f} %", end=", ")
        print(f"gaps of {middle:.0f} us at the median, {most:.0f} at most", flush=True)


def profile(llm: LLM) -> None:
    """The kernels of prompts, and of some decode steps at batch 1 and 64 with their prompts, by time."""
    for batch, num_in, num_out in ((1, 2048, 1), (16, 512, 1), (1, 128, 32), (64, 128, 32)):
        generate_seconds(llm, batch, num_in, num_out, 1)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            generate_seconds(llm, batch, num_in, num_out, 1)
        events = [each for each in profiler.key_averages() if each.self_device_time_total]
        events.sort(key=lambda each: -each.self_device_time_total)
        total = sum(each.self_device_time_total for each in events)
        print(f"batch {batch}, {num_in} to {num_out}, twice: {total / 1e3:.1f} ms on the GPU")
        for each in events[:20]:
            part = 100 * each.self_device_time_total / total
            each_us = each.self_device_time_total / each.count
            print(f"  {part:5.1f} %  {each.count:6d} x {each_us:8.1f} us  {each.key[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--format", default="bf16", choices=FORMATS)
    parser.add_argument("--parts", default="decode,prefill,throughput")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to look at a step quickly")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tp_size", type=int, default=1)
    parser.add_argument("--max_batch_size", type=int, default=256)
    parser.add_argument("--max_num_tokens", type=int, default=8192)
    parser.add_argument("--kv_cache_dtype", default="auto")
    parser.add_argument("--kv_cache_max_tokens", type=int)
    parser.add_argument("--folder", help="where the engine is written for as long as this runs")
    parser.add_argument("--deterministic", action="store_true", help="the same once more, batch-invariant")
    arguments = parser.parse_args()
    if arguments.layers:
        SHAPES[arguments.shape]["num_hidden_layers"] = arguments.layers
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    commit = found.stdout.strip() or "unknown"
    what = f"{arguments.shape} {arguments.format}, tp_size {arguments.tp_size}"
    print(f"{what}, commit {commit}, torch {torch.__version__}")
    bandwidth = card()
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        start = time.perf_counter()
        config = BuildConfig(
            dtype="bfloat16", kv_cache_dtype=arguments.kv_cache_dtype, max_batch_size=arguments.max_batch_size,
            max_num_tokens=arguments.max_num_tokens, max_seq_len=4096, tp_size=arguments.tp_size,
        )  # fmt: skip
        engine = Path(folder) / "engine"
        report = build(checkpoint_of(arguments.shape, arguments.format), engine, config, device="cuda")
        seconds = ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items())
        print(f"built in {time.perf_counter() - start:.1f} s ({seconds})", flush=True)
        print_choices(engine)
        measure(engine, arguments, bandwidth)
        if arguments.deterministic:
            print("\ndeterministic:")
            measure(engine, arguments, bandwidth, deterministic=True)


def measure(engine: Path, arguments: argparse.Namespace, bandwidth: float, deterministic: bool = False) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with LLM(
        engine, device="cuda", enable_block_reuse=False, kv_cache_max_tokens=arguments.kv_cache_max_tokens,
        deterministic=deterministic,
    ) as llm:  # fmt: skip
        opened = time.perf_counter() - start
        llm.generate([prompts(1, 128, llm.manifest.vocab_size)[0]], SamplingParams(temperature=0, max_tokens=1))
        print(f"open to first token {time.perf_counter() - start:.1f} s, {opened:.1f} of them opening", flush=True)
        weights = llm.manifest.memory["weights"]
        peak = torch.cuda.max_memory_allocated()
        print(f"weights {weights / 1e9:.2f} GB, GPU memory at most {peak / 2**30:.2f} GiB")
        calls = {
            "decode": lambda: decode(llm, bandwidth, arguments.batches, arguments.times),
            "prefill": lambda: prefill(llm, arguments.times),
            "throughput": lambda: throughput(llm),
            "idle": lambda: idle(llm),
            "profile": lambda: profile(llm),
        }
        for part in arguments.parts.split(","):
            calls[part]()


DEVICE = torch.device("cuda")

if __name__ == "__main__":
    main()
