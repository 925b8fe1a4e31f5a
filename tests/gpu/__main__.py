"""Runs tests/gpu in several processes that share the GPU, and prints a summary: python -m tests.gpu [--processes 8]

Nothing is installed: the Python that runs it has what the tests need. What pytest understands may follow (-k, a file).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import torch

FOLDER = Path(__file__).parent
ALONE = "test_start.py"  # measures the GPU's memory, and fills it


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    arguments, of_pytest = parser.parse_known_args()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: interpreted"
    print(f"{where}; torch {torch.__version__}", flush=True)
    start = time.perf_counter()
    tests = collect(of_pytest)
    alone = [test for test in tests if ALONE in test]
    shared = [test for test in tests if ALONE not in test]
    with tempfile.TemporaryDirectory() as folder:
        parts = [shared[first :: arguments.processes] for first in range(arguments.processes)]
        runs = [Run(part, Path(folder) / str(index)) for index, part in enumerate(parts) if part]
        for run in runs:
            run.wait()
        if alone:
            runs.append(Run(alone, Path(folder) / "alone"))
            runs[-1].wait()
        return summarize(runs, time.perf_counter() - start)


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

    def __init__(self, tests: list[str], path: Path) -> None:
        self._arguments, self._report = path.with_suffix(".txt"), path.with_suffix(".xml")
        self._arguments.write_text("\n".join(tests))
        self._log = path.with_suffix(".log")
        command = [sys.executable, "-m", "pytest", f"--junitxml={self._report}", f"@{self._arguments}"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def wait(self) -> None:
        self._process.wait()

    @property
    def has_failed(self) -> bool:
        return self._process.returncode != 0

    @property
    def log(self) -> str:
        return self._log.read_text()

    def cases(self) -> list[tuple[float, str, str]]:
        """(seconds, passed or what else, name) of each test; none where the process died."""
        if not self._report.exists():
            return []
        found = []
        for case in ElementTree.parse(self._report).iter("testcase"):
            kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
            found.append((float(case.get("time", 0)), kinds[0] if kinds else "passed", name))
        return found


def summarize(runs: list[Run], seconds: float) -> int:
    """-> the exit code."""
    cases = [case for run in runs for case in run.cases()]
    for run in runs:
        if run.has_failed:
            print(run.log[-20_000:])
    print("slowest:", *(f"{each[0]:7.1f} s  {each[2]}" for each in sorted(cases)[:-11:-1]), sep="\n  ")
    for _, kind, name in cases:
        if kind in ("failure", "error"):
            print(f"{kind}: {name}")
    counts = Counter(kind for _, kind, _ in cases)
    print(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())), f"in {seconds:.0f} s")
    return int(any(run.has_failed for run in runs))


if __name__ == "__main__":
    sys.exit(main())
