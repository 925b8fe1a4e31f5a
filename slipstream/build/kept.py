"""The folder on this machine where we keep what can be made again: engines, and the kernels that Triton compiled."""

import contextlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """$SLIPSTREAM_CACHE, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slipstream"
    return Path(os.environ.get("SLIPSTREAM_CACHE") or default)


def keep_compiled_kernels() -> None:
    """Have Triton keep its binaries beside the engines, unless the user chose a place: one folder to keep or to mount.

    Triton names them by source, GPU and compiler. (docs/design-opinions.md: why they are not in the engine folder.)
    """
    if "TRITON_CACHE_DIR" not in os.environ:
        folder = cache_folder() / "triton"
        with contextlib.suppress(OSError):  # where we cannot write, Triton's own place may do
            folder.mkdir(parents=True, exist_ok=True)
            os.environ["TRITON_CACHE_DIR"] = str(folder)
