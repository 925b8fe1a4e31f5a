"""Prompts that a prefill engine computes and a decode engine goes on with, as a front arranges it.

The prefill engine keeps the KV in a file (kv_folder.py), which the decode engine takes. Whatever goes wrong on the
way, the decode engine computes the prompt itself.
"""

import asyncio
import secrets
from dataclasses import replace

from slipstream.schema.request import GenerateRequest, TokenEvent
from slipstream.schema.sampling import SamplingParams
from slipstream.serve.connection import EngineConnection, EngineDown
from slipstream.serve.messages import BEAT_SECONDS
from slipstream.serve.router import SEQUENCE_TOKENS

_ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0)  # which the decode engine finds again, by the request's own


def is_worth_it(request: GenerateRequest, num_known: int) -> bool:
    """num_known: tokens at the beginning of the prompt that the decode engine has already.

    Few others disturb those that it runs no more than one sequence more does.
    """
    needs_rows = request.pooling is not None or request.sampling.prompt_logprobs is not None
    may_be = not needs_rows and not request.sampling.use_beam_search
    return may_be and len(request.prompt_token_ids) - 1 - num_known > SEQUENCE_TOKENS


class Handover:
    """Of the prompts of one call."""

    def __init__(self) -> None:
        self._engines: dict[str, tuple[EngineConnection, EngineConnection]] = {}  # that may have a file of this name

    async def prefill(
        self, request: GenerateRequest, to: EngineConnection, engine: EngineConnection, block_keys: list[int],
        asked: float,
    ) -> GenerateRequest:  # fmt: skip
        """The request with the KV of its prompt, or as it is where that engine gives none.

        to: who will go on with it.  block_keys, asked: as EngineConnection.together wants them.
        """
        name = f"{request.request_id}-{secrets.token_hex(16)}"  # who knows it gets the file
        prefill = replace(
            request, prompt_token_ids=request.prompt_token_ids[:-1], sampling=_ONE_TOKEN, max_tokens=1,
            eos_token_ids=frozenset(), bad_words_ids=(), kv_to=name,
        )  # fmt: skip
        end: asyncio.Future[TokenEvent] = asyncio.get_running_loop().create_future()
        place = f"{engine.kv_address}/{name}"
        self._engines[name] = engine, to
        try:
            with engine.together([block_keys], asked):
                engine.submit(prefill, end.set_result)
            while not end.done() and engine.is_healthy:
                await asyncio.wait([end], timeout=BEAT_SECONDS)
        except EngineDown:
            return request
        finally:
            engine.abort(request.request_id)  # where it has not ended
        is_there = end.done() and end.result().error is None
        return replace(request, kv_from=place) if is_there else request

    def end(self) -> None:
        """The call is over: nobody will take what is left."""
        for name, engines in self._engines.items():
            for engine in engines:
                engine.discard(name)
