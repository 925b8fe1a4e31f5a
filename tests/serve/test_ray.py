"""`slipstream serve --ray` on a cluster of two nodes, two raylets of this machine; one is killed under load."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slipstream import LLM, SamplingParams
from slipstream.build import build
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.errors import UsageError
from slipstream.schema.build import BuildConfig
from slipstream.schema.launch import Launch
from slipstream.serve import ray_engines
from slipstream.serve.messages import EngineSetup
from slipstream.serve.ray_engines import Place, RayEngines, cores_each, rank_environments
from tests.serve.conftest import START_SECONDS, Server, descendants, eventually, serving, words_of
from tests.serve.test_handover import SHARED_MEMORY, computed
from tests.serve.test_replicas import ENDLESS, Reader, running, statuses

LOST_SECONDS = 60.0  # within which requests of a lost node end: Ray notices after some 3
ASKED = {"prompt": [1, 2, 3], "max_tokens": 8, "temperature": 0, "ignore_eos": True}


def patiently(start: Callable[..., Any], **options: Any) -> Any:
    """A node gives up where its agent has not started within 15 seconds, which on a busy machine it has not."""
    for _ in range(2):
        with contextlib.suppress(Exception):
            return start(**options)
    return start(**options)


class Cluster:
    """A node that stays, with one core, and another one that may be killed and replaced."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        self._cluster: Any = RayCluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        self.address = self._cluster.address
        self.add()

    def add(self) -> None:
        self._other = patiently(self._cluster.add_node, num_cpus=1)

    def kill_other(self) -> None:
        self._cluster.remove_node(self._other, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # other tests' memory is no reason to end ours
        cluster = Cluster()
        yield cluster
        started = {pid for pid in descendants(os.getpid()) if is_of_ray(pid)}
        cluster.close()
        eventually(lambda: not any(is_of_ray(pid) for pid in started), seconds=60)


def is_of_ray(pid: int) -> bool:
    """It lives, and is Ray's."""
    words = words_of(pid)
    return "/ray/" in words or words.startswith("ray::")


@pytest.fixture(scope="module")
def two_ranks(patient_engine: Path) -> Path:
    engine = patient_engine.with_name("two-ranks")
    checkpoint = open_checkpoint(resolve(patient_engine.with_name("talker")), "float32")
    build(checkpoint, engine, BuildConfig(tp_size=2, max_batch_size=8, max_num_tokens=64))
    checkpoint.close()
    return engine


def answer(server: Server) -> str:
    response = server.post("/v1/completions", ASKED)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def test_ranks_on_two_nodes_serve_and_are_placed_again(cluster: Cluster, two_ranks: Path) -> None:
    with serving(two_ranks, "--ray", *ENDLESS, RAY_ADDRESS=cluster.address) as server:
        before = answer(server)
        readers = [Reader(server, number) for number in range(4)]
        eventually(lambda: all(reader.num_lines for reader in readers), seconds=60)
        cluster.kill_other()
        eventually(lambda: all(reader.has_failed for reader in readers), seconds=LOST_SECONDS)
        error = json.loads(readers[0].ending[0].removeprefix("data: "))["error"]["message"]
        assert "the engine process ended (" in error or "rank 1" in error
        eventually(lambda: server.health().status_code == 503, seconds=LOST_SECONDS)
        cluster.add()
        eventually(lambda: statuses(server) == ["ok"], seconds=START_SECONDS)
        assert answer(server) == before


def test_a_replica_whose_node_is_lost_takes_its_own_requests_only(cluster: Cluster, patient_engine: Path) -> None:
    options = ("--ray", "--replicas", 2, "--max_batch_size", 8, *ENDLESS)
    with serving(patient_engine, *options, RAY_ADDRESS=cluster.address) as server:
        before = answer(server)
        readers = [Reader(server, number) for number in range(4)]
        eventually(lambda: sum(running(server)) == 4 and all(running(server)), seconds=60)
        cluster.kill_other()
        eventually(lambda: sum(reader.has_failed for reader in readers) == 2, seconds=LOST_SECONDS)
        assert answer(server) == before  # by the one that is left
        assert sum(reader.is_alive() for reader in readers) == 2
        cluster.add()
        eventually(lambda: statuses(server) == ["ok", "ok"], seconds=START_SECONDS)
        for reader in readers:
            reader.leaves = True


def test_a_replica_comes_with_the_load_and_gives_its_place_back(cluster: Cluster, patient_engine: Path) -> None:
    options = ("--ray", "--max_replicas", 2, "--upscale_delay", 1, "--downscale_delay", 2, "--max_batch_size", 2)
    with serving(patient_engine, *options, *ENDLESS, RAY_ADDRESS=cluster.address) as server:
        for _ in range(2):  # the second time there has to be room again
            readers = [Reader(server, number) for number in range(3)]
            eventually(lambda: statuses(server) == ["ok", "ok"], seconds=START_SECONDS)
            for reader in readers:
                reader.leaves = True
            eventually(lambda: statuses(server) == ["ok"], seconds=60)
            assert answer(server)


def test_a_prompts_kv_goes_from_node_to_node(cluster: Cluster, engine: Path) -> None:
    """Over TCP; without the prefill engine the other one computes the prompt, as on one machine (test_handover.py)."""
    before = set(SHARED_MEMORY.glob("slipstream-*"))
    with serving(engine, "--ray", "--prefill_replicas", 1, RAY_ADDRESS=cluster.address) as server:
        asked = ASKED | {"prompt": [(7 * place * place) % 320 for place in range(100)]}
        with LLM(engine) as llm:
            alone = llm.generate(asked["prompt"], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
        for seen in (0, 1):  # the second time it is known there
            response = server.post("/v1/completions", asked)
            assert response.json()["choices"][0]["text"] == alone.outputs[0].text
            eventually(lambda: computed(server) == [1 + seen, 99], seconds=60)  # noqa: B023
        folders = set(SHARED_MEMORY.glob("slipstream-*")) - before
        assert len(folders) == 2 and not [file for folder in folders for file in folder.iterdir()]
    eventually(lambda: set(SHARED_MEMORY.glob("slipstream-*")) <= before, seconds=60)


def test_a_node_that_says_nothing_is_lost(
    cluster: Cluster, patient_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever Ray thinks of it: to Ray a process that is stopped is alive."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.setattr(ray_engines, "SILENCE_SECONDS", 3.0)
    options = {"model": str(patient_engine), "device": "cpu", "kv_cache_free_memory_fraction": 0.1}
    setup = EngineSetup("one", options, 0, 1, 8, None, 120.0, None, None)

    async def stop_it(engines: RayEngines) -> str:
        engine = await asyncio.wait_for(engines.start(setup), START_SECONDS)
        pid = await engine._seats[0].__ray_call__.remote(lambda seat: os.getpid())
        os.kill(pid, signal.SIGSTOP)
        try:
            return await asyncio.wait_for(engine.wait(), 60)
        finally:
            with contextlib.suppress(ProcessLookupError):  # Ray has killed it
                os.kill(pid, signal.SIGCONT)

    engines = RayEngines.connect(options | {"tp_size": None, "pp_size": None}, 1)
    try:
        assert asyncio.run(stop_it(engines)) == "a node has not answered for 3 seconds"
    finally:
        engines.close()


def test_cores_are_shared_out_over_nodes() -> None:
    assert cores_each([8, 8], 1) == 8
    assert cores_each([8, 8], 4) == 4
    assert cores_each([8, 4], 3) == 4
    assert cores_each([1, 1], 2) == 1
    assert cores_each([1], 5) == 1  # the fifth waits for a node


def test_ranks_of_a_node_see_each_others_gpus() -> None:
    places = [
        Place("a", "10.0.0.1", (70, 71), ("3",)),
        Place("b", "10.0.0.2", (80, 81), ("0",)),
        Place("a", "10.0.0.1", (90, 91), ("1",)),
    ]
    environments = rank_environments(places)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments] == ["3,1", "0", "3,1"]
    launches = [Launch.read(each) for each in environments]
    assert launches == [Launch(rank, 3, local, "10.0.0.1", 70) for rank, local in enumerate([0, 0, 1])]
    assert rank_environments(places[:1]) == [{"CUDA_VISIBLE_DEVICES": "3"}]


def test_a_cluster_that_is_not_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UsageError, match=r"There is no Ray cluster to run on .*; see to RAY_ADDRESS"):
        RayEngines.connect({"device": "cpu"}, 1)
