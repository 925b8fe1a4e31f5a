"""Where the seconds before the first token went: what `slipstream run --verbose` prints."""

import os
import sys
import time
from pathlib import Path

from slipstream.progress import Stopwatch


class StartupClock(Stopwatch):
    """Stages of a start, from the moment the process was made."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds["start Python, read the command line"] = process_age()

    def add(self, seconds: dict[str, float]) -> None:
        """Stages that somebody else measured, and that end now."""
        self.seconds |= seconds
        self._last = time.perf_counter()

    def report(self) -> None:
        """To stderr, so that stdout holds answers only."""
        total = sum(self.seconds.values())
        lines = [f"{seconds:8.3f} s  {stage}" for stage, seconds in self.seconds.items()]
        beyond = total - self.seconds.get("import torch", 0.0)
        lines.append(f"{total:8.3f} s  in all, {beyond:.3f} s beyond import torch")
        print(*lines, sep="\n", file=sys.stderr)


def process_age() -> float:
    """Seconds since the kernel made this process; where it does not say, the CPU time spent, which is close."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), in ticks since boot
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started, time.process_time())
    except (OSError, AttributeError, ValueError, IndexError):
        return time.process_time()
