"""Sixty clients at once for a while, each of whom knows its answer; the long form is `python -m tests.serve.load`."""

import asyncio
from pathlib import Path

from tests.serve.conftest import serving
from tests.serve.load import LOAD_OPTIONS, Crowd, Processes, check_after, make_tasks, press

MEBIBYTES = 16.0  # in so short a time a process may still be warming up


def test_no_answer_is_lost_or_mixed_and_nothing_stays_behind(engine: Path) -> None:
    tasks = make_tasks(engine, 24)
    assert len(tasks) > 12
    with serving(engine, *LOAD_OPTIONS) as server:
        processes, crowd = Processes(server), Crowd(server, tasks, num_clients=60)
        asyncio.run(press(crowd, processes, seconds=15))
        check_after(server, crowd.tally)
        assert len(crowd.tally.whole) == 6 and crowd.tally.num_whole > 60  # of each protocol
        assert crowd.tally.left > 0 and crowd.tally.refused > 0
        assert max(processes.growth().values()) < MEBIBYTES
