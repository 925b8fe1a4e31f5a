"""The C++ sources become a shared library, once for each machine: kept in the user's cache folder, found by a digest.

There is a library for each level of instructions below; the highest that the CPU has is taken. $SLIPSTREAM_CPU_LEVEL
asks for a lower one, or for none: `torch` leaves a CPU to torch's own kernels.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from slipstream.errors import UsageError
from slipstream.schema.folders import cache_folder

SOURCES = Path(__file__).parent / "src"
NO_LEVEL = "torch"
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-pthread", "-fvisibility=default")


class Level(NamedTuple):
    flags: tuple[str, ...]  # for the compiler
    needs: frozenset[str] = frozenset()  # of what /proc/cpuinfo lists


_X86_64_V3 = frozenset(("avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"))
_X86_64_V4 = _X86_64_V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
LEVELS: dict[str, dict[str, Level]] = {  # by machine; the highest first
    "x86_64": {
        "avx512_vnni": Level(("-march=x86-64-v4", "-mavx512vnni"), _X86_64_V4 | {"avx512_vnni"}),
        "avx2": Level(("-march=x86-64-v3",), _X86_64_V3),
        "baseline": Level(()),
    },
    "aarch64": {"baseline": Level(())},
}


class CompileError(Exception):
    """There is no compiler, or it failed; the message says which."""


def levels_here() -> Mapping[str, Level]:
    """What this machine can run, the best first; nothing on machines that the sources were not written for."""
    found = LEVELS.get(platform.machine(), {}) if os.name == "posix" else {}
    features = _cpu_features()
    return {name: level for name, level in found.items() if level.needs <= features}


def chosen_level() -> str | None:
    """The level to run, None for torch's kernels. Raises UsageError for one that this machine has not."""
    levels, asked = list(levels_here()), os.environ.get("SLIPSTREAM_CPU_LEVEL")
    if asked == NO_LEVEL or not (asked or levels):
        return None
    if asked and asked not in levels:
        raise UsageError(f"SLIPSTREAM_CPU_LEVEL is {asked!r}; this machine has {', '.join([*levels, NO_LEVEL])}.")
    return asked or levels[0]


def compiled_library(level: str) -> Path:
    """The library of a level, compiled now unless it was before. Raises CompileError."""
    flags = (*_FLAGS, *levels_here()[level].flags)
    library = cache_folder() / "cpu" / f"{level}-{_digest(flags)}.so"
    if not library.is_file():
        _compile(flags, library)
    return library


def _compile(flags: tuple[str, ...], library: Path) -> None:
    compiler = find_compiler()
    sources = sorted(SOURCES.glob("*.cpp"))
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=".", dir=library.parent) as scratch,
            ThreadPoolExecutor(os.cpu_count()) as threads,
        ):
            objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
            commands = [
                [compiler, *flags, "-c", str(source), "-o", str(target)]
                for source, target in zip(sources, objects, strict=True)
            ]
            list(threads.map(_run, commands))
            linked = Path(scratch) / library.name
            _run([compiler, "-shared", "-pthread", *map(str, objects), "-o", str(linked)])
            linked.replace(library)  # whole or not at all, whoever else compiles it meanwhile
    except OSError as error:
        raise CompileError(f"{library.parent} cannot be written ({error.strerror})") from None


def find_compiler() -> str:
    """$CXX, or the first C++ compiler on PATH."""
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        found = shutil.which(name)
        if found:
            return found
    raise CompileError(f"there is no C++ compiler ({asked or 'c++, g++ or clang++'}) on PATH")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise CompileError(f"{command[0]} failed: {lines[0].strip() if lines else f'exit code {done.returncode}'}")


def _digest(flags: tuple[str, ...]) -> str:
    """Of everything that shapes the library but the compiler, a newer one of which gives no other answers."""
    digest = hashlib.sha256("\0".join((platform.machine(), *flags)).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".cpp", ".h"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


@cache
def _cpu_features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))
