"""docs/adding/kernel.md: its kernel passes its test, and its commands run an engine with it."""

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from slipstream.build import build, timing
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.kernels.arithmetic import soft_cap
from slipstream.models import gemma2
from slipstream.schema.build import BuildConfig
from tests.cli.conftest import Call, call, write_tokenizer
from tests.surface.sources import ROOT

pytest.importorskip("triton")

__all__ = ["call"]  # a fixture of tests/cli, where the other pages' commands are typed

PAGE = (ROOT / "docs" / "adding" / "kernel.md").read_text(encoding="utf-8")
MODULES = ("soft_cap_kernel", "test_soft_cap")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to be in, with the page's files."""
    for name, block in zip(MODULES, re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), strict=True):
        assert block.startswith(f"# {name}.py\n")
        (tmp_path / f"{name}.py").write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    soft_cap.kernels.pop("triton", None)  # other tests walk the candidates that are ours
    for name in MODULES:
        sys.modules.pop(name, None)


def test_the_page_s_kernel_passes_the_page_s_test(here: Path) -> None:
    module = importlib.import_module("test_soft_cap")
    marks = {mark.args[0]: mark.args[1] for mark in module.test_soft_cap.pytestmark}
    for shape in marks["shape"]:
        for dtype, tolerance in marks["dtype", "tolerance"]:
            module.test_soft_cap(shape, dtype, tolerance)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    apart = torch.randn(3, 16, device=device)[:, :8]
    torch.testing.assert_close(soft_cap.kernels["triton"].function(apart, 2.0), 2 * torch.tanh(apart / 2))


def test_the_page_s_commands_run(here: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_ROUND_SECONDS", 1e-4)
    model = write_random_model(here / "model", gemma2.TINY | {"vocab_size": 320})
    write_tokenizer(model, vocab_size=320)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = BuildConfig(max_batch_size=2, max_num_tokens=16)
    build(open_checkpoint(resolve(model)), here / "ENGINE", config, device=device)
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    lines = block.splitlines()
    assert lines[0] == "TRITON_INTERPRET=1 python -m pytest test_soft_cap.py"
    bench, run = (call(*shlex.split(line)[1:]) for line in lines[1:])
    assert (bench.code, run.code) == (0, 0), bench.err + run.err
    assert re.search(r"^soft_cap +\d+×320 ", bench.out, re.MULTILINE)
    assert run.out.startswith('Input [Text 0]: "Hello"\n')
