"""What the front adds to the engine's time: requests on their way in, tokens on their way out.

    PYTHONPATH=. python benchmarks/serve_overhead.py [--model smollm2] [--clients 50] [--rounds 3]
        [--beside FOLDER]      another checkout of this repository, whose server is asked in the same rounds

Clients stream chats over connections that they keep, end-of-sequence ignored, each message its own. Two loads:

steady   a client asks again as soon as it has its answer, of 8 to 40 tokens; they begin one after the other.
burst    all of them ask at once, and again when all have their answers of 24 tokens.

In is the time from before a client's send() of its request until the engine's process has it in its queue. Out is the
time from a token's leaving the engine (serve_stamps.py has both) until the kernel has put its bytes on the client's
socket: the kernel's own timestamp, so that a client that waits for a core counts as lag of its own. First is what both
add to a first token. The client is one thread over raw sockets that looks at nothing until the round is over.

Beside it the front's processor time (user and system, all its threads), which other work on the machine hardly changes.
"""

import argparse
import datetime
import json
import os
import platform
import random
import select
import socket
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from slipstream import LLM
from slipstream.text.detokenize import Detokenizer
from slipstream.text.tokenizer import Tokenizer
from tests.serve.conftest import Server, serving, write_engine

_TIMESTAMPING = 37  # SO_TIMESTAMPING and SCM_TIMESTAMPING of linux/net_tstamp.h
_ON_RECEIPT = 1 << 3 | 1 << 4  # by software: made, and told
_WORDS = ["time", "light", "water", "stone", "river", "paper", "glass", "house", "night", "green", "small", "round"]
_draw = random.Random(0)


@dataclass
class Reply:
    """Times by time.monotonic()."""

    seed: int
    asked: float
    pieces: list[tuple[float, float, bytes]] = field(default_factory=list)  # on the socket, read, what

    def text_arrivals(self) -> Iterator[tuple[float, int]]:
        """When how many characters of the text were there."""
        num_characters, rest = 0, b""
        for arrived, _, piece in self.pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    num_characters += len(json.loads(line[6:])["choices"][0]["delta"].get("content", ""))
            yield arrived, num_characters


@dataclass(frozen=True)
class Round:
    seconds: float
    front_seconds: float  # of a processor
    num_tokens: int
    ways_in: Sequence[float]  # seconds of each request, sorted as all of these
    ways_out: Sequence[float]  # of each token
    firsts: Sequence[float]
    lags: Sequence[float]  # of the client, for each piece


# --- asking ---


class Client:
    """One connection."""

    def __init__(self, url: str) -> None:
        host, port = url.removeprefix("http://").split(":")
        self.host, self.replies = host, list[Reply]()
        self.socket = socket.create_connection((host, int(port)))
        self.socket.setsockopt(socket.SOL_SOCKET, _TIMESTAMPING, _ON_RECEIPT)

    def ask(self, seed: int, num_tokens: int) -> None:
        message = {"role": "user", "content": " ".join(_draw.choices(_WORDS, k=48))}
        sampling = {"max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "seed": seed}
        body = json.dumps({"messages": [message], "stream": True, **sampling}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        self.replies.append(Reply(seed, time.monotonic()))
        self.socket.sendall(request)

    def read(self, clock_offset: float) -> bool:
        """What has come; whether that is the end of the answer."""
        piece, ancillary, _, _ = self.socket.recvmsg(1 << 16, 256)
        arrived = read = time.monotonic()
        assert piece, "the server closed the connection"
        for _, kind, stamp in ancillary:  # none for the first packets, until the kernel has begun to make them
            if kind == _TIMESTAMPING:
                seconds, nanoseconds = struct.unpack_from("qq", stamp)
                arrived = seconds + nanoseconds / 1e9 - clock_offset
        self.replies[-1].pieces.append((arrived, read, piece))
        return piece.endswith(b"0\r\n\r\n")


def run_steady(clients: Sequence[Client], num_turns: int, seed: int) -> None:
    """They begin over the first seconds; people do not come in step."""
    starts = sorted((_draw.uniform(0, 4), client) for client in range(len(clients)))
    started, turns = time.monotonic(), [0] * len(clients)

    def ask(index: int) -> None:
        clients[index].ask(seed + index * 1000 + turns[index], _draw.randint(8, 40))
        turns[index] += 1

    with _Poller(clients) as poller:
        while starts or poller.num_open:
            while starts and starts[0][0] <= time.monotonic() - started:
                ask(starts.pop(0)[1])
            for index in poller.ended(0.01 if starts else 1):
                if turns[index] < num_turns:
                    ask(index)
                else:
                    poller.leave(index)


def run_bursts(clients: Sequence[Client], num_turns: int, seed: int) -> None:
    with _Poller(clients) as poller:
        for turn in range(num_turns):
            for index, client in enumerate(clients):
                client.ask(seed + index * 1000 + turn, 24)
            num_left = len(clients)
            while num_left:
                num_left -= len(poller.ended(1))


class _Poller:
    def __init__(self, clients: Sequence[Client]) -> None:
        self._by_file = {client.socket.fileno(): index for index, client in enumerate(clients)}
        self._clients, self._poller, self.num_open = clients, select.epoll(), len(clients)
        self._clock_offset = time.time() - time.monotonic()

    def __enter__(self) -> "_Poller":
        for file in self._by_file:
            self._poller.register(file, select.EPOLLIN)
        return self

    def __exit__(self, *_: object) -> None:
        self._poller.close()

    def ended(self, seconds: float) -> list[int]:
        """Read what there is; whose answers have ended with it."""
        ready = [self._by_file[file] for file, _ in self._poller.poll(seconds)]
        return [index for index in ready if self._clients[index].read(self._clock_offset)]

    def leave(self, index: int) -> None:
        self._poller.unregister(self._clients[index].socket)
        self.num_open -= 1


LOADS = {"steady": run_steady, "burst": run_bursts}


# --- measuring ---


def measure(server: Server, stamps: Path, load: str, num_turns: int, arguments: argparse.Namespace, seed: int) -> Round:
    [front] = server.front_pids
    clients = [Client(server.url) for _ in range(arguments.clients)]
    started, worked = time.monotonic(), processor_seconds(front)
    LOADS[load](clients, num_turns, seed)
    seconds, worked = time.monotonic() - started, processor_seconds(front) - worked
    for client in clients:
        client.socket.close()
    time.sleep(1)  # the last line is written
    known = {entry["seed"]: entry for entry in map(json.loads, stamps.read_text().splitlines())}
    ways_in, ways_out, firsts, lags = [], [], [], []
    for reply in (reply for client in clients for reply in client.replies):
        entry = known[reply.seed]
        way_in = entry["came"] - reply.asked
        outs = list(_ways_out(reply, entry["left"], arguments.tokenizer))
        ways_in.append(way_in)
        ways_out += outs
        firsts.append(way_in + outs[0])
        lags += [read - arrived for arrived, read, _ in reply.pieces]
    return Round(seconds, worked, len(ways_out), *map(sorted, (ways_in, ways_out, firsts, lags)))


def _ways_out(reply: Reply, left: Sequence[tuple[float, int]], tokenizer: Tokenizer) -> Iterator[float]:
    """Of each token, to the piece with its text. One that ends inside a character is not shown before the next."""
    detokenizer, arrivals = Detokenizer(tokenizer, (0,), skip_special_tokens=True), reply.text_arrivals()
    num_characters = num_arrived = 0
    for time_left, token_id in left:
        text = detokenizer.push([token_id])
        num_characters += len(text)
        while num_arrived < num_characters:
            arrived, num_arrived = next(arrivals)
        if text:
            yield arrived - time_left


def processor_seconds(pid: int) -> float:
    """Of all its threads, by the scheduler's clock of nanoseconds."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def shown(values: Sequence[float]) -> str:
    """Milliseconds: median, 99th percentile, longest."""
    return ", ".join(f"{values[min(int(len(values) * part), len(values) - 1)] * 1000:.1f}" for part in (0.5, 0.99, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="tiny is a random one, whose steps take the least time")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turns", type=int, default=4, help="requests of each client in a round")
    parser.add_argument("--threads", default="1", help="of each engine")
    parser.add_argument("--fronts", type=int, default=1)
    parser.add_argument("--loads", default="steady,burst")
    parser.add_argument("--beside", type=Path)
    arguments = parser.parse_args()
    here = Path(__file__).parents[1]
    trees = {"this": here} | ({"beside": arguments.beside} if arguments.beside else {})
    for name, tree in trees.items():
        commit = subprocess.run(["git", "-C", tree, "describe", "--always", "--dirty"], capture_output=True, text=True)
        print(f"{name}: {commit.stdout.strip()}")
    print(f"{datetime.date.today()}, {platform.platform()}, {os.cpu_count()} cores, {arguments}")
    print(f"load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = write_engine(Path(folder)) if arguments.model == "tiny" else arguments.model
        with LLM(model) as llm:
            arguments.tokenizer = llm.tokenizer
        servers: dict[str, tuple[Server, Path]] = {}
        for name, tree in trees.items():
            stamps = Path(folder) / f"{name}.jsonl"
            options = ("--num_fronts", arguments.fronts, "--max_batch_size", 64, "--plugin", "benchmarks.serve_stamps")
            environment = {"OMP_NUM_THREADS": arguments.threads, "SLIPSTREAM_STAMPS": str(stamps)}
            environment |= {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}  # not the folder that this runs in
            servers[name] = stack.enter_context(serving(model, *options, **environment)), stamps
        run_rounds(servers, arguments)
    print(f"load at the end {os.getloadavg()[0]:.1f}")


def run_rounds(servers: dict[str, tuple[Server, Path]], arguments: argparse.Namespace) -> None:
    print("median, p99 and longest in ms; the front's processor time in ms a request\n")
    print(
        "| load | checkout | round | requests | tokens/s | in | out | added to a first token | client's lag | front |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    work: dict[tuple[str, str], list[float]] = {}
    for index in range(arguments.rounds + 1):  # the first warms up
        for load in arguments.loads.split(","):
            for name in list(servers) if index % 2 else reversed(list(servers)):
                server, stamps = servers[name]
                turns = arguments.turns if index else 1
                seed = (list(LOADS).index(load) * 100 + index) * 1_000_000
                found = measure(server, stamps, load, turns, arguments, seed)
                if index == 0:
                    continue
                num_requests, rate = len(found.ways_in), found.num_tokens / found.seconds
                cost = found.front_seconds / num_requests * 1000
                work.setdefault((load, name), []).append(cost)
                times = " | ".join(map(shown, (found.ways_in, found.ways_out, found.firsts, found.lags)))
                print(f"| {load} | {name} | {index} | {num_requests} | {rate:.0f} | {times} | {cost:.2f} |", flush=True)
    print()
    for (load, name), costs in sorted(work.items()):
        print(f"{load}, {name}: {statistics.median(costs):.2f} ms of the front's processor time a request")


if __name__ == "__main__":
    main()
