"""docs/serving/options.md: its file has every option of `slipstream serve` with its default, and can be loaded."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from slipstream.cli._app import make_app
from slipstream.errors import UsageError

PAGE = (Path(__file__).parents[2] / "docs" / "serving" / "options.md").read_text(encoding="utf-8")
NO_DEFAULT = r"^# (?=\w+: )"


@pytest.fixture(scope="module")
def example() -> str:
    [block] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    return str(block)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy: `threads` sets OMP_NUM_THREADS."""
    monkeypatch.setattr(os, "environ", os.environ.copy())


def loaded(text: str, folder: Path) -> dict[str, Any]:
    """The options that `serve --config` makes of a file, whose values they check."""
    file = folder / "slipstream.yaml"
    file.write_text(text, encoding="utf-8")
    app: Any = typer.main.get_command(make_app(["serve", "run"]))
    options: dict[str, Any] = app.commands["serve"].make_context("serve", ["--config", str(file)]).params
    return {name: value for name, value in options.items() if name != "config"}


def test_its_values_are_the_defaults(example: str, tmp_path: Path) -> None:
    assert loaded(example, tmp_path) == loaded("model: smollm2", tmp_path)


def test_it_names_every_option_once_and_each_can_be_given(example: str, tmp_path: Path) -> None:
    complete = re.sub(NO_DEFAULT, "", example, flags=re.MULTILINE)
    names = re.findall(r"^(\w+):", complete, re.MULTILINE)
    options = loaded(complete, tmp_path)
    assert len(names) == len(set(names)) and set(names) == set(options)
    defaults = loaded(example, tmp_path)
    without = re.findall(NO_DEFAULT + r"(\w+)", example, re.MULTILINE)
    assert without and all(options[name] != defaults[name] for name in without)
    given = yaml.safe_load(complete)
    assert options["grpc_port"] == given["grpc_port"] and options["api_key"] == given["api_key"]


def test_other_names_are_names(tmp_path: Path) -> None:
    others = re.findall(r"`(\w+)`", PAGE.rpartition("work as well:")[2])
    assert len(others) == 5
    for name in others:
        loaded(f"{name}: 1", tmp_path)
        with pytest.raises(UsageError, match="which is no option"):
            loaded(f"{name}s: 1", tmp_path)
