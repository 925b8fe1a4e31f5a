"""Opens the drafter that an engine is started with."""

from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from slipstream.errors import UsageError
from slipstream.schema.speculative import Speculation
from slipstream.speculative import drafter as interface
from slipstream.speculative.drafter import AnyDrafter, DeviceDrafter, Drafter, Target

ENTRY_POINTS = "slipstream.drafters"


def open_drafter(speculation: Speculation, target: Target) -> AnyDrafter:
    """Raises UsageError for a method that is not there, for options it does not know, and for what is no drafter."""
    kind = _find(speculation.method)
    if not (isinstance(kind, type) and issubclass(kind, (Drafter, DeviceDrafter))):
        raise UsageError(
            f"The drafter {speculation.method!r} is {kind!r}; it must be a class derived from Drafter or DeviceDrafter."
        )
    return kind.class_for(target.device, target.max_seq_len)(speculation, target)


def methods() -> list[str]:
    folder = Path(interface.__file__).parent
    return sorted(path.parent.name for path in folder.glob("*/drafter.py"))


def _find(method: str) -> Any:
    if method in methods():
        return import_module(f"slipstream.speculative.{method}.drafter").Drafter
    offered = {each.name: each for each in entry_points(group=ENTRY_POINTS)}
    if method not in offered:
        known = ", ".join([*methods(), *sorted(offered)])
        raise UsageError(f"speculative names the method {method!r}, which is not there; there are: {known}.")
    try:
        return offered[method].load()
    except Exception as error:
        raise UsageError(
            f"The drafter {method!r} cannot be imported ({type(error).__name__}: {error}); repair its package."
        ) from error
