"""Start a tritonserver over a model repository, see that it serves, and end it cleanly."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from slipstream.errors import SlipstreamError, UsageError
from slipstream.serve.triton.server import WheelServer, find_server, site_of_wheel
from slipstream.serve.triton.template import check_filled

EXIT_SECONDS = 10  # for requests in flight, once it has been told to stop
POLL_SECONDS = 0.1  # until it is ready
WATCH_SECONDS = 0.5  # from then on
STUB = "triton_python_b"  # the name of a model's process, as the kernel keeps it: 15 characters


class LaunchFailed(SlipstreamError):
    """The server did not start, or ended by itself."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    model_repository: Path
    world_size: int = 1  # ranks of its engine
    tritonserver: Path | None = None
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    log_file: Path | None = None  # default: stderr
    beside_others: bool = False  # start although a tritonserver runs here already


def launch(config: LaunchConfig, on_ready: Callable[[float], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    on_ready: called with the seconds that it took.  Raises UsageError for what could never work, LaunchFailed where
    the server or one of its models ends by itself.
    """
    _check_repository(config.model_repository)
    _check_ranks(config)
    program = find_server(config.tritonserver)
    _check_alone(config)
    for port in (config.http_port, config.grpc_port, config.metrics_port):
        _check_free(config.host, port)
    with tempfile.TemporaryDirectory(prefix="slipstream-triton-") as folder:
        site = site_of_wheel(program)
        wheel = None if site is None else WheelServer(site, Path(folder) / "backends")
        prefix = f"slipstream_{os.getpid()}_"
        command = [str(program), *_arguments(config, prefix), *(wheel.arguments if wheel else [])]
        environment = {**os.environ, **(wheel.environment if wheel else {})}
        try:
            with _stop_signal() as stop, _running(command, environment, config.log_file) as server:
                _serve(server, config, stop, on_ready)
        finally:
            for left in Path("/dev/shm").glob(f"{prefix}*"):  # of models that were killed
                left.unlink(missing_ok=True)


def _check_repository(repository: Path) -> None:
    if not any(repository.glob("*/config.pbtxt")):
        raise UsageError(
            f"--model_repo is {repository}, which holds no model; write one with: slipstream triton init --model_repo "
            f"{repository}."
        )
    check_filled(repository)
    instances = re.search(r"count: *(\d+)", _text(repository / "postprocessing/config.pbtxt"))
    is_decoupled = re.search(
        r"decoupled: *(true|t\b|1)", _text(repository / "tensorrt_llm/config.pbtxt"), re.IGNORECASE
    )
    if instances and int(instances[1]) > 1 and is_decoupled:
        raise UsageError(
            f"postprocessing_instance_count is {instances[1]}, which puts the pieces of streamed texts out of order; "
            "give 1, or decoupled_mode:False."
        )


def _check_ranks(config: LaunchConfig) -> None:
    """The model `tensorrt_llm` starts the other ranks itself, as many as the engine has."""
    from slipstream.api.replicas import num_ranks

    text = _text(config.model_repository / "tensorrt_llm/config.pbtxt")
    found = re.search(r'"engine_dir"[^"]*"((?:[^"\\]|\\.)*)"', text)
    if not found:
        return
    engine = re.sub(r"\\(.)", r"\1", found[1])
    count = num_ranks({"model": engine, "tp_size": None, "pp_size": None})
    if count != config.world_size:
        ranks = "one rank" if count == 1 else f"{count} ranks"
        raise UsageError(
            f"--world_size is {config.world_size}, but {engine} has {ranks}; give --world_size {count}, or build it "
            "with another --tp_size."
        )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _check_alone(config: LaunchConfig) -> None:
    others = [] if config.beside_others else [pid for pid, _, name in _processes() if name == "tritonserver"]
    if others:
        raise UsageError(
            f"A tritonserver runs here already (process {', '.join(map(str, others))}); end it, or add --force with "
            "other ports."
        )


def _check_free(host: str, port: int) -> None:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise UsageError(
            f"{host}:{port} cannot be listened on ({error.strerror}); give other ports: --http_port, --grpc_port, "
            "--metrics_port."
        ) from None


def _arguments(config: LaunchConfig, shm_prefix: str) -> list[str]:
    addresses = [
        f"--{kind}-{what}={value}"
        for kind, port in (("http", config.http_port), ("grpc", config.grpc_port), ("metrics", config.metrics_port))
        for what, value in (("address", config.host), ("port", port))
    ]
    return [
        f"--model-repository={config.model_repository}",
        *addresses,
        "--disable-auto-complete-config",  # which would start each model twice
        f"--exit-timeout-secs={EXIT_SECONDS}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
    ]


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """Set once SIGTERM or SIGINT has come."""
    stop = threading.Event()

    def note(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Server:
    """The running program, and the first thing that it says went wrong."""

    def __init__(self, command: list[str], environment: dict[str, str], log_file: Path | None) -> None:
        try:
            self._log = None if log_file is None else log_file.open("w", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"--log_file is {log_file}, which cannot be written ({error.strerror}).") from None
        self.reason = ""
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        out = self._log or sys.stderr
        for line in self.process.stdout:
            out.write(line)
            out.flush()
            failed = re.search(r"(failed to load '.*|failed to start .*|error: .*)", line)
            if failed and not self.reason:  # what follows from it is said later
                self.reason = failed[1].rstrip('".')

    def kill(self) -> None:
        """With all of its models, and what it may have left of them."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(EXIT_SECONDS + 5)
        self.kill()
        self.process.wait()
        self._reader.join(1)
        if self._log is not None:
            self._log.close()


@contextmanager
def _running(command: list[str], environment: dict[str, str], log_file: Path | None) -> Iterator[_Server]:
    server = _Server(command, environment, log_file)
    try:
        yield server
    finally:
        server.end()


def _serve(server: _Server, config: LaunchConfig, stop: threading.Event, on_ready: Callable[[float], None]) -> None:
    started = time.monotonic()
    models: set[int] = set()  # their processes, once all are ready
    while not stop.wait(WATCH_SECONDS if models else POLL_SECONDS):
        code = server.process.poll()
        if code is not None:
            when = "by itself" if models else "before it was ready"
            raise LaunchFailed(f"tritonserver ended {when} (exit code {code}): {server.reason or 'see its log'}.")
        if not models and _is_ready(config):
            models = {pid for pid, parent, name in _processes() if parent == server.process.pid and name == STUB}
            on_ready(time.monotonic() - started)
        if any(_stat(Path("/proc", str(pid))) is None for pid in models):
            server.kill()  # asked to stop, it would wait for the dead model
            raise LaunchFailed(
                "The process of a model has ended (its last words are in the log); tritonserver would go on calling it "
                "ready, so it was ended: launch again."
            )


def _is_ready(config: LaunchConfig) -> bool:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    try:
        with urllib.request.urlopen(f"http://{host}:{config.http_port}/v2/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _processes() -> Iterator[tuple[int, int, str]]:
    """(process, its parent, its name) of all that live."""
    for folder in Path("/proc").glob("[0-9]*"):
        found = _stat(folder)
        if found is not None:
            yield int(folder.name), *found


def _stat(folder: Path) -> tuple[int, str] | None:
    """(parent, name) of a process; None once it has ended."""
    try:
        stat = (folder / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    name, _, rest = stat.partition("(")[2].rpartition(")")
    state, parent = rest.split()[:2]
    return None if state == "Z" else (int(parent), name)
