"""Seed 002's table on our server: what a fixed set of requests takes, by threads, drafts, memory, and two servers.

    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/seed_002.py [--requests 256] [--rows 0,1,2]

A row is a server started for it, `slipstream serve smollm2` with the flags that it names, then `--requests` texts asked
by so many clients, each asking again when it has its answer. Two servers share the device: half the clients and half
the texts go to each, at the same time. Prints an entry for benchmarks/.
"""

import argparse
import os
import random
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

from slipstream.bench.dataset import Sample, random_words
from slipstream.bench.http_client import Target, first_model
from slipstream.bench.load import Load
from slipstream.bench.protocols import PROTOCOLS
from slipstream.bench.report import Report, Table, facts_here, to_markdown
from slipstream.bench.serving import Endpoint
from tests.serve.conftest import Server, serving

MEMORY = 4096  # tokens of KV cache: 64 texts of input, output and what is left of their last blocks
INPUT, OUTPUT = 32, 16  # words, tokens


@dataclass(frozen=True)
class Row:
    name: str  # of the seed's, as it numbers them
    threads: int
    num_drafts: int = 0
    memory: int = MEMORY
    num_servers: int = 1

    @property
    def flags(self) -> list[str]:
        drafts = ["--speculate", str(self.num_drafts)] if self.num_drafts else []
        return ["--kv_cache_max_tokens", str(self.memory), "--no_kv_cache_enable_block_reuse", *drafts]


ROWS = (
    Row("1", 24),
    Row("2", 64),
    Row("3", 128),
    Row("4", 256),
    Row("–", 128, num_drafts=1),
    Row("5", 128, num_drafts=2),
    Row("6", 128, num_drafts=8),
    Row("8", 128, memory=MEMORY // 2),
    Row("9", 128, memory=MEMORY // 2, num_servers=2),
)


def measure(row: Row, samples: Sequence[Sample]) -> tuple[object, ...]:
    load, threads = Load(concurrency=row.threads // row.num_servers), os.environ.get("OMP_NUM_THREADS", "2")
    with ExitStack() as stack:
        servers = [
            stack.enter_context(serving("smollm2", *row.flags, OMP_NUM_THREADS=threads)) for _ in range(row.num_servers)
        ]
        parts = []
        for index, server in enumerate(servers):
            target = Target(server.url, {}, 600.0)
            endpoint = Endpoint(target, PROTOCOLS["openai"], first_model(target), {"ignore_eos": True}, None)
            stack.callback(endpoint.close)
            endpoint.measure(samples[:2], Load(concurrency=2), draw=random.Random(0))  # warm-up
            parts.append((endpoint, samples[index :: row.num_servers]))
        pool = stack.enter_context(ThreadPoolExecutor(len(parts)))
        asked = [pool.submit(endpoint.measure, part, load, draw=random.Random(0)) for endpoint, part in parts]
        timelines = [timeline for each in asked for timeline in each.result().run.timelines]
        accepted = "–" if not row.num_drafts else f"{sum(map(_accepted, servers)) / len(servers):.0%}"
    wrong = [timeline.error for timeline in timelines if timeline.error is not None]
    assert not wrong, f"{len(wrong)} requests failed: {wrong[0]}"
    seconds = max(each.ended for each in timelines) - min(each.asked for each in timelines)
    memory = f"{row.num_servers} × {row.memory}" if row.num_servers > 1 else str(row.memory)
    rate, wait = (
        sum(each.num_output for each in timelines) / seconds,
        statistics.median(each.ttft for each in timelines),
    )
    return (
        row.name,
        memory,
        row.threads,
        row.num_drafts or "–",
        accepted,
        f"{seconds:.1f}",
        f"{rate:.0f}",
        f"{wait:.2f}",
    )


def _accepted(server: Server) -> float:
    """Of the drafted tokens."""
    text = httpx.get(f"{server.url}/metrics").text
    values = {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
    drafted, accepted = (values[f"slipstream:spec_decode_num_{name}_tokens_total"] for name in ("draft", "accepted"))
    return accepted / max(1.0, drafted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rows", default=",".join(map(str, range(len(ROWS)))), help="Which, counted from 0.")
    arguments = parser.parse_args()
    samples, rows = random_words(random.Random(2), arguments.requests, INPUT, OUTPUT), []
    for index in map(int, arguments.rows.split(",")):
        rows.append(measure(ROWS[index], samples))
        print(*rows[-1], file=sys.stderr, flush=True)
    columns = ["the seed's row", "KV cache, tokens", "client threads", "drafts", "of them accepted", "time, s",
               "tokens/s", "first token, s, median"]  # fmt: skip
    threads = os.environ.get("OMP_NUM_THREADS", "2")
    facts = facts_here([]) | {"command": f"OMP_NUM_THREADS={threads} PYTHONPATH=. python {' '.join(sys.argv)}"}
    title = f"{arguments.requests} texts of {INPUT} words, {OUTPUT} tokens each answer"
    print(to_markdown(Report("Seed 002's table", facts, [Table(title, columns, rows)], [])))


if __name__ == "__main__":
    main()
