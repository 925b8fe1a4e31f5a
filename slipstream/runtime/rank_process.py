"""One of the ranks after the first: it computes its part of each step, and says that it lives.

    python -m slipstream.runtime.rank_process      environment: a Launch (meeting.py); stdin: its lifeline

It ends when the first rank does, and before it has found that one when its stdin does: whatever happens to who started
it, no rank stays behind.
"""

import importlib
import os
import sys
import threading
import time
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from slipstream.engine.choices import Choices
from slipstream.engine.folder import open_engine
from slipstream.errors import SlipstreamError, in_words
from slipstream.runtime.meeting import Line, knock, open_store
from slipstream.runtime.rank_group import BEAT_SECONDS, plan_from_json
from slipstream.runtime.ranks import ProcessRanks
from slipstream.runtime.worker.start import StartOptions, open_worker, use_threads
from slipstream.schema.launch import Launch
from slipstream.schema.mapping import Mapping


def main() -> None:
    launch = Launch.read()
    assert launch is not None and launch.rank
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        follow(launch)
    except SlipstreamError as error:
        sys.exit(f"error: {error}")


def follow(launch: Launch) -> NoReturn:
    """Be this rank until the first one is done, and end the process. Raises RankError where there is no first one."""
    store = open_store(launch)
    line = knock(launch, store)
    setup = line.hear()
    if setup is not None:
        threading.Thread(target=_beat, args=(line,), daemon=True).start()
        try:
            _serve(line, setup, store, launch)
        except Exception as error:
            _say(line, {"error": in_words(error)})
            if isinstance(error, SlipstreamError):
                sys.exit(1)
            raise
    os._exit(0)  # the first rank has gone or is done; nothing here is worth the time of an orderly end


def _serve(line: Line, setup: dict[str, Any], store: dist.Store, launch: Launch) -> None:
    for module in setup["plugins"]:  # those that the user named, as in the first rank
        importlib.import_module(module)
    device, mapping = torch.device(setup["device"]), Mapping(**setup["mapping"])
    if setup["num_threads"]:
        use_threads(setup["num_threads"])
    folder = open_engine(setup["engine"], launch.rank)
    _say(line, {"is_here": True})
    ranks = ProcessRanks(store, launch.rank, mapping, device, line.address)
    choices = Choices("", setup["kernels"])
    worker, _ = open_worker(folder, choices, device, StartOptions.from_json(setup["options"]), ranks)
    while (plan := line.hear()) is not None:
        worker.follow(*plan_from_json(plan))


def _beat(line: Line) -> None:
    while True:
        _say(line, {})
        time.sleep(BEAT_SECONDS)


def _say(line: Line, message: dict[str, Any]) -> None:
    try:
        line.say(message)
    except OSError:
        os._exit(1)


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
