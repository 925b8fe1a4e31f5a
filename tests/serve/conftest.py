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
from typing import IO, Any

import httpx
import pytest

from tests.cli.conftest import call as call  # a fixture here too
from tests.cli.conftest import write_tokenizer

START_SECONDS = 60

CALLER = """
{%- for tool in tools or [] %}{{ tool.function.name }},{% endfor %}
{%- for m in messages %}{{ m.role }} {{ m.name }}:{{ m.reasoning_content }}|{{ m.content }}
    {%- for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }} {{ call.function.arguments.colour }}
    {%- endfor %};
{%- endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""


class Server:
    """A running server. `url` is without a slash at its end."""

    def __init__(self, process: subprocess.Popen[str], url: str, ready_line: str) -> None:
        self.process, self.url, self.ready_line = process, url, ready_line

    @property
    def engine_pid(self) -> int:
        """The engine's process; there is none for a moment after it has died."""
        [pid] = self.engine_pids
        return pid

    @property
    def engine_pids(self) -> list[int]:
        return self._pids("engine_process")

    @property
    def front_pids(self) -> list[int]:
        return self._pids("front_process")

    @property
    def rank_pids(self) -> list[int]:
        """Of the engine's other ranks, which are children of its process."""
        return [pid for engine in self._pids("engine_process") for pid in self._pids("rank_process", of=engine)]

    def _pids(self, module: str, of: int | None = None) -> list[int]:
        return [child for child in _children(of or self.process.pid) if module in words_of(child)]

    def health(self) -> httpx.Response:
        return httpx.get(f"{self.url}/health", timeout=5)

    def stats(self) -> dict[str, int]:
        stats: dict[str, int] = self.health().json()["engine"]
        return stats

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=30, **more)


def _children(pid: int) -> list[int]:
    """None of a process that has ended; threads end at any time."""
    tasks = Path("/proc").glob(f"{pid}/task/*/children")
    return [int(child) for task in tasks for child in _text(task).split()]


def words_of(pid: int) -> str:
    """Its command line, empty once it has ended."""
    return _text(Path(f"/proc/{pid}/cmdline"))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    """The processes below this one."""
    children = _children(pid)
    return [*children, *(below for child in children for below in descendants(child))]


@contextmanager
def serving(model: object, *arguments: object, stderr: IO[str] | None = None, **environment: str) -> Iterator[Server]:
    """A server that is ready; it is ended by SIGTERM, and then has to be gone with exit code 0."""
    process = start(model, *arguments, stderr=stderr, **environment)
    assert process.stdout is not None
    try:
        ready_line = process.stdout.readline()
        found = re.search(r" at (https?://\S+) ", ready_line)
        assert found, f"no ready line but {ready_line!r}; the reason is on stderr"
        yield Server(process, found[1], ready_line)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def start(
    model: object, *arguments: object, stderr: IO[str] | None = None, **environment: str
) -> subprocess.Popen[str]:
    words = ["serve", model, "--port", 0, *arguments]
    return subprocess.Popen(
        [sys.executable, "-c", "import slipstream.cli; slipstream.cli.main()", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=stderr,
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
    return write_engine(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="session")
def patient_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its answers may be so long that whoever leaves one has left before it ends."""
    return write_engine(tmp_path_factory.mktemp("patient"), max_position_embeddings=8192)


def write_engine(folder: Path, **options: Any) -> Path:
    """The engine folder of a tiny model that talks (nonsense), and ends with <|im_end|>."""
    from slipstream.build import build
    from slipstream.checkpoint import open_checkpoint, resolve
    from slipstream.checkpoint.random import write_random_model
    from slipstream.models.llama import TINY
    from slipstream.schema.build import BuildConfig

    model = folder / "talker"
    write_random_model(model, TINY | {"vocab_size": 320, "eos_token_id": 1} | options)
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
def caller(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The tiny model behind the chat template of a tool user, who is brief, as its texts have 256 tokens at most."""
    template = tmp_path_factory.mktemp("templates") / "caller.jinja"
    template.write_text(CALLER)
    with serving(engine, "--chat_template", template) as server:
        yield server


@pytest.fixture(scope="session")
def parrot(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The real model, whose prompt is the last message alone: what that repeats many times, it goes on with."""
    template = tmp_path_factory.mktemp("templates") / "parrot.jinja"
    template.write_text("{{ messages[-1].content }}{# <tool_call> </think> #}")
    options = ("--max_batch_size", 4, "--max_num_tokens", 512, "--chat_template", template, "--dtype", "float32")
    with serving("smollm2", *options, OMP_NUM_THREADS="2") as server:
        yield server


@pytest.fixture(scope="session")
def offline(engine: Path) -> Iterator[Any]:
    """The same engine without a server: what its answers must be."""
    from slipstream import LLM

    with LLM(engine) as llm:
        yield llm


@pytest.fixture(scope="session")
def no_blanks(offline: Any) -> dict[str, float]:
    """A logit_bias for JSON by a model that knows nothing: it would put blanks without end where they may be."""
    tokens = ((token_id, offline.tokenizer.decode([token_id])) for token_id in range(320))
    return {str(token_id): -100.0 for token_id, text in tokens if text.isspace()}
