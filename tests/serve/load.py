"""Many clients at once, of all protocols, some of whom leave, read slowly, never read, or do not speak the language.

    python -m tests.serve.load [--clients 500] [--seconds 300]      a table; tests/serve/test_load.py is the short form

Each checks its own answer against what the engine says offline (seeded, or greedy where a protocol has no seed), so
that a token lost, repeated, out of order or of another's answer shows. At the end the server has to be as it was.
"""

import argparse
import asyncio
import json
import random
import re
import socket
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc as service

from slipstream import LLM, SamplingParams
from tests.serve.conftest import Server, eventually, serving, write_engine

TOP_K = 50
SMALL_BUFFER = 4096  # bytes of the socket of who reads slowly
LOAD_OPTIONS = ("--grpc_port", 0)
PATIENCE = 120.0  # seconds in which any answer has to come

Event = Mapping[str, Any]


# --- what is asked, and what has to be answered ---


@dataclass(frozen=True)
class Task:
    """One prompt; `texts` and `token_ids` by how it is asked: plain (seeded), chat (seeded), greedy (chat)."""

    prompt: str
    num_tokens: int
    seed: int
    texts: Mapping[str, str]
    token_ids: Mapping[str, Sequence[int]]


def make_tasks(engine: Path, num_tasks: int) -> list[Task]:
    """Fewer, where a token hangs by the last digit of a number: on a CPU that depends on the other rows of a batch."""
    draw = random.Random(0)
    asked = []
    for seed in range(num_tasks):
        prompt = f"{seed}: " + "".join(draw.choices("aeiou nrst", k=draw.randint(1, 60)))
        asked.append((prompt, draw.randint(1, 160), seed))
    with LLM(engine) as llm:
        together, by_eight = _said(llm, asked, num_tasks), _said(llm, asked, 8)
    return [
        Task(
            *each,
            texts={kind: completion.text for kind, completion in one.items()},
            token_ids={kind: completion.token_ids for kind, completion in one.items()},
        )
        for each, one, other in zip(asked, together, by_eight, strict=True)
        if one == other
    ]


def _said(llm: LLM, asked: Sequence[tuple[str, int, int]], size: int) -> list[dict[str, Any]]:
    """The answers to each, by kind, so many prompts at a time."""
    found: list[dict[str, Any]] = [{} for _ in asked]
    for kind in ("plain", "chat", "greedy"):
        prompts = [prompt if kind == "plain" else rendered(prompt) for prompt, _, _ in asked]
        params = [
            SamplingParams(temperature=0, max_tokens=num_tokens)
            if kind == "greedy"
            else SamplingParams(temperature=1.0, top_k=TOP_K, max_tokens=num_tokens, seed=seed)
            for _, num_tokens, seed in asked
        ]
        for first in range(0, len(asked), size):
            outputs = llm.generate(prompts[first : first + size], params[first : first + size])
            for index, output in enumerate(outputs, first):
                found[index][kind] = output.outputs[0]
    return found


def rendered(prompt: str) -> str:
    """As the chat template of tests/cli/conftest.py has it."""
    return f"<|im_start|>user {prompt}<|im_end|><|im_start|>assistant "


# --- the protocols over HTTP ---


@dataclass(frozen=True)
class Protocol:
    path: str
    kind: str  # of Task.texts
    body: Callable[[Task], Any]
    text: Callable[[Event], str]  # that an event adds
    last: bytes = b""  # what the stream ends with, where the protocol has a word for it


def _seeded(task: Task) -> dict[str, Any]:
    return {"max_tokens": task.num_tokens, "seed": task.seed, "top_k": TOP_K, "temperature": 1.0, "stream": True}


def _message(task: Task) -> list[dict[str, str]]:
    return [{"role": "user", "content": task.prompt}]


def _of_choice(part: Callable[[Event], str | None]) -> Callable[[Event], str]:
    return lambda event: part(event["choices"][0]) or ""


PROTOCOLS = {
    "completions": Protocol(
        "/v1/completions",
        "plain",
        lambda task: {"prompt": task.prompt, **_seeded(task)},
        _of_choice(lambda choice: choice["text"]),
        last=b"data: [DONE]",
    ),
    "chat": Protocol(
        "/v1/chat/completions",
        "chat",
        lambda task: {"messages": _message(task), **_seeded(task)},
        _of_choice(lambda choice: choice["delta"].get("content")),
        last=b"data: [DONE]",
    ),
    "messages": Protocol(
        "/v1/messages",
        "greedy",
        lambda task: {
            "model": "talker",
            "messages": _message(task),
            "max_tokens": task.num_tokens,
            "temperature": 0,
            "stream": True,
        },
        lambda event: event.get("delta", {}).get("text", ""),
        last=b'data: {"type":"message_stop"}',
    ),
    "tgi": Protocol(
        "/generate_stream",
        "plain",
        lambda task: {
            "inputs": task.prompt,
            "parameters": {"max_new_tokens": task.num_tokens, "seed": task.seed, "top_k": TOP_K},
        },
        lambda event: event["generated_text"] or "",  # with the last token; these are checked one by one
    ),
    "kserve": Protocol(
        "/v2/models/ensemble/generate_stream",
        "plain",
        lambda task: {
            "text_input": task.prompt,
            "parameters": {"max_tokens": task.num_tokens, "random_seed": task.seed, "top_k": TOP_K, "stream": True},
        },
        lambda event: event["text_output"],
    ),
}

# What no server can answer, and the statuses it may refuse it with; none where the client hangs up first.
MALFORMED: Sequence[tuple[bytes, Sequence[int]]] = (
    (b"\x16\x03\x01 is no HTTP\r\n\r\n", (400,)),
    (b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", (404,)),
    (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{", ()),
    (b"POST /v1/chat/comp", ()),
)
WRONG_BODIES: Sequence[tuple[str, bytes]] = (
    ("/v1/completions", b'{"prompt": "x", "max_tokens": "many"}'),
    ("/v1/completions", b'{"prompt": "x", "tempersture": 1}'),
    ("/v1/chat/completions", b'{"messages": []'),
    ("/v1/messages", b'{"messages": [], "max_tokens": -1}'),
    ("/generate_stream", b'{"inputs": ""}'),
    ("/generate_stream", json.dumps({"inputs": "x " * 4000}).encode()),
    ("/v2/models/ensemble/generate_stream", b'{"text_input": 7}'),
)


def http_request(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


# --- clients ---


@dataclass
class Tally:
    """What the clients did and got."""

    whole: Counter[str] = field(default_factory=Counter)  # answers that were read to their end, by protocol
    left: int = 0  # before that, with something of the answer
    left_early: int = 0  # before anything came; the engine may not even have heard of it
    refused: int = 0
    tokens_whole: int = 0
    seconds: list[float] = field(default_factory=list)  # of the whole answers
    wrong: list[str] = field(default_factory=list)

    @property
    def num_whole(self) -> int:
        return self.whole.total()


@dataclass(frozen=True)
class Manner:
    """How one answer is read."""

    leaves_after: int | None = None  # events; None: never
    is_slow: bool = False  # sixteen bytes a second at first
    is_silent: bool = False  # does not read at all, and leaves
    seconds: float = 0.0  # of being one of these two


class Left(Exception):
    """The client hung up, as it meant to."""


class Crowd:
    """So many clients, each of which asks again as soon as it has its answer."""

    def __init__(self, server: Server, tasks: Sequence[Task], num_clients: int, seed: int = 0) -> None:
        found = re.search(r"https?://([\d.]+):(\d+) and grpc://(\S+) ", server.ready_line)
        assert found, server.ready_line
        self._host, self._port, self._grpc = found[1], int(found[2]), found[3]
        self._tasks, self._num_clients = tasks, num_clients
        self._draw = random.Random(seed)
        self.tally = Tally()

    async def run(self, seconds: float) -> None:
        """For so long new requests are made; those under way are read to their end."""
        end = time.monotonic() + seconds
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(self._grpc, options) for _ in range(4)]
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._num_clients):
                    group.create_task(self._live_until(end))
        finally:
            for channel in self._channels:
                await channel.close()

    async def _live_until(self, end: float) -> None:
        await asyncio.sleep(self._draw.random())
        while time.monotonic() < end:
            if self._draw.random() < 0.03:
                await self._refused()
                continue
            name = self._draw.choice([*PROTOCOLS, "grpc"])
            task, manner = self._draw.choice(self._tasks), self._manner(end)
            try:
                await self._checked(name, task, manner)
            except Exception as error:  # the crowd goes on, and the test fails with what each has met
                self.tally.wrong.append(f"{name}, {task.prompt!r}, {manner}: {type(error).__name__}: {error}")

    def _manner(self, end: float) -> Manner:
        dice = self._draw.random()
        seconds = min(self._draw.uniform(2, 20), max(0.0, end - time.monotonic()))
        if dice < 0.2:
            return Manner(leaves_after=self._draw.choice([0, 1, 2, 5, 20]))
        if dice < 0.22:
            return Manner(is_slow=True, seconds=seconds)
        if dice < 0.23:
            return Manner(is_silent=True, seconds=seconds)
        return Manner()

    async def _checked(self, name: str, task: Task, manner: Manner) -> None:
        started = time.monotonic()
        kind = "plain" if name == "grpc" else PROTOCOLS[name].kind
        texts: list[str] = []
        token_ids: list[int] = []
        steps = self._ask_grpc(task, manner) if name == "grpc" else self._ask_http(PROTOCOLS[name], task, manner)
        try:
            async with asyncio.timeout(PATIENCE + manner.seconds), aclosing(steps):
                async for text, event in steps:
                    texts.append(text)
                    token_ids += [event["token"]["id"]] if "token" in event else []
                    if manner.leaves_after == len(texts):
                        raise Left
        except Left:
            if texts:
                self.tally.left += 1
            else:
                self.tally.left_early += 1
            return
        if "".join(texts) != task.texts[kind]:
            raise AssertionError(f"{''.join(texts)!r} came for {task.texts[kind]!r}")
        if name == "tgi" and token_ids != task.token_ids[kind]:
            raise AssertionError(f"{token_ids} came for {task.token_ids[kind]}")
        self.tally.whole[name] += 1
        self.tally.tokens_whole += len(task.token_ids[kind])
        if not manner.is_slow:
            self.tally.seconds.append(time.monotonic() - started)

    async def _ask_http(self, protocol: Protocol, task: Task, manner: Manner) -> AsyncIterator[tuple[str, Event]]:
        request = http_request(protocol.path, json.dumps(protocol.body(task)).encode())
        async with aclosing(self._exchange(request, manner)) as answer:
            status = await anext(answer)
            if not status.startswith(b"HTTP/1.1 200"):
                raise AssertionError(f"refused: {status!r}")
            line = b""
            async for line in answer:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise AssertionError(f"failed: {line!r}")
                    yield protocol.text(event), event
            if not line.startswith(protocol.last):
                raise AssertionError(f"the stream ends with {line!r}")

    async def _exchange(self, request: bytes, manner: Manner) -> AsyncIterator[bytes]:
        """The status line, then the lines of the body that are not empty. Raises where the body has no orderly end."""
        reader, writer = await self._connect(SMALL_BUFFER if manner.seconds else None)
        try:
            writer.write(request)
            if manner.leaves_after == 0:
                await asyncio.sleep(self._draw.uniform(0, 0.2))
                raise Left
            if manner.is_silent:
                await asyncio.sleep(manner.seconds)
                raise Left
            async for line in _Answer(reader, manner.seconds).lines():
                yield line
        finally:
            writer.transport.abort()

    async def _connect(self, buffer: int | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        connection = socket.socket()
        connection.setblocking(False)
        if buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        await asyncio.get_running_loop().sock_connect(connection, (self._host, self._port))
        return await asyncio.open_connection(sock=connection, limit=buffer or 1 << 16)

    async def _ask_grpc(self, task: Task, manner: Manner) -> AsyncIterator[tuple[str, Event]]:
        request = _grpc_request(task)

        async def requests() -> AsyncIterator[Any]:
            yield request

        stub = service.GRPCInferenceServiceStub(self._draw.choice(self._channels))
        call = stub.ModelStreamInfer(requests())
        try:
            if manner.leaves_after == 0:
                await asyncio.sleep(self._draw.uniform(0, 0.2))
                raise Left
            if manner.seconds:
                await asyncio.sleep(manner.seconds)
            if manner.is_silent:
                raise Left
            async for response in call:
                if response.error_message:
                    raise AssertionError(response.error_message)
                raw = response.infer_response.raw_output_contents[0]
                yield raw[4:].decode(), {}  # behind its length
        finally:
            call.cancel()

    async def _refused(self) -> None:
        path, body = self._draw.choice(WRONG_BODIES)
        request, statuses = self._draw.choice([*MALFORMED, *[(http_request(path, body), (400, 422))] * 4])
        reader, writer = await self._connect(None)
        try:
            writer.write(request)
            if statuses:
                async with asyncio.timeout(PATIENCE):
                    said = await reader.read()
                if int(said.split(b" ", 2)[1]) not in statuses:
                    self.tally.wrong.append(f"{request!r} was answered by {said!r}")
        finally:
            writer.transport.abort()
        self.tally.refused += 1


class _Answer:
    """The bytes of a chunked answer; in its first seconds, sixteen of them each second."""

    def __init__(self, reader: asyncio.StreamReader, seconds_slow: float) -> None:
        self._reader, self._slow_until, self._bytes = reader, time.monotonic() + seconds_slow, b""

    async def lines(self) -> AsyncIterator[bytes]:
        """The status line, then those of the body that are not empty."""
        head = await self._until(b"\r\n\r\n")
        yield head.split(b"\r\n", 1)[0]
        body = b""
        while size := int(await self._until(b"\r\n"), 16):
            body += (await self._exactly(size + 2))[:-2]
            *whole, body = body.split(b"\n")
            for line in whole:
                if line:
                    yield line

    async def _until(self, mark: bytes) -> bytes:
        while mark not in self._bytes:
            await self._read()
        found, self._bytes = self._bytes.split(mark, 1)
        return found

    async def _exactly(self, size: int) -> bytes:
        while len(self._bytes) < size:
            await self._read()
        found, self._bytes = self._bytes[:size], self._bytes[size:]
        return found

    async def _read(self) -> None:
        is_slow = time.monotonic() < self._slow_until
        if is_slow:
            await asyncio.sleep(1)
        more = await self._reader.read(16 if is_slow else 1 << 16)
        if not more:
            raise AssertionError(f"the connection ended after {self._bytes!r}")
        self._bytes += more


def _grpc_request(task: Task) -> Any:
    request = messages.ModelInferRequest(model_name="ensemble")
    text = task.prompt.encode()
    tensors = (
        ("text_input", "BYTES", len(text).to_bytes(4, "little") + text),
        ("max_tokens", "INT32", task.num_tokens.to_bytes(4, "little")),
        ("random_seed", "UINT64", task.seed.to_bytes(8, "little")),
        ("top_k", "INT32", TOP_K.to_bytes(4, "little")),
        ("stream", "BOOL", b"\x01"),
    )
    for name, datatype, raw in tensors:
        request.inputs.add(name=name, datatype=datatype, shape=[1, 1])
        request.raw_input_contents.append(raw)
    return request


# --- the server meanwhile, and after ---


@dataclass(frozen=True)
class Processes:
    """Of a server: what each holds, over time."""

    server: Server
    mebibytes: dict[str, list[float]] = field(default_factory=dict)

    def look(self) -> None:
        for name, pid in self._pids().items():
            status = Path(f"/proc/{pid}/status").read_text()
            kilobytes = int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]
            self.mebibytes.setdefault(name, []).append(kilobytes / 1024)

    def growth(self) -> dict[str, float]:
        """Mebibytes between the third quarter of the time and the last, each on average."""
        found = {}
        for name, values in self.mebibytes.items():
            quarter = len(values) // 4
            third, last = values[-2 * quarter : -quarter], values[-quarter:]
            found[name] = sum(last) / quarter - sum(third) / quarter
        return found

    def num_files(self) -> dict[str, int]:
        """Open ones, connections among them."""
        return {name: len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in self._pids().items()}

    def _pids(self) -> dict[str, int]:
        fronts = {f"front {index}": pid for index, pid in enumerate(sorted(self.server.front_pids))}
        return {"parent": self.server.process.pid, "engine": self.server.engine_pid, **fronts}


async def press(crowd: Crowd, processes: Processes, seconds: float) -> None:
    async def watch() -> None:
        while True:
            processes.look()
            await asyncio.sleep(seconds / 100)

    watching = asyncio.create_task(watch())
    await crowd.run(seconds)
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching


def counts_of(server: Server) -> dict[str, float]:
    """Of /metrics, by name and, where there is one, reason."""
    text = httpx.get(f"{server.url}/metrics").text
    return {
        " ".join(
            [sample.name.removeprefix("slipstream:"), sample.labels.get("finished_reason", "")]
        ).strip(): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "le" not in sample.labels
    }


def check_after(server: Server, tally: Tally) -> None:
    """Everything has ended, and the server counted what the clients did."""
    assert not tally.wrong, "\n".join([f"{len(tally.wrong)} answers are wrong, such as", *tally.wrong[:5]])

    def is_idle() -> bool:
        stats = server.stats()
        return stats["num_blocks_used"] == stats["num_running"] == stats["num_waiting"] == 0

    eventually(is_idle)
    counts = counts_of(server)
    assert counts["num_requests_running"] == counts["num_requests_waiting"] == counts["kv_cache_usage_perc"] == 0
    finished = counts.get("request_success_total length", 0) + counts.get("request_success_total stop", 0)
    aborted = counts.get("request_success_total abort", 0)
    assert "request_success_total error" not in counts
    # Who leaves may do so when the engine has just finished, or, early, before the engine has heard of the request.
    assert tally.num_whole <= finished <= tally.num_whole + tally.left + tally.left_early
    assert tally.num_whole + tally.left <= finished + aborted <= tally.num_whole + tally.left + tally.left_early
    assert counts["e2e_request_latency_seconds_count"] == finished + aborted
    assert counts["request_generation_tokens_sum"] >= tally.tokens_whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=300)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        engine = write_engine(Path(folder))
        tasks = make_tasks(engine, 200)
        with serving(engine, *LOAD_OPTIONS) as server:
            processes = Processes(server)
            files = processes.num_files()
            crowd = Crowd(server, tasks, arguments.clients)
            asyncio.run(press(crowd, processes, arguments.seconds))
            report(crowd.tally, processes, arguments.seconds)
            check_after(server, crowd.tally)
            print(f"open files before and after: {files}, {processes.num_files()}")


def report(tally: Tally, processes: Processes, seconds: float) -> None:
    by_protocol = ", ".join(f"{name} {count}" for name, count in sorted(tally.whole.items()))
    print(f"whole answers: {tally.num_whole} ({by_protocol}), {tally.tokens_whole / seconds:.0f} tokens/s of them")
    print(f"left: {tally.left} with something of their answer, {tally.left_early} before; refused: {tally.refused}")
    print(f"wrong: {len(tally.wrong)}", *tally.wrong[:5], sep="\n")
    median, p99 = (sorted(tally.seconds)[int(len(tally.seconds) * part)] for part in (0.5, 0.99))
    print(f"seconds of an answer: median {median:.2f}, p99 {p99:.2f}")
    for name, grown in processes.growth().items():
        values = processes.mebibytes[name]
        print(f"{name}: {values[0]:.0f} MiB at first, {max(values):.0f} at most, last quarter over third {grown:+.2f}")


if __name__ == "__main__":
    main()
