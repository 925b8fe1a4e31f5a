"""The server under 1, 8 and 32 clients beside the same prompts offline. serve_overhead.py is what its front adds.

    PYTHONPATH=. python benchmarks/serve_clients.py [--model smollm2] [--clients 1,8,32] [--rounds 3]
        [--peer http://127.0.0.1:8080]         another server of OpenAI's protocol, asked in the same rounds

Clients stream /v1/completions, greedy, end-of-sequence ignored, each its own prompt of random tokens, all at once. In
each round the server and the offline LLM take turns in an order that changes; the numbers are medians over the rounds.
"""

import argparse
import asyncio
import datetime
import json
import os
import platform
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import torch

from slipstream import LLM, SamplingParams
from tests.serve.conftest import serving, write_engine

Prompts = Sequence[list[int]]


@dataclass
class Reply:
    """What a client saw, by time.monotonic()."""

    asked: float
    tokens: list[float]  # when each came; where text is held back, it comes with a later one


@dataclass(frozen=True)
class Run:
    """Prompts at once: seconds to the first token of each, and tokens a second of them all."""

    first: float
    rate: float


# --- asking ---


async def ask(url: str, prompt: list[int], num_tokens: int, seed: int, *, stream: bool = True) -> Reply:
    """One request on a connection of its own, read as it comes."""
    host, port = url.removeprefix("http://").split(":")
    fields = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
    body = json.dumps(fields | {"seed": seed}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    reader, writer = await asyncio.open_connection(host, int(port))
    reply = Reply(time.monotonic(), [])
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    async for line in reader:
        data = line.removeprefix(b"data: ")
        if not data.startswith(b"{"):
            continue
        came = time.monotonic()
        [choice] = json.loads(data)["choices"] or [{"text": ""}]
        reply.tokens += [came] * bool(choice["text"])
    writer.close()
    assert reply.tokens, "nothing came"
    return reply


async def run_server(url: str, prompts: Prompts, num_tokens: int) -> Run:
    started = time.monotonic()
    replies = await asyncio.gather(*(ask(url, prompt, num_tokens, seed) for seed, prompt in enumerate(prompts)))
    seconds = time.monotonic() - started
    return Run(statistics.median(each.tokens[0] - each.asked for each in replies), len(prompts) * num_tokens / seconds)


async def run_offline(llm: LLM, prompts: Prompts, num_tokens: int) -> Run:
    started = time.monotonic()

    async def stream(prompt: list[int]) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        first = 0.0
        async with aclosing(llm.stream_async(prompt, sampling)) as steps:
            async for _ in steps:
                first = first or time.monotonic() - started
        return first

    firsts = await asyncio.gather(*map(stream, prompts))
    return Run(statistics.median(firsts), len(prompts) * num_tokens / (time.monotonic() - started))


# --- measuring ---


def compare(arguments: argparse.Namespace, model: Path | str) -> None:
    torch.set_num_threads(int(arguments.threads))  # of the offline engine
    counts = [int(count) for count in arguments.clients.split(",")]
    runs: dict[tuple[int, str], list[Run]] = {}
    most = ("--max_batch_size", 64)
    with (
        serving(model, "--num_fronts", 1, *most, OMP_NUM_THREADS=arguments.threads) as server,
        LLM(model, max_batch_size=64) as llm,
    ):

        def offline(prompts: Prompts) -> Awaitable[Run]:
            return run_offline(llm, prompts, arguments.tokens)

        ways: dict[str, Callable[[Prompts], Awaitable[Run]]] = {"offline": offline}
        for name, url in (("server", server.url), ("peer", arguments.peer)):
            if url:
                ways[name] = lambda prompts, url=url: run_server(url, prompts, arguments.tokens)  # type: ignore[misc]
        for round_index in range(-1, arguments.rounds):  # the first warms up
            for count in counts:
                prompts = make_prompts(count, arguments.prompt_tokens)
                for name in list(ways) if round_index % 2 else reversed(list(ways)):
                    found = asyncio.run(ways[name](prompts))  # type: ignore[arg-type]
                    if round_index >= 0:
                        runs.setdefault((count, name), []).append(found)
    print("| clients | what | first token, ms | tokens/s (lowest to highest) | of offline |")
    print("| --- | --- | --- | --- | --- |")
    for (count, name), found in sorted(runs.items()):
        rates = [each.rate for each in found]
        rate, first = statistics.median(rates), statistics.median(each.first for each in found)
        share = statistics.median(
            each.rate / base.rate for each, base in zip(found, runs[count, "offline"], strict=True)
        )
        spread = f"{min(rates):.1f} to {max(rates):.1f}"
        print(f"| {count} | {name} | {first * 1000:.0f} | {rate:.1f} ({spread}) | {share:.3f} |")


_draw = random.Random(0)


def make_prompts(count: int, num_tokens: int) -> Prompts:
    return [[_draw.randint(2, 300) for _ in range(num_tokens)] for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="tiny is a random one, whose steps take the least time")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--threads", default="2", help="of each engine")
    parser.add_argument("--peer")
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(f"{datetime.date.today()}, commit {commit}, {platform.platform()}, {os.cpu_count()} cores, {arguments}")
    print(f"load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        model = write_engine(Path(folder)) if arguments.model == "tiny" else arguments.model
        compare(arguments, model)
    print(f"load at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
