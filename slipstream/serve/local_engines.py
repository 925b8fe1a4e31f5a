"""Engines as processes of this machine: children of the supervisor, whose stdin is their lifeline."""

import asyncio
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any, Protocol

import msgspec

from slipstream.serve.kv_folder import KVFolder
from slipstream.serve.messages import EngineSetup, json_line

STOP_SECONDS = 10.0  # for a process to end by itself


class EngineLost(Exception):
    """It could not be started, for the reason given."""


class RunningEngine(Protocol):
    """An engine's process, wherever it is."""

    address: str  # of its socket

    def tell(self, message: msgspec.Struct) -> None: ...
    async def wait(self) -> str:
        """How it ended."""

    async def end(self, is_ready: bool) -> None:
        """Bring its end about. is_ready: it has opened the model."""


class Engines(Protocol):
    """Where engines run."""

    async def start(self, setup: EngineSetup) -> RunningEngine:
        """Raises EngineLost."""

    def close(self) -> None: ...


class LocalEngines:
    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="slipstream-"))  # of the engines' sockets; nobody else's to enter

    async def start(self, setup: EngineSetup) -> "LocalEngine":
        address = f"ipc://{self._folder}/{setup.name}"
        process = await start_child("slipstream.serve.engine_process", setup, address)
        return LocalEngine(process, address, KVFolder(setup.name))

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class LocalEngine:
    def __init__(self, process: Process, address: str, kv_folder: KVFolder) -> None:
        self._process, self.address, self._kv_folder = process, address, kv_folder

    def tell(self, message: msgspec.Struct) -> None:
        tell(self._process, message)

    async def wait(self) -> str:
        how = ending(await self._process.wait())
        self._kv_folder.remove()  # which a process that was killed has left
        return how

    async def end(self, is_ready: bool) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if not is_ready:  # it is still opening the model, and would not look
            send_signal(self._process, signal.SIGTERM)
        await ended(self._process, STOP_SECONDS)
        self._kv_folder.remove()


# --- children, of which fronts are some, too ---


async def start_child(module: str, setup: msgspec.Struct, *arguments: str, **more: Any) -> Process:
    # A session of its own: Ctrl-C is the parent's to handle, and ends the engine after the requests.
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, stdin=PIPE, start_new_session=True, **more
    )
    tell(process, setup)
    return process


def tell(process: Process, message: msgspec.Struct) -> None:
    assert process.stdin is not None
    process.stdin.write(json_line(message))


def send_signal(process: Process, number: int) -> None:
    if process.returncode is None:
        process.send_signal(number)


async def ended(process: Process, seconds: float) -> None:
    """Wait for its end, and bring it about where it takes longer."""
    try:
        await asyncio.wait_for(process.wait(), seconds)
    except TimeoutError:
        send_signal(process, signal.SIGKILL)
        await process.wait()


def ending(exit_code: int) -> str:
    return f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
