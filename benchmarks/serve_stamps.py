"""A plugin for an engine's process that is measured: when each sequence came, and its tokens, when each left.

A line of JSON a sequence goes to $SLIPSTREAM_STAMPS, under its seed. Times are of time.monotonic(), which is one clock
for all processes of a machine.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from slipstream.serve.ledger import Ledger

_file = Path(os.environ["SLIPSTREAM_STAMPS"]).open("a", buffering=1, encoding="utf-8")  # noqa: SIM115 - to the end
_stamps: dict[str, dict[str, Any]] = {}
_open, _note = Ledger.open, Ledger.note


def stamped_open(ledger: Ledger, request: Any, front: bytes, sent: float, **more: Any) -> None:
    _stamps[request.request_id] = {"seed": request.seed, "came": time.monotonic(), "left": []}
    _open(ledger, request, front, sent, **more)


def stamped_note(ledger: Ledger, event: Any) -> None:
    _note(ledger, event)
    stamps = _stamps[event.request_id]
    left = time.monotonic()
    stamps["left"] += [(left, token_id) for token_id in event.token_ids]
    if event.finish_reason is not None:
        _file.write(json.dumps(_stamps.pop(event.request_id)) + "\n")


Ledger.open, Ledger.note = stamped_open, stamped_note  # type: ignore[method-assign]
