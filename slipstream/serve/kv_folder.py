"""KVFolder: the KV of prompts that an engine's process has computed for another one, until that takes it.

A file a prompt, in shared memory (runtime/worker/handover.py). Engines of the same machine open it there; to those of
others it is given over TCP, once.
"""

import contextlib
import os
import shutil
import socket
import socketserver
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

SILENCE_SECONDS = 10.0  # of the other machine: longer than that no prompt takes to be computed again, mostly
_SHARED_MEMORY = Path("/dev/shm")
_TCP = "tcp://"


class KVFolder:
    """It ends with its process, or else with remove() by the parent."""

    def __init__(self, name: str) -> None:
        """name: of the engine's process."""
        folder = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        self._path = folder / f"slipstream-{name}"
        self.address = str(self._path)  # where others have it: a folder, or host and port

    def make(self) -> None:
        self._path.mkdir(mode=0o700)

    def remove(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)

    def expect(self, request_id: str) -> str:
        """An empty file for what is to come: once it is gone, nobody writes it any more."""
        with contextlib.suppress(OSError):
            self._file(request_id).touch()
        return str(self._file(request_id))

    def discard(self, request_ids: Iterable[str]) -> None:
        """Nobody will take what has been computed of them, or is still to come."""
        for request_id in request_ids:
            with contextlib.suppress(OSError):
                self._file(request_id).unlink()

    def discard_all_of(self, front: str) -> None:
        self.discard(path.name for path in self._path.glob(f"{front}-*"))

    def listen(self, host: str) -> None:
        """Give files to whoever asks for them at this host."""
        server = _Server(host, self)
        self.address = f"{_TCP}{host}:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, name="slipstream-kv", daemon=True).start()

    def fetch(self, place: str) -> str | None:
        """What another machine's folder has (address/request id), as a file of this one; None where it has not."""
        address, _, request_id = place.removeprefix(_TCP).rpartition("/")
        host, _, port = address.rpartition(":")
        path = self._file(request_id)
        try:
            with socket.create_connection((host, int(port)), SILENCE_SECONDS) as connection, path.open("wb") as file:
                connection.sendall(f"{request_id}\n".encode())
                with connection.makefile("rb") as source:
                    shutil.copyfileobj(source, file, 1 << 20)
                if file.tell():
                    return str(path)
        except OSError:
            pass
        self.discard([request_id])
        return None

    def take(self, request_id: str) -> BinaryIO:
        """Its name is gone from here on. Raises OSError."""
        file = self._file(request_id).open("rb")
        self.discard([request_id])
        return file

    def _file(self, request_id: str) -> Path:
        return self._path / Path(request_id).name


def is_elsewhere(place: str | None) -> bool:
    """It has to be fetched."""
    return place is not None and place.startswith(_TCP)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, host: str, folder: KVFolder) -> None:
        self.folder = folder
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, 0), _Giving)


class _Giving(socketserver.StreamRequestHandler):
    timeout = SILENCE_SECONDS
    server: _Server

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # whoever asks gets less than the whole, and sees that
            request_id = self.rfile.readline(256).decode().strip()
            with self.server.folder.take(request_id) as file:
                self.connection.sendfile(file)
