"""Servers as users start them: `slipstream serve` in a process of its own, on a free port."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cli.conftest import write_tokenizer

START_SECONDS = 60


class Server:
    """A running server. `url` is without a slash at its end."""

    def __init__(self, process: subprocess.Popen[str], url: str, ready_line: str) -> None:
        self.process, self.url, self.ready_line = process, url, ready_line

    @property
    def engine_pid(self) -> int:
        """The engine's process; there is none for a moment after it has died."""
        pid = self.process.pid
        children = [child for task in Path(f"/proc/{pid}/task").iterdir() for child in _children(task)]
        assert len(children) == 1, children
        return children[0]

    def health(self) -> httpx.Response:
        return httpx.get(f"{self.url}/health", timeout=5)

    def stats(self) -> dict[str, int]:
        stats: dict[str, int] = self.health().json()["engine"]
        return stats

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=30, **more)


def _children(task: Path) -> list[int]:
    return [int(pid) for pid in (task / "children").read_text().split()]


@contextmanager
def serving(model: object, *arguments: object, **environment: str) -> Iterator[Server]:
    """A server that is ready; it is ended by SIGTERM, and then has to be gone with exit code 0."""
    process = start(model, *arguments, **environment)
    assert process.stdout is not None
    ready_line = process.stdout.readline()
    found = re.search(r" at (https?://\S+) ", ready_line)
    assert found, f"no ready line but {ready_line!r}; stderr: {process.communicate(timeout=START_SECONDS)[1]}"
    try:
        yield Server(process, found[1], ready_line)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def start(model: object, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    words = ["serve", model, "--port", 0, *arguments]
    return subprocess.Popen(
        [sys.executable, "-c", "import slipstream.cli; slipstream.cli.main()", *map(str, words)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> float:
    """Seconds until the condition held; fails where it never does."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "it never came true"
        time.sleep(0.02)
    return time.monotonic() - started


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine folder of a tiny model that talks (nonsense), and ends with <|im_end|>."""
    from slipstream.build import build
    from slipstream.checkpoint import open_checkpoint, resolve
    from slipstream.checkpoint.random import write_random_model
    from slipstream.models.llama import TINY
    from slipstream.schema.build import BuildConfig

    model = tmp_path_factory.mktemp("serve") / "talker"
    write_random_model(model, TINY | {"vocab_size": 320, "eos_token_id": 1})
    write_tokenizer(model, vocab_size=320)
    checkpoint = open_checkpoint(resolve(model), "float32")
    build(checkpoint, model.with_name("engine"), BuildConfig(max_batch_size=64, max_num_tokens=64))
    checkpoint.close()
    return model.with_name("engine")


@pytest.fixture(scope="session")
def server(engine: Path) -> Iterator[Server]:
    with serving(engine) as server:
        yield server


@pytest.fixture(scope="session")
def offline(engine: Path) -> Iterator[Any]:
    """The same engine without a server: what its answers must be."""
    from slipstream import LLM

    with LLM(engine) as llm:
        yield llm
