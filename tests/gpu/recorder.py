"""A plugin of pytest: each test's beginning and end as a line of JSON in the file that TESTS_RECORD names, at once.

A test that takes longer than TESTS_SECONDS ends its process, with a traceback of all threads. Each of pytest-xdist's
processes sees one of TESTS_GPUS GPUs.
"""

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER is not None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(int(WORKER.removeprefix("gw")) % int(os.environ["TESTS_GPUS"]))


def pytest_runtest_logstart(nodeid: str) -> None:
    _write(test=nodeid, outcome="running")


def pytest_runtest_setup() -> None:
    faulthandler.dump_traceback_later(float(os.environ["TESTS_SECONDS"]), file=sys.__stderr__, exit=True)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _write(test=report.nodeid, outcome=report.outcome, seconds=report.duration, text=report.longreprtext)


def pytest_runtest_teardown() -> None:
    faulthandler.cancel_dump_traceback_later()


def _write(**values: Any) -> None:
    """By one process: pytest-xdist's tell the first all that they do."""
    if WORKER is not None:
        return
    with Path(os.environ["TESTS_RECORD"]).open("a") as file:
        file.write(json.dumps(values) + "\n")
