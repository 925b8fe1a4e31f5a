"""What the engine's process tells its operator: a line a step, where a step hangs, and traces of torch.profiler."""

import faulthandler
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from slipstream.errors import RequestError, UsageError
from slipstream.schema.request import EngineStats, RequestState

LOG_BYTES = 64 << 20  # then the log goes on in a new file; one old one is kept
GRACE_SECONDS = 5.0  # in which the watchdog's own thread should have had Python's lock


class StepLog:
    """JSON lines, one a step, each a few microseconds."""

    def __init__(self, path: str) -> None:
        """Raises UsageError where it cannot be written."""
        self._path = Path(path)
        try:
            self._file: IO[str] | None = self._open()
        except OSError as error:
            raise UsageError(
                f"--iteration_log is {path}, which cannot be written ({error.strerror}); give a file in your folder."
            ) from None

    def note(self, stats: EngineStats, num_tokens: int, seconds: float) -> None:
        if self._file is None:
            return
        line = (
            f'{{"time": {time.time():.6f}, "step": {stats.num_steps}, "seconds": {seconds:.6f}, '
            f'"tokens": {num_tokens}, "running": {stats.num_running}, "waiting": {stats.num_waiting}, '
            f'"free_blocks": {stats.num_blocks_total - stats.num_blocks_used}}}\n'
        )
        try:
            self._file.write(line)
            self._num_bytes += len(line)
            if self._num_bytes > LOG_BYTES:
                self._file.close()
                self._path.replace(f"{self._path}.1")
                self._file = self._open()
        except OSError as error:  # a full disk is no reason to stop
            self._file = None
            print(f"warning: {self._path} goes on no more: {error.strerror}.", file=sys.stderr, flush=True)

    def _open(self) -> IO[str]:
        file = self._path.open("a", encoding="utf-8", buffering=1)
        self._num_bytes = file.tell()
        return file


class Watchdog:
    """Says on stderr which requests are in the engine, and what its threads do, once for each step that hangs."""

    def __init__(self, requests: Callable[[], list[RequestState]], step_timeout: float) -> None:
        self._requests, self._step_timeout = requests, step_timeout
        self._has_barked = False

    def look(self, seconds_stuck: float) -> None:
        """Call it every now and then. Where nobody can, because Python's lock is held, C code dumps the threads."""
        faulthandler.dump_traceback_later(self._step_timeout + GRACE_SECONDS)
        if seconds_stuck < self._step_timeout:
            self._has_barked = False
        elif not self._has_barked:
            self._has_barked = True
            self._bark(seconds_stuck)

    def _bark(self, seconds_stuck: float) -> None:
        lines = [f"warning: no step has ended for {seconds_stuck:.1f} seconds. In the engine are:"]
        lines += [f"  {each.describe()}" for each in self._requests()]
        print(*lines, "Its threads are at:", sep="\n", file=sys.stderr, flush=True)
        faulthandler.dump_traceback()


class Profiler:
    """torch.profiler of the thread that calls this, which is to be the engine's."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._profile: Any = None
        self._path = ""

    def start(self) -> str:
        """Returns where the trace will be. Raises RequestError where one is being taken."""
        if self._profile is not None:
            raise RequestError("A profile is being taken already; stop it with /stop_profile.")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = str(self._folder / f"slipstream-{os.getpid()}-{time.strftime('%Y%m%d-%H%M%S')}.json.gz")
        self._profile = torch.profiler.profile()
        self._profile.start()
        return self._path

    def stop(self) -> str:
        """Writes the trace and returns its path; steps wait for that. Raises RequestError where none is being taken."""
        if self._profile is None:
            raise RequestError("No profile is being taken; start one with /start_profile.")
        profile, self._profile = self._profile, None
        profile.stop()
        profile.export_chrome_trace(self._path)
        return self._path
