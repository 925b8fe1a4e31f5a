"""What deploy/ holds, looked at by the tools that will read it, and against the server that it starts."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from slipstream.cli._app import make_app
from slipstream.serve.supervisor import STOP_SECONDS
from tests.serve.conftest import Server, serving
from tests.serve.conftest import engine as engine  # a fixture here too

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KEY = "0123456789abcdef"
BEARER = {"Authorization": f"Bearer {KEY}"}

# scripts/_setup.sh puts them there.
_FOLDERS = (Path(sys.executable).parent, Path(sys.prefix) / "prometheus" / "usr" / "bin")


def tool(name: str) -> str:
    path = shutil.which(name, path=os.pathsep.join([*map(str, _FOLDERS), os.environ.get("PATH", "")]))
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def run_tool(name: str, *words: object, **more: Any) -> str:
    """What it prints; it has to be content."""
    done = subprocess.run([tool(name), *map(str, words)], capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def serve_options(words: Sequence[str]) -> dict[str, Any]:
    """The options of `slipstream serve`, as it reads them; flags that it does not have are an error."""
    app: Any = typer.main.get_command(make_app(["serve", "run"]))
    options: dict[str, Any] = app.commands["serve"].make_context("serve", list(words)).params
    return options


def longest_stop(options: dict[str, Any]) -> float:
    """Seconds from SIGTERM to the end: fronts and then the engine get STOP_SECONDS more than the requests."""
    return float(options["drain_timeout"]) + 2 * STOP_SECONDS


def yaml_of(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def guarded(engine: Path) -> Iterator[Server]:
    with serving(engine, SLIPSTREAM_API_KEY=KEY) as server:
        yield server
