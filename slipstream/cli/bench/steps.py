"""slipstream bench steps: what an engine's steps take, for slipstream simulate."""

from pathlib import Path
from typing import Annotated

import typer

from slipstream.cli import _options as options
from slipstream.cli.bench import _offline
from slipstream.progress import progress_bar

UNEVEN = 1.15  # rounds of equal steps; above it, somebody else had a part of the machine


def steps(
    output: Annotated[Path, typer.Option(help="Write the costs to this file.")],
    model: _offline.Model = None,
    engine_dir: _offline.EngineDir = None,
    dtype: options.Dtype = "auto",
    kv_cache_dtype: options.KvCacheDtype = "auto",
    quantization: options.Quantization = None,
    device: options.Device = "auto",
    max_batch_size: options.MaxBatchSize = None,
    max_num_tokens: options.MaxNumTokens = None,
    max_seq_len: options.MaxSeqLen = None,
    kv_cache_free_memory_fraction: options.KvCacheFraction = 0.9,
    kv_cache_max_tokens: options.KvCacheMaxTokens = None,
    plugin: options.Plugin = None,
) -> None:
    """Time an engine's steps of all sizes and write what they take as a function of their tokens and contexts.

    slipstream simulate plans with it, on any machine. Nothing else should run here meanwhile.

    Example:
        slipstream bench steps --model smollm2 --output costs.json
    """
    from slipstream.bench.calibrate import calibrate
    from slipstream.bench.costs_file import CostsFile
    from slipstream.build.cache import device_for
    from slipstream.build.tune import describe_device
    from slipstream.cli.bench._engine import open_measured

    build = {
        "dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "quantization": quantization,
        "max_batch_size": max_batch_size, "max_num_tokens": max_num_tokens, "max_seq_len": max_seq_len,
    }  # fmt: skip
    more = {
        "kv_cache_free_memory_fraction": kv_cache_free_memory_fraction, "kv_cache_max_tokens": kv_cache_max_tokens,
        "plugins": plugin or (),
    }  # fmt: skip
    where = device_for(device)
    runs_ahead = where.type == "cuda"
    with open_measured(model, engine_dir, device, build, more) as measured:
        with progress_bar() as progress:
            found = calibrate(measured.llm, runs_ahead, progress)
        config = measured.llm.runtime_config
        CostsFile(measured.name, describe_device(where), runs_ahead, config, found.costs).write(output)
    rounds = ", ".join(f"{seconds:.1f}" for seconds in found.round_seconds)
    print(
        f"{found.num_steps} steps measured, in {rounds} s; the costs miss one by {found.median_error:.0%} (median), "
        f"and all of them together by {found.total_error:+.1%}."
    )
    if max(found.round_seconds) > UNEVEN * min(found.round_seconds):
        print("The same steps took longer in one round: something else ran here; measure again when nothing does.")
    print(f"written to {output}; next: slipstream simulate --costs {output} --dataset FILE --rate 2")
