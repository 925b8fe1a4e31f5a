"""One of the ranks after the first, which is the parent of this process.

    python -m slipstream.runtime.rank_process      stdin: lines of JSON, a RankSetup and then the plans of steps

It computes its part of each step and says on stdout that it lives. It ends when its stdin does: whatever happens to the
parent, no rank stays behind.
"""

import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import torch

from slipstream.engine.choices import Choices
from slipstream.engine.folder import open_engine
from slipstream.errors import SlipstreamError
from slipstream.runtime.ranks import BEAT_SECONDS, ProcessRanks, plan_from_json
from slipstream.runtime.worker.start import StartOptions, open_worker, use_threads
from slipstream.schema.mapping import Mapping


def main() -> None:
    said = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else prints here is for people
    setup = json.loads(sys.stdin.buffer.readline())
    try:
        _serve(setup, said)
    except SlipstreamError as error:
        _say(said, {"error": str(error)})
        sys.exit(1)
    except Exception as error:
        _say(said, {"error": f"{type(error).__name__}: {error}"})
        raise


def _serve(setup: dict[str, Any], said: BinaryIO) -> None:
    threading.Thread(target=_beat, args=(said,), daemon=True).start()
    for module in setup["plugins"]:  # those that the user named, as in the parent
        importlib.import_module(module)
    rank, device = setup["rank"], torch.device(setup["device"])
    use_threads(setup["num_threads"])
    folder = open_engine(setup["engine"], rank)
    _say(said, {"is_here": True})
    ranks = ProcessRanks(Path(setup["store"]), rank, Mapping(**setup["mapping"]), device)
    choices = Choices("", setup["kernels"])
    worker, _ = open_worker(folder, choices, device, StartOptions.from_json(setup["options"]), ranks)
    for line in sys.stdin.buffer:
        worker.follow(*plan_from_json(json.loads(line)))
    os._exit(0)  # the parent has gone or is done; nothing here is worth the time of an orderly end


def _beat(said: BinaryIO) -> None:
    while True:
        _say(said, {})
        time.sleep(BEAT_SECONDS)


def _say(said: BinaryIO, message: dict[str, Any]) -> None:
    try:
        said.write(json.dumps(message).encode() + b"\n")
        said.flush()
    except OSError:
        os._exit(1)


if __name__ == "__main__":
    main()
