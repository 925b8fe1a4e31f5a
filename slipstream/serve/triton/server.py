"""The tritonserver program: where it is, and what the one inside the nvidia-pytriton wheel needs to run.

That wheel has the server and its Python backend, but in folders where the server does not look (found by trying;
the wheel's version is pinned in pyproject.toml): a private folder of links puts them together.
"""

import ctypes
import os
import sys
import sysconfig
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import Distribution
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from slipstream.errors import UsageError

IN_CONTAINER = Path("/opt/tritonserver/bin/tritonserver")
IN_WHEEL = Path("pytriton/tritonserver/bin/tritonserver")
INSTALL = "pip install 'slipstream[triton-server]' (Linux, Python 3.11), or use NVIDIA's tritonserver container"
WORKING_PYTHON = (3, 11)  # of the wheel: calls between models crash with 3.12, and 3.13 has no NumPy 1


def find_server(given: Path | None, environment: Mapping[str, str] = os.environ) -> Path:
    """--tritonserver, $TRITONSERVER, PATH, NVIDIA's container, the wheel; the first there is. Raises UsageError."""
    for what, path in (("--tritonserver", given), ("TRITONSERVER", environment.get("TRITONSERVER"))):
        if path:
            if os.access(path, os.X_OK) and Path(path).is_file():
                return Path(path).absolute()
            raise UsageError(f"{what} is {path}, which is no program; name the tritonserver file itself.")
    on_path = which("tritonserver", path=environment.get("PATH"))
    if on_path:
        return Path(on_path)
    spec = find_spec("pytriton")  # located, not imported
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for found in (IN_CONTAINER, *(Path(folder).parent / IN_WHEEL for folder in folders)):
        if os.access(found, os.X_OK):
            return found
    raise UsageError(f"No tritonserver was found (looked at --tritonserver, PATH and the wheel); {INSTALL}.")


def site_of_wheel(program: Path) -> Path | None:
    """The folder that nvidia-pytriton is installed in, where the program is the one inside it."""
    depth = len(IN_WHEEL.parts)
    return program.parents[depth - 1] if program.parts[-depth:] == IN_WHEEL.parts else None


class WheelServer:
    """What the wheel's server is started with beside its own options. `folder`: empty, to be filled with links."""

    def __init__(self, site: Path, folder: Path) -> None:
        """Raises UsageError where this Python could not run its models: the server itself would hang or crash."""
        self._wheel, self._folder = site / "pytriton" / "tritonserver", folder
        # The wheel's folder may be one of its own, beside the environment (pip install --target).
        self._module_folders = [*([] if str(site) in sys.path else [str(site)]), *filter(None, sys.path)]
        self._libraries = sysconfig.get_config_var("LIBDIR") or ""
        self._check_python()
        self._check_numpy()
        self._check_libpython()
        self._link()

    @property
    def arguments(self) -> list[str]:
        return [f"--backend-directory={self._folder}"]

    @property
    def environment(self) -> dict[str, str]:
        """The server's Python finds its home by PATH, and its library by LD_LIBRARY_PATH."""
        before = {name: os.environ.get(name, "") for name in ("PATH", "LD_LIBRARY_PATH")}
        first = {"PATH": str(Path(sys.prefix) / "bin"), "LD_LIBRARY_PATH": self._libraries}
        return {name: os.pathsep.join(filter(None, (first[name], before[name]))) for name in first}

    def _check_python(self) -> None:
        if sys.version_info[:2] != WORKING_PYTHON:
            raise UsageError(
                f"This is Python {sys.version_info.major}.{sys.version_info.minor}, with which the models of the "
                "tritonserver in nvidia-pytriton crash; use Python 3.11, or NVIDIA's tritonserver container."
            )

    def _check_numpy(self) -> None:
        """With NumPy 2 everything would be ready, and crash at the first text (python_backend#384)."""
        numpy = next(iter(Distribution.discover(name="numpy", path=self._module_folders)), None)
        if numpy is None or int(numpy.version.partition(".")[0]) >= 2:
            raise UsageError(
                f"NumPy is {numpy.version if numpy else 'missing'}, and the tritonserver in nvidia-pytriton needs one "
                f"below 2; {INSTALL}."
            )

    def _check_libpython(self) -> None:
        """Without it the server would wait for its models for ever."""
        name = f"libpython{sys.version_info.major}.{sys.version_info.minor}.so.1.0"
        if (Path(self._libraries) / name).is_file():
            return
        with suppress(OSError):
            ctypes.CDLL(name)
            return
        raise UsageError(
            f"{name} is not in {self._libraries or 'any folder'}: this Python was built without it; install a Python "
            "with a shared library (apt-get install libpython3.11, or pyenv with --enable-shared)."
        )

    def _link(self) -> None:
        python = self._folder / "python"
        python.mkdir(parents=True)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        backend = self._wheel / "backends" / "python"
        utilities = backend / "triton_python_backend_utils.py"
        parts = (backend / "libtriton_python.so", self._stub(version))
        for part in (*parts, utilities):
            if not part.is_file():
                raise UsageError(f"{part} is missing; install again: pip install --force-reinstall nvidia-pytriton.")
        for part in parts:
            (python / part.name).symlink_to(part)
        # The server's Python ignores PYTHONPATH, and looks for modules in the working directory first. This is the
        # first module that our models import: from here on they see what we see.
        first = f"import sys\n\nsys.path[:0] = {self._module_folders!r}\nsys.path.remove('')\n\n"
        (python / utilities.name).write_text(first + utilities.read_text(encoding="utf-8"), encoding="utf-8")

    def _stub(self, version: str) -> Path:
        return self._wheel / "python_backend_stubs" / version / "triton_python_backend_stub"
