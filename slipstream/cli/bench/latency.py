"""slipstream bench latency: how long one batch takes, by itself."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli import _options as options
from slipstream.cli.bench import _offline
from slipstream.errors import UsageError

if TYPE_CHECKING:
    from slipstream.bench.static import Case, Line
    from slipstream.cli.bench._engine import Measured


def latency(
    model: _offline.Model = None,
    engine_dir: _offline.EngineDir = None,
    dataset: _offline.Dataset = None,
    num_requests: _offline.NumRequests = None,
    input_output_len: Annotated[
        str | None,
        typer.Option(help='Instead of a --dataset, tokens of prompt and answer: "32,50;128,50" are two cases.'),
    ] = None,
    batch_size: Annotated[str, typer.Option(help='Equal prompts at once: "1;8" are two cases.')] = "1",
    warm_up: Annotated[int, typer.Option("--warm_up", "--warmup", min=0, help="Runs that are not counted.")] = 2,
    num_runs: Annotated[int, typer.Option(min=1, help="Runs of each case at least.")] = 10,
    duration: Annotated[float, typer.Option(min=0, help="Seconds for each case at least.")] = 0,
    csv: Annotated[bool, typer.Option("--csv", help="Write them to a file, too, named as benchmark.py's.")] = False,
    json_file: _offline.Json = None,
    dtype: options.Dtype = "auto",
    kv_cache_dtype: options.KvCacheDtype = "auto",
    quantization: options.Quantization = None,
    device: options.Device = "auto",
    max_batch_size: options.MaxBatchSize = None,
    max_num_tokens: options.MaxNumTokens = None,
    max_seq_len: options.MaxSeqLen = None,
    kv_cache_free_memory_fraction: options.KvCacheFraction = 0.9,
    kv_cache_enable_block_reuse: options.BlockReuse = True,
    speculative: options.Speculative = None,
    plugin: options.Plugin = None,
) -> None:
    """Time one batch at a time, end-of-sequence ignored.

    With --dataset its requests one after the other, reported as trtllm-bench does. With --input_output_len made-up
    prompts, and for each case the line `[BENCHMARK] model_name …` of TensorRT-LLM's benchmark.py. A model may be the
    name of a shape, such as llama_7b: it gets random weights.

    Example:
        slipstream bench latency --model smollm2 --dataset synthetic.txt
        slipstream bench latency -m smollm2_135m --batch_size "1;8" --input_output_len "32,50;128,50"
    """
    if (dataset is None) == (input_output_len is None):
        given = "neither was" if dataset is None else "both were"
        raise UsageError(f'Give either --dataset FILE or --input_output_len "32,50;128,50"; {given} given.')
    cases = [] if input_output_len is None else _cases(input_output_len, batch_size)
    build = {
        "dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "quantization": quantization,
        "max_batch_size": max_batch_size, "max_num_tokens": max_num_tokens, "max_seq_len": max_seq_len,
    }  # fmt: skip
    more = {
        "kv_cache_free_memory_fraction": kv_cache_free_memory_fraction,
        "enable_block_reuse": kv_cache_enable_block_reuse, "speculative": speculative, "plugins": plugin or (),
    }  # fmt: skip
    from slipstream.cli.bench._engine import open_measured

    with open_measured(model, engine_dir, device, build, more) as measured:
        if dataset is not None:
            _offline.run_dataset(measured, dataset, num_requests, 1, warm_up, device, json_file)
        else:
            _run_cases(measured, cases, warm_up, num_runs, duration, device, csv, json_file)


def _cases(input_output_len: str, batch_size: str) -> "list[Case]":
    """ "32,50;128,50" and "1;8": each batch size with each pair."""
    from slipstream.bench.static import Case

    if not re.fullmatch(r"[1-9]\d{0,8},[1-9]\d{0,8}(;[1-9]\d{0,8},[1-9]\d{0,8})*", input_output_len):
        raise UsageError(
            f'--input_output_len is {input_output_len!r}; it must be pairs of numbers, such as "32,50;128,50".'
        )
    if not re.fullmatch(r"[1-9]\d{0,5}(;[1-9]\d{0,5})*", batch_size):
        raise UsageError(f'--batch_size is {batch_size!r}; it must be numbers with ; between them, such as "1;8".')
    pairs = [pair.split(",") for pair in input_output_len.split(";")]
    return [Case(int(size), int(i), int(o)) for size in batch_size.split(";") for i, o in pairs]


def _run_cases(
    measured: "Measured", cases: "list[Case]", warm_up: int, num_runs: int, duration: float, device: str, csv: bool,
    json_file: Path | None,
) -> None:  # fmt: skip
    from slipstream.bench.blocks import quantization_of
    from slipstream.bench.static import line_of, text_of, time_case, write_csv
    from slipstream.build.cache import device_for

    llm, where = measured.llm, device_for(device)
    lines: list[Line] = []
    for case in cases:
        if case.batch_size > llm.runtime_config.max_batch_size:
            raise UsageError(
                f"--batch_size is {case.batch_size}, and the engine takes {llm.runtime_config.max_batch_size}; raise "
                "--max_batch_size, or build one that takes more."
            )
        timing = time_case(llm, case, warm_up=warm_up, num_runs=num_runs, duration=duration)
        lines.append(line_of(measured.name, case, timing, llm.manifest, where, measured.build_seconds))
        print(text_of(lines[-1]), flush=True)
    quantization = quantization_of(llm)
    if csv:
        write_csv(Path(), lines, quantization, uses_fp8="fp8" in quantization)
    if json_file is not None:
        _offline.write_json(json_file, {"cases": lines, "quantization": quantization})
