"""How far something long is, as a bar on stderr (none where that is no terminal), and where its time went."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[str, int, int], None]  # stage, done, total

STAGES = {
    "capture": "Capturing the model",
    "tune": "Measuring kernels",
    "write": "Writing the engine",
    "bench": "Timing the ops",
    "convert": "Writing the checkpoint",
    "search": "Measuring weights",
    "quantize": "Quantizing",
    "evaluate": "Comparing",
    "generate": "Generating",
    "answer": "Writing texts",
    "hidden": "Reading hidden states",
    "train": "Training",
}


class Stopwatch:
    """Seconds of the stages of something, one after the other without gaps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """The stage that ends now."""
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now


@contextmanager
def progress_bar(is_wanted: bool = True) -> Iterator[Progress]:
    """Yields what to call as (stage, done, total). The bar appears with the first call and goes at the end."""
    if not is_wanted or not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    bar = _Bar()
    try:
        yield bar
    finally:
        bar.close()


class _Bar:
    def __init__(self) -> None:
        self._progress: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._progress is None:
            self._open()
        description = STAGES.get(stage, stage)
        self._progress.update(self._task, description=description, completed=done, total=max(total, 1))

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _open(self) -> None:
        # Here, because most starts find everything built, and rich takes longer to import than they have.
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._progress.start()
        self._task = self._progress.add_task("", total=None)
