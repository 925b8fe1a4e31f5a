"""A plugin of pytest: each test's beginning and end as a line of JSON in the file that TESTS_RECORD names, at once.

A test that takes longer than TESTS_SECONDS ends its process, with a traceback of all threads in its log.
"""

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest


def pytest_runtest_logstart(nodeid: str) -> None:
    faulthandler.dump_traceback_later(float(os.environ["TESTS_SECONDS"]), file=sys.__stderr__, exit=True)
    _write(test=nodeid, outcome="running")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _write(test=report.nodeid, outcome=report.outcome, seconds=report.duration, text=report.longreprtext)


def pytest_runtest_logfinish() -> None:
    faulthandler.cancel_dump_traceback_later()


def _write(**values: Any) -> None:
    with Path(os.environ["TESTS_RECORD"]).open("a") as file:
        file.write(json.dumps(values) + "\n")
