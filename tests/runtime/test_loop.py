"""The engine's thread: whoever waits for a request hears how it ended, whatever happens to the engine."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest

from slipstream.errors import SlipstreamError
from slipstream.runtime.loop import EngineLoop
from slipstream.schema.request import EngineStats, FinishReason, GenerateRequest, TokenEvent

from .fake_worker import make_request


class FakeEngine:
    """Ends each request with its first step, unless told to do something else."""

    def __init__(self, on_add: Callable[[str], None] = lambda id_: None, on_step: Callable[[], None] = lambda: None):
        self.stats = EngineStats()
        self.requests: list[str] = []
        self._on_add, self._on_step = on_add, on_step

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def when_lost(self, call: Callable[[], None]) -> None:
        pass

    def begin(self) -> None:
        pass

    def close(self) -> None:
        pass

    def prepare(self, request: GenerateRequest) -> None:
        assert request.sampling.guided is None

    def add(self, request: GenerateRequest) -> None:
        self._on_add(request.request_id)
        self.requests.append(request.request_id)

    def abort(self, request_id: str) -> bool:
        return False

    def step(self) -> list[TokenEvent]:
        self._on_step()
        ended, self.requests = self.requests, []
        return [TokenEvent(id_, finish_reason=FinishReason.LENGTH) for id_ in ended]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread's traceback is expected."""
    monkeypatch.setattr(threading, "excepthook", lambda args: None)


def fail(*_: Any) -> None:
    raise TypeError("a defect")


def leave(*_: Any) -> None:
    raise SystemExit


def submit(loop: EngineLoop, name: str) -> "SimpleQueue[TokenEvent]":
    events: SimpleQueue[TokenEvent] = SimpleQueue()
    loop.submit(make_request(name, (1,)), events.put)
    return events


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("engine", [FakeEngine(on_add=fail), FakeEngine(on_step=fail), FakeEngine(on_step=leave)])
def test_when_the_engine_dies_its_callers_are_told_and_later_ones_refused(engine: Any) -> None:
    loop = EngineLoop(engine)
    event = submit(loop, "a").get(timeout=30)
    assert event.finish_reason is FinishReason.ERROR and event.error and "the engine stopped" in event.error
    loop.close()
    with pytest.raises(SlipstreamError, match="closed"):
        submit(loop, "b")


@pytest.mark.usefixtures("quiet")
def test_when_adding_one_fails_those_behind_it_are_told() -> None:
    first, go = threading.Event(), threading.Event()

    def wait_then_fail(request_id: str) -> None:
        first.set()
        assert go.wait(30)
        fail()

    loop = EngineLoop(FakeEngine(on_add=wait_then_fail))  # type: ignore[arg-type]
    streams = [submit(loop, "a")]
    assert first.wait(30)
    streams += [submit(loop, "b"), submit(loop, "c")]
    go.set()
    assert [stream.get(timeout=30).finish_reason for stream in streams] == [FinishReason.ERROR] * 3
    loop.close()


def test_closing_ends_what_runs_and_an_abort_after_it_is_ignored() -> None:
    started, go = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        started.set()
        assert go.wait(30)

    loop = EngineLoop(FakeEngine(on_add=wait))  # type: ignore[arg-type]
    stream = submit(loop, "a")
    assert started.wait(30)
    closing = threading.Thread(target=loop.close)
    closing.start()
    while not loop._is_closed:
        pass
    go.set()
    closing.join()
    assert stream.get(timeout=30).finish_reason is FinishReason.ABORT
    loop.abort("a")


def test_a_listener_that_is_gone_ends_nobody_else() -> None:
    loop = EngineLoop(FakeEngine())  # type: ignore[arg-type]
    loop.submit(make_request("gone", (1,)), fail)
    assert submit(loop, "here").get(timeout=30).finish_reason is FinishReason.LENGTH
    loop.close()


def test_a_fork_is_told_rather_than_left_waiting() -> None:
    loop = EngineLoop(FakeEngine())  # type: ignore[arg-type]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            submit(loop, "a")
        except SlipstreamError as error:
            loop.close()
            code = 0 if "process that opened it" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert submit(loop, "b").get(timeout=30).finish_reason is FinishReason.LENGTH
    loop.close()


@pytest.mark.parametrize("ending", ["", "raise KeyboardInterrupt"])
def test_the_interpreter_waits_for_the_step_where_nobody_closed(ending: str) -> None:
    program = f"""
import time
from tests.runtime.test_loop import EngineLoop, FakeEngine, submit
class Slow(FakeEngine):
    def step(self):
        time.sleep(0.3)
        print("stepped", flush=True)
        return super().step()
submit(EngineLoop(Slow()), "a")
time.sleep(0.1)
{ending}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "stepped\n"
    assert done.returncode == (-2 if ending else 0)
