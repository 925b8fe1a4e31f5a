"""What can be compared: servers, engines of ours, and transformers. The last two each in a process of its own.

Two engines in one process would share its threads and its interpreter; in two, each sleeps while it is not its turn.
"""

import multiprocessing
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from slipstream.bench.dataset import Sample
from slipstream.bench.load import Load
from slipstream.bench.serving import Endpoint
from slipstream.bench.timeline import Run
from slipstream.checkpoint import resolve
from slipstream.errors import SlipstreamError, UsageError

Turn = Callable[[Sequence[Sample], int], Run]

_turn: Turn  # of a worker process, once it is open


class Server:
    """A server that is there already."""

    def __init__(self, name: str, endpoint: Endpoint, concurrency: int) -> None:
        self.name, self._endpoint, self._load = name, endpoint, Load(concurrency=concurrency)

    def turn(self, samples: Sequence[Sample]) -> Run:
        return self._endpoint.measure(samples, self._load, draw=random.Random(0)).run

    def close(self) -> None:
        self._endpoint.close()


class Worker:
    """A model in a process that is started for it. Raises UsageError where that cannot open it."""

    def __init__(self, name: str, kind: str, concurrency: int, options: Mapping[str, Any]) -> None:
        """kind: slipstream or transformers; options: model, dtype and device."""
        source = resolve(options["model"])
        if kind == "transformers" and source.kind not in ("folder", "gguf"):
            raise UsageError(
                f"{name} is an own {source.kind}, which transformers cannot read; give the model it was made of."
            )
        self.name, self._concurrency = name, concurrency
        self._process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        try:
            self._call(_open, kind, dict(options))
        except UsageError:
            self.close()
            raise

    def turn(self, samples: Sequence[Sample]) -> Run:
        run: Run = self._call(_take_turn, samples, self._concurrency)
        return run

    def close(self) -> None:
        self._process.shutdown()

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self._process.submit(function, *arguments).result()
        except (SlipstreamError, BrokenProcessPool, ImportError, OSError, ValueError) as error:
            raise UsageError(f"{self.name} cannot be measured ({error}); leave it out, or give another.") from None


def _open(kind: str, options: dict[str, Any]) -> None:
    global _turn
    _turn = _open_slipstream(**options) if kind == "slipstream" else _open_transformers(**options)


def _take_turn(samples: Sequence[Sample], concurrency: int) -> Run:
    return _turn(samples, concurrency)


def _open_slipstream(model: str, dtype: str, device: str) -> Turn:
    from slipstream.api.llm import LLM
    from slipstream.bench.offline import ask, make_requests

    llm = LLM(model, dtype=dtype, device=device, show_progress=False)
    return lambda samples, concurrency: ask(llm, make_requests(llm, samples), Load(concurrency))


def _open_transformers(model: str, dtype: str, device: str) -> Turn:
    from slipstream.bench.transformers_peer import Peer

    return Peer(model, dtype, device).turn
