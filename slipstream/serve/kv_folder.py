"""KVFolder: the KV of prompts that an engine's process has computed for another one, until that takes it.

A file a prompt, in shared memory (runtime/worker/handover.py). Engines of the same machine open it there; to those of
others it is given over TCP, once. Its name, which nobody can guess (handover.py), is what whoever asks has to know.
"""

import contextlib
import os
import shutil
import socket
import socketserver
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

FETCH_SECONDS = 30.0  # that a prompt waits for its KV: longer than that few take to be computed again
SILENCE_SECONDS = 10.0  # of the other machine
_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "slipstream-"
_TCP = "tcp://"
_CHUNK = 1 << 20  # bytes
_MOST_WAITING = 128  # connections that are still to be looked at


class KVFolder:
    """It ends with its process, or else with remove() by the parent."""

    def __init__(self, name: str) -> None:
        """name: of the engine's process."""
        folder = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        self._path = folder / f"{_PREFIX}{name}"
        self._server: _Server | None = None
        self.address = str(self._path)  # where others have it: a folder, or host and port

    def make(self) -> None:
        self._path.mkdir(mode=0o700)

    def remove(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        shutil.rmtree(self._path, ignore_errors=True)

    def expect(self, name: str) -> str:
        """An empty file for what is to come: once it is gone, nobody writes it any more."""
        with contextlib.suppress(OSError):
            self._file(name).touch()
        return str(self._file(name))

    def discard(self, names: Iterable[str]) -> None:
        """Nobody will take what has been computed of them, or is still to come."""
        for name in names:
            with contextlib.suppress(OSError):
                self._file(name).unlink()

    def discard_all_of(self, front: str) -> None:
        self.discard(path.name for path in self._path.glob(f"{front}-*"))

    def near(self, place: str) -> str | None:
        """The place, where it is in such a folder of this machine: no other file may be opened, and taken away."""
        folder = Path(place).parent
        return place if folder.parent == self._path.parent and folder.name.startswith(_PREFIX) else None

    def listen(self, host: str) -> None:
        """Give files to whoever knows their names, at this host."""
        self._server = _Server(host, self)
        self.address = f"{_TCP}{host}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, name="slipstream-kv", daemon=True).start()

    def fetch(self, place: str, until: float, most: int) -> str | None:
        """What another machine's folder has (address/name), as a file of this one; None where that cannot be had.

        until: by time.monotonic().  most: bytes.
        """
        address, _, name = place.removeprefix(_TCP).rpartition("/")
        host, _, port = address.rpartition(":")
        path = self._file(name)
        try:
            with (
                socket.create_connection((host, int(port)), _patience(until)) as connection,
                path.open("wb") as file,
            ):
                connection.sendall(f"{name}\n".encode())
                if _receive(connection, file, until, most):
                    return str(path)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            print(
                f"warning: a prompt's KV could not be fetched from {address} ({why}); the prompt is computed here.",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        self.discard([name])
        return None

    def take(self, name: str) -> BinaryIO:
        """The file is nameless from here on. Raises OSError."""
        file = self._file(name).open("rb")
        self.discard([name])
        return file

    def _file(self, name: str) -> Path:
        return self._path / Path(name).name


def _receive(connection: socket.socket, file: BinaryIO, until: float, most: int) -> int:
    """The number of bytes that came before the other side had no more. Raises OSError."""
    buffer = memoryview(bytearray(_CHUNK))
    while True:
        connection.settimeout(_patience(until))
        count = connection.recv_into(buffer)
        if not count:
            return file.tell()
        file.write(buffer[:count])
        if file.tell() > most:
            raise OSError(f"it has more than {most} bytes")


def _patience(until: float) -> float:
    """Seconds of silence that are borne. Raises TimeoutError."""
    seconds = until - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("timed out")
    return min(seconds, SILENCE_SECONDS)


def is_elsewhere(place: str | None) -> bool:
    """It has to be fetched."""
    return place is not None and place.startswith(_TCP)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = _MOST_WAITING

    def __init__(self, host: str, folder: KVFolder) -> None:
        self.folder = folder
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, 0), _Giving)


class _Giving(socketserver.StreamRequestHandler):
    timeout = SILENCE_SECONDS
    server: _Server

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # whoever asks gets less than the whole, and sees that
            name = self.rfile.readline(256).decode().strip()
            with self.server.folder.take(name) as file:
                self.connection.sendfile(file)
