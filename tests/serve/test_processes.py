"""Parent, fronts, engine: what happens to requests when one dies, a client leaves, or the server is told to stop."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serve.conftest import START_SECONDS, Server, eventually, serving, start

KEY = {"Authorization": "Bearer second"}
ENDLESS = {"prompt": [1, 2, 3], "max_tokens": 1_000_000, "ignore_eos": True, "stream": True}
SHORT = {"prompt": [1, 2, 3], "max_tokens": 2}


@pytest.fixture(scope="module")
def guarded(engine: Path) -> Iterator[Server]:
    """Two sequences at a time and none that waits, keys, and texts without an end (a window with sinks)."""
    limits: list[object] = ["--max_batch_size", 2, "--max_queue_size", 0, "--max_body_size", "2KiB"]
    endless = ["--sink_token_length", 4, "--max_attention_window_size", 64, "--max_seq_len", 2_000_000]
    open_to = ["--api_key", "first", "--allowed_origin", "https://page.example"]
    with serving(engine, *limits, *endless, *open_to, SLIPSTREAM_API_KEY="second") as server:
        yield server


def streaming(server: Server) -> Any:
    return httpx.stream("POST", f"{server.url}/v1/completions", json=ENDLESS, headers=KEY, timeout=30)


def test_only_those_with_a_key_may_ask(guarded: Server) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "second"}, {"Authorization": "Bearer"}):
        answer = guarded.post("/v1/completions", SHORT, headers=headers)
        assert answer.status_code == 401 and "API key" in answer.json()["error"]["message"]
    for key in ("first", "second"):
        answer = guarded.post("/v1/completions", SHORT, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 200
    assert guarded.health().status_code == 200


def test_a_page_of_a_named_origin_may_ask(guarded: Server) -> None:
    def allowed(origin: str) -> str | None:
        asks = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        return httpx.options(f"{guarded.url}/v1/completions", headers=asks).headers.get("access-control-allow-origin")

    assert allowed("https://page.example") == "https://page.example"
    assert allowed("https://other.example") is None


def test_a_large_body_is_refused_with_and_without_a_length(guarded: Server) -> None:
    large = json.dumps({"prompt": "x" * 3000}).encode()
    kind = KEY | {"Content-Type": "application/json"}
    for content in (large, iter([large[:1500], large[1500:]])):
        answer = httpx.post(f"{guarded.url}/v1/completions", content=content, headers=kind)
        assert answer.status_code == 413 and "--max_body_size" in answer.json()["error"]["message"]


def test_more_than_may_wait_are_told_to_come_back(guarded: Server) -> None:
    with streaming(guarded) as one, streaming(guarded) as two:
        texts = [stream.iter_lines() for stream in (one, two)]  # kept: httpx closes with them
        for lines in texts:
            next(lines)
        answer = guarded.post("/v1/completions", SHORT, headers=KEY)
        assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1
    eventually(lambda: guarded.post("/v1/completions", SHORT, headers=KEY).status_code == 200)


def test_a_client_that_leaves_aborts_its_request(guarded: Server) -> None:
    with streaming(guarded) as stream:
        lines = stream.iter_lines()
        next(lines)
        eventually(lambda: guarded.stats()["num_blocks_used"] > 0)
    eventually(lambda: guarded.stats()["num_blocks_used"] == 0)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{guarded.url}/v1/completions", json=ENDLESS | {"stream": False}, headers=KEY, timeout=0.8)
    eventually(lambda: guarded.stats()["num_blocks_used"] == 0)
    assert guarded.stats()["num_running"] == 0


def test_a_killed_engine_fails_its_requests_and_is_started_again(guarded: Server) -> None:
    with streaming(guarded) as stream:
        lines = stream.iter_lines()
        next(lines)
        started = time.monotonic()
        os.kill(guarded.engine_pid, signal.SIGKILL)
        last = [line for line in lines if line][-2:]
        assert time.monotonic() - started < 20  # it never ends by itself
    assert "the engine process ended (signal 9)" in json.loads(last[0].removeprefix("data: "))["error"]["message"]
    assert last[1] == "data: [DONE]"
    assert guarded.health().status_code == 503
    refused = guarded.post("/v1/completions", SHORT, headers=KEY)
    assert refused.status_code == 503 and int(refused.headers["Retry-After"]) >= 1
    eventually(lambda: guarded.health().status_code == 200, seconds=START_SECONDS)
    assert guarded.post("/v1/completions", SHORT, headers=KEY).status_code == 200


def test_a_lost_rank_fails_its_requests_and_all_are_started_again(tmp_path: Path) -> None:
    """Two processes share the model (docs/parallelism.md): the engine's own and a child of it, which dies or hangs."""
    from slipstream.checkpoint.random import write_random_model
    from slipstream.models.llama import TINY

    model = write_random_model(tmp_path / "model", TINY | {"max_position_embeddings": 1_000_000})
    with serving(model, "--tp_size", 2, "--max_num_tokens", 64) as server:
        answer = server.post("/v1/completions", SHORT).json()
        endless = ENDLESS | {"max_tokens": 900_000}
        for sent, why in (
            (signal.SIGKILL, "has ended, by signal 9"),
            (signal.SIGSTOP, "has not answered for 20 seconds"),
        ):
            with httpx.stream("POST", f"{server.url}/v1/completions", json=endless, timeout=120) as stream:
                lines = stream.iter_lines()
                next(lines)
                [rank] = server.rank_pids
                os.kill(rank, sent)
                last = [line for line in lines if line][-2:]
            message = json.loads(last[0].removeprefix("data: "))["error"]["message"]
            assert f"rank 1 {why}" in message or "the engine process ended" in message
            assert last[1] == "data: [DONE]"
            eventually(lambda: server.rank_pids not in ([], [rank]), seconds=START_SECONDS)  # noqa: B023
            eventually(lambda: server.health().status_code == 200, seconds=START_SECONDS)
            assert server.post("/v1/completions", SHORT).json()["choices"] == answer["choices"]


def test_sigterm_lets_requests_finish(engine: Path) -> None:
    with serving(engine) as server:
        begun, ends = [], []

        def ask() -> None:
            body = {"prompt": "The", "max_tokens": 200, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as response:
                lines = response.iter_lines()
                begun.append(next(lines))
                ends.append([line for line in lines if line][-2:])

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(begun) == 4)
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert server.process.wait(timeout=20) == 0
        assert [end[-1] for end in ends] == ["data: [DONE]"] * 4
        assert all('"finish_reason":"length"' in end[0].replace(" ", "") for end in ends)


def test_nothing_outlives_a_killed_parent(engine: Path, tmp_path: Path) -> None:
    with serving(engine, "--num_fronts", 2, TMPDIR=str(tmp_path)) as server:
        assert list(tmp_path.glob("slipstream-*"))
        pids = [server.engine_pid, *server.front_pids]
        assert len(pids) == 3
        server.process.kill()
        server.process.wait()
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
        assert not list(tmp_path.glob("slipstream-*"))


@pytest.fixture(scope="module")
def two_fronts(engine: Path) -> Iterator[Server]:
    endless = ["--sink_token_length", 4, "--max_attention_window_size", 64, "--max_seq_len", 2_000_000]
    with serving(engine, "--num_fronts", 2, "--max_batch_size", 2, "--max_queue_size", 0, *endless) as server:
        yield server


class Stream:
    """An endless answer, and the process that it comes from: the one that holds the connection's other end."""

    def __init__(self, server: Server) -> None:
        self._open = httpx.stream("POST", f"{server.url}/v1/completions", json=ENDLESS, timeout=30)
        response = self._open.__enter__()
        self._lines = response.iter_lines()
        self.next()
        self.front = front_of(server, response)

    def next(self) -> str:
        return next(line for line in self._lines if line)

    def close(self) -> None:
        self._open.__exit__(None, None, None)


def front_of(server: Server, response: httpx.Response) -> int:
    """The process that answers."""
    stream = response.extensions["network_stream"]
    socket = socket_between(stream.get_extra_info("server_addr")[1], stream.get_extra_info("client_addr")[1])
    [front] = [pid for pid in server.front_pids if socket in sockets(pid)]
    return front


def socket_between(port: int, peers_port: int) -> str:
    """The socket of this machine with these two ports, as /proc/PID/fd shows it. A client's port alone may be that of
    connections to other servers, too."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    [inode] = [row[9] for row in rows if row[1].endswith(f":{port:04X}") and row[2].endswith(f":{peers_port:04X}")]
    return f"socket:[{inode}]"


def sockets(pid: int) -> set[str]:
    found = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.add(str(each.readlink()))
    return found


def streams_of_both_fronts(server: Server) -> list[Stream]:
    """The kernel says who answers; some connections later it has been both."""
    streams: dict[int, Stream] = {}
    for _ in range(100):
        stream = Stream(server)
        if stream.front in streams:
            stream.close()
            eventually(lambda: server.stats()["num_running"] == len(streams))
        else:
            streams[stream.front] = stream
        if len(streams) == 2:
            return list(streams.values())
    pytest.fail("one front answers everything")


def test_the_queue_is_one_over_all_fronts(two_fronts: Server) -> None:
    streams = streams_of_both_fronts(two_fronts)
    answer = two_fronts.post("/v1/completions", SHORT)
    assert answer.status_code == 429 and "2 sequences run or wait" in answer.json()["error"]["message"]
    for stream in streams:
        stream.close()
    eventually(lambda: two_fronts.post("/v1/completions", SHORT | {"n": 3}).status_code == 200)  # alone, any size


def test_a_killed_front_loses_its_own_connections_only(two_fronts: Server) -> None:
    one, other = streams_of_both_fronts(two_fronts)
    os.kill(one.front, signal.SIGKILL)
    with pytest.raises(httpx.RemoteProtocolError):
        while one.next():
            pass
    eventually(lambda: two_fronts.stats()["num_running"] == 1)  # the engine has given up what nobody waits for
    for _ in range(100):
        assert '"text"' in other.next()
    other.close()
    eventually(lambda: two_fronts.stats()["num_blocks_used"] == 0)
    eventually(lambda: len(two_fronts.front_pids) == 2 and one.front not in two_fronts.front_pids)
    for stream in streams_of_both_fronts(two_fronts):  # the new one answers as well
        stream.close()


def test_a_start_that_fails_says_why(engine: Path, tmp_path: Path, server: Server) -> None:
    def ending(*arguments: object) -> tuple[int, str]:
        words = ["serve", *map(str, arguments)]
        command = [sys.executable, "-c", "import slipstream.cli; slipstream.cli.main()", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr and not done.stdout, done.stderr
        return done.returncode, done.stderr

    code, said = ending(engine, "--port", 0, "--max_batch_size", 65)
    assert code == 2 and "max_batch_size is 65" in said
    code, said = ending(engine, "--port", server.url.rpartition(":")[2])
    assert code == 2 and "--port" in said
    code, said = ending(engine, "--ssl_keyfile", tmp_path)
    assert code == 2 and "--ssl_certfile" in said


def test_sigterm_ends_a_server_that_is_still_starting(engine: Path) -> None:
    process = start(engine)
    eventually(lambda: bool(Server(process, "", "").front_pids), seconds=START_SECONDS)  # the engine imports torch
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
