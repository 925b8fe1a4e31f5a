"""The unit, read by systemd's own tools; and the server's word to the service manager."""

import shutil
import socket
import sys
from collections.abc import Iterator
from configparser import RawConfigParser
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from slipstream.serve.service_manager import tell_service_manager
from tests.deploy.conftest import DEPLOY, longest_stop, run_tool, serve_options
from tests.serve.conftest import START_SECONDS, serving

UNIT = DEPLOY / "systemd" / "slipstream.service"


class _Unit(RawConfigParser):
    def optionxform(self, name: str) -> str:  # keys are not in lower case
        return name


@pytest.fixture(scope="module")
def service() -> Any:
    unit = _Unit(strict=False)
    unit.read(UNIT)
    return unit["Service"]


def test_systemd_verifies_it(tmp_path: Path) -> None:
    installed = Path(sys.executable).with_name("slipstream")
    text = UNIT.read_text(encoding="utf-8").replace("/opt/slipstream/bin/slipstream", str(installed))
    (tmp_path / UNIT.name).write_text(text, encoding="utf-8")
    assert not run_tool("systemd-analyze", "verify", "--man=no", tmp_path / UNIT.name)


def test_systemd_finds_little_exposed() -> None:
    run_tool("systemd-analyze", "security", "--offline=yes", "--threshold=20", UNIT)  # tenths; 96 without hardening


def test_the_server_has_its_options_and_the_time_to_end(service: Any, tmp_path: Path) -> None:
    program, verb, *words = service["ExecStart"].split()
    assert (Path(program).name, verb) == ("slipstream", "serve")
    shutil.copy(UNIT.with_name("slipstream.yaml"), tmp_path)
    options = serve_options([word.replace("/etc/slipstream", str(tmp_path)) for word in words])
    assert options["host"] == "0.0.0.0"
    assert float(service["TimeoutStopSec"]) >= longest_stop(options)
    assert service["KillMode"] == "mixed"


def test_it_says_when_it_is_ready_and_when_it_stops(engine: Path, tmp_path: Path, service: Any) -> None:
    assert service["Type"] == "notify"
    with manager(str(tmp_path / "notify")) as said:
        with serving(engine, NOTIFY_SOCKET=str(tmp_path / "notify")):
            assert said.recv(100) == b"READY=1"
            said.setblocking(False)
            with pytest.raises(BlockingIOError):
                said.recv(100)
        assert said.recv(100) == b"STOPPING=1"


def test_a_manager_may_have_an_abstract_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with manager("\0slipstream-test") as said:
        monkeypatch.setenv("NOTIFY_SOCKET", "@slipstream-test")
        tell_service_manager("READY=1")
        assert said.recv(100) == b"READY=1"


@contextmanager
def manager(name: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as said:
        said.bind(name)
        said.settimeout(START_SECONDS)
        yield said
