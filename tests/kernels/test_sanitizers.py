"""The C++ kernels under AddressSanitizer and UBSan: every op's cases, in a process with a library of both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream.kernels.cpu.compiler import CompileError, find_compiler, levels_here

FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g1")
LINKED = "-fsanitize=address,undefined"
PROGRAM = f"""
import sys
import pytest
from slipstream.kernels.cpu import compiler

plain = compiler._run
compiler._run = lambda command: plain([*command, {LINKED!r}] if "-shared" in command else command)
compiler._FLAGS += {FLAGS!r}
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/kernels/test_ops.py", "-k", "native and computes_what"]))
"""


def runtime(name: str) -> str:
    """The sanitizer's library, which must be there before Python's own allocations."""
    try:
        found = subprocess.run(
            [find_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
    except (CompileError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no compiler that knows sanitizers: {error}")
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        pytest.skip(f"the compiler has no {name}")
    return str(path.resolve())


@pytest.mark.skipif(not levels_here(), reason="no kernels for this CPU")
def test_every_kernel_under_both_sanitizers(tmp_path: Path) -> None:
    environment = os.environ | {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch free little at their end
        "SLIPSTREAM_CACHE": str(tmp_path), "SLIPSTREAM_CPU_LEVEL": next(iter(levels_here())), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "[100%]" in done.stdout and list((tmp_path / "cpu").glob("*.so"))
