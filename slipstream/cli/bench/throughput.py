"""slipstream bench throughput: what an engine gets done when it always has enough to do."""

from typing import Annotated

import typer

from slipstream.cli import _options as options
from slipstream.cli.bench import _offline
from slipstream.errors import UsageError


def throughput(
    model: _offline.Model = None,
    engine_dir: _offline.EngineDir = None,
    dataset: _offline.Dataset = None,
    num_requests: _offline.NumRequests = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests at a time.  [default: all at once]")] = None,
    warm_up: Annotated[int, typer.Option("--warm_up", "--warmup", min=0, help="Requests that are not counted.")] = 2,
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
    enable_chunked_context: options.ChunkedContext = True,
    capacity_scheduler_policy: options.CapacityPolicy = "guaranteed_no_evict",
    speculative: options.Speculative = None,
    plugin: options.Plugin = None,
) -> None:
    """Run the requests of a data set all at once, end-of-sequence ignored, and report as trtllm-bench does.

    Example:
        slipstream bench throughput --model smollm2 --dataset synthetic.txt --concurrency 64
        slipstream bench throughput -m llama_7b --quantization int8_wo --dataset synthetic.txt
    """
    if dataset is None:
        raise UsageError("There is no --dataset; make one with slipstream bench prepare-dataset.")
    build = {
        "dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "quantization": quantization,
        "max_batch_size": max_batch_size, "max_num_tokens": max_num_tokens, "max_seq_len": max_seq_len,
    }  # fmt: skip
    more = {
        "kv_cache_free_memory_fraction": kv_cache_free_memory_fraction,
        "enable_block_reuse": kv_cache_enable_block_reuse, "enable_chunked_prefill": enable_chunked_context,
        "capacity_scheduler_policy": capacity_scheduler_policy, "speculative": speculative, "plugins": plugin or (),
    }  # fmt: skip
    from slipstream.cli.bench._engine import open_measured

    with open_measured(model, engine_dir, device, build, more) as measured:
        _offline.run_dataset(measured, dataset, num_requests, concurrency, warm_up, device, json_file)
