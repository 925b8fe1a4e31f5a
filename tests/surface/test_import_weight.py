"""`import slipstream` and `slipstream --help` are light: no torch and nothing else that takes its time."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "torch", "numpy", "tokenizers", "jinja2", "huggingface_hub", "transformers", "gguf", "safetensors", "triton",
    "fastapi", "uvicorn", "zmq", "msgspec",
}  # fmt: skip
CPU_SECONDS = 0.3  # generous: 0.02 to 0.15 where this was written

STARTS = {
    "import slipstream": "import slipstream",
    "import slipstream.cli": "import slipstream.cli",
    "slipstream --help": "import slipstream.cli; slipstream.cli.main(['--help'])",
    "slipstream --version": "import slipstream.cli; slipstream.cli.main(['--version'])",
}


@pytest.mark.parametrize("start", STARTS)
def test_heavy_packages_are_not_imported(start: str) -> None:
    script = f"""
import sys
try:
    {STARTS[start]}
except SystemExit as end:
    assert not end.code, end.code
print("heavy:", *sorted({HEAVY} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["heavy:"]


@pytest.mark.parametrize("start", STARTS)
def test_the_start_takes_little_cpu_time(start: str, tmp_path: Path) -> None:
    """As a user has it: with bytecode, which the first of these runs writes, whatever the environment says."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)
    seconds = min(cpu_seconds(STARTS[start], environment) for _ in range(5))
    print(f"{start}: {seconds * 1000:.0f} ms of CPU time")
    assert seconds < CPU_SECONDS


def cpu_seconds(script: str, environment: dict[str, str]) -> float:
    """User and system time of a Python process; unlike wall time, a busy machine hardly changes it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL, check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
