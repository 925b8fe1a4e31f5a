"""Engines on the nodes of a Ray cluster: a placement group each, with a bundle for each rank.

In each bundle an actor starts the same process as on one machine (engine_process.py for rank 0, runtime/rank_process.py
for the others), tells it in torchrun's words which rank it is, and holds its stdin, which is its lifeline: Ray ends the
actors of a supervisor that is gone. Requests do not go through Ray: fronts speak to engines as ever, over TCP.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from slipstream.errors import UsageError
from slipstream.schema.launch import Launch
from slipstream.serve.kv_folder import KVFolder
from slipstream.serve.local_engines import STOP_SECONDS, EngineLost, ending
from slipstream.serve.messages import EngineSetup, json_line

PENDING_SECONDS = 5.0  # after which it is said that an engine waits for a place
PING_SECONDS = 2.0
SILENCE_SECONDS = 10.0  # after which a node counts as lost, whatever Ray thinks of it
CALLS_AT_ONCE = 8
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Place:
    """Where a bundle is."""

    node: str
    host: str  # its address
    ports: tuple[int, int]  # that are free there
    gpus: tuple[str, ...]  # that Ray gave it


class Seat:
    """The actor of a bundle."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes]

    def ping(self) -> None:
        pass

    def place(self) -> Place:
        import ray

        with socket.create_server(("", 0)) as one, socket.create_server(("", 0)) as other:
            ports = one.getsockname()[1], other.getsockname()[1]
        gpus = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        return Place(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), ports, tuple(gpus))

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], first_line: bytes, name: str) -> None:
        """name: of the engine's process."""
        self._kv_folder = KVFolder(name)
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments], stdin=subprocess.PIPE, env={**os.environ, **environment},
            start_new_session=True,
        )  # fmt: skip
        self.tell(first_line)

    def tell(self, line: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, which `wait` tells
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def wait(self) -> int:
        code = self._process.wait()
        self._kv_folder.remove()  # which a process that was killed has left
        return code

    def end(self, number: int) -> None:
        """number: of a signal, or 0."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.send_signal(number)


class RayEngines:
    """connect() first, where no event loop has its signal handlers yet: Ray sets some of its own."""

    def __init__(self, bundle: Mapping[str, int], num_ranks: int, options: Mapping[str, Any]) -> None:
        self._bundle, self._num_ranks, self._options = bundle, num_ranks, options

    @classmethod
    def connect(cls, options: Mapping[str, Any], num_replicas: int) -> "RayEngines":
        """To the cluster of RAY_ADDRESS, or of this machine, or to one that is started for this server.

        Raises UsageError where that cannot be.
        """
        try:
            import ray
        except ImportError:
            raise UsageError("--ray needs Ray; install it with: pip install 'slipstream[serve,ray]'.") from None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            _knock(os.environ.get("RAY_ADDRESS", ""))
            ray.init(logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            raise UsageError(f"There is no Ray cluster to run on ({error}); see to RAY_ADDRESS.") from None
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        num_ranks = ray.get(ray.remote(num_cpus=0)(_num_ranks).remote(dict(options)))
        has_gpus = any(node.get("GPU") for node in nodes)
        if options["device"] == "cuda" or (options["device"] == "auto" and has_gpus):
            return cls({"GPU": 1}, num_ranks, {**options, "device": "cuda"})
        if options["device"] not in ("auto", "cpu"):
            raise UsageError(f"--device is {options['device']}, but with --ray Ray chooses which; give cuda or cpu.")
        cores = [int(node.get("CPU", 0)) for node in nodes]
        each = cores_each(cores, num_replicas * num_ranks)
        sharing = min(num_replicas, max(count // each for count in cores) or 1)
        fraction = options["kv_cache_free_memory_fraction"] / sharing
        return cls({"CPU": each}, num_ranks, {**options, "device": "cpu", "kv_cache_free_memory_fraction": fraction})

    async def start(self, setup: EngineSetup) -> "RayEngine":
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = placement_group([dict(self._bundle)] * self._num_ranks, strategy="PACK")
        seats: list[Any] = []
        try:
            await self._when_placed(group)
            for index in range(self._num_ranks):
                strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
                resources = {"num_cpus": self._bundle.get("CPU", 0), "num_gpus": self._bundle.get("GPU", 0)}
                seat = ray.remote(Seat).options(
                    max_concurrency=CALLS_AT_ONCE, scheduling_strategy=strategy, **resources
                )  # fmt: skip
                seats.append(seat.remote())
            places = await asyncio.gather(*(seat.place.remote() for seat in seats))
            address = f"tcp://{places[0].host}:{places[0].ports[1]}"
            setup = msgspec.structs.replace(setup, options=dict(self._options), is_placed=True)
            first, *others = zip(seats, rank_environments(places), strict=True)
            name = setup.name
            starts = [seat.start.remote(["slipstream.runtime.rank_process"], said, b"", name) for seat, said in others]
            engine = ["slipstream.serve.engine_process", address]
            starts.append(first[0].start.remote(engine, first[1], json_line(setup), name))
            await asyncio.gather(*starts)
        except ray.exceptions.RayError as error:
            _give_back(group, seats)
            raise EngineLost(f"Ray could not start it: {str(error).splitlines()[0]}") from None
        except BaseException:
            _give_back(group, seats)
            raise
        return RayEngine(group, seats, address)

    async def _when_placed(self, group: Any) -> None:
        ready = asyncio.ensure_future(_of(group.ready()))
        done, _ = await asyncio.wait([ready], timeout=PENDING_SECONDS)
        if not done:
            what = " and ".join(f"{count} {name}" for name, count in self._bundle.items())
            each = f"{self._num_ranks} times {what}" if self._num_ranks > 1 else what
            print(f"note: an engine waits until the Ray cluster has {each} for it.", file=sys.stderr, flush=True)
        await ready

    def close(self) -> None:
        import ray

        ray.shutdown()


class RayEngine:
    """A RunningEngine (local_engines.py)."""

    def __init__(self, group: Any, seats: Sequence[Any], address: str) -> None:
        self._group, self._seats, self.address = group, seats, address
        self._waiting = asyncio.ensure_future(self._wait())

    def tell(self, message: msgspec.Struct) -> None:
        self._seats[0].tell.remote(json_line(message))

    async def wait(self) -> str:
        return await asyncio.shield(self._waiting)

    async def end(self, is_ready: bool) -> None:
        self._seats[0].end.remote(0 if is_ready else signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.wait(), STOP_SECONDS)
        _give_back(self._group, self._seats)

    async def _wait(self) -> str:
        """Without one of its ranks it is no engine any more."""
        watches = [self._watch(rank, seat) for rank, seat in enumerate(self._seats)]
        tasks = [asyncio.ensure_future(watch) for watch in (*watches, *map(self._ping, self._seats))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            for task in tasks:
                task.cancel()
            _give_back(self._group, self._seats)

    async def _watch(self, rank: int, seat: Any) -> str:
        import ray

        try:
            how = ending(await seat.wait.remote())
        except ray.exceptions.RayError:
            how = "its node was lost"
        return how if len(self._seats) == 1 else f"rank {rank}: {how}"

    async def _ping(self, seat: Any) -> str:
        import ray

        while True:
            try:
                await asyncio.wait_for(_of(seat.ping.remote()), SILENCE_SECONDS)
            except TimeoutError:
                return f"a node has not answered for {SILENCE_SECONDS:.0f} seconds"
            except ray.exceptions.RayError:
                return "a node was lost"
            await asyncio.sleep(PING_SECONDS)


def cores_each(cores: Sequence[int], num_ranks: int) -> int:
    """The most that each of so many ranks can have on nodes with these, at least 1."""
    most = max(cores, default=1)
    return next((each for each in range(most, 1, -1) if sum(count // each for count in cores) >= num_ranks), 1)


def rank_environments(places: Sequence[Place]) -> list[dict[str, str]]:
    """For each rank. Those of one node see all its GPUs of this engine, so that they can read each other's memory."""
    environments = []
    for rank, place in enumerate(places):
        here = [other for other, each in enumerate(places) if each.node == place.node]
        gpus = [gpu for other in here for gpu in places[other].gpus]
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
        if len(places) > 1:
            launch = Launch(rank, len(places), here.index(rank), places[0].host, places[0].ports[0])
            environment |= launch.environment()
        environments.append(environment)
    return environments


def _num_ranks(options: Mapping[str, Any]) -> int:
    """On a node: what a model is, is found out with torch, which the supervisor does without."""
    from slipstream.api.replicas import num_ranks

    return num_ranks(options)


def _knock(address: str) -> None:
    """Raise OSError where nobody listens at host:port. Ray itself tries for minutes, and then ends the process."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in host:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


async def _of(reference: Any) -> Any:
    return await reference


def _give_back(group: Any, seats: Sequence[Any]) -> None:
    import ray
    from ray.util.placement_group import remove_placement_group

    for seat in seats:
        ray.kill(seat)
    remove_placement_group(group)
