"""A prefill engine and a decode engine behind one address: the answers of one engine, whoever is lost or leaves."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import httpx
import pytest

from slipstream import LLM, SamplingParams
from slipstream.schema.request import FinishReason, GenerateRequest, TokenEvent
from slipstream.serve import kv_folder
from slipstream.serve.frontend import Frontend
from slipstream.serve.handover import Handover
from slipstream.serve.kv_folder import KVFolder, is_elsewhere
from slipstream.serve.messages import EngineSetup, json_line
from tests.serve.conftest import START_SECONDS, Server, eventually, serving, start
from tests.serve.load import LOAD_OPTIONS, Crowd, make_tasks
from tests.serve.test_replicas import ENDLESS, Reader, statuses

SHARED_MEMORY = Path("/dev/shm")
TWO = ("--prefill_replicas", 1)
soon = partial(eventually, seconds=START_SECONDS)


class Split(Server):
    others: set[Path]  # folders that were there before

    @property
    def folders(self) -> set[Path]:
        """Of its engines."""
        return set(SHARED_MEMORY.glob("slipstream-*")) - self.others

    def files(self) -> list[Path]:
        return [file for folder in self.folders for file in folder.glob("*")]


@contextmanager
def splitting(engine: Path, *options: object) -> Iterator[Split]:
    before = set(SHARED_MEMORY.glob("slipstream-*"))
    with serving(engine, *TWO, *options) as server:
        split = Split(server.process, server.url, server.ready_line)
        split.others = before
        yield split
    assert not split.folders


@pytest.fixture(scope="module")
def split(engine: Path) -> Iterator[Split]:
    with splitting(engine, *LOAD_OPTIONS) as split:
        yield split


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [(7 * i * i + 3 * i + seed) % 320 for i in range(length)]


def computed(server: Server) -> list[int]:
    """Prompt tokens that each engine has computed, the decode engine first."""
    return [each["engine"]["prompt_tokens_computed"] for each in server.health().json()["replicas"]]


def ask(server: Server, prompt: list[int], **more: Any) -> httpx.Response:
    return server.post("/v1/completions", {"prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 0} | more)


def tokens_of(choice: dict[str, Any]) -> list[str]:
    tokens: list[str] = choice["logprobs"]["tokens"]
    return tokens


def test_long_prompts_are_computed_by_one_and_answered_by_the_other(split: Split, offline: LLM) -> None:
    assert "1 decode and 1 prefill engines, each float32" in split.ready_line
    for length in (2, 64, 65, 66, 80, 81, 97, 200):
        seen = computed(split)
        body = ask(split, prompt_of(length, seed=length)).json()
        expected = offline.generate(prompt_of(length, seed=length), SamplingParams(max_tokens=12, temperature=0))
        assert body["choices"][0]["text"] == expected.outputs[0].text
        news = [length, 0] if length <= 65 else [1, length - 1]
        soon(lambda: computed(split) == [a + b for a, b in zip(seen, news, strict=True)])  # noqa: B023
    assert not split.files()


def test_what_the_decode_engine_has_it_is_not_handed(split: Split, offline: LLM) -> None:
    prompt = prompt_of(150, seed=250)
    seen = computed(split)
    for longer in (prompt, [*prompt, *prompt_of(30, seed=5)]):
        text = ask(split, longer).json()["choices"][0]["text"]
        assert text == offline.generate(longer, SamplingParams(max_tokens=12, temperature=0)).outputs[0].text
    soon(lambda: computed(split)[1] == seen[1] + 149)
    soon(lambda: 1 + 30 <= computed(split)[0] - seen[0] <= 1 + 30 + 16)


def test_several_completions_go_on_from_one_prompt_and_scores_are_made_alone(split: Split, offline: LLM) -> None:
    prompt, seen = prompt_of(100, seed=300), computed(split)
    asked = {"temperature": 1, "seed": 4, "n": 3}
    choices = ask(split, prompt, **asked).json()["choices"]
    expected = offline.generate(prompt, SamplingParams(max_tokens=12, temperature=1, seed=4, n=3))
    assert [choice["text"] for choice in choices] == [each.text for each in expected.outputs]
    soon(lambda: computed(split)[1] == seen[1] + 99)
    seen = computed(split)
    scored = ask(split, prompt_of(100, seed=301), echo=True, max_tokens=1).json()["choices"][0]  # needs every row
    assert len(tokens_of(scored)) == 101
    soon(lambda: computed(split)[0] >= seen[0] + 100)
    assert computed(split)[1] == seen[1]


def test_answers_under_load_are_those_of_one_engine(split: Split, engine: Path) -> None:
    crowd = Crowd(split, make_tasks(engine, 16), num_clients=24)
    asyncio.run(crowd.run(2))
    assert not crowd.tally.wrong, "\n".join(crowd.tally.wrong[:5])
    assert crowd.tally.num_whole > 10
    soon(lambda: split.stats()["num_blocks_used"] == 0)
    soon(lambda: not split.files())


def pids(server: Split) -> tuple[int, int]:
    """The decode engine's and the prefill engine's, whose cores are the last."""
    decode, prefill = sorted(server.engine_pids, key=lambda pid: min(os.sched_getaffinity(pid)))
    return decode, prefill


class Waiting(threading.Thread):
    """A client whose prompt the prefill engine is sent, and stands still with."""

    def __init__(self, server: Split, prompt: list[int]) -> None:
        super().__init__(daemon=True)
        self._server, self._prompt, self._leaves = server, prompt, threading.Event()
        self.status = 0
        _, prefill = pids(server)
        os.kill(prefill, signal.SIGSTOP)
        self.start()
        for _ in range(3):  # the front answers one after the other
            server.health()

    def run(self) -> None:
        asyncio.run(self._wait())

    async def _wait(self) -> None:
        asked = {"prompt": self._prompt, "max_tokens": 12, "temperature": 0}
        async with httpx.AsyncClient(timeout=60) as client:
            answer = asyncio.create_task(client.post(f"{self._server.url}/v1/completions", json=asked))
            leaving = asyncio.create_task(asyncio.to_thread(self._leaves.wait))
            await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                self.status = 0 if answer.exception() else answer.result().status_code
            else:
                answer.cancel()
            self._leaves.set()

    def leave(self) -> None:
        self._leaves.set()
        self.join()


def wait_with_a_prompt(server: Split, seed: int) -> Waiting:
    """On a machine so slow that a standing engine counts as ill before it is asked, once more."""
    for attempt in range(20):
        waiting = Waiting(server, [seed, attempt, *prompt_of(120, seed=seed)])
        if waiting.is_alive():
            return waiting
        os.kill(pids(server)[1], signal.SIGCONT)
        soon(lambda: statuses(server) == ["ok", "ok"])
    pytest.fail("the prefill engine is never asked")


def test_who_leaves_while_the_prompt_is_computed_leaves_nothing(split: Split) -> None:
    wait_with_a_prompt(split, seed=310).leave()
    soon(lambda: not split.files())
    os.kill(pids(split)[1], signal.SIGCONT)
    soon(lambda: statuses(split) == ["ok", "ok"])
    soon(lambda: split.stats()["num_blocks_used"] == 0)
    assert not split.files()


def test_a_prefill_engine_that_hangs_is_not_waited_for(split: Split) -> None:
    waiting = wait_with_a_prompt(split, seed=311)
    waiting.join()
    assert waiting.status == 200
    os.kill(pids(split)[1], signal.SIGCONT)
    soon(lambda: statuses(split) == ["ok", "ok"])
    soon(lambda: split.stats()["num_blocks_used"] == 0)
    assert not split.files()


def test_what_is_not_there_yet_is_one_sentence(engine: Path) -> None:
    process = start(engine.with_name("talker"), *TWO, "--tp_size", 2, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 2
    assert "--prefill_replicas is for engines of one rank so far; leave it out, or --tp_size" in errors


def test_a_lost_engine_costs_only_what_it_answers(patient_engine: Path) -> None:
    with splitting(patient_engine, *ENDLESS) as server:
        prompt = prompt_of(120)
        before = ask(server, list(prompt)).json()["choices"][0]["text"]
        reader = Reader(server, 7)
        soon(lambda: reader.num_lines > 0)
        waiting = wait_with_a_prompt(server, seed=50)
        os.kill(pids(server)[1], signal.SIGKILL)
        waiting.join()
        assert waiting.status == 200  # the decode engine computes the prompt itself
        soon(lambda: statuses(server) == ["ok", "ok"])
        assert reader.is_alive()
        assert ask(server, list(prompt)).json()["choices"][0]["text"] == before

        os.kill(pids(server)[0], signal.SIGKILL)
        soon(lambda: reader.has_failed)
        error = json.loads(reader.ending[0].removeprefix("data: "))["error"]["message"]
        assert "the engine process ended (signal 9)" in error
        soon(lambda: statuses(server) == ["ok", "ok"])
        seen = computed(server)
        assert ask(server, list(prompt)).json()["choices"][0]["text"] == before
        soon(lambda: computed(server)[0] == seen[0] + 1)  # the prefill engine has its prefix still

        [front] = server.front_pids
        waiting = wait_with_a_prompt(server, seed=90)
        os.kill(front, signal.SIGKILL)
        os.kill(pids(server)[1], signal.SIGCONT)
        soon(lambda: not server.files())
        soon(lambda: server.front_pids not in ([], [front]))


# --- from one machine to another ---


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[KVFolder, KVFolder]]:
    """One that gives, over TCP, and one that takes, as on another machine."""
    giving, taking = KVFolder(f"giving-{tmp_path.name}"), KVFolder(f"taking-{tmp_path.name}")
    for folder in (giving, taking):
        folder.remove()
        folder.make()
    giving.listen("127.0.0.1")
    yield giving, taking
    for folder in (giving, taking):
        folder.remove()


@pytest.fixture
def peer() -> Iterator[socket.socket]:
    """Another machine that listens and does no more by itself."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def place_at(peer: socket.socket) -> str:
    return f"tcp://127.0.0.1:{peer.getsockname()[1]}/front-1"


def fetch(folder: KVFolder, place: str, seconds: float = 30.0, most: int = 8 << 20) -> str | None:
    return folder.fetch(place, time.monotonic() + seconds, most)


def test_a_file_is_fetched_once(folders: tuple[KVFolder, KVFolder]) -> None:
    giving, taking = folders
    content = os.urandom(5 << 20)
    Path(giving.expect("front-1")).write_bytes(content)
    place = f"{giving.address}/front-1"
    assert is_elsewhere(place) and not is_elsewhere(f"{taking.address}/front-1")
    path = fetch(taking, place)
    assert path is not None and Path(path).read_bytes() == content
    assert fetch(taking, place) is None


def test_a_files_name_cannot_be_guessed() -> None:
    """Request ids can: they are counted."""
    engine = MagicMock(kv_address="tcp://host:1")
    engine.submit = lambda request, sink: sink(TokenEvent(request.request_id, finish_reason=FinishReason.LENGTH))
    request = GenerateRequest("front-1", tuple(range(100)), SamplingParams(), seed=0, max_tokens=1)

    async def place() -> str:
        return (await Handover().prefill(request, engine, engine, [], 0.0)).kv_from or ""

    places = {asyncio.run(place()) for _ in range(2)}
    assert len(places) == 2 and all(re.fullmatch("tcp://host:1/front-1-[0-9a-f]{32}", each) for each in places)


def test_what_is_not_there_is_not_fetched(
    folders: tuple[KVFolder, KVFolder], capfd: pytest.CaptureFixture[str]
) -> None:
    giving, taking = folders
    for name in ("front-1", "front-2", "other-1"):
        Path(giving.expect(name)).write_bytes(b"1")
    giving.discard(["front-1"])
    giving.discard_all_of("front")
    assert fetch(taking, f"{giving.address}/front-1") is fetch(taking, f"{giving.address}/front-2") is None
    assert fetch(taking, f"{giving.address}/other-1")
    beside = Path(giving.expect("front-1")).parent.with_suffix(".secret")
    beside.write_text("not to be read")
    for name in (f"../{beside.name}".encode(), b"..", b"", b"\xff", b"a\0b", b"x" * 1000):
        with socket.create_connection(("127.0.0.1", int(giving.address.rpartition(":")[2])), 10) as connection:
            connection.sendall(name + b"\n")
            with suppress(ConnectionResetError):  # it has not read all of the long one
                assert connection.recv(10) == b""
    beside.unlink()
    assert capfd.readouterr().err == ""


def test_nobody_is_waited_for_long(
    folders: tuple[KVFolder, KVFolder], peer: socket.socket, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Not for one that is not there, says nothing, talks for ever or too long; what has come of it is not kept."""
    _, taking = folders

    def warned(place: str, **limits: Any) -> str:
        assert fetch(taking, place, **limits) is None
        assert not list(Path(taking.address).iterdir())
        said = capfd.readouterr().err
        assert said.startswith("warning: a prompt's KV could not be fetched from 127.0.0.1:")
        return said

    monkeypatch.setattr(kv_folder, "SILENCE_SECONDS", 1.0)
    assert "(Connection refused); the prompt is computed here.\n" in warned("tcp://127.0.0.1:1/front-1")
    assert "(timed out)" in warned(place_at(peer))
    peer.accept()[0].close()
    assert "(timed out)" in warned(place_at(peer), seconds=-1.0)

    def talk() -> None:
        for _ in range(2):
            connection, _ = peer.accept()
            with connection, suppress(OSError):
                while True:
                    connection.sendall(bytes(1000))
                    time.sleep(0.01)

    talking = threading.Thread(target=talk, daemon=True)
    talking.start()
    assert "(timed out)" in warned(place_at(peer), seconds=0.5)
    assert "(it has more than 5000 bytes)" in warned(place_at(peer), most=5000)
    talking.join()


def test_a_folder_that_is_removed_gives_nothing_more(folders: tuple[KVFolder, KVFolder]) -> None:
    giving, _ = folders
    giving.remove()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(giving.address.rpartition(":")[2])), 10)


def test_others_go_on_while_one_waits_for_its_kv(engine: Path, peer: socket.socket, tmp_path: Path) -> None:
    """An engine as Ray starts it. What comes breaks off, so that it computes the prompt. A file elsewhere it leaves."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    options = {"model": str(engine), "device": "cpu", "kv_cache_free_memory_fraction": 0.1}
    setup = EngineSetup(f"test-{os.getpid()}", options, 0, 1, 8, None, 120.0, None, None, hands_over=True)
    beside = tmp_path / "beside"
    beside.write_text("not to be taken")

    async def ask_all() -> None:
        are_ready = asyncio.Event()
        front = Frontend("front", on_ready=lambda replica, ready: are_ready.set())
        front.attach(0, address)
        await asyncio.wait_for(are_ready.wait(), START_SECONDS)
        ends = {name: asyncio.get_running_loop().create_future() for name in ("alone", "beside", "waits")}
        for name, place in (("waits", place_at(peer)), ("beside", str(beside)), ("alone", None)):
            request = front.maker.request(name, tuple(prompt_of(100)), SamplingParams(max_tokens=1, temperature=0))
            front.engines[0].submit(replace(request, kv_from=place), ends[name].set_result)
        connection = (await asyncio.to_thread(peer.accept))[0]
        connection.sendall(bytes(100))
        first = [await asyncio.wait_for(ends[name], 60) for name in ("alone", "beside")]
        assert not ends["waits"].done()
        connection.close()
        events = [*first, await asyncio.wait_for(ends["waits"], 60)]
        assert len({event.token_ids for event in events}) == 1 and not any(event.error for event in events)
        await front.close()

    process = subprocess.Popen(
        [sys.executable, "-m", "slipstream.serve.engine_process", address], stdin=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(json_line(setup))
    process.stdin.flush()
    try:
        asyncio.run(ask_all())
    finally:
        process.stdin.close()
        assert process.wait(60) == 0
    assert beside.exists() and not (SHARED_MEMORY / f"slipstream-{setup.name}").exists()
