"""One front of the server: HTTP on a socket that it shares with the other fronts, and a Frontend to the engines.

    python -m slipstream.serve.front_process       stdin: lines of JSON from the parent, which messages.py describes

It takes connections once an engine is ready, and says what each is in a line on stdout whenever it is. SIGTERM lets its
requests finish.
"""

import asyncio
import gc
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import msgspec
import uvicorn
import uvloop
from fastapi import FastAPI

from slipstream.serve.app import ServeConfig, make_app
from slipstream.serve.frontend import Frontend
from slipstream.serve.messages import (
    LOAD_SECONDS,
    EngineEnded,
    EngineLeaves,
    EngineStarted,
    FrontLoad,
    FrontReady,
    FrontSetup,
    Ready,
    ToFront,
    ToParent,
    json_line,
)

LONGEST_LINE = 1 << 24  # bytes; a chat template is in the first


async def _serve() -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    parent = asyncio.StreamReader(limit=LONGEST_LINE)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(parent), sys.stdin)
    setup = msgspec.json.decode(await parent.readline(), type=FrontSetup)
    config = msgspec.convert(setup.config, ServeConfig)
    ready, is_open = asyncio.Event(), asyncio.Event()
    early: list[FrontReady] = []  # said once clients are let in, for which an engine has to be ready

    def note_ready(replica: int, engine: Ready) -> None:
        ready.set()
        said = FrontReady(replica, engine)
        _say(said) if is_open.is_set() else early.append(said)

    frontend = Frontend(
        setup.name,
        on_ready=note_ready,
        num_replicas=config.replicas,
        max_replicas=config.max_replicas,
        num_prefill_replicas=config.prefill_replicas,
        max_input_len=config.max_input_len,
        chat_template=config.chat_template,
        request_timeout=config.request_timeout,
        step_timeout=config.step_timeout,
    )
    following = asyncio.create_task(_follow(parent, frontend))
    stopping, starting = asyncio.create_task(stop.wait()), asyncio.create_task(ready.wait())
    ends, reporting = {following, stopping}, list[asyncio.Task[None]]()
    try:
        await asyncio.wait({*ends, starting}, return_when=asyncio.FIRST_COMPLETED)
        if not ready.is_set():
            return
        app = make_app(frontend, config)
        gc.freeze()  # what is here stays: looking through it for garbage would hold requests up
        server = _Server(_uvicorn_config(app, config))
        serving = asyncio.create_task(server.serve([socket.socket(fileno=setup.listener)]))
        async with _rpc(app, config):
            is_open.set()
            for said in early:
                _say(said)
            if config.most_replicas > config.replicas:
                reporting.append(asyncio.create_task(_report(frontend)))
            await asyncio.wait({serving, *ends}, return_when=asyncio.FIRST_COMPLETED)
            server.should_exit = True  # takes no new connections, and waits for those in use
        await serving
        if following.done():
            following.result()  # a defect of ours
    finally:
        tasks = (following, stopping, starting, *reporting)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await frontend.close()


def _say(message: ToParent) -> None:
    sys.stdout.buffer.write(json_line(message))
    sys.stdout.buffer.flush()


async def _report(frontend: Frontend) -> None:
    while True:
        _say(FrontLoad(frontend.in_flight()))
        await asyncio.sleep(LOAD_SECONDS)


async def _follow(parent: asyncio.StreamReader, frontend: Frontend) -> None:
    """Do as the parent says, until there is none."""
    try:
        async for line in parent:
            match msgspec.json.decode(line, type=ToFront):
                case EngineStarted(replica, address):
                    frontend.attach(replica, address)
                case EngineLeaves(replica):
                    frontend.leave(replica)
                case EngineEnded(replica, why):
                    await frontend.detach(replica, f"the engine process ended ({why}); try again in a few seconds.")
    finally:
        await frontend.detach_all()


@asynccontextmanager
async def _rpc(app: FastAPI, config: ServeConfig) -> AsyncIterator[None]:
    """gRPC beside HTTP, where it was asked for; it ends as that does."""
    if config.grpc_port is None:
        yield
        return
    from slipstream.serve.kserve.rpc import start_rpc  # of an extra

    server = await start_rpc(app.state.kserve, config)
    yield
    await server.stop(config.drain_timeout)


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours: uvicorn would raise them again once it has stopped."""
        yield


def _uvicorn_config(app: FastAPI, config: ServeConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        http="httptools",
        timeout_graceful_shutdown=max(1, round(config.drain_timeout)),
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
    )


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve())
