"""slipstream serve: a model or engine behind HTTP."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli import _options as options
from slipstream.cli._prompts import read_text
from slipstream.cli._tables import human_bytes
from slipstream.errors import UsageError

if TYPE_CHECKING:
    from slipstream.serve.messages import Ready

KEY_VARIABLE = "SLIPSTREAM_API_KEY"


def serve(
    model: Annotated[
        str, typer.Argument(help="Model folder, .gguf file, engine folder, Hub id or smollm2.")
    ] = "smollm2",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What requests call the model; may be given again.  [default: its own]")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help=f"Key that a request must bring; may be given again, or in ${KEY_VARIABLE}."),
    ] = None,
    allowed_origin: Annotated[
        list[str] | None, typer.Option(help="Web page that may call this server (CORS); may be given again.")
    ] = None,
    max_queue_size: Annotated[
        int, typer.Option(min=0, help="Sequences that may wait beside a full batch; more are told to come back.")
    ] = 1024,
    max_body_size: Annotated[str, typer.Option(help="Largest request body.")] = "32MiB",
    step_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds without a step, with work to do, after which /health is red.")
    ] = 120.0,
    drain_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that requests get to finish in after SIGTERM.")
    ] = 30.0,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Certificate, for HTTPS.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="The certificate's key.")] = None,
    tokenizer_dir: options.TokenizerDir = None,
    chat_template: options.ChatTemplate = None,
    dtype: options.Dtype = "auto",
    kv_cache_dtype: options.KvCacheDtype = "auto",
    device: options.Device = "auto",
    max_batch_size: options.MaxBatchSize = None,
    max_num_tokens: options.MaxNumTokens = None,
    max_seq_len: options.MaxSeqLen = None,
    kv_cache_max_tokens: options.KvCacheMaxTokens = None,
    kv_cache_max_bytes: options.KvCacheMaxBytes = None,
    kv_cache_free_memory_fraction: options.KvCacheFraction = 0.9,
    max_attention_window_size: options.AttentionWindow = None,
    sink_token_length: options.SinkTokens = 0,
    kv_cache_enable_block_reuse: options.BlockReuse = True,
    enable_chunked_context: options.ChunkedContext = True,
    capacity_scheduler_policy: options.CapacityPolicy = "guaranteed_no_evict",
    queue_policy: Annotated[str, typer.Option(help="Who is next: fifo, or priority (lower first).")] = "fifo",
    deterministic: options.Deterministic = False,
    plugin: options.Plugin = None,
) -> None:
    """Serve a model over HTTP, in OpenAI's protocol.

    The engine runs in a process of its own, and is started again if it dies. SIGTERM lets the requests in flight
    finish. A line on stdout says when it is ready.

    Example:
        slipstream serve smollm2 --port 8000
    """
    template = None if chat_template is None else read_text(chat_template, "--chat_template")
    max_body_bytes = options.parse_bytes("--max_body_size", max_body_size)
    if (ssl_certfile is None) != (ssl_keyfile is None):
        raise UsageError("--ssl_certfile and --ssl_keyfile belong together; give both or neither.")
    for flag, path in (("--ssl_certfile", ssl_certfile), ("--ssl_keyfile", ssl_keyfile)):
        if path is not None and not path.is_file():
            raise UsageError(f"{flag} is {path}, which is no file; give one in PEM format.")
    try:
        from slipstream.serve.app import ServeConfig, run_server
    except ImportError as error:
        raise UsageError(f"The server needs {error.name}; install it with: pip install 'slipstream[serve]'.") from None

    llm_options = {
        "model": model,
        "tokenizer": None if tokenizer_dir is None else str(tokenizer_dir),
        "dtype": dtype,
        "kv_cache_dtype": kv_cache_dtype,
        "device": device,
        "max_batch_size": max_batch_size,
        "max_num_tokens": max_num_tokens,
        "max_seq_len": max_seq_len,
        "kv_cache_max_tokens": kv_cache_max_tokens,
        "kv_cache_max_bytes": options.parse_bytes("--kv_cache_max_bytes", kv_cache_max_bytes),
        "kv_cache_free_memory_fraction": kv_cache_free_memory_fraction,
        "max_attention_window_size": max_attention_window_size,
        "sink_token_length": sink_token_length,
        "enable_block_reuse": kv_cache_enable_block_reuse,
        "enable_chunked_prefill": enable_chunked_context,
        "capacity_scheduler_policy": capacity_scheduler_policy,
        "queue_policy": queue_policy,
        "deterministic": deterministic,
        "plugins": plugin or [],
    }
    keys = [*(api_key or ()), *filter(None, [os.environ.get(KEY_VARIABLE)])]
    config = ServeConfig(
        host=host,
        port=port,
        served_model_names=served_model_name or (),
        api_keys=keys,
        cors_origins=allowed_origin or (),
        max_body_bytes=max_body_bytes or 0,
        max_queue_size=max_queue_size,
        chat_template=template,
        step_timeout=step_timeout,
        drain_timeout=drain_timeout,
        ssl_certfile=None if ssl_certfile is None else str(ssl_certfile),
        ssl_keyfile=None if ssl_keyfile is None else str(ssl_keyfile),
    )
    run_server(llm_options, config, _say_ready)


def _say_ready(engine: "Ready", url: str) -> None:
    runtime, memory = engine.runtime, engine.memory
    num_tokens = runtime.num_blocks * runtime.tokens_per_block
    print(
        f"Ready: {engine.facts.name} at {url} after {engine.startup_seconds:.1f} s: {engine.dtype}, "
        f"weights {human_bytes(memory['weights'])}, activations {human_bytes(memory['activations'])}, "
        f"KV cache {human_bytes(memory['kv_cache'])} ({runtime.num_blocks} blocks, {num_tokens} tokens); "
        f"at most {runtime.max_batch_size} sequences and {runtime.max_num_tokens} tokens a step, "
        f"{runtime.max_seq_len} tokens a sequence.",
        flush=True,
    )
