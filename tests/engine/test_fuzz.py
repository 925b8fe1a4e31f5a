"""The fuzzer itself, for seconds: nothing found in the engine as it is, and whatever is made to go wrong is found."""

import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from slipstream.engine import folder
from tests.engine import fuzz

NAMES = ("llama", "gptq", "mixtral")


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return fuzz.make_engines(tmp_path_factory.mktemp("engines"), NAMES)


def test_mutants_are_refused_or_run(engines: list[Path], tmp_path: Path) -> None:
    report = fuzz.fuzz(tmp_path, engines, seed=7, mutants=250)
    assert report.findings == []
    ends = sum(report.counts.values(), Counter[str]())
    assert ends["refused"] > 150 and ends["ran"] > 15 and ends["step failed"] == 0
    assert len(report.reasons["refused"]) > 30  # by many checks, not by one


def check_nothing() -> None:
    """The opener as it would be if it believed every file."""
    for name in ("_check", "check_program", "check_orders"):
        setattr(folder, name, lambda *_: None)


def test_an_opener_without_checks_is_found_out(engines: list[Path], tmp_path: Path) -> None:
    report = fuzz.fuzz(tmp_path, engines[:1], seed=7, mutants=100, prepare=check_nothing)
    assert {outcome.end for _, outcome in report.findings} >= {"exception"}
    assert report.counts["graph, made to agree"]["step failed"] > 0


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def take_memory() -> None:
    bytearray(2 * fuzz.MEMORY)


WRONG = {"forbidden": partial(os.system, ""), "memory": take_memory, "crash": crash, "hang": partial(time.sleep, 600)}


def misbehave() -> None:
    """A mutant goes wrong in the way of its number."""
    try_mutant, open_and_run = fuzz.try_mutant, fuzz.open_and_run

    def do(engines: Sequence[Path], scratch: Path, seed: int, number: int) -> fuzz.Outcome:
        fuzz.open_and_run = lambda *arguments: [*WRONG.values()][number]() or open_and_run(*arguments)
        return try_mutant(engines, scratch, seed, number)

    fuzz.try_mutant = do


def test_what_goes_wrong_is_found(engines: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 5)
    report = fuzz.fuzz(tmp_path, engines[:1], seed=0, mutants=len(WRONG), prepare=misbehave)
    assert [outcome.end for _, outcome in report.findings] == [*WRONG]
