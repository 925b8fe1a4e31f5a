"""The stopwatch of builds and starts: its stages add up to the time that passed."""

import time

import pytest

from slipstream.progress import Stopwatch


def test_stages_follow_each_other_without_gaps() -> None:
    begin = time.perf_counter()
    watch = Stopwatch()
    time.sleep(0.01)
    watch.lap("first")
    time.sleep(0.02)
    watch.lap("second")
    assert list(watch.seconds) == ["first", "second"] and watch.seconds["second"] > 0.02
    assert sum(watch.seconds.values()) == pytest.approx(time.perf_counter() - begin, abs=0.005)
