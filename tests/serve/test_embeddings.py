"""/v1/embeddings, asked by OpenAI's own client: the vectors that LLM.embed makes, and what holds for all requests."""

import asyncio
import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.serve.conftest import Server, eventually, serving
from tests.serve.test_metrics import NAME, scrape, value

TEXTS = ["The capital of France is", "one", "It is " * 60]
IDS = [[5, 6, 7], [*range(100, 164)]]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def close(vector: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.array(vector), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", [openai.NOT_GIVEN, "float", "base64"])  # the client's own choice is base64
@pytest.mark.parametrize("given", [TEXTS[0], TEXTS, IDS[0], IDS], ids=["text", "texts", "ids", "lists of ids"])
def test_vectors_are_those_of_llm_embed(client: openai.OpenAI, offline: Any, given: Any, form: Any) -> None:
    answer = client.embeddings.create(model="talker", input=given, encoding_format=form)
    expected = offline.embed(given)
    expected = expected if isinstance(expected, list) else [expected]
    assert (answer.object, answer.model, [each.index for each in answer.data]) == (
        "list", "talker", list(range(len(expected)))
    )  # fmt: skip
    for each, output in zip(answer.data, expected, strict=True):
        vector: Any = each.embedding
        if form == "base64":
            vector = np.frombuffer(base64.b64decode(vector), "<f4")
        close(vector, output.embedding)
    num_tokens = sum(len(output.token_ids) for output in expected)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (num_tokens, num_tokens)


def test_last_and_dimensions(client: openai.OpenAI, offline: Any) -> None:
    answer = client.embeddings.create(model="talker", input=TEXTS, dimensions=10, extra_body={"pooling": "last"})
    for each, output in zip(answer.data, offline.embed(TEXTS, pooling="last", dimensions=10), strict=True):
        close(each.embedding, output.embedding)


def test_a_long_text_is_cut_where_that_is_asked_for(client: openai.OpenAI, offline: Any) -> None:
    ids = [*range(2, 302)]
    for limit, left in ((-1, ids[-256:]), (256, ids[-256:]), (5, ids[-5:]), (301, None), (0, None), (-2, None)):
        body = {"truncate_prompt_tokens": limit}
        if left is None:
            with pytest.raises(openai.BadRequestError, match=f"truncate_prompt_tokens is {limit}; it must be 1 to 256"):
                client.embeddings.create(model="talker", input=ids, extra_body=body)
            continue
        answer = client.embeddings.create(model="talker", input=ids, extra_body=body)
        close(answer.data[0].embedding, offline.embed(left).embedding)
        assert answer.usage.prompt_tokens == len(left)


def test_vectors_are_made_beside_streams_of_tokens(server: Server, offline: Any) -> None:
    expected = offline.embed(TEXTS)
    endless: Any = {"model": "talker", "prompt": [3, 4], "max_tokens": 250, "extra_body": {"ignore_eos": True}}

    async def all_of_them() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def one(index: int) -> Any:
                if index % 2:
                    return await client.completions.create(**endless)
                return await client.embeddings.create(model="talker", input=TEXTS)

            return await asyncio.gather(*map(one, range(24)))

    for index, answer in enumerate(asyncio.run(all_of_them())):
        if index % 2:
            assert answer.usage.completion_tokens == 250
        else:
            for each, output in zip(answer.data, expected, strict=True):
                close(each.embedding, output.embedding)
    eventually(lambda: server.stats()["num_blocks_used"] == 0)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"input": None}, "input"),
        ({"input": ""}, "input is empty"),
        ({"input": []}, "input is empty"),
        ({"input": [[]]}, "empty"),
        ({"input": [1.5]}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [320]}, "320"),
        ({"input": [[1], [2] * 257]}, r"input[1] has 257 tokens and may have 256; shorten it"),
        ({"dimensions": 65}, "dimensions is 65; a vector of talker has 1 to 64"),
        ({"dimensions": 0}, "dimensions is 0"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"pooling": "cls"}, "pooling"),
        ({"priority": 1}, "priority"),
        ({"user": 5}, "user"),
        ({"cache_salt": 5}, "cache_salt"),
    ],
)
def test_a_wrong_value_is_a_400_that_names_it(server: Server, fields: dict[str, Any], named: str) -> None:
    answer = server.post("/v1/embeddings", {"input": "x", **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert named in error["message"] and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"] and error["message"].endswith(".")


def test_a_model_that_is_not_here(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'other'"):
        client.embeddings.create(model="other", input="x")


def test_limits_and_numbers_of_a_server_count_texts_too(engine: Path) -> None:
    """One place, held by a stream without an end; two may wait for it."""
    sinks = ("--sink_token_length", 4, "--max_attention_window_size", 64, "--max_seq_len", 2_000_000)
    limits = ("--max_batch_size", 1, "--max_concurrent_requests", 3, "--max_input_len", 40)
    with serving(engine, *sinks, *limits, "--served_model_name", NAME) as server:
        error = server.post("/v1/embeddings", {"input": [1] * 41}).json()["error"]
        assert error["code"] == 400 and error["message"].startswith("input[0] has 41 tokens and may have 40")
        cut = server.post("/v1/embeddings", {"input": [1] * 41, "truncate_prompt_tokens": -1})
        assert cut.json()["usage"]["prompt_tokens"] == 40
        assert server.post("/v1/embeddings", {"input": [[1]] * 9}).status_code == 200  # so many may come alone
        eventually(lambda: value(scrape(server), "request_success_total", "stop") == 10)
        samples = scrape(server)
        for name in ("request_queue_time", "request_prefill_time", "e2e_request_latency"):
            assert value(samples, f"{name}_seconds_count") == 10
        assert value(samples, "time_to_first_token_seconds_count") == value(samples, "generation_tokens_total") == 0
        assert value(samples, "prompt_tokens_total") == value(samples, "request_prompt_tokens_sum") == 49

        with held(server):
            busy = server.post("/v1/embeddings", {"input": ["a", "b", "c"]})
            assert busy.status_code == 429 and busy.headers["Retry-After"]
            leaving = HTTPConnection(server.url.removeprefix("http://"))
            leaving.request("POST", "/v1/embeddings", json.dumps({"input": "a"}), {"Content-Type": "application/json"})
            eventually(lambda: value(scrape(server), "num_requests_waiting") == 1)
            leaving.close()
            eventually(lambda: value(scrape(server), "request_success_total", "abort") == 1)
            assert value(scrape(server), "num_requests_running") == 1
        eventually(lambda: server.stats()["num_blocks_used"] == 0)


@contextmanager
def held(server: Server) -> Iterator[None]:
    """While a sequence runs that comes to no end."""
    body = {"prompt": [1, 2, 3], "max_tokens": 1_000_000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as stream:
        lines = stream.iter_lines()
        next(lines)
        yield
