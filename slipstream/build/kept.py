"""Triton's binaries are kept where we keep what can be made again."""

import contextlib
import os

from slipstream.schema.folders import cache_folder


def keep_compiled_kernels() -> None:
    """Have Triton keep its binaries beside the engines, unless the user chose a place: one folder to keep or to mount.

    Triton names them by source, GPU and compiler. (docs/design-opinions.md: why they are not in the engine folder.)
    """
    if "TRITON_CACHE_DIR" not in os.environ:
        folder = cache_folder() / "triton"
        with contextlib.suppress(OSError):  # where we cannot write, Triton's own place may do
            folder.mkdir(parents=True, exist_ok=True)
            os.environ["TRITON_CACHE_DIR"] = str(folder)
