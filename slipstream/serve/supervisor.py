"""The server's parent process: it holds the listening socket, and sees that there are so many engines and fronts.

It touches no request. What it tells its children, and how they end with it, is in messages.py.
"""

import asyncio
import secrets
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import msgspec

from slipstream.errors import SlipstreamError, UsageError
from slipstream.serve.app import ServeConfig
from slipstream.serve.local_engines import (
    STOP_SECONDS,
    EngineLost,
    Engines,
    LocalEngines,
    RunningEngine,
    ended,
    ending,
    send_signal,
    start_child,
    tell,
)
from slipstream.serve.messages import (
    LOAD_SECONDS,
    EngineEnded,
    EngineLeaves,
    EngineSetup,
    EngineStarted,
    FrontGone,
    FrontLoad,
    FrontSetup,
    Ready,
    ToFront,
    ToParent,
)
from slipstream.serve.ray_engines import RayEngines
from slipstream.serve.scaling import Scaling
from slipstream.serve.service_manager import tell_service_manager

RESTART_SECONDS = (0.0, 1.0, 5.0, 15.0, 30.0)  # between a death and the next start, by how many there were in a row
LONGEST_LINE = 1 << 24  # bytes of what a front says of its engine

OnReady = Callable[[Ready, str], None]


class StartFailed(SlipstreamError):
    """The first engine process, or front, ended before it was ready; it has said why on stderr."""


def run_server(options: Mapping[str, Any], config: ServeConfig, on_ready: OnReady, *, on_ray: bool = False) -> None:
    """Serve until SIGTERM or SIGINT, then let the requests in flight finish.

    options: of LLM(...), plain values.  on_ready: called with what the engine is and the server's address.
    on_ray: engines run on the nodes of a Ray cluster, fronts here.
    Raises UsageError for an address that cannot be had, StartFailed where the engine does not come up.
    """
    with (
        _listen(config, "--port", config.port) as listener,
        _with_grpc_port(config) as config,
        redirect_stdout(sys.stderr),  # what Ray prints of its nodes is for people, and stdout for programs
    ):
        engines = RayEngines.connect(options, config.num_engines) if on_ray else LocalEngines()
        try:
            asyncio.run(_run(Supervisor(options, config, engines, listener, on_ready)))
        finally:
            engines.close()


async def _run(supervisor: "Supervisor") -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    keepers = supervisor.start()
    stopping = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait({*keepers, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # why the start failed, or a defect of ours
    finally:
        await supervisor.close()
        for task in (*keepers, stopping):
            task.cancel()
        await asyncio.gather(*keepers, stopping, return_exceptions=True)


@dataclass
class _Replica:
    """The place of one engine process, whichever has it."""

    index: int
    engine: RunningEngine | None = None
    is_ready: bool = False
    was_ready: asyncio.Event = field(default_factory=asyncio.Event)  # ever
    is_wanted: asyncio.Event = field(default_factory=asyncio.Event)
    left_at: float | None = None  # since when fronts are told to send nothing there, so that it can end


class Supervisor:
    def __init__(
        self, options: Mapping[str, Any], config: ServeConfig, engines: Engines, listener: socket.socket,
        on_ready: OnReady,
    ) -> None:  # fmt: skip
        self._options, self._config, self._listener, self._on_ready = dict(options), config, listener, on_ready
        self._engines = engines
        self._replicas = [_Replica(index) for index in range(config.num_engines)]
        self._fronts: dict[str, Process] = {}
        self._ready: set[tuple[str, int]] = set()  # which front has said so of which engine
        self._loads: dict[str, tuple[float, FrontLoad]] = {}  # the last of each front, and when it came
        self._max_batch_size = 1  # of an engine, from when one is ready
        self._has_started = self._is_closing = False

    def start(self) -> Sequence[asyncio.Task[None]]:
        """Tasks that end when the server is closed, or cannot be started."""
        config = self._config
        staying = [*self._replicas[: config.replicas], *self._replicas[config.most_replicas :]]
        for replica in staying:
            replica.is_wanted.set()
        self._ready_at_start = config.num_fronts * len(staying)
        keepers = [self._keep_engine(replica) for replica in self._replicas]
        keepers += [self._keep_front() for _ in range(config.num_fronts)]
        if config.most_replicas > config.replicas:
            keepers.append(self._scale())
        return [asyncio.create_task(keeper) for keeper in keepers]

    async def close(self) -> None:
        """Fronts finish what they have, or what drain_timeout lets them; the engines end after them."""
        self._is_closing = True
        tell_service_manager("STOPPING=1")
        self._listener.close()
        for front in self._fronts.values():
            send_signal(front, signal.SIGTERM)
        seconds = self._config.drain_timeout + STOP_SECONDS
        await asyncio.gather(*(ended(front, seconds) for front in list(self._fronts.values())))
        await asyncio.gather(*(self._end_engine(replica) for replica in self._replicas))

    # --- engines ---

    async def _keep_engine(self, replica: _Replica) -> None:
        if replica.index:  # the first one builds the engine where there is none, and the others find it
            await self._replicas[0].was_ready.wait()
        num_deaths = 0
        while not self._is_closing:
            await replica.is_wanted.wait()
            why = await self._live_once(replica)
            if self._is_closing:
                return
            if not replica.is_wanted.is_set():
                num_deaths, replica.left_at = 0, None
                continue
            if not self._has_started:
                raise StartFailed(f"The engine could not be started ({why}).")
            num_deaths = 1 if replica.is_ready else num_deaths + 1  # in a row, of such as were never ready
            print(f"warning: the engine process ended ({why}); starting it again.", file=sys.stderr, flush=True)
            await asyncio.sleep(_pause(num_deaths))

    async def _live_once(self, replica: _Replica) -> str:
        """An engine process from its start to its end; returns how it ended."""
        replica.is_ready = False
        config = self._config
        setup = EngineSetup(
            secrets.token_hex(4), self._options, replica.index, len(self._replicas), config.max_queue_size,
            config.max_concurrent_requests, config.step_timeout, config.iteration_log, config.profile_dir,
            hands_over=config.prefill_replicas > 0,
        )  # fmt: skip
        try:
            engine = replica.engine = await self._engines.start(setup)
        except EngineLost as error:
            return str(error)
        self._tell_fronts(EngineStarted(replica.index, engine.address))
        why = await engine.wait()
        replica.engine = None
        self._tell_fronts(EngineEnded(replica.index, why))
        return why

    async def _end_engine(self, replica: _Replica) -> None:
        if replica.engine is not None:
            await replica.engine.end(replica.is_ready)

    # --- more engines, and fewer ---

    async def _scale(self) -> None:
        """One at a time, while all others take requests."""
        config, loop = self._config, asyncio.get_running_loop()
        scaling = Scaling(config.replicas, config.most_replicas, config.upscale_delay, config.downscale_delay)
        replicas = self._replicas[: config.most_replicas]
        while True:
            await asyncio.sleep(LOAD_SECONDS)
            leaving = [replica for replica in replicas if replica.left_at is not None]
            await asyncio.gather(*(self._end_engine(replica) for replica in leaving if self._is_left(replica)))
            there = [replica for replica in replicas if replica.is_wanted.is_set()]
            if leaving or not self._has_started or not all(replica.is_ready for replica in there):
                continue
            num_sequences = sum(sum(load.in_flight.values()) for _, load in self._loads.values())
            change = scaling.change(loop.time(), num_sequences, len(there), self._max_batch_size)
            if change:
                self._say_scaled(change, num_sequences, len(there))
            if change > 0:
                next(replica for replica in replicas if not replica.is_wanted.is_set()).is_wanted.set()
            if change < 0:
                last = there[-1]
                last.is_wanted.clear()
                last.left_at = loop.time()
                self._tell_fronts(EngineLeaves(last.index))

    def _is_left(self, replica: _Replica) -> bool:
        """No front has anything there, or will: each has said so since it was told."""
        assert replica.left_at is not None
        said = [self._loads.get(name) for name in self._fronts]
        return all(
            each is not None and each[0] > replica.left_at and replica.index not in each[1].in_flight for each in said
        )

    def _say_scaled(self, change: int, num_sequences: int, num_engines: int) -> None:
        what = "one more engine is started" if change > 0 else "one engine ends"
        at_once = num_engines * self._max_batch_size
        print(
            f"note: {what}; {num_sequences} sequences are in flight, and {at_once} run at a time.",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    # --- fronts ---

    async def _keep_front(self) -> None:
        num_deaths = 0
        while not self._is_closing:
            name = secrets.token_hex(4)
            setup = FrontSetup(name, self._listener.fileno(), asdict(self._config))
            front = self._fronts[name] = await start_child(
                "slipstream.serve.front_process", setup, stdout=PIPE, limit=LONGEST_LINE, pass_fds=[setup.listener]
            )
            for replica in self._replicas:
                if replica.engine is not None and replica.is_wanted.is_set():
                    tell(front, EngineStarted(replica.index, replica.engine.address))
            was_ready = await self._listen_to(name, front)
            why = ending(await front.wait())
            del self._fronts[name]
            self._loads.pop(name, None)
            self._ready = {(front_name, index) for front_name, index in self._ready if front_name != name}
            for replica in self._replicas:
                if replica.engine is not None:
                    replica.engine.tell(FrontGone(name))
            if self._is_closing:
                return
            if not self._has_started:
                raise StartFailed(f"A front could not be started ({why}).")
            num_deaths = 1 if was_ready else num_deaths + 1
            print(f"warning: a front ended ({why}); starting another one.", file=sys.stderr, flush=True)
            await asyncio.sleep(_pause(num_deaths))

    async def _listen_to(self, name: str, front: Process) -> bool:
        """A front says what an engine is, each time that one is ready, and its load. Returns whether it ever did."""
        assert front.stdout is not None
        was_ready = False
        async for line in front.stdout:
            said = msgspec.json.decode(line, type=ToParent)
            if isinstance(said, FrontLoad):
                self._loads[name] = asyncio.get_running_loop().time(), said
                continue
            was_ready = True
            self._max_batch_size = said.engine.runtime.max_batch_size
            replica = self._replicas[said.replica]
            replica.is_ready = True
            replica.was_ready.set()
            self._ready.add((name, said.replica))
            if not self._has_started and len(self._ready) == self._ready_at_start:
                self._has_started = True
                self._on_ready(said.engine, _url(self._config, self._listener))
                tell_service_manager("READY=1")
        return was_ready

    def _tell_fronts(self, message: ToFront) -> None:
        for front in self._fronts.values():
            tell(front, message)


def _pause(num_deaths: int) -> float:
    return RESTART_SECONDS[min(num_deaths, len(RESTART_SECONDS)) - 1]


def _listen(config: ServeConfig, flag: str, port: int) -> socket.socket:
    """Before the engine starts: an address that is taken shows at once."""
    try:
        return socket.create_server((config.host, port), family=_family(config), backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{config.host}:{port} cannot be listened on ({reason}); give another --host or {flag}."
        ) from None


@contextmanager
def _with_grpc_port(config: ServeConfig) -> Iterator[ServeConfig]:
    """Its number, where any will do. Each front listens on it by itself; it is held for those that come later."""
    if config.grpc_port is None:
        yield config
        return
    with _listen(config, "--grpc_port", config.grpc_port) as found:
        port = found.getsockname()[1]
    with socket.socket(_family(config)) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((config.host, port))
        yield replace(config, grpc_port=port)


def _family(config: ServeConfig) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in config.host else socket.AF_INET


def _url(config: ServeConfig, listener: socket.socket) -> str:
    scheme = "https" if config.ssl_certfile else "http"
    host = f"[{config.host}]" if ":" in config.host else config.host
    more = "" if config.grpc_port is None else f" and grpc://{host}:{config.grpc_port}"
    return f"{scheme}://{host}:{listener.getsockname()[1]}{more}"
