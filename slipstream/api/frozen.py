"""Frozen: what is there when an engine is ready stays, so the garbage collector need not look through it.

To look again and again took 200 ms that all requests waited. The collector is the process's: it goes back to work when
the last of the engines open in it is closed.
"""

import gc
import threading

_lock = threading.Lock()
_num_holders = 0


class Frozen:
    """From now until `release`; one for each engine."""

    def __init__(self) -> None:
        global _num_holders
        self._is_held = True
        with _lock:
            _num_holders += 1
            gc.freeze()

    def release(self) -> None:
        """Releasing twice does nothing."""
        global _num_holders
        with _lock:
            _num_holders -= self._is_held
            if self._is_held and not _num_holders:
                gc.unfreeze()
            self._is_held = False
