"""benchmarks/host_step.py drives scheduler and inputs by hand: that it still can."""

from benchmarks.host_step import rows


def test_the_host_step_benchmark_runs():
    _, _, one, three = rows(requests=[1, 3], contexts=[8], num_steps=4)
    assert one.startswith("| 1 | 8 |") and three.startswith("| 3 | 8 |")
