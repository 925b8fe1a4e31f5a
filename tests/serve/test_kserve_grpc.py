"""KServe's protocol over gRPC, asked by Triton's own clients: calls, streams, cancelling, deadlines, keys, the end."""

import asyncio
import os
import queue
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from slipstream import SamplingParams
from slipstream.serve.kserve.ensemble import INPUTS
from tests.serve.conftest import START_SECONDS, Server, eventually, serving

PROMPT = "The capital of France is"
KEY = {"authorization": "Bearer mine"}
ENDLESS = ["--sink_token_length", 4, "--max_attention_window_size", 64, "--max_seq_len", 2_000_000]
DTYPES: dict[str, Any] = {"BYTES": object, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": bool}


@pytest.fixture(scope="module")
def server(engine: Path) -> Iterator[Server]:
    with serving(engine, "--grpc_port", 0, "--api_key", "mine", *ENDLESS) as server:
        yield server


def address_of(server: Server) -> str:
    found = re.search(r" and grpc://(\S+) ", server.ready_line)
    assert found, server.ready_line
    return found[1]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address_of(server)) as client:
        yield client


def asking(prompt: str = PROMPT, **inputs: Any) -> list[triton.InferInput]:
    tensors = []
    for name, value in ({"text_input": prompt, "max_tokens": 12} | inputs).items():
        datatype = INPUTS[name].datatype
        tensor = triton.InferInput(name, [1, 1], datatype)
        tensors.append(tensor.set_data_from_numpy(np.array([[value]], dtype=DTYPES[datatype])))
    return tensors


def offline_text(offline: Any, prompt: str) -> str:
    text: str = offline.generate(prompt, SamplingParams(temperature=0, max_tokens=12)).outputs[0].text
    return text


def is_idle(server: Server) -> bool:
    return server.stats()["num_blocks_used"] == 0


def test_the_server_and_its_model_say_what_they_are(client: Any) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.get_server_metadata(headers=KEY).name == "slipstream"
    for name in ("talker", "ensemble"):
        assert client.is_model_ready(name, "1", headers=KEY)
        metadata = client.get_model_metadata(name, headers=KEY)
        assert {each.name: each.datatype for each in metadata.inputs}["text_input"] == "BYTES"
        config = client.get_model_config(name, headers=KEY).config
        assert config.max_batch_size == 64 and len(config.input) == len(metadata.inputs)
    index = client.get_model_repository_index(headers=KEY)
    assert {each.name: each.state for each in index.models}["ensemble"] == "READY"
    with pytest.raises(triton.InferenceServerException, match=r"NOT_FOUND.*'other'"):
        client.get_model_metadata("other", headers=KEY)
    with pytest.raises(triton.InferenceServerException, match="UNIMPLEMENTED"):
        client.load_model("other", headers=KEY)


def test_an_answer_is_what_the_engine_says_offline(client: Any, offline: Any) -> None:
    expected = offline.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12, logprobs=0)).outputs[0]
    found = client.infer("ensemble", asking(return_log_probs=True), request_id="mine", headers=KEY)
    assert (found.get_response().id, found.get_response().model_name) == ("mine", "ensemble")
    assert found.as_numpy("text_output").tolist() == [[expected.text.encode()]]
    logprobs = [entry.logprob for entry in expected.logprobs]
    assert found.as_numpy("output_log_probs")[0][0] == pytest.approx(logprobs, abs=1e-5)
    only = client.infer("ensemble", asking(), outputs=[triton.InferRequestedOutput("text_output")], headers=KEY)
    assert len(only.get_response().outputs) == 1
    (stats,) = client.get_inference_statistics("ensemble", headers=KEY).model_stats
    assert stats.inference_stats.success.count >= 2 and stats.inference_stats.success.ns > 0


def test_typed_contents_do_as_raw_ones(server: Server, offline: Any) -> None:
    tensor = partial(service_pb2.ModelInferRequest.InferInputTensor, shape=[1, 1])
    request = service_pb2.ModelInferRequest(
        model_name="ensemble",
        inputs=[
            tensor(name="text_input", datatype="BYTES", contents={"bytes_contents": [PROMPT.encode()]}),
            tensor(name="max_tokens", datatype="UINT32", contents={"uint_contents": [12]}),
        ],
    )
    with grpc.insecure_channel(address_of(server)) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        response = stub.ModelInfer(request, metadata=list(KEY.items()))
        assert response.raw_output_contents[0][4:].decode() == offline_text(offline, PROMPT)
        request.inputs[0].contents.bytes_contents[0] = b"\xff"
        with pytest.raises(grpc.RpcError, match="UTF-8"):
            stub.ModelInfer(request, metadata=list(KEY.items()))
        request.raw_input_contents.append(b"")
        with pytest.raises(grpc.RpcError, match="raw_input_contents"):
            stub.ModelInfer(request, metadata=list(KEY.items()))


def test_several_requests_share_a_stream(client: Any, offline: Any) -> None:
    prompts = {str(number): f"{number} {PROMPT}" for number in range(6)}
    came: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: came.put((result, error)), headers=KEY)
    for request_id, prompt in prompts.items():
        client.async_stream_infer(
            "ensemble", asking(prompt, stream=True), request_id=request_id, enable_empty_final_response=True
        )
    texts, finals = dict.fromkeys(prompts, ""), 0
    while finals < len(prompts):
        result, error = came.get(timeout=30)
        assert error is None
        response = result.get_response()
        texts[response.id] += result.as_numpy("text_output")[0][0].decode()
        finals += response.parameters["triton_final_response"].bool_param
    client.async_stream_infer("ensemble", asking(), request_id="whole")
    assert came.get(timeout=30)[0].as_numpy("text_output")[0][0].decode() == offline_text(offline, PROMPT)
    client.async_stream_infer("ensemble", asking(temperature=-1.0, top_k=2))
    assert "temperature" in str(came.get(timeout=30)[1])
    client.stop_stream()
    assert texts == {request_id: offline_text(offline, prompt) for request_id, prompt in prompts.items()}


def test_a_stream_that_is_cancelled_aborts_its_requests(server: Server) -> None:
    async def begin_and_cancel() -> None:
        async with triton_aio.InferenceServerClient(address_of(server)) as client:

            async def requests() -> AsyncIterator[dict[str, Any]]:
                yield {"model_name": "ensemble", "inputs": asking(max_tokens=1_000_000, end_id=-1, stream=True)}
                await asyncio.sleep(60)

            stream = client.stream_infer(requests(), headers=KEY)
            async for result, error in stream:
                assert error is None and result is not None
                break
            await asyncio.to_thread(eventually, lambda: not is_idle(server))
            stream.cancel()
            await asyncio.to_thread(eventually, partial(is_idle, server))

    asyncio.run(begin_and_cancel())


def test_a_call_that_is_cancelled_or_late_is_aborted(server: Server, client: Any) -> None:
    endless = asking(max_tokens=1_000_000, end_id=-1)
    with pytest.raises(triton.InferenceServerException, match="Deadline"):
        client.infer("ensemble", endless, client_timeout=1.0, headers=KEY)
    eventually(lambda: is_idle(server))
    came: queue.Queue[Any] = queue.Queue()
    call = client.async_infer("ensemble", endless, lambda result, error: came.put(error), headers=KEY)
    eventually(lambda: not is_idle(server))
    call.cancel()
    assert "cancelled" in str(came.get(timeout=10)).lower()
    eventually(lambda: is_idle(server))


def test_errors_have_their_status(client: Any) -> None:
    for inputs, options, named in (
        (asking(temperature=-1.0, top_k=2), {}, r"INVALID_ARGUMENT\].*temperature"),
        (asking()[:1], {}, r"INVALID_ARGUMENT\].*max_tokens is missing"),
        (asking(stream=True), {}, r"INVALID_ARGUMENT\].*ModelStreamInfer"),
        (asking(), {"sequence_id": 7}, r"INVALID_ARGUMENT\].*sequence_id"),
        (asking(), {"timeout": 7}, r"DEADLINE_EXCEEDED\].*longer"),
        (asking(), {"outputs": [triton.InferRequestedOutput("text_output", class_count=2)]}, "classification"),
        (asking(), {"model_version": "7"}, r"NOT_FOUND\].*'7'"),
    ):
        with pytest.raises(triton.InferenceServerException, match=named):
            client.infer("ensemble", inputs, headers=KEY, **options)


def test_only_those_with_a_key_may_ask(client: Any) -> None:
    for headers in (None, {"authorization": "Bearer wrong"}):
        with pytest.raises(triton.InferenceServerException, match=r"UNAUTHENTICATED\].*API key"):
            client.infer("ensemble", asking(), headers=headers)
    came: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: came.put(error))
    assert "UNAUTHENTICATED" in str(came.get(timeout=10))
    client.stop_stream()


def test_a_taken_port_is_refused(server: Server, engine: Path) -> None:
    words = ["serve", engine, "--port", 0, "--grpc_port", address_of(server).rpartition(":")[2]]
    command = [sys.executable, "-c", "import slipstream.cli; slipstream.cli.main()", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--grpc_port" in done.stderr and "Traceback" not in done.stderr


def test_two_fronts_share_the_port_drain_and_see_an_engine_end(engine: Path) -> None:
    with serving(engine, "--grpc_port", 0, "--num_fronts", 2, *ENDLESS) as server:
        came: queue.Queue[Any] = queue.Queue()
        with triton.InferenceServerClient(address_of(server)) as client:
            client.start_stream(lambda result, error: came.put((result, error)))
            client.async_stream_infer("ensemble", asking(max_tokens=1_000_000, end_id=-1, stream=True))
            assert came.get(timeout=30)[1] is None
            os.kill(server.engine_pid, signal.SIGKILL)
            started = time.monotonic()
            while (error := came.get(timeout=30)[1]) is None:
                pass
            assert "the engine process ended" in str(error) and time.monotonic() - started < 20
            with pytest.raises(triton.InferenceServerException, match="UNAVAILABLE"):
                client.infer("ensemble", asking())
            eventually(client.is_server_ready, seconds=START_SECONDS)
            client.async_stream_infer("ensemble", asking(max_tokens=300, end_id=-1, stream=True))
            assert came.get(timeout=30)[1] is None
            server.process.send_signal(signal.SIGTERM)
            while True:
                result, error = came.get(timeout=30)
                assert error is None
                if result.get_response().parameters["triton_final_response"].bool_param:
                    break
            client.stop_stream()
        assert server.process.wait(timeout=20) == 0
