"""KServe's protocol over HTTP, asked by Triton's own client and by curl: each tensor has its effect or is refused."""

import json
import shlex
import struct
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton

from slipstream import SamplingParams
from slipstream.serve.kserve.ensemble import INPUTS
from tests.serve.conftest import Server

PROMPT = "The capital of France is"
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as client:
        yield client


def tensor(name: str, value: Any, datatype: str, *, is_binary: bool = True) -> triton.InferInput:
    dtype: Any = {"BYTES": object, "INT32": np.int32, "UINT32": np.uint32, "UINT64": np.uint64, "FP32": np.float32}
    array = np.array([value] if isinstance(value, list) else [[value]], dtype=dtype.get(datatype, bool))
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=is_binary)
    return made


def asking(prompt: str = PROMPT, **inputs: Any) -> list[triton.InferInput]:
    known = {"text_input": prompt, "max_tokens": 12} | inputs
    return [tensor(name, value, INPUTS[name].datatype) for name, value in known.items()]


def generated(server: Server, path: str = "ensemble/generate", **inputs: Any) -> dict[str, Any]:
    answer = server.post(f"/v2/models/{path}", {"text_input": PROMPT, "max_tokens": 12} | inputs)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def text_of(server: Server, **inputs: Any) -> str:
    text: str = generated(server, **inputs)["text_output"]
    return text


def test_the_curl_of_seed_001(server: Server, offline: Any) -> None:
    typed = """curl -sS -X POST localhost:8000/v2/models/ensemble/generate -d
    '{"text_input": "How do I count to nine in French?",
    "parameters": {"max_tokens": 100, "bad_words":[""],"stop_words":[""]}}'"""
    command = shlex.split(typed.replace("localhost:8000", server.url))
    answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    expected = offline.generate("How do I count to nine in French?", SamplingParams(temperature=0, max_tokens=100))
    assert answer == {
        "model_name": "ensemble", "model_version": "1", "sequence_end": False, "sequence_id": 0,
        "sequence_start": False, "text_output": expected.outputs[0].text,
    }  # fmt: skip


def test_the_server_and_its_model_say_what_they_are(client: Any) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.get_server_metadata()["name"] == "slipstream"
    for name in ("talker", "ensemble"):
        for version in ("", "1"):
            assert client.is_model_ready(name, version)
            metadata = client.get_model_metadata(name, version)
            assert metadata["name"] == name and metadata["versions"] == ["1"]
            assert {each["name"]: each["datatype"] for each in metadata["inputs"]}["text_input"] == "BYTES"
            config = client.get_model_config(name, version)
            assert len(config["input"]) == len(metadata["inputs"]) and config["max_batch_size"] == 64
        assert [each["state"] for each in client.get_model_repository_index() if each["name"] == name] == ["READY"]
    assert not client.is_model_ready("other")
    with pytest.raises(triton.InferenceServerException, match=r"'other'.*talker"):
        client.get_model_metadata("other")
    with pytest.raises(triton.InferenceServerException, match="version '2'"):
        client.get_model_config("talker", "2")


def test_tensors_travel_as_bytes_and_as_json(client: Any, offline: Any) -> None:
    expected = offline.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12, logprobs=0)).outputs[0]
    logprobs = [entry.logprob for entry in expected.logprobs]
    for is_binary in (True, False):
        inputs = [
            tensor("text_input", PROMPT, "BYTES", is_binary=is_binary),
            tensor("max_tokens", 12, "UINT32", is_binary=is_binary),
            tensor("return_log_probs", True, "BOOL"),
        ]
        for outputs in (
            None,
            [triton.InferRequestedOutput(name, binary_data=is_binary) for name in ("output_log_probs", "text_output")],
        ):
            found = client.infer("ensemble", inputs, request_id="mine", outputs=outputs)
            assert (found.get_response()["id"], found.get_response()["model_name"]) == ("mine", "ensemble")
            assert found.as_numpy("text_output").shape == (1, 1)
            text = found.as_numpy("text_output")[0][0]
            assert (text.decode() if isinstance(text, bytes) else text) == expected.text
            assert found.as_numpy("output_log_probs")[0][0] == pytest.approx(logprobs, abs=1e-5)
            assert (found.as_numpy("cum_log_probs") is None) == (outputs is not None)


def test_several_prompts_in_one_call(client: Any, offline: Any) -> None:
    prompts = [PROMPT, "It is", "A"]
    inputs = [
        triton.InferInput("text_input", [3, 1], "BYTES").set_data_from_numpy(np.array([[p] for p in prompts], object)),
        triton.InferInput("max_tokens", [3, 1], "INT32").set_data_from_numpy(np.array([[12], [3], [5]], np.int32)),
        tensor("return_log_probs", True, "BOOL"),
    ]
    found = client.infer("talker", inputs)
    for index, (prompt, num) in enumerate(zip(prompts, (12, 3, 5), strict=True)):
        expected = offline.generate(prompt, SamplingParams(temperature=0, max_tokens=num, logprobs=0)).outputs[0]
        assert found.as_numpy("text_output")[index][0].decode() == expected.text
        assert found.as_numpy("cum_log_probs")[index][0] == pytest.approx(expected.cumulative_logprob, abs=1e-4)
        assert np.count_nonzero(found.as_numpy("output_log_probs")[index][0]) == num


def test_generate_stream_with_curl(server: Server, offline: Any) -> None:
    expected = offline.generate(PROMPT, GREEDY).outputs[0].text
    body = json.dumps({"text_input": PROMPT, "max_tokens": 12, "stream": True, "return_log_probs": True, "id": "a"})
    command = ["curl", "-sSN", "-X", "POST", f"{server.url}/v2/models/ensemble/generate_stream", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n")
    assert lines.pop() == ""
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert "".join(event["text_output"] for event in events) == expected
    assert {event["id"] for event in events} == {"a"}
    logprobs = [value for event in events for value in np.atleast_1d(event["output_log_probs"])]
    assert sum(logprobs) == pytest.approx(events[-1]["cum_log_probs"], abs=1e-4) and len(logprobs) == 12
    whole = server.post("/v2/models/talker/versions/1/generate_stream", {"text_input": PROMPT, "max_tokens": 12})
    assert json.loads(whole.text.removeprefix("data: "))["text_output"] == expected
    assert generated(server, "talker/generate")["text_output"] == expected


def test_each_input_has_its_effect(server: Server, offline: Any) -> None:
    greedy = text_of(server)

    def offline_text(**sampling: Any) -> str:
        text: str = (
            offline.generate(PROMPT, SamplingParams(**{"max_tokens": 12, "temperature": 0} | sampling)).outputs[0].text
        )
        return text

    assert greedy == offline_text() == text_of(server, temperature=2.0) == text_of(server, top_k=1, random_seed=3)
    for sampled in ({"top_k": 300}, {"top_p": 0.99}, {"top_k": 300, "temperature": 2.0}):
        assert text_of(server, **sampled, random_seed=4) == offline_text(**{"temperature": 1.0, "seed": 4} | sampled)
        assert text_of(server, **sampled, random_seed=4) != greedy
    for penalty in ({"repetition_penalty": 5.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        assert text_of(server, **penalty) == offline_text(**penalty) != greedy
    stop, token_ids = greedy[4:6], offline.generate(PROMPT, GREEDY).outputs[0].token_ids
    first, words_said = token_ids[0], [offline.tokenizer.decode([token_id]) for token_id in token_ids]
    for words in (stop, [stop], ["", stop]):
        assert text_of(server, stop_words=words) == greedy.partition(stop)[0]
    bad = next(word for word in words_said if word.isascii())
    assert text_of(server, bad_words=[bad, ""]) == offline_text(bad_words=[bad]) != greedy
    assert text_of(server, end_id=first) == "" and text_of(server, end_id=first, min_length=3) != ""
    always_ends = {"embedding_bias_words": ["<|im_end|>"], "embedding_bias_weights": [100.0]}
    assert text_of(server, **always_ends) == ""
    assert len(generated(server, **always_ends, end_id=-1, return_log_probs=True)["output_log_probs"]) == 12
    assert text_of(server, pad_id=0) == greedy == text_of(server, return_context_logits=False)
    beams = offline.generate(PROMPT, SamplingParams(use_beam_search=True, n=3, max_tokens=5, length_penalty=2.0))
    found = generated(server, beam_width=3, max_tokens=5, length_penalty=2.0)["text_output"]
    assert found == [beam.text for beam in beams.outputs]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"nonsense": 1}, "nonsense"),
    ({"parameters": {"nonsense": 1}}, "nonsense"),
    ({"parameters": {"max_tokens": 1}}, "max_tokens is given twice"),
    ({"parameters": 1}, "parameters"),
    ({"max_tokens": "many"}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": [1, 2]}, "max_tokens"),
    ({"text_input": ""}, "empty"),
    ({"text_input": 5}, "text_input"),
    ({"text_input": ["a", "b"]}, "2 prompts"),
    ({"temperature": -1.0, "top_k": 2}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": True}, "top_k"),
    ({"random_seed": -1}, "random_seed"),
    ({"min_length": -1}, "min_length"),
    ({"beam_width": 0}, "beam_width"),
    ({"beam_width": 2, "stop_words": ["a"]}, "stop"),
    ({"end_id": 320}, "320"),
    ({"stream": True}, "generate_stream"),
    ({"return_context_logits": True}, "return_context_logits"),
    ({"return_generation_logits": True}, "return_generation_logits"),
    ({"prompt_vocab_size": 3}, "prompt_vocab_size"),
    ({"prompt_embedding_table": [0.5]}, "prompt_embedding_table"),
    ({"embedding_bias_words": ["a"]}, "embedding_bias_weights"),
    ({"sequence_id": 5}, "sequence_id"),
    ({"timeout": -5}, "timeout"),
    ({"priority": "high"}, "priority"),
    ({"priority": 5}, "priority"),
]


@pytest.mark.parametrize(("inputs", "named"), WRONG, ids=[str(each[0])[:40] for each in WRONG])
def test_a_wrong_value_is_a_400_that_names_it(server: Server, inputs: dict[str, Any], named: str) -> None:
    answer = server.post("/v2/models/ensemble/generate", {"text_input": PROMPT, "max_tokens": 12} | inputs)
    assert answer.status_code == 400 and list(answer.json()) == ["error"]
    assert named in answer.json()["error"] and answer.json()["error"].endswith(".")


def test_errors_reach_the_client(server: Server, client: Any) -> None:
    for inputs, options, named in (
        (asking(temperature=-1.0, top_k=2), {}, "temperature"),
        (asking()[:1], {}, "max_tokens is missing"),
        (asking(stream=True), {}, "stream"),
        (asking(), {"sequence_id": 7}, "sequence_id"),
        (asking(), {"outputs": [triton.InferRequestedOutput("context_logits")]}, "context_logits"),
        (asking(), {"outputs": [triton.InferRequestedOutput("cum_log_probs")]}, "return_log_probs"),
        (asking(), {"request_compression_algorithm": "gzip"}, "Content-Encoding"),
    ):
        with pytest.raises(triton.InferenceServerException, match=named):
            client.infer("talker", inputs, **options)
    with pytest.raises(triton.InferenceServerException, match="longer than 1e-06 seconds"):
        client.infer("talker", asking(), timeout=1)
    for path in ("/v2/models/other/infer", "/v2/models/talker/versions/9/infer", "/v2/nothing"):
        assert server.post(path, {}).status_code == 404


def test_a_body_that_is_no_request_is_a_400(server: Server) -> None:
    text = {"name": "text_input", "shape": [1, 1], "datatype": "BYTES", "data": ["a"]}
    deep: Any = ["a"]
    for _ in range(400):
        deep = [deep]
    for wrong in (
        text | {"shape": [2, 1]}, text | {"shape": [-1, -1]}, text | {"datatype": "TEXT"}, text | {"data": deep},
        text | {"parameters": {"binary_data_size": 3}}, text | {"more": 1}, {"name": "text_input"},
        {"name": "text_input", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 9}},
        {"name": "text_input", "shape": [1], "datatype": "BYTES"},
    ):  # fmt: skip
        answer = server.post("/v2/models/talker/infer", {"inputs": [wrong]})
        assert answer.status_code == 400 and answer.json()["error"].endswith("."), answer.text
    head = {"name": "text_input", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 6}}
    for raw in (struct.pack("<I", 9) + b"ab", struct.pack("<I", 2) + b"\xff\xff", b"\0\0\0\0\0\0more"):
        body = json.dumps({"inputs": [head]}).encode()
        lengths = {"Inference-Header-Content-Length": str(len(body))}
        answer = httpx.post(f"{server.url}/v2/models/talker/infer", content=body + raw, headers=lengths)
        assert answer.status_code == 400 and answer.json()["error"].endswith("."), answer.text
    for content, length in ((b"{", "1"), (b"[]", "2"), (b"{}", "x"), (b"{}", "3"), (b"[" * 100_000, "100000")):
        lengths = {"Inference-Header-Content-Length": length}
        answer = httpx.post(f"{server.url}/v2/models/talker/infer", content=content, headers=lengths)
        assert answer.status_code == 400 and answer.json()["error"].endswith("."), answer.text


def test_calls_are_counted(server: Server, client: Any) -> None:
    (before,) = client.get_inference_statistics("talker")["model_stats"]
    client.infer("talker", asking())
    with pytest.raises(triton.InferenceServerException):
        client.infer("talker", asking(end_id=320))
    (after,) = client.get_inference_statistics("talker")["model_stats"]
    done, failed = (after["inference_stats"][kind]["count"] for kind in ("success", "fail"))
    assert done == before["inference_stats"]["success"]["count"] + 1 == after["inference_count"]
    assert failed == before["inference_stats"]["fail"]["count"] + 1
    assert after["inference_stats"]["success"]["ns"] > before["inference_stats"]["success"]["ns"]
