"""Where the ranks of an engine find each other, on one machine or several.

Each process has a Launch: torchrun's or mpirun's, or the first rank's to those that it starts itself. It leads to
torch's TCPStore, where groups of ranks meet. There it is written where the first rank listens: each other one keeps a
connection to it for lines of JSON.
"""

import contextlib
import json
import secrets
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from slipstream.errors import CapacityError, RankError, UsageError
from slipstream.schema.launch import FIRST_ATTEMPT, LOOPBACK, Launch

COLLECTIVE_SECONDS = 120.0  # that ranks wait for each other within a step, and to meet
FIRST_SECONDS = 3600.0  # that the others wait for the first one, which may have an engine to build
HELLO_SECONDS = 5.0

_KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a machine that is gone says no goodbye


def check_ranks(size: int, device: torch.device) -> None:
    """Raises UsageError where others than so many ranks were started, CapacityError for GPUs that are not there."""
    launch = Launch.read()
    if launch is not None and launch.size != size:
        raise UsageError(
            f"{launch.size} ranks were started for an engine of {size} (--tp_size times --pp_size); start {size}, or "
            f"build it with --tp_size {launch.size}."
        )
    if device.type != "cuda":
        return
    first, found = device.index or 0, torch.cuda.device_count()
    if launch is not None:
        if first + launch.local_rank >= found:
            raise CapacityError(
                f"Rank {launch.rank} is to have cuda:{first + launch.local_rank}, and its machine has {found} GPUs; "
                f"start at most {found - first} ranks on it."
            )
    elif first + size > found:
        here = f"this machine has {found}" if first == 0 else f"from {device} on there are {found - first}"
        raise CapacityError(
            f"The engine is for {size} GPUs, and {here}; build it with --tp_size {found - first} alone, or give "
            "--device cpu."
        )


def open_store(launch: Launch) -> dist.Store:
    """Of a rank that was started."""
    if not launch.rank and not launch.has_store:
        return keep_store(launch.host, launch.port)[0]
    return dist.PrefixStore(launch.attempt, _connect(launch))


def keep_store(host: str, port: int = 0) -> tuple[dist.Store, int]:
    """In this process; returns its port, too."""
    try:
        listener = socket.create_server((_here(host), port))
    except OSError as error:
        raise RankError(f"Rank 0 cannot listen on port {port} ({error.strerror}); give another MASTER_PORT.") from None
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=COLLECTIVE_SECONDS),
        master_listen_fd=listener.detach(),
    )  # fmt: skip
    return dist.PrefixStore(FIRST_ATTEMPT, store), port


def _connect(launch: Launch) -> dist.Store:
    try:
        store = dist.TCPStore(launch.host, launch.port, is_master=False, timeout=timedelta(seconds=FIRST_SECONDS))
    except RuntimeError as error:
        raise RankError(
            f"Rank {launch.rank} found nobody at {launch.host}:{launch.port} ({first_line(error)})."
        ) from None
    store.set_timeout(timedelta(seconds=COLLECTIVE_SECONDS))
    return store


def _here(host: str) -> str:
    """Where to listen for those who know this machine as `host`: a name may mean another of its addresses here."""
    return LOOPBACK if host == "localhost" or host.startswith("127.") else ""


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].rstrip(".")


class Line:
    """A connection between the first rank and another one: messages both ways, from any thread."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):  # Linux
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connection = connection
        self._reader, self._writer = connection.makefile("rb"), connection.makefile("wb")
        self.address: str = connection.getsockname()[0]  # of this end

    def fileno(self) -> int:
        return self._connection.fileno()

    def say(self, message: Any) -> None:
        """Raises OSError where nobody is there any more."""
        self._writer.write(json.dumps(message).encode() + b"\n")
        self._writer.flush()

    def hear(self) -> Any:
        """None at its end."""
        try:
            line = self._reader.readline()
        except OSError:  # as good as an end: the other one was killed
            return None
        return json.loads(line) if line.endswith(b"\n") else None

    def end(self) -> None:
        """The other one hears so; what it still says is heard."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for file in (self._reader, self._writer, self._connection):
            with contextlib.suppress(OSError):
                file.close()


class Door:
    """Where the first rank lets the others in."""

    def __init__(self, host: str, store: dist.Store) -> None:
        self._listener = socket.create_server((_here(host), 0))
        self._password = secrets.token_hex(8)  # whoever knows the store may come in
        store.set("door", json.dumps([self._listener.getsockname()[1], self._password]))

    def fileno(self) -> int:
        return self._listener.fileno()

    def admit(self) -> tuple[Line, dict[str, Any]] | None:
        """Whoever knocks, and what it says of itself; None for a stranger."""
        connection, _ = self._listener.accept()
        connection.settimeout(HELLO_SECONDS)
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            with connection.makefile("rb", 0) as reader:  # no byte beyond the first line
                said = json.loads(reader.readline(1024))
            if said["password"] == self._password:
                return Line(connection), said
        connection.close()
        return None

    def close(self) -> None:
        self._listener.close()


def knock(launch: Launch, store: dist.Store) -> Line:
    """As one of the other ranks, once the first one listens."""
    try:
        store.wait(["door"], timedelta(seconds=FIRST_SECONDS))
        port, password = json.loads(store.get("door"))
        line = Line(socket.create_connection((launch.host, port), HELLO_SECONDS))
        line.say(
            {"password": password, "rank": launch.rank, "local_rank": launch.local_rank, "host": socket.gethostname()}
        )
    except (OSError, RuntimeError) as error:
        raise RankError(f"Rank {launch.rank} could not reach rank 0 at {launch.host} ({first_line(error)}).") from None
    return line


def machine() -> str:
    """Equal on ranks that share memory."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # as names may repeat
    return f"{socket.gethostname()} {boot.read_text() if boot.exists() else ''}".strip()
