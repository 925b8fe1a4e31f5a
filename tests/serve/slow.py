"""A plugin for servers under test: what is slow now and then, always is, and by so much that it shows.

A grammar with the word "slowly" takes a while to compile; a step with the token HANGS takes a while to compute.
"""

import time
from typing import Any

from slipstream.runtime.guidance import Guidance
from slipstream.runtime.worker.worker import Worker

SECONDS = 3.0
HANGS = 319

_prepare, _launch = Guidance.prepare, Worker.launch


def prepare(guidance: Guidance, guided: Any) -> None:
    if "slowly" in (guided.regex or "") and guided not in guidance._compiled:
        time.sleep(SECONDS)
    _prepare(guidance, guided)


def launch(worker: Worker, begun: Any) -> Any:
    if any(HANGS in step.token_ids for step in begun.plan.sequences):
        time.sleep(SECONDS)
    return _launch(worker, begun)


Guidance.prepare, Worker.launch = prepare, launch  # type: ignore[method-assign]
