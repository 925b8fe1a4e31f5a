"""The folder on this machine where we keep what can be made again: engines, and kernels compiled for its devices."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$SLIPSTREAM_CACHE, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slipstream"
    return Path(os.environ.get("SLIPSTREAM_CACHE") or default)
