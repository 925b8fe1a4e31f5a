"""The real tritonserver for tests: found where scripts/test installs it, launched as users launch it."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from slipstream.serve.triton.server import IN_WHEEL, WORKING_PYTHON
from tests.serve.conftest import descendants

PROGRAM = Path(sys.prefix) / "triton-server" / IN_WHEEL
CAN_RUN = sys.platform == "linux" and sys.version_info[:2] == WORKING_PYTHON
needs_server = pytest.mark.skipif(
    not CAN_RUN, reason="the tritonserver in the nvidia-pytriton wheel runs on Linux with Python 3.11 alone"
)


class TritonServer:
    def __init__(self, process: subprocess.Popen[str], ports: list[int], log: Path) -> None:
        self.process, self.log = process, log
        self.http, self.grpc, self.metrics = (f"127.0.0.1:{port}" for port in ports)

    def post(self, model: str, body: dict[str, Any], verb: str = "generate") -> httpx.Response:
        return httpx.post(f"http://{self.http}/v2/models/{model}/{verb}", json=body, timeout=60)

    def text(self, model: str, **body: Any) -> str:
        response = self.post(model, body)
        assert response.status_code == 200, response.text
        text: str = response.json()["text_output"]
        return text

    def gauge(self, name: str) -> float:
        lines = httpx.get(f"http://{self.metrics}/metrics", timeout=5).text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"slipstream:{name} "))

    def children(self) -> list[int]:
        """All processes below the launcher."""
        return descendants(self.process.pid)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def start(repository: Path, *arguments: object) -> TritonServer:
    assert PROGRAM.is_file(), f"{PROGRAM} is missing; scripts/test installs it (step 4 of scripts/_setup.sh)"
    ports, log = free_ports(3), repository.with_name(f"{repository.name}.log")
    flags = ["--http_port", ports[0], "--grpc_port", ports[1], "--metrics_port", ports[2]]
    words = ["triton", "launch", "--model_repo", repository, *flags, "--force", *arguments]
    process = subprocess.Popen(
        [sys.executable, "-c", "import slipstream.cli; slipstream.cli.main()", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=log.open("w"),
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITONSERVER": str(PROGRAM)},
    )
    return TritonServer(process, ports, log)


@contextmanager
def serving(repository: Path, *arguments: object) -> Iterator[TritonServer]:
    """A server that is ready; it is ended by SIGTERM, and then has to be gone with exit code 0."""
    server = start(repository, *arguments)
    assert server.process.stdout is not None
    try:
        ready_line = server.process.stdout.readline()
        assert ready_line.startswith("Ready:"), server.log.read_text()[-3000:]
        yield server
        if server.process.poll() is None:
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(timeout=30) == 0, server.log.read_text()[-3000:]
    finally:
        server.process.terminate()
        server.process.wait()
        server.process.stdout.close()
