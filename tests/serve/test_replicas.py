"""Two engines behind one front: what they answer, who gets what, and what happens to requests when one of them dies."""

import asyncio
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from slipstream.api import replicas
from slipstream.errors import UsageError
from tests.serve.conftest import START_SECONDS, Server, eventually, serving
from tests.serve.load import LOAD_OPTIONS, Crowd, make_tasks
from tests.serve.test_processes import front_of

ENDLESS = ["--sink_token_length", 4, "--max_attention_window_size", 64, "--max_seq_len", 2_000_000]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("replicas")


@pytest.fixture(scope="module")
def two(engine: Path, folder: Path) -> Iterator[Server]:
    told = ["--iteration_log", folder / "steps.jsonl", "--profile_dir", folder / "profiles"]
    with serving(engine, "--replicas", 2, *LOAD_OPTIONS, *told) as server:
        yield server


def counted(server: Server, name: str, client: Any = httpx) -> list[float]:
    """Of each engine."""
    families = text_string_to_metric_families(client.get(f"{server.url}/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == f"slipstream:{name}"]
    assert [sample.labels["engine"] for sample in samples] == [str(index) for index in range(len(samples))]
    return [sample.value for sample in samples]


def test_each_prefix_has_a_home(two: Server) -> None:
    """No time is in it: one prompt after the other, so that it is known who gets which, and what is found there."""
    assert "2 replicas, each float32" in two.ready_line
    prefixes = [[10 + family] * 64 for family in range(2)]
    for turn in range(5):
        for prefix in prefixes:
            asked = {"prompt": [*prefix, 100 + turn], "max_tokens": 1, "temperature": 0}
            assert two.post("/v1/completions", asked).status_code == 200
    eventually(lambda: counted(two, "prompt_tokens_total") == [5 * 65, 5 * 65])
    assert counted(two, "prefix_cache_hits_total") == [4 * 64, 4 * 64]
    health = two.health().json()
    assert [each["engine"]["prompt_tokens"] for each in health["replicas"]] == [5 * 65, 5 * 65]
    assert health["engine"]["prompt_tokens"] == 2 * 5 * 65 and health["status"] == "ok"


def test_each_has_cores_of_its_own(two: Server) -> None:
    one, other = (
        {core for thread in Path(f"/proc/{pid}/task").iterdir() for core in os.sched_getaffinity(int(thread.name))}
        for pid in two.engine_pids
    )
    assert one and other and not one & other


def test_answers_under_load_are_those_of_one_engine(two: Server, engine: Path) -> None:
    before = counted(two, "generation_tokens_total")
    crowd = Crowd(two, make_tasks(engine, 16), num_clients=24)
    asyncio.run(crowd.run(2))
    assert not crowd.tally.wrong, "\n".join(crowd.tally.wrong[:5])
    assert crowd.tally.num_whole > 10
    after = counted(two, "generation_tokens_total")
    assert all(new > old for new, old in zip(after, before, strict=True))
    eventually(lambda: two.stats()["num_blocks_used"] == 0)


def test_all_are_profiled_and_each_logs_its_steps(two: Server, folder: Path) -> None:
    assert len(two.post("/start_profile", None).json()["paths"]) == 2
    paths = two.post("/stop_profile", None).json()["paths"]
    assert len(set(paths)) == 2 and all(Path(path).stat().st_size for path in paths)
    logs = [(folder / f"steps-{replica}.jsonl").read_text().splitlines() for replica in range(2)]
    assert all(json.loads(log[-1])["step"] > 0 for log in logs)


def check_that_fronts_tell_each_other(server: Server) -> None:
    """One sends two prefixes, which go round; the other one then knows where the second is."""
    with ExitStack() as stack:
        one, other = clients_of_both_fronts(server, stack)

        def ask(client: httpx.Client, prompt: list[int]) -> None:
            asked = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
            assert client.post("/v1/completions", json=asked).status_code == 200

        ask(one, [20] * 48 + [1])
        ask(one, [21] * 48 + [1])
        eventually(lambda: counted(server, "prompt_tokens_total", other) == [49, 49])  # the beat that says so says all
        ask(other, [21] * 48 + [2])
        eventually(lambda: counted(server, "prompt_tokens_total", one) == [49, 98])
        assert counted(server, "prefix_cache_hits_total", one) == [0, 48]


def clients_of_both_fronts(server: Server, stack: ExitStack) -> Sequence[httpx.Client]:
    """Each with its one connection, which it keeps; the kernel says whose it is."""
    clients: dict[int, httpx.Client] = {}
    for _ in range(100):
        client = stack.enter_context(httpx.Client(base_url=server.url, timeout=30))
        with client.stream("GET", "/health") as response:
            front = front_of(server, response)
            response.read()
        clients.setdefault(front, client)
        if len(clients) == 2:
            return list(clients.values())
    pytest.fail("one front answers everything")


class Reader(threading.Thread):
    """Reads an endless answer until it is told to leave, or the answer ends."""

    def __init__(self, server: Server, number: int, max_tokens: int = 1_000_000) -> None:
        super().__init__(daemon=True)
        self._url, self._number, self._max_tokens = server.url, number, max_tokens
        self.num_lines = 0
        self.leaves = False
        self.ending: list[str] = []
        self.start()

    def run(self) -> None:
        asked = {"prompt": [self._number] * 40, "max_tokens": self._max_tokens, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{self._url}/v1/completions", json=asked, timeout=60) as response:
            for line in filter(None, response.iter_lines()):
                self.num_lines += 1
                self.ending = [*self.ending[-1:], line]
                if self.leaves:
                    return

    @property
    def has_failed(self) -> bool:
        return not self.is_alive() and self.ending[-1] == "data: [DONE]" and '"error"' in self.ending[0]


def test_a_killed_engine_takes_its_own_requests_only_and_comes_back(patient_engine: Path) -> None:
    """With two fronts, each of which knows its own requests at once and the other's by and by."""
    with serving(patient_engine, "--replicas", 2, "--num_fronts", 2, "--max_batch_size", 8, *ENDLESS) as server:
        check_that_fronts_tell_each_other(server)
        readers = [Reader(server, number) for number in range(8)]
        eventually(lambda: sum(running(server)) == 8, seconds=60)
        num_lost = running(server)[1]
        assert 2 <= num_lost <= 6
        killed = max(server.engine_pids, key=lambda pid: min(os.sched_getaffinity(pid)))  # whose cores are the last
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: sum(reader.has_failed for reader in readers) == num_lost, seconds=30)
        failed = [json.loads(reader.ending[0].removeprefix("data: ")) for reader in readers if reader.has_failed]
        assert all("the engine process ended (signal 9)" in each["error"]["message"] for each in failed)

        living = [reader for reader in readers if reader.is_alive()]
        seen = [reader.num_lines for reader in living]
        eventually(lambda: all(r.num_lines > n + 20 for r, n in zip(living, seen, strict=True)), seconds=30)
        assert server.health().status_code == 200
        answer = server.post("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 2})  # by the one that is left
        assert answer.status_code == 200

        eventually(lambda: statuses(server) == ["ok", "ok"], seconds=START_SECONDS)
        assert killed not in server.engine_pids
        more = [Reader(server, 100 + number) for number in range(4)]
        eventually(lambda: running(server)[1] >= 1, seconds=60)
        for reader in (*living, *more):
            assert reader.is_alive()
            reader.leaves = True
        eventually(lambda: server.stats()["num_blocks_used"] == 0)

        last = [Reader(server, 200 + number, max_tokens=300) for number in range(4)]
        eventually(lambda: all(reader.num_lines for reader in last), seconds=30)
        server.process.send_signal(signal.SIGTERM)
        for reader in last:
            reader.join()
            assert reader.ending[1] == "data: [DONE]" and '"finish_reason":"length"' in reader.ending[0]
        assert server.process.wait(timeout=20) == 0


def running(server: Server) -> list[float]:
    return counted(server, "num_requests_running")


def statuses(server: Server) -> list[str]:
    return [each["status"] for each in server.health().json()["replicas"]]


def test_there_have_to_be_cores_for_all() -> None:
    num_cores = len(os.sched_getaffinity(0))
    with pytest.raises(UsageError, match=f"there are {num_cores} cores; give at most {num_cores}"):
        replicas.place_replica({"device": "cpu"}, 0, num_cores + 1)


def test_gpus_are_shared_out_by_the_ranks_of_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic alone: there is no GPU here."""
    monkeypatch.setattr(replicas, "device_for", lambda device: torch.device("cuda:2" if device == "cuda:2" else "cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    options = {"model": str(tmp_path), "device": "auto", "tp_size": 2}
    monkeypatch.setattr(replicas, "num_ranks", lambda options: options["tp_size"] or 1)
    devices = [replicas.place_replica(options, replica, 4)["device"] for replica in range(4)]
    assert devices == ["cuda:0", "cuda:2", "cuda:4", "cuda:6"]
    later: dict[str, Any] = options | {"device": "cuda:2"}
    assert replicas.place_replica(later, 2, 3)["device"] == "cuda:6"
    with pytest.raises(UsageError, match=r"from cuda:2 on need 8, and there are 6; lower --replicas to 3"):
        replicas.place_replica(later, 0, 4)
