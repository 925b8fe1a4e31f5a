"""slipstream serve: a model or engine behind HTTP."""

import os
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from slipstream.cli import _options as options
from slipstream.cli._config_file import effective_values, use_config_file
from slipstream.cli._prompts import read_text
from slipstream.errors import UsageError
from slipstream.schema.launch import Launch
from slipstream.schema.units import human_bytes
from slipstream.text.tools import answer_format

if TYPE_CHECKING:
    from slipstream.serve.messages import Ready

KEY_VARIABLE = "SLIPSTREAM_API_KEY"


def serve(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(help="Model folder, .gguf file, engine folder, Hub id or smollm2.")
    ] = "smollm2",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8000,
    grpc_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port of KServe's gRPC, which is off where it is not given.")
    ] = None,
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
    max_concurrent_requests: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences that may run and wait.  [default: a batch and --max_queue_size more]"),
    ] = None,
    replicas: Annotated[
        int, typer.Option(min=1, help="Engines, each on GPUs or cores of its own; prompts go where their prefix is.")
    ] = 1,
    max_replicas: Annotated[
        int | None,
        typer.Option(min=1, help="With those that are started while the load asks for them.  [default: --replicas]"),
    ] = None,
    upscale_delay: Annotated[
        float, typer.Option(min=0.0, help="Seconds that batches have to be full before one more is started.")
    ] = 10.0,
    downscale_delay: Annotated[
        float, typer.Option(min=0.0, help="Seconds that one fewer has to do before one ends.")
    ] = 300.0,
    prefill_replicas: Annotated[
        int, typer.Option(min=0, help="Engines beside these that compute prompts, for the others to go on with.")
    ] = 0,
    ray: Annotated[
        bool, typer.Option(help="Run engines on the nodes of a Ray cluster: RAY_ADDRESS's, or this machine's.")
    ] = False,
    num_fronts: Annotated[
        int, typer.Option(min=1, help="Processes that speak HTTP; more where one is too slow for its clients.")
    ] = 1,
    max_input_len: Annotated[
        int | None,
        typer.Option(
            "--max_input_len",
            "--max_input_length",
            "--max_input_tokens",
            min=1,
            help="Most tokens of a prompt.  [default: what fits a sequence]",
        ),
    ] = None,
    max_body_size: Annotated[str, typer.Option(help="Largest request body.")] = "32MiB",
    request_timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds that a request may take, waiting included.  [default: any]")
    ] = None,
    step_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds of one step after which /health is red and stderr says what hangs.")
    ] = 120.0,
    iteration_log: Annotated[
        Path | None, typer.Option(help="File that gets a line of JSON a step; at 64 MiB it becomes FILE.1.")
    ] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="Collector of OpenTelemetry spans over HTTP, such as http://localhost:4318.")
    ] = None,
    profile_dir: Annotated[
        Path | None, typer.Option(help="Folder for the traces of /start_profile and /stop_profile, which need it.")
    ] = None,
    drain_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that requests get to finish in after SIGTERM.")
    ] = 30.0,
    ssl_certfile: Annotated[Path | None, typer.Option(help="Certificate, for HTTPS.")] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(help="The certificate's key.")] = None,
    tokenizer_dir: options.TokenizerDir = None,
    chat_template: options.ChatTemplate = None,
    tool_parser: Annotated[
        str, typer.Option(help="How the model writes tool calls: hermes, llama3, mistral, none. auto: as its template.")
    ] = "auto",
    reasoning_parser: Annotated[
        str, typer.Option(help="Whether answers begin with <think>: think, none. auto: as the chat template says.")
    ] = "auto",
    dtype: options.Dtype = "auto",
    kv_cache_dtype: options.KvCacheDtype = "auto",
    quantization: options.Quantization = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    tp_size: options.TpSize = None,
    pp_size: options.PpSize = None,
    moe_ep_size: options.MoeEpSize = None,
    max_batch_size: options.MaxBatchSize = None,
    max_num_tokens: options.MaxNumTokens = None,
    max_seq_len: Annotated[
        int | None,
        typer.Option(
            "--max_seq_len",
            "--max_total_tokens",
            min=1,
            help="Most tokens of one sequence, prompt and output.  [default: the model's own]",
        ),
    ] = None,
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
    speculative: options.Speculative = None,
    plugin: options.Plugin = None,
    config: Annotated[
        Path | None,
        typer.Option(
            is_eager=True,
            callback=use_config_file,
            help="YAML file of these options, by their names; flags win.",
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP, in the protocols of OpenAI, Anthropic, TGI and KServe.

    Each engine and each front runs in a process of its own, and is started again if it dies. SIGTERM lets the
    requests in flight finish. A line on stdout says when it is ready.

    Example:
        slipstream serve smollm2 --port 8000
    """
    if Launch.read() is not None:
        raise UsageError("slipstream serve starts its ranks itself; run it once, without torchrun or mpirun.")
    if config is not None:
        print(f"Options of {config} and the command line: {effective_values(ctx)}", file=sys.stderr)
    if max_replicas is not None and max_replicas < replicas:
        raise UsageError(f"--max_replicas is {max_replicas} and --replicas {replicas}; give {replicas} or more.")
    template = None if chat_template is None else read_text(chat_template, "--chat_template")
    max_body_bytes = options.parse_bytes("--max_body_size", max_body_size)
    _check_key_pair(ssl_certfile, ssl_keyfile)
    answer_format(None, tool_parser, reasoning_parser)  # a name that is none shows before the engine starts
    try:
        from slipstream.serve.app import ServeConfig
        from slipstream.serve.supervisor import run_server
    except ImportError as error:
        raise UsageError(f"The server needs {error.name}; install it with: pip install 'slipstream[serve]'.") from None
    if grpc_port is not None and find_spec("tritonclient") is None:
        raise UsageError("--grpc_port needs tritonclient; install it with: pip install 'slipstream[serve,grpc]'.")
    _check_otlp(otlp_endpoint)

    llm_options = {
        "model": model,
        "tokenizer": None if tokenizer_dir is None else str(tokenizer_dir),
        "dtype": dtype,
        "kv_cache_dtype": kv_cache_dtype,
        "quantization": quantization,
        "device": device,
        "tp_size": tp_size,
        "pp_size": pp_size,
        "moe_ep_size": moe_ep_size,
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
        "speculative": speculative,
        "plugins": plugin or [],
    }
    keys = [*(api_key or ()), *filter(None, [os.environ.get(KEY_VARIABLE)])]
    serve_config = ServeConfig(
        host=host,
        port=port,
        grpc_port=grpc_port,
        replicas=replicas,
        max_replicas=max_replicas,
        upscale_delay=upscale_delay,
        downscale_delay=downscale_delay,
        prefill_replicas=prefill_replicas,
        num_fronts=num_fronts,
        served_model_names=served_model_name or (),
        api_keys=keys,
        cors_origins=allowed_origin or (),
        max_body_bytes=max_body_bytes or 0,
        max_queue_size=max_queue_size,
        max_concurrent_requests=max_concurrent_requests,
        max_input_len=max_input_len,
        chat_template=template,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        request_timeout=request_timeout,
        step_timeout=step_timeout,
        iteration_log=None if iteration_log is None else str(iteration_log),
        otlp_endpoint=otlp_endpoint,
        profile_dir=None if profile_dir is None else str(profile_dir),
        drain_timeout=drain_timeout,
        ssl_certfile=None if ssl_certfile is None else str(ssl_certfile),
        ssl_keyfile=None if ssl_keyfile is None else str(ssl_keyfile),
    )
    run_server(llm_options, serve_config, partial(_say_ready, sys.stdout, replicas, prefill_replicas), on_ray=ray)


def _check_key_pair(certfile: Path | None, keyfile: Path | None) -> None:
    if (certfile is None) != (keyfile is None):
        raise UsageError("--ssl_certfile and --ssl_keyfile belong together; give both or neither.")
    if certfile is None or keyfile is None:
        return
    for flag, path in (("--ssl_certfile", certfile), ("--ssl_keyfile", keyfile)):
        if not path.is_file():
            raise UsageError(f"{flag} is {path}, which is no file; give one in PEM format.")
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, password="")
    except OSError as error:  # ssl.SSLError is one
        reason = getattr(error, "reason", "") or ("no PEM" if isinstance(error, ssl.SSLError) else error.strerror)
        raise UsageError(
            f"--ssl_certfile {certfile} and --ssl_keyfile {keyfile} are no pair ({reason}); give a certificate and its "
            f"own key, in PEM format and without a passphrase."
        ) from None


def _check_otlp(endpoint: str | None) -> None:
    if endpoint is None:
        return
    if not endpoint.startswith(("http://", "https://")):
        raise UsageError(f"--otlp_endpoint is {endpoint!r}; give a URL, such as http://localhost:4318.")
    try:
        import slipstream.serve.tracing  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--otlp_endpoint needs {error.name}; install it with: pip install 'slipstream[serve,otel]'."
        ) from None


def _say_ready(out: TextIO, num_replicas: int, num_prefilling: int, engine: "Ready", url: str) -> None:
    each = f"{num_replicas} replicas, each " if num_replicas > 1 else ""
    if num_prefilling:
        each = f"{num_replicas} decode and {num_prefilling} prefill engines, each "
    runtime, memory = engine.runtime, engine.memory
    num_tokens = runtime.num_blocks * runtime.tokens_per_block
    print(
        f"Ready: {engine.facts.name} at {url} after {engine.startup_seconds:.1f} s: {each}{engine.dtype}, "
        f"weights {human_bytes(memory['weights'])}, activations {human_bytes(memory['activations'])}, "
        f"KV cache {human_bytes(memory['kv_cache'])} ({runtime.num_blocks} blocks, {num_tokens} tokens); "
        f"at most {runtime.max_batch_size} sequences and {runtime.max_num_tokens} tokens a step, "
        f"{runtime.max_seq_len} tokens a sequence.",
        file=out,
        flush=True,
    )
