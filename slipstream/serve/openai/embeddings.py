"""OpenAI's /v1/embeddings: texts become vectors, in the batch that others generate in."""

import base64
from collections.abc import Sequence
from contextlib import aclosing
from typing import Literal

import msgspec
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import TypedDict

from slipstream.api.embeddings import embedding_of
from slipstream.api.outputs import RequestOutput
from slipstream.errors import RequestError
from slipstream.schema.request import Pooling
from slipstream.schema.sampling import SamplingParams
from slipstream.serve.chats import Chats
from slipstream.serve.document import errors_as
from slipstream.serve.fields import Fields
from slipstream.serve.frontend import Ask, Steps
from slipstream.serve.openai.fields import Prompts, prompts_of
from slipstream.serve.openai.routes import ErrorBody
from slipstream.serve.replies import json_response, unless_gone


class EmbeddingFields(Fields):
    """The body. What OpenAI does not have is vLLM's, but for pooling."""

    model: str | None = None
    input: Prompts
    dimensions: int | None = Field(None, description="so many of a vector's first numbers, which get length 1 anew")
    encoding_format: Literal["float", "base64"] | None = Field(None, description="base64: of little-endian float32")
    pooling: Literal["mean", "last"] = Field("mean", description="of the hidden states of a text's tokens")
    truncate_prompt_tokens: int | None = Field(None, description="the last so many tokens alone; -1: all that fit")
    add_special_tokens: bool = True
    priority: int = Field(0, description="lower runs first, where the server was started with --queue_policy priority")
    cache_salt: str = Field("", description="cached prompts, which pooling last takes, are shared within one salt")
    user: str | None = Field(None, description="a note of the caller's own; it changes nothing")

    def shortened(self, token_ids: tuple[int, ...], index: int, longest: int) -> tuple[int, ...]:
        """What is computed of the input of this index. Raises RequestError where that is too long."""
        limit = self.truncate_prompt_tokens
        if limit is not None and not (limit == -1 or 1 <= limit <= longest):
            raise RequestError(f"truncate_prompt_tokens is {limit}; it must be 1 to {longest}, or -1 for {longest}.")
        if limit is not None:
            return token_ids[-(longest if limit == -1 else limit) :]
        if len(token_ids) > longest:
            raise RequestError(
                f"input[{index}] has {len(token_ids)} tokens and may have {longest}; shorten it, or set "
                "truncate_prompt_tokens to -1."
            )
        return token_ids


class Embedding(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class CachedTokens(TypedDict):
    cached_tokens: int


class EmbeddingUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class EmbeddingList(TypedDict):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Embeddings:
    """The endpoint over one front."""

    def __init__(self, chats: Chats) -> None:
        self._chats, self._frontend = chats, chats.frontend
        self.router = APIRouter(responses=errors_as(ErrorBody))
        self.router.post("/v1/embeddings", response_model=EmbeddingList)(self.embed)

    async def embed(self, body: EmbeddingFields, request: Request) -> Response:
        name = self._chats.checked_name(body.model)
        asks = await self._asks(body)
        data, num_cached = await unless_gone(request, _data(self._frontend.generate(asks), body))
        num_tokens = sum(len(ask.token_ids) for ask in asks)
        usage: EmbeddingUsage = {
            "prompt_tokens": num_tokens,
            "total_tokens": num_tokens,
            "prompt_tokens_details": {"cached_tokens": num_cached},
        }
        return json_response({"object": "list", "data": data, "model": name, "usage": usage})

    async def _asks(self, body: EmbeddingFields) -> list[Ask]:
        maker = self._frontend.maker
        maker.check_embedding(body.dimensions)
        longest = min(maker.facts.max_seq_len, self._frontend.max_input_len or maker.facts.max_seq_len)
        prompts = prompts_of("input", body.input)
        texts = await self._frontend.encode_all(prompts, body.add_special_tokens)
        return [
            Ask(
                body.shortened(token_ids, index, longest), SamplingParams(),
                priority=body.priority, cache_salt=body.cache_salt, pooling=Pooling(body.pooling),
            )
            for index, token_ids in enumerate(texts)
        ]  # fmt: skip


async def _data(steps: Steps, body: EmbeddingFields) -> tuple[Sequence[msgspec.Raw], int]:
    """The vectors as JSON, each written when it comes: all at the end would keep others waiting. And tokens cached."""
    written: dict[int, msgspec.Raw] = {}
    num_cached = 0
    async with aclosing(steps):
        async for index, handle in steps:
            output = handle.output()
            num_cached += output.num_cached_tokens
            written[index] = msgspec.Raw(msgspec.json.encode(_embedding(index, output, body)))
    return [written[index] for index in range(len(written))], num_cached


def _embedding(index: int, output: RequestOutput, body: EmbeddingFields) -> Embedding:
    assert output.vector is not None, output.error
    vector = embedding_of(output.vector, body.dimensions)
    is_base64 = body.encoding_format == "base64"
    shown = base64.b64encode(vector.astype("<f4").tobytes()).decode() if is_base64 else vector.tolist()
    return {"object": "embedding", "index": index, "embedding": shown}
