"""slipstream triton launch: a tritonserver over a model repository."""

from pathlib import Path
from typing import Annotated

import typer

Port = Annotated[int, typer.Option(min=1, max=65535)]


def launch(
    model_repo: Annotated[Path, typer.Option(help="Folder that `slipstream triton init` wrote.")],
    world_size: Annotated[
        int, typer.Option(min=1, help="Ranks of the engine: --tp_size times --pp_size of its build.")
    ] = 1,
    tritonserver: Annotated[
        Path | None, typer.Option(help="The server program.  [default: on PATH, or in the nvidia-pytriton wheel]")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    http_port: Port = 8000,
    grpc_port: Port = 8001,
    metrics_port: Port = 8002,
    force: Annotated[bool, typer.Option("--force", help="Start although a tritonserver runs here already.")] = False,
    log: Annotated[bool, typer.Option("--log", help="Write the server's log to --log_file instead of stderr.")] = False,
    log_file: Annotated[Path, typer.Option(help="Where --log writes.")] = Path("triton_log.txt"),
) -> None:
    """Start the real Triton Inference Server, and stay until it ends.

    A line on stdout says when it is ready. SIGTERM and Ctrl-C end it. It ends by itself, with exit code 2, when
    one of its models has died, for whoever starts it again.

    Example:
        slipstream triton launch --model_repo repository --world_size 1
    """
    from slipstream.serve.triton.launch import LaunchConfig
    from slipstream.serve.triton.launch import launch as run

    config = LaunchConfig(
        model_repository=model_repo, world_size=world_size, tritonserver=tritonserver, host=host, http_port=http_port,
        grpc_port=grpc_port, metrics_port=metrics_port, log_file=log_file if log else None, beside_others=force,
    )  # fmt: skip

    def say_ready(seconds: float) -> None:
        print(
            f"Ready: {model_repo} at http://{host}:{http_port} (gRPC {host}:{grpc_port}, metrics "
            f"http://{host}:{metrics_port}/metrics) after {seconds:.1f} s.",
            flush=True,
        )

    run(config, say_ready)
