"""What a user adds to a build from outside the package: passes, and the modules that declare their ops.

A pass is named `module:attribute` (the module is found in the current folder or on PYTHONPATH), or by the name under
which an installed package offers it as an entry point of the group `slipstream.passes`. Nothing is imported that the
user did not name: neither what else is installed, nor what an engine file asks for.
"""

import hashlib
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from slipstream.build.pipeline import Pass
from slipstream.errors import UsageError

ENTRY_POINTS = "slipstream.passes"


def import_plugin(module: str) -> ModuleType:
    """Import a user's module, also from the current folder. Raises UsageError where that fails."""
    here = str(Path.cwd())
    sys.path.append(here)  # last, so that it hides nothing
    try:
        return import_module(module)
    except Exception as error:
        raise UsageError(
            f"The module {module!r} cannot be imported ({type(error).__name__}: {error}); it must be a Python module "
            "in the current folder or on PYTHONPATH."
        ) from None
    finally:
        sys.path.remove(here)


def load_passes(names: Sequence[str]) -> tuple[Pass, ...]:
    """The passes of these names, in this order. Raises UsageError for one that is not there or is no pass."""
    return tuple(_load(name) for name in names)


def digest_of_sources(names: Sequence[str]) -> str:
    """sha256 of the Python files that the passes come from: the module's own, or all of its package."""
    digest = hashlib.sha256()
    for name in names:
        module = import_plugin(_target(name).partition(":")[0])
        package = sys.modules[module.__name__.partition(".")[0]]
        for folder in getattr(package, "__path__", ()):
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(file.read_bytes())
        if not hasattr(package, "__path__") and module.__file__ is not None:
            digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


def _load(name: str) -> Pass:
    module, _, attribute = _target(name).partition(":")
    found: Any = getattr(import_plugin(module), attribute, None)
    is_pass = all(isinstance(getattr(found, each, None), str) for each in ("name", "benefit"))
    if not is_pass or not callable(getattr(found, "run", None)):
        raise UsageError(
            f"{name} is no pass; it must be a Rewrite(name, benefit, rules), or have a name, a benefit and run(graph)."
        )
    return found


def _target(name: str) -> str:
    """`module:attribute` of a pass."""
    if ":" in name:
        return name
    offered = {each.name: each.value for each in entry_points(group=ENTRY_POINTS)}
    if name not in offered:
        known = ", ".join(sorted(offered)) or "none"
        raise UsageError(
            f"No installed package offers a pass called {name!r} (there are: {known}); write it as module:name."
        )
    return offered[name]
