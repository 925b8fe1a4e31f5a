"""Prompts that a prefill engine computes and a decode engine goes on with, as a front arranges it.

For each the front makes an empty file, which the prefill engine fills and the decode engine takes
(runtime/worker/handover.py). Whatever goes wrong on the way, the decode engine computes the prompt itself.
"""

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from slipstream.schema.request import GenerateRequest, TokenEvent
from slipstream.schema.sampling import SamplingParams
from slipstream.serve.connection import EngineConnection, EngineDown
from slipstream.serve.messages import BEAT_SECONDS
from slipstream.serve.router import SEQUENCE_TOKENS

_SHARED_MEMORY = Path("/dev/shm")
_ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0)  # which the decode engine finds again, by the request's own


def is_worth_it(request: GenerateRequest, num_known: int) -> bool:
    """num_known: tokens at the beginning of the prompt that the decode engine has already.

    Few others disturb those that it runs no more than one sequence more does.
    """
    needs_rows = request.pooling is not None or request.sampling.prompt_logprobs is not None
    may_be = not needs_rows and not request.sampling.use_beam_search
    return may_be and len(request.prompt_token_ids) - 1 - num_known > SEQUENCE_TOKENS


class KVFolder:
    """Of a front, in shared memory. It ends with the front, or else with remove() by the front's parent."""

    def __init__(self, front: str) -> None:
        folder = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        self._path = folder / f"slipstream-{front}"

    def make(self) -> None:
        self._path.mkdir(mode=0o700)

    def remove(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)

    def discard(self, requests: Iterable[GenerateRequest]) -> None:
        """Their call is over: nobody will take what has been computed of them, or is still to come."""
        for request in requests:
            with contextlib.suppress(OSError):
                self._file(request).unlink()

    async def prefill(
        self, request: GenerateRequest, engine: EngineConnection, block_keys: list[int], asked: float
    ) -> GenerateRequest:
        """The request with the KV of its prompt, or as it is where that engine gives none.

        block_keys, asked: as EngineConnection.together wants them.
        """
        prefill = replace(
            request, prompt_token_ids=request.prompt_token_ids[:-1], sampling=_ONE_TOKEN, max_tokens=1,
            eos_token_ids=frozenset(), bad_words_ids=(), kv_to=str(self._file(request)),
        )  # fmt: skip
        end: asyncio.Future[TokenEvent] = asyncio.get_running_loop().create_future()
        try:
            self._file(request).touch()
            with engine.together([block_keys], asked):
                engine.submit(prefill, end.set_result)
            while not end.done() and engine.is_healthy:
                await asyncio.wait([end], timeout=BEAT_SECONDS)
        except (EngineDown, OSError):
            return request
        finally:
            engine.abort(request.request_id)  # where it has not ended
        is_there = end.done() and end.result().error is None
        return replace(request, kv_from=prefill.kv_to) if is_there else request

    def _file(self, request: GenerateRequest) -> Path:
        return self._path / request.request_id
