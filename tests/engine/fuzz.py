"""Open and run engines that someone changed; report what crashes, hangs, takes memory, or runs what is no op.

    python -m tests.engine.fuzz --minutes 10 --seed 1
    python -m tests.engine.fuzz --seed 1 --only 4711          one mutant again, with its traceback

Each mutant (tests/engine/mutants.py) is opened by LLM, as a user would, and where it opens it generates two tokens for
two prompts: a prefill and a decode. That happens in a child process with bounded memory and time, which is restarted
when it dies. A mutant may be refused, or run, or end its requests with an error; anything else is a finding.
"""

import argparse
import itertools
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from slipstream import LLM, SamplingParams
from slipstream.build import timing
from slipstream.checkpoint.random import write_random_model
from slipstream.engine.check import ONLY_AT_BUILD
from slipstream.errors import SlipstreamError
from slipstream.models import deepseek_v3, gemma2, gpt2, llama, mixtral
from slipstream.runtime.worker import worker
from tests.checkpoint.naive_formats import FORMATS
from tests.checkpoint.test_formats import build_engine, write_quantized
from tests.engine.mutants import write_mutant
from tests.engine.support import assert_calls_only_ops

SECONDS = 20  # a mutant's; they take milliseconds
MEMORY = 1 << 30  # bytes more than an unchanged engine takes
PROMPTS = [[index % 50 for index in range(20)], [3, 1, 2]]
PARAMS = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
FINE = ("refused", "step failed", "ran")
WINDOWS = {"max_attention_window_size": [8, 200]}
SINKS = {"max_attention_window_size": 16, "sink_token_length": 4}
# What an engine has no reason to cause, by the names of Python's audit events.
FORBIDDEN = (
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "socket.connect", "socket.bind",
    "pickle.find_class",
)  # fmt: skip


class Outcome(NamedTuple):
    kind: str  # of change
    end: str  # one of FINE, or what is wrong
    why: str


@dataclass
class Report:
    seconds: float = 0.0
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # kind of change → end
    reasons: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # end → reason
    findings: list[tuple[int, Outcome]] = field(default_factory=list)

    def add(self, number: int, outcome: Outcome) -> None:
        self.counts[outcome.kind][outcome.end] += 1
        self.reasons[outcome.end][_without_details(outcome.why)] += 1
        if outcome.end not in FINE:
            self.findings.append((number, outcome))

    def text(self) -> str:
        """Tables in Markdown."""
        total = sum(self.counts.values(), Counter())
        ends = [*FINE, *sorted(set(total) - set(FINE))]
        lines = [f"{total.total()} mutants in {self.seconds:.0f} s, {total.total() / self.seconds:.0f} a second.", ""]
        lines += [f"| what was changed | mutants | {' | '.join(ends)} |", f"| --- |{' ---: |' * (len(ends) + 1)}"]
        for kind, counts in [*sorted(self.counts.items()), ("all", total)]:
            lines.append(f"| {kind} | {counts.total()} | {' | '.join(str(counts[end]) for end in ends)} |")
        for end in (each for each in ends[:2] if self.reasons[each]):
            lines += ["", f"| {end}, because | mutants |", "| --- | ---: |"]
            lines += [f"| {reason} | {count} |" for reason, count in self.reasons[end].most_common(40)]
        return "\n".join(lines)


def _without_details(why: str) -> str:
    """The sentence less its names and numbers, so that equal reasons count together."""
    why = re.sub(r"(/\S*|\S*/)*(config\.json|rank0\.engine|engine)\b:?", "FILE", why.replace("|", "/"), count=1)
    why = re.sub(r"'[^']*'|\"[^\"]*\"|\[[^\]]*\]|\([^)]*\)", "…", why)
    return " ".join(re.sub(r"\b\d+\b", "N", why).split()[:9])[:90]


# ----- the child


# Attention of all kinds, experts dense and packed, windows, soft caps, learned positions, and formats of linears.
MODELS: dict[str, tuple[dict[str, Any], str | None]] = {
    "llama": (llama.TINY, None),
    "deepseek_v3": (deepseek_v3.TINY, None),
    "gemma2": (gemma2.TINY, None),
    "gpt2": (gpt2.TINY, None),
    "gptq": (llama.TINY, "gptq-4-act-order"),
    "w8a8": (llama.TINY, "ct-int-w8a8"),
    "mixtral": (mixtral.TINY, "gptq-4-sym"),
}


def make_engines(folder: Path, names: Iterable[str] = tuple(MODELS)) -> list[Path]:
    """Of two layers each, so that windows can differ."""
    quicken_tuning()
    engines = []
    for name in names:
        tiny, format = MODELS[name]
        options = tiny | {"n_layer" if "n_layer" in tiny else "num_hidden_layers": 2}
        model = folder / "models" / name
        if format is None:
            write_random_model(model, options)
        else:
            write_quantized(model, options, FORMATS[format])
        engines.append(build_engine(model, folder / name))
    return engines


def open_and_run(engine: Path, options: dict[str, Any]) -> tuple[str, str]:
    """How it ended, and why."""
    try:
        with LLM(engine, device="cpu", kv_cache_max_tokens=128, show_progress=False, **options) as llm:
            outputs = llm.generate(PROMPTS, PARAMS)
    except SlipstreamError as error:
        str(error).encode()  # it is printed
        return "refused", str(error)
    errors = [output.error for output in outputs if output.error is not None]
    wrong = next((error for error in errors if "the step failed" in error), None)
    if wrong is None:
        return "ran", errors[0] if errors else ""
    return ("memory" if "allocate" in wrong else "step failed"), wrong.partition("the step failed: ")[2]


def try_mutant(engines: Sequence[Path], scratch: Path, seed: int, number: int) -> Outcome:
    rng = random.Random(f"{seed} {number}")
    folder = scratch / "engine"
    shutil.rmtree(folder, ignore_errors=True)
    kind = write_mutant(rng.choice(engines), folder, rng)
    options = rng.choice([{}, {}, {}, {}, WINDOWS, SINKS])
    _forbidden.clear()
    try:
        outcome = Outcome(kind, *open_and_run(folder, options))
    except BaseException as error:
        end = "memory" if isinstance(error, MemoryError) or "allocate" in str(error) else "exception"
        outcome = Outcome(kind, end, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    return Outcome(kind, "forbidden", _forbidden[0]) if _forbidden else outcome


_forbidden: list[str] = []  # what the mutant at hand did


def watch() -> None:
    """Note what no engine may do. Raising would not do: a step's exceptions end its requests only."""

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            _forbidden.append(f"{event}{arguments}")

    def compile_checked(graph: Any, *rest: Any, **options: Any) -> Any:
        compiled = compile_graph(graph, *rest, **options)
        try:
            assert not {node.op for node in graph.nodes} & ONLY_AT_BUILD
            assert_calls_only_ops(compiled.run)
        except AssertionError:
            _forbidden.append(f"an op outside the allowed set: {traceback.format_exc()}")
        return compiled

    compile_graph = worker.compile_graph
    worker.compile_graph = compile_checked  # type: ignore[assignment]
    sys.addaudithook(note)


def quicken_tuning() -> None:
    """Which kernel wins does not matter here, and a damaged model.cache is measured anew."""
    timing._ROUND_SECONDS, timing._COLD_BYTES, timing._ROUNDS = 1e-5, 1, 1


def serve(
    connection: Connection, engines: Sequence[Path], scratch: Path, seed: int, prepare: Callable[[], None]
) -> None:
    """The child: numbers in, outcomes out."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    quicken_tuning()
    prepare()
    watch()
    for engine in engines:
        end, why = open_and_run(engine, {})
        assert end == "ran" and not _forbidden, f"{engine} unchanged: {end} {why} {_forbidden}"
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection.send("ready")
    while True:
        connection.send(try_mutant(engines, scratch, seed, connection.recv()))


# ----- the parent


def nothing() -> None:
    """Prepare nothing: the engine's own checks are what is tested."""


class Child:
    """A process that tries mutants, started again when one was too much for it."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments
        self._process: SpawnProcess | None = None

    def _start(self) -> SpawnProcess:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, *self._arguments), daemon=True)
        process.start()
        theirs.close()
        assert self._connection.poll(120) and self._connection.recv() == "ready"
        return process

    def try_mutant(self, number: int) -> Outcome:
        self._process = self._process or self._start()
        self._connection.send(number)
        try:
            if self._connection.poll(SECONDS):
                return self._connection.recv()
            end, why = "hang", f"no end after {SECONDS} s"
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode or 0
            end, why = "crash", signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self.close()
        return Outcome("?", end, why)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._process = None


def fuzz(
    folder: Path, engines: Sequence[Path], *, seed: int, seconds: float = float("inf"), mutants: int | None = None,
    prepare: Callable[[], None] = nothing,
) -> Report:  # fmt: skip
    """Try mutants 0, 1, 2, … of a seed until the time, or their number, is over."""
    report = Report()
    child = Child(engines, folder, seed, prepare)
    start = time.monotonic()
    try:
        for number in itertools.count() if mutants is None else range(mutants):
            report.add(number, child.try_mutant(number))
            report.seconds = time.monotonic() - start
            if report.seconds >= seconds:
                break
    finally:
        child.close()
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one mutant, tried in this process")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        engines = make_engines(folder)
        if arguments.only is not None:
            watch()
            print(*try_mutant(engines, folder, arguments.seed, arguments.only), sep="\n")
            return 0
        report = fuzz(folder, engines, seed=arguments.seed, seconds=60 * arguments.minutes)
    print(report.text())
    for number, outcome in report.findings:
        print(f"\n--seed {arguments.seed} --only {number}: {outcome.end} ({outcome.kind}): {outcome.why}")
    return 1 if report.findings else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
