"""A server that answers what it is told, byte for byte and piece by piece: for what real ones rarely do."""

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CLOSE = b""  # instead of a piece: close the connection

Answer = Sequence[bytes]


class OddServer:
    """`asked`: the requests as they came. `sent`: when each piece of the answers went out, by time.monotonic()."""

    def __init__(self, answer: Callable[[int], Answer], pause: Callable[[], None]) -> None:
        self.asked, self.sent = list[bytes](), list[list[float]]()
        self._answer, self._pause = answer, pause
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Only once nobody waits there: a number that is free again may be the next server's socket."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection:
            while request := self._read(connection):
                self.asked.append(request)
                self.sent.append([])
                times = self.sent[-1]
                for piece in self._answer(len(self.asked) - 1):
                    if piece == CLOSE:
                        return
                    self._pause()
                    times.append(time.monotonic())
                    connection.sendall(piece)

    @staticmethod
    def _read(connection: socket.socket) -> bytes:
        got = b""
        while b"\r\n\r\n" not in got:
            piece = connection.recv(1 << 16)
            if not piece:
                return b""
            got += piece
        head, _, body = got.partition(b"\r\n\r\n")
        size = int(next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")).split()[1])
        while len(body) < size:
            body += connection.recv(1 << 16)
        return head + b"\r\n\r\n" + body


@contextmanager
def odd_server(answer: Callable[[int], Answer], pause: Callable[[], None] = lambda: None) -> Iterator[OddServer]:
    server = OddServer(answer, pause)
    yield server
    server.close()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"
