"""A crowd of clients in one thread: sockets that are read as they have something, each piece with when it came.

When a piece came is what the kernel wrote on it as it reached the socket (SO_TIMESTAMPING, on Linux without TLS; else,
the time at which it was read). A client that is late therefore does not make a server look slow; how late it was is
counted, and reported beside the server's numbers.
"""

import contextlib
import json
import resource
import selectors
import socket
import ssl
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from slipstream.errors import UsageError

_TIMESTAMPING = 37  # SO_TIMESTAMPING and SCM_TIMESTAMPING of linux/net_tstamp.h
_ON_RECEIPT = 1 << 3 | 1 << 4  # by software: made, and told
_MOST_READ = 1 << 16
_MOST_WAITING = 4096  # answers that have ended and are held for a quiet moment
_ASKED_BETWEEN_READS = 16  # where many are due at once, answers to the first are read meanwhile


@dataclass
class Exchange:
    """One request and its answer, in seconds of time.monotonic()."""

    index: int
    asked: float
    lag: float  # between when it was due and when it was asked
    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)  # of the answer's body
    ended: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Target:
    url: str  # without a slash at its end
    headers: Mapping[str, str]
    timeout: float  # seconds without a byte

    def post(self, path: str, body: bytes) -> bytes:
        """The request's bytes."""
        parts = urlsplit(self.url)
        lines = [f"POST {parts.path}{path} HTTP/1.1", f"Host: {parts.netloc}", f"Content-Length: {len(body)}"]
        lines += ["Content-Type: application/json", *(f"{name}: {value}" for name, value in self.headers.items())]
        return "\r\n".join([*lines, "\r\n"]).encode() + body

    def connect(self) -> socket.socket:
        parts = urlsplit(self.url)
        is_secure = parts.scheme == "https"
        host, port = parts.hostname or "", parts.port or (443 if is_secure else 80)
        try:
            plain = socket.create_connection((host, port), timeout=self.timeout)
        except OSError as error:
            raise UsageError(f"{self.url} cannot be reached ({error}); start the server, or give its URL.") from None
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if is_secure:
            return ssl.create_default_context().wrap_socket(plain, server_hostname=host)
        if sys.platform == "linux":
            plain.setsockopt(socket.SOL_SOCKET, _TIMESTAMPING, _ON_RECEIPT)
        return plain


class Crowd:
    """Asks a server for answers, and keeps its connections from one run to the next."""

    def __init__(self, target: Target) -> None:
        self.read_lags: list[float] = []  # of each piece: between its coming and its being read
        self._target, self._idle = target, list[_Connection]()
        self._selector = selectors.DefaultSelector()
        _allow_many_files()

    def run(
        self,
        requests: Sequence[bytes],
        *,
        concurrency: int | None = None,
        due: Sequence[float] | None = None,
        on_end: Callable[[Exchange], None],
    ) -> None:
        """All of them: `concurrency` at a time, or each when it is due (ascending seconds from now).

        on_end: called with each exchange once it has ended. Raises UsageError where the server cannot be reached.
        """
        self.read_lags.clear()
        clock_offset = max(time.time() - time.monotonic() for _ in range(9))  # the least held up between the two
        began, begun, busy = time.monotonic(), 0, set[_Connection]()
        looked, ended = began, deque[Exchange]()  # looked into when there is nothing to read

        def seconds_to_next() -> float:
            """Until the next one may be asked: 0 or less if now, no more than a second."""
            if begun == len(requests) or (due is None and len(busy) >= (concurrency or 1)):
                return 1.0
            return 0.0 if due is None else min(1.0, due[begun] - (time.monotonic() - began))

        while begun < len(requests) or busy:
            for _ in range(_ASKED_BETWEEN_READS):
                lag = -seconds_to_next()
                if lag < 0:
                    break
                busy.add(self._ask(Exchange(begun, 0.0, lag), requests[begun]))
                begun += 1
            ready = self._selector.select(0.0 if ended else max(0.0, seconds_to_next()))
            for key, _ in ready:
                self._read(key.data, clock_offset, busy, ended)
            if ended and (not ready or len(ended) > _MOST_WAITING):
                on_end(ended.popleft())
            if time.monotonic() - looked > 1.0:
                looked = time.monotonic()
                self._give_up(busy, ended)
        for exchange in ended:
            on_end(exchange)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._selector.close()

    def _ask(self, exchange: Exchange, request: bytes) -> "_Connection":
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable():
                break
            connection.close()
        else:
            connection = _Connection(self._target)
        connection.ask(exchange, request)
        self._selector.register(connection.socket, selectors.EVENT_READ, connection)
        return connection

    def _read(self, connection: "_Connection", offset: float, busy: "set[_Connection]", ended: deque[Exchange]) -> None:
        for arrived, read, piece in connection.receive(offset):
            if not piece and connection.was_closed_unheard:
                self._selector.unregister(connection.socket)
                connection.ask_again(self._target)
                self._selector.register(connection.socket, selectors.EVENT_READ, connection)
                return
            self.read_lags.append(read - arrived)
            if connection.feed(arrived, piece):
                self._end(connection, busy, ended)
                return

    def _end(self, connection: "_Connection", busy: "set[_Connection]", ended: deque[Exchange]) -> None:
        self._selector.unregister(connection.socket)
        busy.discard(connection)
        if connection.stays_open:
            self._idle.append(connection)
        else:
            connection.close()
        ended.append(connection.exchange)

    def _give_up(self, busy: "set[_Connection]", ended: deque[Exchange]) -> None:
        now = time.monotonic()
        for connection in [each for each in busy if now - each.last_heard > self._target.timeout]:
            connection.fail(f"nothing came for {self._target.timeout:g} s", now)
            self._end(connection, busy, ended)


class _Connection:
    """A socket, and the answer that it is in the middle of."""

    def __init__(self, target: Target) -> None:
        self.socket = target.connect()
        self.exchange = Exchange(0, 0.0, 0.0)
        self.stays_open = True
        self.last_heard = 0.0
        self._num_asked = 0

    def ask(self, exchange: Exchange, request: bytes) -> None:
        self.exchange, self._buffer, self._left, self._is_chunked = exchange, b"", -1, False
        self._request, self._num_asked = request, self._num_asked + 1
        exchange.asked = self.last_heard = time.monotonic()
        self._send()

    @property
    def was_closed_unheard(self) -> bool:
        """The server closed it after an earlier answer, before it could see this request (RFC 9112, 9.3.1)."""
        return self._num_asked > 1 and not self.exchange.status and not self._buffer

    def ask_again(self, target: Target) -> None:
        """The same, in a connection of its own; its time goes on."""
        self.socket.close()
        self.socket, self._num_asked = target.connect(), 1
        self._send()

    def _send(self) -> None:
        self.socket.setblocking(True)
        with contextlib.suppress(OSError):  # then there is an end to read
            self.socket.sendall(self._request)
        self.socket.setblocking(False)

    def is_usable(self) -> bool:
        """False where the server has closed it meanwhile, or says what nobody asked for."""
        try:
            self.socket.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            pass
        return False

    def receive(self, clock_offset: float) -> Iterator[tuple[float, float, bytes]]:
        """(came, read, bytes), as long as there is something; empty bytes where the server has closed."""
        while True:
            arrived = None
            try:
                if isinstance(self.socket, ssl.SSLSocket):
                    piece = self.socket.recv(_MOST_READ)
                else:
                    piece, ancillary, _, _ = self.socket.recvmsg(_MOST_READ, 256)
                    arrived = _stamp(ancillary, clock_offset)
            except (BlockingIOError, ssl.SSLWantReadError):
                return
            except OSError:
                piece = b""
            read = time.monotonic()
            self.last_heard = read
            yield min(arrived or read, read), read, piece
            if not piece or (len(piece) < _MOST_READ and not isinstance(self.socket, ssl.SSLSocket)):
                return

    def feed(self, arrived: float, piece: bytes) -> bool:
        """Take in a piece; whether that is the end of the answer."""
        if not piece:
            self.stays_open = False
            if self._left >= 0 or self._is_chunked or not self.exchange.status:
                self.fail("the connection ended before the answer did", arrived)
            self.exchange.ended = arrived
            return True
        self._buffer += piece
        if not self.exchange.status and not self._read_head():
            return False
        is_end = self._read_chunks(arrived) if self._is_chunked else self._read_rest(arrived)
        if is_end:
            self.exchange.ended = arrived
        return is_end

    def fail(self, why: str, now: float) -> None:
        self.stays_open = False
        self.exchange.error, self.exchange.ended = why, now

    def close(self) -> None:
        self.socket.close()

    def _read_head(self) -> bool:
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return False
        first, *lines = head.split(b"\r\n")
        headers = dict(line.lower().split(b":", 1) for line in lines if b":" in line)
        self.exchange.status, self._buffer = int(first.split()[1]), rest
        self._is_chunked = b"chunked" in headers.get(b"transfer-encoding", b"")
        if b"content-length" in headers and not self._is_chunked:
            self._left = int(headers[b"content-length"])
        self.stays_open = b"close" not in headers.get(b"connection", b"") and (self._is_chunked or self._left >= 0)
        return True

    def _read_chunks(self, arrived: float) -> bool:
        while True:
            line, found, rest = self._buffer.partition(b"\r\n")
            if not found:
                return False
            size = int(line.split(b";")[0], 16)
            if len(rest) < size + 2:
                return False
            if size == 0:
                return True
            self.exchange.pieces.append((arrived, rest[:size]))
            self._buffer = rest[size + 2 :]

    def _read_rest(self, arrived: float) -> bool:
        self.exchange.pieces.append((arrived, self._buffer))
        self._left -= len(self._buffer) if self._left >= 0 else 0
        self._buffer = b""
        return self._left == 0


def _stamp(ancillary: Sequence[tuple[int, int, bytes]], clock_offset: float) -> float | None:
    """None for the first packets, until the kernel has begun to stamp them."""
    for _, kind, stamp in ancillary:
        if kind == _TIMESTAMPING:
            seconds, nanoseconds = struct.unpack_from("qq", stamp)
            if seconds:
                return float(seconds + nanoseconds / 1e9 - clock_offset)
    return None


def _allow_many_files() -> None:
    """As many connections as the system lets us have, instead of the usual 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def first_model(target: Target) -> str:
    """What the server calls its model, by /v1/models."""
    import urllib.error
    import urllib.request

    request = urllib.request.Request(f"{target.url}/v1/models", headers=dict(target.headers))
    try:
        with urllib.request.urlopen(request, timeout=target.timeout) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (urllib.error.URLError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UsageError(
            f"{target.url}/v1/models says no name of a model ({error}); give it as --model, or another --protocol."
        ) from None
