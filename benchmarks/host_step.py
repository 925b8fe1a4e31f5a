"""What a step costs the host: planning it, writing its tensors, and taking in its result. No GPU is needed.

    python benchmarks/host_step.py [--requests 1,16,64,256,1024] [--contexts 128,4096] [--steps 200]

The real scheduler, KV blocks and step tensors; the tokens come from nowhere at once. Each step is planned while the one
before it is in flight, as on a GPU. The numbers are medians over steps in which every request decodes one token.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from slipstream.runtime.scheduler import Scheduler
from slipstream.runtime.worker.inputs import fill_inputs, rows_wanted, sizes_of
from slipstream.runtime.worker.tables import BlockTables
from slipstream.schema.build import RuntimeConfig
from slipstream.schema.request import GenerateRequest
from slipstream.schema.sampling import SamplingParams
from slipstream.schema.step import SequenceResult, StepPlan, StepResult

PARTS = ("plan", "inputs", "commit")
TOKENS_PER_BLOCK = 16


class Stopwatch:
    def __init__(self) -> None:
        self.microseconds: dict[str, list[float]] = {part: [] for part in PARTS}

    def time(self, part: str, call: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter_ns()
        result = call(*arguments)
        self.microseconds[part].append((time.perf_counter_ns() - start) / 1e3)
        return result

    def medians(self, last: int) -> list[float]:
        return [statistics.median(self.microseconds[part][-last:]) for part in PARTS]


class Host:
    """A scheduler whose steps are computed by nobody."""

    def __init__(self, num_requests: int, context: int, num_steps: int) -> None:
        blocks_each = -(-(context + num_steps) // TOKENS_PER_BLOCK) + 1
        self._scheduler = Scheduler(
            RuntimeConfig(
                num_blocks=num_requests * blocks_each + 1,
                tokens_per_block=TOKENS_PER_BLOCK,
                max_batch_size=num_requests,
                max_num_tokens=num_requests * context,
                max_seq_len=context + num_steps,
            )
        )
        self._tables = BlockTables(1, num_requests, TOKENS_PER_BLOCK)
        self._numbers = torch.empty(0, dtype=torch.int64)
        self.watch = Stopwatch()
        for index in range(num_requests):
            # Prompts that differ from their first token on: each has blocks of its own.
            prompt = tuple(range(index * context, (index + 1) * context))
            self._scheduler.add(GenerateRequest(str(index), prompt, SamplingParams(), seed=0, max_tokens=num_steps))

    def run(self, num_steps: int) -> None:
        before = self._launched(self._scheduler.plan)
        for _ in range(num_steps - 1):
            ahead = self._launched(self._scheduler.plan_ahead)
            self._commit(before)
            before = ahead
        self._commit(before)

    def _launched(self, plan_next: Callable[[], StepPlan | None]) -> StepPlan:
        plan = self.watch.time("plan", plan_next)
        self.watch.time("inputs", self._write_inputs, plan)
        return plan

    def _write_inputs(self, plan: StepPlan) -> None:
        self._tables.update(plan)
        counts = rows_wanted(plan, [False] * len(plan.sequences))
        sizes = sizes_of(plan, counts, self._tables)
        if len(self._numbers) < sizes.num_numbers:
            self._numbers = torch.empty(sizes.num_numbers, dtype=torch.int64)
        is_chosen = [sequence.sample for sequence in plan.sequences]
        fill_inputs(plan, counts, is_chosen, self._tables, sizes, self._numbers[: sizes.num_numbers])

    def _commit(self, plan: StepPlan) -> None:
        result = StepResult(tuple(SequenceResult((7,)) for _ in plan.sequences))
        self.watch.time("commit", self._scheduler.commit, plan, result)


def rows(requests: list[int], contexts: list[int], num_steps: int) -> Iterator[str]:
    yield f"| requests | tokens each | {' | '.join(f'{part} µs' for part in PARTS)} | together µs | µs a request |"
    yield f"|{' --- |' * (len(PARTS) + 4)}"
    for context in contexts:
        for num_requests in requests:
            host = Host(num_requests, context, num_steps)
            gc.collect()
            host.run(num_steps)
            medians = host.watch.medians(last=num_steps - 2)
            total = sum(medians)
            shown = [f"{value:,.0f}" for value in (*medians, total)]
            yield f"| {num_requests:,} | {context:,} | {' | '.join(shown)} | {total / num_requests:.1f} |"


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=numbers, default=[1, 16, 64, 256, 1024])
    parser.add_argument("--contexts", type=numbers, default=[128, 4096])
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for row in rows(arguments.requests, arguments.contexts, arguments.steps):
        print(row, flush=True)


if __name__ == "__main__":
    main()
