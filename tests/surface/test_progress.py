"""The stopwatch of builds and starts: its stages add up to the time that passed."""

import pytest

from slipstream import progress
from slipstream.progress import Stopwatch


def test_stages_follow_each_other_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 12.5])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    watch = Stopwatch()
    watch.lap("first")
    watch.lap("second")
    assert watch.seconds == {"first": 0.5, "second": 2.0}
