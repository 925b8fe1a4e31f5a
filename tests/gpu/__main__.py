"""Runs tests/gpu in several processes that share the GPUs, and prints a summary: python -m tests.gpu [--processes 8]

Nothing is installed: the Python that runs it has what the tests need. What pytest understands may follow (-k, a file).
"""

import argparse
import json
import os
import signal
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
    # An idle process takes half of what another one has left: neighbours share kernels, so that few compile twice.
    together = ["-n", str(arguments.processes), "--dist", "worksteal"]
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        environment = {"TESTS_RECORD": str(record), "TESTS_SECONDS": str(arguments.test_limit)}
        environment["TESTS_GPUS"] = str(num_gpus)
        for some, how in ((alone, ["-n", "0"]), ([test for test in tests if test not in alone], together)):
            names = Path(folder) / "names.txt"
            names.write_text("\n".join(some))
            if some:
                run([*how, f"@{names}"], environment, start + arguments.limit - time.perf_counter())
        return summarize(tests, record, time.perf_counter() - start)


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


def run(arguments: list[str], environment: dict[str, str], seconds: float) -> None:
    """pytest, whose processes are all killed when the seconds are over."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.gpu.recorder",
        "--tb=short",
        "--no-summary",
        "--capture=sys",
        *arguments,
    ]
    process = subprocess.Popen(command, env=os.environ | environment, start_new_session=True)
    try:
        process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def summarize(tests: list[str], record: Path, seconds: float) -> int:
    """-> the exit code."""
    last: dict[str, dict[str, Any]] = {test: {"test": test, "outcome": "not run"} for test in tests}
    for line in record.read_text().splitlines() if record.exists() else ():
        case = json.loads(line)
        last[case["test"]] = case
    cases = list(last.values())
    for case in cases:
        if case["outcome"] == "failed":
            print(f"failed: {case['test']}\n{case['text'][-LONGEST_TEXT:]}\n")
    slowest = sorted(cases, key=lambda case: -case.get("seconds", 0))[:15]
    print("slowest:", *(f"{case.get('seconds', 0):7.1f} s  {case['test']}" for case in slowest), sep="\n  ")
    files = Counter[str]()
    for case in cases:
        files[case["test"].partition("::")[0]] += case.get("seconds", 0)
    print("all processes:", *(f"{each:7.1f} s  {name}" for name, each in files.most_common()), sep="\n  ")
    for outcome in ("running", "failed"):
        print(*(f"{outcome}: {case['test']}" for case in cases if case["outcome"] == outcome), sep="\n")
    counts = Counter(case["outcome"] for case in cases)
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())), f"in {seconds:.0f} s")
    return int(any(counts[kind] for kind in ("failed", "running", "not run")))


if __name__ == "__main__":
    sys.exit(main())
