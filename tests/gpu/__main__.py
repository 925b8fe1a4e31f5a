"""Runs tests/gpu in several processes that share the GPUs, and prints a summary: python -m tests.gpu [--processes 8]

Nothing is installed: the Python that runs it has what the tests need. What pytest understands may follow (-k, a file).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
ALONE = ("test_start.py", "test_ranks.py")  # the one measures the GPU's memory and fills it, the other takes all GPUs
LONGEST_TEXT = 4_000  # characters of one failure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which what still runs is stopped")
    parser.add_argument("--test_limit", type=float, default=300, help="seconds of one test, which end its process")
    arguments, of_pytest = parser.parse_known_args()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: interpreted"
    start = time.perf_counter()
    tests = collect(of_pytest)
    num_gpus = max(1, torch.cuda.device_count())
    print(f"{num_gpus} x {where}; torch {torch.__version__}; {len(tests)} tests", flush=True)
    alone = [test for test in tests if any(name in test for name in ALONE)]
    shared = [test for test in tests if test not in alone]
    with tempfile.TemporaryDirectory() as folder:
        parts = [shared[first :: arguments.processes] for first in range(arguments.processes)]
        on_one = [(part, {"CUDA_VISIBLE_DEVICES": str(index % num_gpus)}) for index, part in enumerate(parts)]
        runs: list[Run] = []
        for round_ in (on_one, [(alone, {})]):
            here = [
                Run(tests_of_it, Path(folder) / str(len(runs) + index), environment, arguments.test_limit)
                for index, (tests_of_it, environment) in enumerate(round_)
                if tests_of_it
            ]
            wait_for(here, start + arguments.limit)
            runs += here
        return summarize(tests, runs, time.perf_counter() - start)


def collect(of_pytest: list[str]) -> list[str]:
    """Names of tests, one a line with pyproject.toml's -q."""
    command = [sys.executable, "-m", "pytest", "--collect-only", *of_pytest]
    if not any(Path(each.partition("::")[0]).exists() for each in of_pytest):
        command.append(str(FOLDER))
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    tests = [line for line in found.stdout.splitlines() if "::" in line]
    if found.returncode or not tests:
        sys.exit(found.stdout + found.stderr)
    return tests


class Run:
    """One process, and what it found."""

    def __init__(self, tests: list[str], path: Path, environment: dict[str, str], test_limit: float) -> None:
        self._record, self._log = path.with_suffix(".jsonl"), path.with_suffix(".log")
        arguments = path.with_suffix(".txt")
        arguments.write_text("\n".join(tests))
        of_plugin = {"TESTS_RECORD": str(self._record), "TESTS_SECONDS": str(test_limit)}
        command = [sys.executable, "-m", "pytest", "-p", "tests.gpu.recorder", "--capture=sys", f"@{arguments}"]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment | of_plugin
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._record.read_text().splitlines()] if self._record.exists() else []


def wait_for(runs: list[Run], end: float) -> None:
    """Until they are done; what still runs at the end is killed, all of it before any is waited for."""
    while time.perf_counter() < end and any(run.process.poll() is None for run in runs):
        time.sleep(0.1)
    for run in runs:
        run.process.kill()
    for run in runs:
        run.process.wait()


def summarize(tests: list[str], runs: list[Run], seconds: float) -> int:
    """-> the exit code."""
    last = {test: {"test": test, "outcome": "not run"} for test in tests}
    for run in runs:
        last |= {each["test"]: each for each in run.records()}
        if not run.records() or run.records()[-1]["outcome"] == "running":
            print(run.log[-LONGEST_TEXT:])
    cases = list(last.values())
    for case in cases:
        if case["outcome"] == "failed":
            print(f"failed: {case['test']}\n{case['text'][-LONGEST_TEXT:]}\n")
    slowest = sorted(cases, key=lambda case: -case.get("seconds", 0))[:15]
    print("slowest:", *(f"{case.get('seconds', 0):7.1f} s  {case['test']}" for case in slowest), sep="\n  ")
    for outcome in ("running", "failed"):
        print(*(f"{outcome}: {case['test']}" for case in cases if case["outcome"] == outcome), sep="\n")
    counts = Counter(case["outcome"] for case in cases)
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())), f"in {seconds:.0f} s")
    return int(any(counts[kind] for kind in ("failed", "running", "not run")))


if __name__ == "__main__":
    sys.exit(main())
