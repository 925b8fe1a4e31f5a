"""What slipstream simulate foretells of three loads that its costs were not fitted to, beside what the engine takes.

    OMP_NUM_THREADS=2 PYTHONPATH=. python benchmarks/simulate_cpu.py [--rounds 2] [--steps steps.jsonl]

One process, so that steps and loads are timed on the same machine in the same minutes: a round of loads, the steps as
slipstream bench steps times them, and the other rounds. Prints an entry for benchmarks/. --steps writes every step of
every load beside what the costs say of it.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from uuid import uuid4

from slipstream import LLM
from slipstream.bench.calibrate import Calibration, calibrate
from slipstream.bench.costs import Work
from slipstream.bench.dataset import Sample, random_tokens, shared_prefixes, uniform_lengths
from slipstream.bench.load import Load
from slipstream.bench.offline import ask, make_requests
from slipstream.bench.report import Report, Table, facts_here, to_markdown
from slipstream.bench.simulate import Simulation
from slipstream.bench.timeline import Run

VOCABULARY = range(300, 40_000)  # of SmolLM2, tokens that stand for text
DISTURBED = 0.05  # of the machine that others had: such a run is shown, but not counted, and taken once more


@dataclass
class Case:
    name: str
    samples: Sequence[Sample]
    load: Load
    runs: list[Run] = field(default_factory=list)
    others: list[float] = field(default_factory=list)  # share of the machine that others took in each run
    seconds: list[list[float]] = field(default_factory=list)  # of each step, in each run


def cases() -> list[Case]:
    draw = random.Random(7)

    def prompts(inputs: list[int], outputs: list[int]) -> list[Sample]:
        return random_tokens(draw, VOCABULARY, inputs, outputs)

    mixed = prompts(uniform_lengths(draw, 32, 32, 400), uniform_lengths(draw, 32, 16, 96))
    shared = shared_prefixes(draw, VOCABULARY, 3, 256, prompts([40] * 32, [48] * 32))
    return [
        Case("96 of 24 → 40", prompts([24] * 96, [40] * 96), Load()),
        Case("32 of 32–400 → 16–96", mixed, Load(concurrency=8)),
        Case("32 of 3 × 256 shared + 40 → 48", shared, Load(concurrency=4)),
    ]


def measure(llm: LLM, case: Case) -> None:
    salt, ends, before = str(uuid4()), [time.perf_counter()], llm.loop.on_step
    requests = [replace(each, cache_salt=salt) for each in make_requests(llm, case.samples)]  # of this run's prefixes
    num_tokens = 0

    def on_step(stats: object, seconds: float) -> None:
        nonlocal num_tokens
        tokens = llm.stats.prompt_tokens_computed + llm.stats.generated_tokens
        if tokens > num_tokens:
            ends.append(time.perf_counter())
        else:  # only requests came
            ends[-1] = time.perf_counter()
        num_tokens = tokens

    num_tokens = llm.stats.prompt_tokens_computed + llm.stats.generated_tokens
    llm.loop.on_step = on_step
    with others_share() as share:
        case.runs.append(ask(llm, requests, case.load))
    llm.loop.on_step = before
    case.others.append(share[0])
    case.seconds.append([end - start for start, end in pairwise(ends)])


@contextmanager
def others_share() -> Iterator[list[float]]:
    """Of the machine's processor time, what was taken by other processes and by neighbours of a virtual machine."""
    share, before, start = list[float](), _busy() - time.process_time(), time.perf_counter()
    yield share
    seconds = (time.perf_counter() - start) * (os.cpu_count() or 1)
    share.append((_busy() - time.process_time() - before) / seconds)


def _busy() -> float:
    """Seconds that all processors have worked, or would have if they could."""
    user, nice, system, _, _, irq, soft_irq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")


def table(found: Sequence[Case], llm: LLM, fitted: Calibration, planned: dict[str, list[Work]]) -> Table:
    rows = []
    for case in found:
        prompts = [(tuple(map(int, each.prompt)), each.output_tokens) for each in case.samples]
        outcome = Simulation(llm.runtime_config, fitted.costs, prompts, case.load).run()
        planned[case.name] = outcome.steps
        runs = [run for run, share in zip(case.runs, case.others, strict=True) if share <= DISTURBED] or case.runs
        rates, waits = [run.output_rate for run in runs], [run.ttft.percentiles[50] * 1e3 for run in runs]
        rate, wait = outcome.run.output_rate, outcome.run.ttft.percentiles[50] * 1e3
        rows.append(
            (f"{case.name}, {case.load}", _list(rates), f"{rate:.1f}", f"{rate / mean(rates) - 1:+.1%}", _list(waits),
             f"{wait:.1f}", f"{wait / mean(waits) - 1:+.1%}", ", ".join(f"{share:.0%}" for share in case.others))
        )  # fmt: skip
    columns = ["load", "tokens/s of each counted run", "simulated", "off by", "TTFT p50 of each, ms", "simulated",
               "off by", "of the machine others had, all runs"]  # fmt: skip
    return Table("Measured and simulated", columns, rows)


def steps_table(found: Sequence[Case], fitted: Calibration, planned: dict[str, list[Work]]) -> Table:
    """The same steps, those of next tokens alone and those with chunks of prompts."""
    rows = []
    for case in found:
        for kind, has_chunks in (("next tokens", False), ("with chunks", True)):
            pairs = [
                (work, seconds)
                for run, share in zip(case.seconds, case.others, strict=True)
                if share <= DISTURBED and len(run) == len(planned[case.name])
                for work, seconds in zip(planned[case.name], run, strict=True)
                if (work.tokens > work.sequences) is has_chunks
            ]  # fmt: skip
            real, said = sum(real for _, real in pairs), sum(fitted.costs.seconds(work) for work, _ in pairs)
            if pairs:
                rows.append((case.name, kind, len(pairs), f"{real:.2f}", f"{said:.2f}", f"{said / real - 1:+.1%}"))
    return Table("Their steps", ["load", "steps", "number", "measured, s", "by the costs, s", "off by"], rows)


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=Path)
    arguments = parser.parse_args()
    found, planned = cases(), dict[str, list[Work]]()
    with LLM("smollm2") as llm:
        fitted = None
        for _ in range(arguments.rounds):
            for case in found:
                measure(llm, case)
                print(case.name, f"{case.runs[-1].output_rate:.1f} tokens/s", f"{case.others[-1]:.0%}", file=sys.stderr)
                if case.others[-1] > DISTURBED:
                    measure(llm, case)
            if fitted is None:
                with others_share() as share:
                    fitted = calibrate(llm, runs_ahead=False)
                rounds = _list(fitted.round_seconds)
                print(f"rounds of {rounds} s, others {share[0]:.0%}", file=sys.stderr)
        assert fitted is not None
        tables = [table(found, llm, fitted, planned), steps_table(found, fitted, planned)]
    facts = facts_here([]) | {
        "command": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '')} PYTHONPATH=. python {' '.join(sys.argv)}",
        "steps": f"{fitted.num_steps}, measured in rounds of {rounds} s, in which others had {share[0]:.0%} of the "
                 f"machine; the costs miss one by {fitted.median_error:.0%} (median), all of them by "
                 f"{fitted.total_error:+.1%}",
    }  # fmt: skip
    print(to_markdown(Report("Three loads, measured and simulated", facts, tables, [])))
    if arguments.steps is not None:
        with arguments.steps.open("w") as file:
            for case in found:
                for run in case.seconds:
                    for work, seconds in zip(planned[case.name], run, strict=False):
                        line = work._asdict() | {"seconds": seconds, "by_the_costs": fitted.costs.seconds(work)}
                        file.write(json.dumps({"load": case.name} | line) + "\n")


if __name__ == "__main__":
    main()
