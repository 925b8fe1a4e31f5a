"""TGI's protocol, asked by its own clients and by curl: each parameter has its effect or is refused by name."""

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
import pytest
import text_generation
from huggingface_hub import InferenceClient

from slipstream import SamplingParams
from tests.serve.conftest import Server, serving

PROMPT = "The capital of France is"
GREEDY = SamplingParams(temperature=0, max_tokens=12)

# Seed 002's call, its text put right: curl -XPOST 0.0.0.0:9091/generate -d '{"inputs": …, "parameters": {…}}'.
SEED_PARAMETERS: dict[str, Any] = {
    "max_new_tokens": 400, "do_sample": False, "best_of": None, "repetition_penalty": 1, "return_full_text": False,
    "seed": None, "stop_sequences": None, "temperature": 0.1, "top_k": 100, "top_p": 0.3, "truncate": None,
    "typical_p": None, "watermark": False, "decoder_input_details": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def hub(server: Server) -> Iterator[InferenceClient]:
    with pytest.MonkeyPatch.context() as patch:  # the tests keep it from the network, and this server is none
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield InferenceClient(server.url)


@pytest.fixture(scope="module")
def client(server: Server) -> text_generation.Client:
    return text_generation.Client(server.url)


def details_of(server: Server, **parameters: Any) -> dict[str, Any]:
    """The answer to a greedy call of twelve tokens, unless the parameters say otherwise."""
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 12, "details": True} | parameters}
    answer = server.post("/generate", body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def text_of(server: Server, **parameters: Any) -> str:
    text: str = details_of(server, **parameters)["generated_text"]
    return text


def events_of(server: Server, **parameters: Any) -> list[dict[str, Any]]:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 12, "details": True} | parameters}
    lines = server.post("/generate_stream", body).text.split("\n\n")
    assert lines.pop() == ""
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_the_seeds_call_with_curl(server: Server) -> None:
    body = json.dumps({"inputs": PROMPT, "parameters": SEED_PARAMETERS | {"max_new_tokens": 40}})
    command = ["curl", "-sS", "-XPOST", f"{server.url}/generate", "-H", "Content-Type: application/json", "-d", body]
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert list(answer) == ["generated_text"] and len(answer["generated_text"]) > 20


def test_the_hub_client_gets_what_the_engine_says_offline(hub: InferenceClient, offline: Any) -> None:
    expected = offline.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12, logprobs=0)).outputs[0]
    assert hub.text_generation(PROMPT, max_new_tokens=12) == expected.text
    found = hub.text_generation(PROMPT, max_new_tokens=12, details=True, decoder_input_details=True)
    assert found.details is not None and found.details.finish_reason == "length" and found.details.seed is None
    assert [token.id for token in found.details.tokens] == expected.token_ids
    assert [token.logprob for token in found.details.tokens] == pytest.approx(
        [entry.logprob for entry in expected.logprobs], abs=1e-5
    )
    assert "".join(token.text for token in found.details.tokens) == expected.text
    prompt = offline.score(PROMPT)
    assert [token.id for token in found.details.prefill] == prompt.token_ids
    assert [token.logprob for token in found.details.prefill[1:]] == pytest.approx(prompt.logprobs[1:], abs=1e-4)
    assert found.details.prefill[0].logprob is None


def test_the_hub_client_streams(hub: InferenceClient, offline: Any) -> None:
    expected = offline.generate(PROMPT, GREEDY).outputs[0]
    assert "".join(hub.text_generation(PROMPT, max_new_tokens=12, stream=True)) == expected.text
    events = list(hub.text_generation(PROMPT, max_new_tokens=12, stream=True, details=True, top_n_tokens=2))
    assert [event.index for event in events] == list(range(1, 13))
    assert [event.token.id for event in events] == expected.token_ids
    for event in events:
        assert event.top_tokens is not None and len(event.top_tokens) == 2
        assert event.top_tokens[0].id == event.token.id and event.top_tokens[0].logprob == event.token.logprob
    assert [event.generated_text for event in events] == [None] * 11 + [expected.text]
    assert events[-1].details is not None
    assert (events[-1].details.generated_tokens, events[-1].details.finish_reason) == (12, "length")
    assert events[-1].details.input_length == len(offline.tokenizer.encode(PROMPT))


def test_the_text_generation_client_asks_at_the_root(client: text_generation.Client, offline: Any) -> None:
    expected = offline.generate(PROMPT, GREEDY).outputs[0]
    found = client.generate(PROMPT, max_new_tokens=12, return_full_text=True, top_n_tokens=1)
    assert found.generated_text == PROMPT + expected.text
    assert found.details.generated_tokens == 12 and len(found.details.top_tokens or ()) == 12
    events = list(client.generate_stream(PROMPT, max_new_tokens=12))
    assert "".join(event.token.text for event in events) == events[-1].generated_text == expected.text

    async def streamed() -> str:
        asking = text_generation.AsyncClient(client.base_url)
        return "".join([event.token.text async for event in asking.generate_stream(PROMPT, max_new_tokens=12)])

    assert asyncio.run(streamed()) == expected.text


def test_each_parameter_has_its_effect(server: Server, offline: Any) -> None:
    greedy = text_of(server)
    assert greedy == offline.generate(PROMPT, GREEDY).outputs[0].text == text_of(server, temperature=1.0)
    for asks_to_sample in ({"do_sample": True}, {"temperature": 1.5}, {"top_k": 300}, {"top_p": 0.99},
                           {"typical_p": 0.99}):  # fmt: skip
        drawn = details_of(server, **asks_to_sample, seed=3)
        assert drawn["generated_text"] != greedy and drawn["details"]["seed"] == 3
        assert text_of(server, **asks_to_sample, seed=3) == drawn["generated_text"]
    unseeded = details_of(server, do_sample=True)
    assert text_of(server, do_sample=True, seed=unseeded["details"]["seed"]) == unseeded["generated_text"]
    for narrow in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}):
        assert text_of(server, **narrow, do_sample=True) == greedy
    seeded = SamplingParams(max_tokens=12, typical_p=0.3, seed=5)
    assert text_of(server, typical_p=0.3, seed=5) == offline.generate(PROMPT, seeded).outputs[0].text
    for penalty in ({"repetition_penalty": 5.0}, {"frequency_penalty": 2.0}):
        expected = offline.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12, **penalty)).outputs[0].text  # type: ignore[arg-type]
        assert text_of(server, **penalty) == expected != greedy
    cut = offline.generate(offline.tokenizer.encode(PROMPT)[-3:], GREEDY).outputs[0].text
    assert text_of(server, truncate=3) == cut != greedy
    assert text_of(server, truncate=3, return_full_text=True) == PROMPT + cut
    assert len(details_of(server, max_new_tokens=None)["details"]["tokens"]) > 100


def test_a_text_ends_with_its_stop_sequence(server: Server, offline: Any) -> None:
    text = offline.generate(PROMPT, GREEDY).outputs[0].text
    stop = text[4:6]
    for name in ("stop", "stop_sequences"):
        found = details_of(server, **{name: ["never", stop]})
        assert found["generated_text"] == text[: text.index(stop) + 2]
        assert found["details"]["finish_reason"] == "stop_sequence"
    events = events_of(server, stop=[stop])
    assert events[-1]["generated_text"] == text[: text.index(stop) + 2]
    assert events[-1]["details"]["generated_tokens"] == len(events) == found["details"]["generated_tokens"]


def test_an_end_of_sequence_token_is_special(server: Server) -> None:
    regex = {"type": "regex", "value": "ab"}
    found = details_of(server, grammar=regex)
    assert found["generated_text"] == "ab" and found["details"]["finish_reason"] == "eos_token"
    assert found["details"]["tokens"][-1]["special"] and found["details"]["tokens"][-1]["text"] == "<|im_end|>"
    assert [event["token"]["special"] for event in events_of(server, grammar=regex)][-2:] == [False, True]


def test_a_text_follows_its_grammar(server: Server) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"],
              "additionalProperties": False}  # fmt: skip
    for grammar in (
        {"type": "json", "value": schema},
        {"type": "json", "value": json.dumps(schema)},
        {"type": "json_schema", "value": {"name": "place", "schema": schema}},
    ):
        text = text_of(server, grammar=grammar, do_sample=True, max_new_tokens=200)
        assert json.loads(text)["city"] in ("Paris", "Rome")


def test_the_best_of_several_comes_first(server: Server) -> None:
    found = details_of(server, best_of=4, do_sample=True)["details"]
    others = found["best_of_sequences"]
    assert len(others) == 3 and len({found["seed"], *(other["seed"] for other in others)}) == 4
    likeliness = [
        fmean(token["logprob"] for token in each["tokens"]) for each in (found, *others)
    ]  # some may be shorter
    assert likeliness == sorted(likeliness, reverse=True)
    assert text_of(server, do_sample=True, seed=others[0]["seed"]) == others[0]["generated_text"]


def test_info_tells_the_limits(server: Server, offline: Any) -> None:
    info = httpx.get(f"{server.url}/info").json()
    longest = offline.runtime_config.max_seq_len
    assert (info["model_id"], info["max_total_tokens"], info["max_input_tokens"]) == ("talker", longest, longest - 1)
    assert server.post("/", {"inputs": PROMPT, "parameters": {"max_new_tokens": 2}}).json()[0]["generated_text"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"watermark": True}, "watermark"),
    ({"adapter_id": "mine"}, "adapter_id"),
    ({"nonsense": 1}, "nonsense"),
    ({"temperature": 0}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 1.0}, "top_p"),
    ({"typical_p": 0}, "typical_p"),
    ({"top_k": 0}, "top_k"),
    ({"truncate": 0}, "truncate"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"frequency_penalty": 1000}, "frequency_penalty"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_new_tokens": 1_000_000}, "max_new_tokens"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "seed"),
    ({"top_n_tokens": 101}, "top_n_tokens"),
    ({"stop": ["a"], "stop_sequences": ["b"]}, "stop_sequences"),
    ({"stop": ["a"] * 257}, "stop"),
    ({"seed": -1}, "seed"),
    ({"top_k": 10**30}, "top_k"),
    ({"grammar": {"type": "regex", "value": {}}}, "grammar.value"),
    ({"grammar": {"type": "json_schema", "value": {}}}, "grammar.value"),
    ({"grammar": {"type": "xml", "value": "a"}}, "grammar.type"),
]


@pytest.mark.parametrize(("parameters", "named"), WRONG, ids=[str(each[0])[:40] for each in WRONG])
def test_a_wrong_value_is_a_422_that_names_it(server: Server, parameters: dict[str, Any], named: str) -> None:
    for path in ("/", "/generate", "/generate_stream"):
        answer = server.post(path, {"inputs": PROMPT, "parameters": parameters})
        assert answer.status_code == 422, answer.text
        body = answer.json()
        assert body["error_type"] == "validation" and named in body["error"] and body["error"].endswith(".")


def test_errors_reach_the_clients_as_theirs(server: Server, hub: InferenceClient, client: Any) -> None:
    from huggingface_hub.errors import ValidationError as HubError

    with pytest.raises(HubError, match="watermark"):
        hub.text_generation(PROMPT, watermark=True)
    with pytest.raises(text_generation.errors.ValidationError, match="watermark"):
        client.generate(PROMPT, watermark=True)
    for name, parameters in (
        ("best_of", {"best_of": 2, "do_sample": True}),
        ("decoder_input_details", {"decoder_input_details": True}),
    ):
        answer = server.post("/generate_stream", {"inputs": PROMPT, "parameters": parameters})
        assert answer.status_code == 422 and name in answer.json()["error"]
    assert "inputs" in server.post("/generate", {"inputs": ""}).json()["error"]
    assert server.post("/generate", {}).json()["error_type"] == "validation"
    assert "5000 tokens" in server.post("/generate", {"inputs": "\x01" * 5000}).json()["error"]
    assert httpx.get(f"{server.url}/generate").status_code == 405


def test_limits_and_failures_have_tgis_statuses(engine: Path) -> None:
    """Its launcher's names of the limits, too."""
    launcher = "--max-input-length 40 --max-total-tokens 1000000 --num-shard 1 --speculate 0 --dtype float32"
    endless = "--sink_token_length 4 --max_attention_window_size 64 --max_batch_size 4 --max-concurrent-requests 1"
    long = {"inputs": PROMPT, "parameters": {"max_new_tokens": 900_000}}
    with serving(engine, *launcher.split(), *endless.split()) as server:
        answer = server.post("/generate", {"inputs": "\x01" * 41})
        assert answer.status_code == 422 and "41 tokens" in answer.json()["error"]
        answer = server.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 10**6}})
        assert answer.status_code == 422 and "--max_seq_len" in answer.json()["error"]
        with httpx.stream("POST", f"{server.url}/generate_stream", json=long, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            answer = server.post("/generate", long)
            assert (answer.status_code, answer.json()["error_type"]) == (429, "overloaded")
            os.kill(server.engine_pid, signal.SIGKILL)
            last = json.loads([line for line in lines if line][-1].removeprefix("data: "))
        assert last["error_type"] == "incomplete_generation" and "the engine process ended" in last["error"]
        answer = server.post("/generate", long)
        assert (answer.status_code, answer.json()["error_type"]) == (424, "generation")
