"""Gaps between the tokens of answers while long prompts come: a prefill and a decode engine beside two replicas.

    OMP_NUM_THREADS=1 PYTHONPATH=. python benchmarks/disaggregation_cpu.py [--rounds 2]

Two engines on a core each, in both; front and client are not pinned. Four clients read answers of 150 tokens, and one
sends prompts of 1,000 new tokens, one after the other. Each server is started anew for its turn.
"""

import argparse
import asyncio
import os
import random
import statistics
from collections.abc import Sequence

from benchmarks.serve_clients import Reply, ask
from tests.serve.conftest import serving

KINDS = {"two replicas": ("--replicas", 2), "prefill and decode": ("--prefill_replicas", 1)}
SIZES = ("--max_seq_len", 2048, "--max_batch_size", 16, "--kv_cache_max_tokens", 32_768)
NUM_LONG, LONG, NUM_READERS, ANSWER = 12, 1000, 4, 150


async def run(url: str) -> tuple[Sequence[Reply], Sequence[Reply]]:
    """The answers that are read, and those to the long prompts."""
    draw = random.Random(0)
    prompts = [[draw.randrange(300, 40_000) for _ in range(LONG)] for _ in range(NUM_LONG)]

    async def send() -> list[Reply]:
        return [await ask(url, prompt, 8, 0) for prompt in prompts]

    *answers, replies = await asyncio.gather(
        *(ask(url, [300 + reader] * 20, ANSWER, reader) for reader in range(NUM_READERS)), send()
    )
    return answers, replies


def describe(answers: Sequence[Reply], replies: Sequence[Reply]) -> str:
    gaps = sorted(
        later - earlier for reply in answers for earlier, later in zip(reply.tokens, reply.tokens[1:], strict=False)
    )
    middle, late, latest = (1000 * gaps[int(part * (len(gaps) - 1))] for part in (0.5, 0.99, 1.0))
    first = 1000 * statistics.median(reply.tokens[0] - reply.asked for reply in replies)
    return f"gap p50 {middle:.0f}, p99 {late:.0f}, longest {latest:.0f}; TTFT of a long prompt {first:.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    for _ in range(parser.parse_args().rounds):
        for name, options in KINDS.items():
            with serving("smollm2", *options, *SIZES) as server:
                print(f"{name}: {describe(*asyncio.run(run(server.url)))}, load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
