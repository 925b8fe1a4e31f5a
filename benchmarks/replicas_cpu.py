"""Two replicas on two cores beside one on one core; and prompts sent where their prefix is beside round robin.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/replicas_cpu.py [--rounds 7] [--parts scaling,prefixes]

Engines are pinned, fronts and this client are not: they run on the same two cores, which with one replica leaves them
the core without an engine. So answers come whole, and each token by itself with --stream, which is more of their work,
this client's most of all. All servers run all the time and take turns in an order that changes; who is not asked
sleeps. Round robin is what a balancer that knows nothing does: two servers of one replica each, asked in turn.
"""

import argparse
import asyncio
import datetime
import itertools
import os
import platform
import random
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serve_clients import Reply, ask
from slipstream.bench.dataset import random_tokens, shared_prefixes
from tests.serve.conftest import Server, serving

VOCABULARY = range(300, 40_000)  # of SmolLM2, tokens that stand for text
BATCH = 8  # sequences of an engine; all engines always have enough to do


@dataclass(frozen=True)
class Run:
    replies: Sequence[Reply]
    seconds: float

    @property
    def first(self) -> float:
        """Seconds to a first token, median."""
        return statistics.median(reply.tokens[0] - reply.asked for reply in self.replies)


async def run(
    urls: Sequence[str], prompts: Sequence[list[int]], num_tokens: int, num_clients: int, *, stream: bool = True
) -> Run:
    """Clients who ask again as soon as they have their answer, of the servers in turn."""
    coming = zip(prompts, itertools.cycle(urls), itertools.count(), strict=False)
    replies: list[Reply] = []

    async def client() -> None:
        for prompt, url, seed in coming:
            replies.append(await ask(url, prompt, num_tokens, seed, stream=stream))

    loop = asyncio.get_running_loop()
    started = loop.time()
    await asyncio.gather(*(client() for _ in range(num_clients)))
    return Run(replies, loop.time() - started)


# --- servers ---


def pin(server: Server, core: int) -> Server:
    for thread in Path(f"/proc/{server.engine_pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), [core])
    return server


def found_cached(urls: Sequence[str]) -> float:
    """Tokens of prompts, of all engines since they began; asked until two beats say the same."""
    before = None
    while True:
        total = sum(sum(_values(url, "slipstream:prefix_cache_hits_total")) for url in urls)
        if total == before:
            return total
        before = total
        asyncio.run(asyncio.sleep(1.1))


def _values(url: str, name: str) -> Iterator[float]:
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        yield from (sample.value for sample in family.samples if sample.name == name)


# --- what is measured ---


def compare_scaling(arguments: argparse.Namespace, one: Sequence[str], two: Sequence[str]) -> None:
    ways = {"one replica": one, "two replicas": two}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    draw = random.Random(0)
    for round_index in range(-1, arguments.rounds):  # the first warms up
        count = arguments.requests if round_index >= 0 else 2 * BATCH
        samples = random_tokens(draw, VOCABULARY, [arguments.input] * count, [0] * count)
        prompts = [list(map(int, sample.prompt)) for sample in samples]
        for name in list(ways) if round_index % 2 else reversed(list(ways)):
            way = run(ways[name], prompts, arguments.output, 4 * BATCH, stream=arguments.stream)
            result = asyncio.run(way)
            if round_index >= 0:
                rates[name].append(len(prompts) * arguments.output / result.seconds)
    print(
        f"\n{arguments.requests} requests a round, {arguments.input} → {arguments.output} tokens, {4 * BATCH} clients"
    )
    print("\n| engines | tokens/s, each round | median |\n| --- | --- | --- |")
    for name, found in rates.items():
        print(f"| {name} | {', '.join(f'{rate:.0f}' for rate in found)} | {statistics.median(found):.1f} |")
    ratios = [two / one for one, two in zip(rates["one replica"], rates["two replicas"], strict=True)]
    print(f"\ntwo by one: {statistics.median(ratios):.3f} (rounds: {', '.join(f'{r:.3f}' for r in sorted(ratios))})")


def compare_prefixes(arguments: argparse.Namespace, router: Sequence[str], round_robin: Sequence[str]) -> None:
    ways = {"router": router, "round robin": round_robin}
    draw = random.Random(1)
    rows: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for round_index in range(arguments.rounds):
        for num_clients in (1, BATCH, 2 * BATCH):
            rest = random_tokens(draw, VOCABULARY, [16] * arguments.requests, [0] * arguments.requests)
            samples = shared_prefixes(draw, VOCABULARY, arguments.prefixes, arguments.prefix_len, rest)
            prompts = [list(map(int, sample.prompt)) for sample in samples]
            for name in list(ways) if round_index % 2 else reversed(list(ways)):
                before = found_cached(ways[name])
                result = asyncio.run(run(ways[name], prompts, 8, num_clients))
                cached = (found_cached(ways[name]) - before) / sum(map(len, prompts))
                rows.setdefault((num_clients, name), []).append((cached, result.first))
    print(f"\n{arguments.requests} requests a round, which begin with one of {arguments.prefixes} new prefixes of")
    print(f"{arguments.prefix_len} tokens, 16 of their own → 8; a KV cache of {arguments.cache} tokens an engine")
    print("\n| clients | way | of the prompts' tokens found cached, each round | TTFT, ms, each round | median |")
    print("| --- | --- | --- | --- | --- |")
    for (num_clients, name), found in rows.items():
        shares = ", ".join(f"{cached:.1%}" for cached, _ in found)
        firsts = [first * 1000 for _, first in found]
        times = ", ".join(f"{first:.0f}" for first in firsts)
        print(f"| {num_clients} | {name} | {shares} | {times} | {statistics.median(firsts):.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--parts", default="scaling,prefixes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=96, help="of a round")
    parser.add_argument("--input", type=int, default=32, help="tokens of a prompt, for scaling; and of an answer:")
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--stream", action="store_true", help="the answers, for scaling")
    parser.add_argument("--prefixes", type=int, default=8)
    parser.add_argument("--prefix_len", type=int, default=256)
    parser.add_argument("--cache", type=int, default=1792, help="tokens of an engine's KV cache, for prefixes")
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    print(f"{datetime.date.today()}, commit {commit}, {platform.platform()}, {os.cpu_count()} cores, {arguments}")
    cores = sorted(os.sched_getaffinity(0))[:2]
    limits = ("--max_batch_size", BATCH, "--max_num_tokens", 512, "--max_seq_len", 512)
    if "scaling" in arguments.parts:
        print(f"load {os.getloadavg()[0]:.2f}")
        with ExitStack() as stack:
            one = pin(stack.enter_context(serving(arguments.model, *limits)), cores[0])
            two = stack.enter_context(serving(arguments.model, *limits, "--replicas", 2))
            compare_scaling(arguments, [one.url], [two.url])
    if "prefixes" in arguments.parts:
        print(f"load {os.getloadavg()[0]:.2f}")
        small = (*limits, "--kv_cache_max_tokens", arguments.cache)
        with ExitStack() as stack:
            router = stack.enter_context(serving(arguments.model, *small, "--replicas", 2))
            single = [pin(stack.enter_context(serving(arguments.model, *small)), core) for core in cores]
            compare_prefixes(arguments, [router.url], [server.url for server in single])
    print(f"load at the end {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
