"""The real Triton Inference Server over our models: NVIDIA's guide as it is written, and what its clients may do."""

import json
import os
import queue
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import slipstream.cli
from slipstream import LLM, SamplingParams
from slipstream.build import build
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.schema.build import BuildConfig
from tests.serve.conftest import eventually, words_of, write_engine
from tests.serve.triton_server import TritonServer, needs_server, serving, start

pytestmark = needs_server

PROMPT = "How do I count to nine in French?"
STREAMED = {"text_input": PROMPT, "max_tokens": 400, "stream": True}

# From NVIDIA's guide to Llama 3 with Triton (seed 001), as it is printed; only the port is another.
CURL = """curl -X POST localhost:8000/v2/models/ensemble/generate -d \\
'{
"text_input": "How do I count to nine in French?",
"parameters": {
"max_tokens": 100,
"bad_words":[""],
"stop_words":[""]
}
}'"""
MODELS = "all_models/inflight_batcher_llm"
FILL = [
    f"{MODELS}/preprocessing/config.pbtxt "
    "tokenizer_dir:${HF_LLAMA_MODEL},tokenizer_type:auto,triton_max_batch_size:64,preprocessing_instance_count:1",
    f"{MODELS}/postprocessing/config.pbtxt "
    "tokenizer_dir:${HF_LLAMA_MODEL},tokenizer_type:auto,triton_max_batch_size:64,postprocessing_instance_count:1",
    f"{MODELS}/tensorrt_llm_bls/config.pbtxt "
    "triton_max_batch_size:64,decoupled_mode:False,bls_instance_count:1,accumulate_tokens:False",
    f"{MODELS}/ensemble/config.pbtxt triton_max_batch_size:64",
    f"{MODELS}/tensorrt_llm/config.pbtxt "
    "triton_max_batch_size:64,decoupled_mode:False,max_beam_width:1,engine_dir:${ENGINE_PATH},"
    "max_tokens_in_paged_kv_cache:2560,max_attention_window_size:2560,kv_cache_free_gpu_mem_fraction:0.5,"
    "exclude_input_in_output:True,enable_kv_cache_reuse:False,batching_strategy:inflight_fused_batching,"
    "max_queue_delay_microseconds:0",
]


def call(*words: object) -> None:
    with pytest.raises(SystemExit) as end:
        slipstream.cli.main([str(word) for word in words])
    assert not end.value.code, words


@pytest.mark.real_model
def test_the_guide_as_it_is_written(smollm2_llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """init, the engine copied, five fill-templates, launch, curl; the answer is the library's own."""
    monkeypatch.chdir(tmp_path)
    assert smollm2_llm.tokenizer_folder is not None
    engine = smollm2_llm.tokenizer_folder.parent
    paths = {"HF_LLAMA_MODEL": str(smollm2_llm.tokenizer_folder), "ENGINE_PATH": f"{MODELS}/tensorrt_llm/1"}
    call("triton", "init", "--model_repo", MODELS)
    shutil.copytree(engine, Path(paths["ENGINE_PATH"]), copy_function=os.link, dirs_exist_ok=True)
    for line in FILL:
        file, substitutions = re.sub(r"\$\{(\w+)\}", lambda found: paths[found[1]], line).split(" ")
        call("triton", "fill-template", "-i", file, substitutions)
    expected = smollm2_llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=100)).outputs[0].text
    with serving(Path(MODELS), "--world_size", 1) as server:
        command = CURL.replace("localhost:8000", server.http)
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
        answer = json.loads(done.stdout)
        assert answer["text_output"] == expected
        assert (answer["model_name"], answer["model_version"]) == ("ensemble", "1")
        assert server.text("tensorrt_llm_bls", text_input=PROMPT, max_tokens=100) == expected
        refused = server.post("ensemble", {"text_input": PROMPT, "max_tokens": 4, "stream": True})
        assert refused.status_code == 400 and "decoupled_mode:False" in refused.text


# From here on with a tiny model that talks nonsense, for a long time, and a repository as `init --engine_dir` fills it.


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run by torch's kernels, which leave Triton's clients the time to meet in one batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIPSTREAM_CPU_LEVEL", "torch")
        yield write_engine(tmp_path_factory.mktemp("triton"), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def offline(engine: Path) -> Iterator[LLM]:
    with LLM(engine) as llm:
        yield llm


@pytest.fixture(scope="module")
def repository(engine: Path) -> Path:
    repository = engine.with_name("repository")
    call("triton", "init", "--model_repo", repository, "--engine_dir", engine)
    config = repository / "tensorrt_llm" / "config.pbtxt"
    text = config.read_text()
    config.write_text(
        text.replace('"max_beam_width" value { string_value: "1"', '"max_beam_width" value { string_value: "4"')
    )
    return repository


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    with serving(repository) as server:
        yield server


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens)


def said(offline: LLM, prompt: str, max_tokens: int, **sampling: Any) -> str:
    return (
        offline.generate(prompt, SamplingParams(**{"temperature": 0, **sampling}, max_tokens=max_tokens))
        .outputs[0]
        .text
    )


def pieces(server: TritonServer, model: str, **body: Any) -> list[dict[str, Any]]:
    with httpx.stream(
        "POST", f"http://{server.http}/v2/models/{model}/generate_stream", json=body, timeout=60
    ) as found:
        lines = [line.removeprefix("data: ") for line in found.iter_lines() if line]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_a_stream_joins_to_the_whole_text(server: TritonServer, offline: LLM, model: str) -> None:
    expected = said(offline, PROMPT, 100)
    assert server.text(model, text_input=PROMPT, max_tokens=100) == expected
    streamed = pieces(server, model, text_input=PROMPT, max_tokens=100, stream=True)
    assert len(streamed) > 5
    assert "".join(piece["text_output"] for piece in streamed) == expected


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_words_that_stop_and_words_that_may_not_be(server: TritonServer, offline: LLM, model: str) -> None:
    free = said(offline, PROMPT, 60)
    stop, bad = free[20:23], free[5]
    for stream in (False, True):
        body = {"text_input": PROMPT, "max_tokens": 60, "stream": stream}
        stopped = pieces(server, model, **body, stop_words=[stop, ""])
        text = "".join(piece["text_output"] for piece in stopped)
        assert text == said(offline, PROMPT, 60, stop=[stop]) and stop not in text
        without = pieces(server, model, **body, bad_words=[bad])
        assert "".join(piece["text_output"] for piece in without) == said(offline, PROMPT, 60, bad_words=[bad])


def test_every_other_input_has_its_effect(server: TritonServer, offline: LLM) -> None:
    drawn = {
        "top_p": 0.9,
        "temperature": 1.5,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
    }
    expected = said(offline, PROMPT, 40, **drawn, top_k=50, seed=7)
    body = {"text_input": PROMPT, "max_tokens": 40}
    assert server.text("ensemble", **body, **drawn, top_k=50, random_seed=7) == expected
    assert server.text("ensemble", **body, top_p=1.0, random_seed=7) == said(offline, PROMPT, 40, temperature=1, seed=7)
    assert server.text("ensemble", **body, min_length=40) == said(offline, PROMPT, 40, min_tokens=40)
    free = offline.generate(PROMPT, SamplingParams(temperature=0, max_tokens=40, logprobs=0)).outputs[0]
    ends = free.token_ids[9]
    cut = said(offline, PROMPT, 40, stop_token_ids=[ends], ignore_eos=True)
    assert server.text("ensemble", **body, end_id=ends) == cut != free.text
    biased = server.text("ensemble", **body, embedding_bias_words=["Q"], embedding_bias_weights=[100.0])
    assert biased == "Q" * 40
    answer = server.post("ensemble", {**body, "return_log_probs": True}).json()
    assert answer["output_log_probs"] == pytest.approx([entry.logprob for entry in free.logprobs or []], abs=1e-4)
    assert answer["cum_log_probs"] == pytest.approx(free.cumulative_logprob, abs=1e-3)
    beams = server.post("ensemble", {**body, "max_tokens": 8, "beam_width": 3, "length_penalty": 0.5}).json()
    params = SamplingParams(use_beam_search=True, n=3, best_of=3, length_penalty=0.5, max_tokens=8)
    assert beams["text_output"] == [each.text for each in offline.generate(PROMPT, params).outputs]


REFUSED = {
    "max_tokens is 0": {"max_tokens": 0},
    "top_p is 3.0": {"top_p": 3.0},
    "return_context_logits": {"return_context_logits": True},
    "return_generation_logits": {"return_generation_logits": True},
    "beam_width is 9": {"beam_width": 9},
    "stream is true": {"beam_width": 2, "stream": True},
    "length_penalty is 2.0": {"length_penalty": 2.0},
    "temperature is 0.5": {"temperature": 0.5},
    "the vocabulary": {"end_id": 5000},
    "no_such_input": {"no_such_input": 1},
    "embedding_bias_words has 1 words": {"embedding_bias_words": ["a"]},
    "text_input is empty": {"text_input": ""},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(server: TritonServer, sentence: str) -> None:
    for model in ("ensemble", "tensorrt_llm_bls"):
        response = server.post(model, {"text_input": PROMPT, "max_tokens": 4, **REFUSED[sentence]})
        assert response.status_code == 400, response.text
        assert sentence in response.json()["error"], response.text


# --- gRPC, by NVIDIA's client ---


class Stream:
    """One gRPC stream of responses; `end` is set by the final one, and `error` by what went wrong."""

    def __init__(self, server: TritonServer) -> None:
        import tritonclient.grpc as grpcclient

        self.client = grpcclient.InferenceServerClient(server.grpc)
        self.news: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.client.start_stream(lambda result, error: self.news.put((result, error)))

    def ask(self, model: str, tensors: dict[str, np.ndarray], request_id: str = "") -> None:
        import tritonclient.grpc as grpcclient

        inputs = []
        for name, values in tensors.items():
            kind = {"O": "BYTES", "i": "INT32", "b": "BOOL", "f": "FP32"}[values.dtype.kind]
            inputs.append(grpcclient.InferInput(name, list(values.shape), kind))
            inputs[-1].set_data_from_numpy(values)
        self.client.async_stream_infer(model, inputs, request_id=request_id, enable_empty_final_response=True)

    def responses(self) -> Iterator[Any]:
        while True:
            result, error = self.news.get(timeout=30)
            if error is not None:
                raise error
            response = result.get_response()
            if response.outputs:
                yield result
            if response.parameters["triton_final_response"].bool_param:
                return

    def close(self, *, cancel: bool = False) -> None:
        self.client.stop_stream(cancel_requests=cancel)
        self.client.close()


def text_tensors(prompt: str, max_tokens: int, stream: bool = True) -> dict[str, np.ndarray]:
    return {
        "text_input": np.array([[prompt.encode()]], np.object_),
        "max_tokens": np.array([[max_tokens]], np.int32),
        "stream": np.array([[stream]], np.bool_),
    }


def token_tensors(token_ids: list[int], max_tokens: int) -> dict[str, np.ndarray]:
    return {
        "input_ids": np.array([token_ids], np.int32),
        "input_lengths": np.array([[len(token_ids)]], np.int32),
        "request_output_len": np.array([[max_tokens]], np.int32),
        "streaming": np.array([[True]], np.bool_),
    }


@pytest.mark.parametrize(("model", "count"), [("ensemble", 8), ("tensorrt_llm_bls", 4)])
def test_streams_run_in_one_batch(server: TritonServer, offline: LLM, model: str, count: int) -> None:
    """Each gets its own answer, and in one of a few rounds, however busy the machine, all run at once."""
    params = greedy(1500)
    prompts = [f"{number} {PROMPT}" for number in range(count)]
    expected = [output.outputs[0].text for output in offline.generate(prompts, params)]

    def run(prompt: str) -> str:
        stream = Stream(server)
        stream.ask(model, text_tensors(prompt, params.max_tokens))
        text = "".join(map(text_of, stream.responses()))
        stream.close()
        return text

    most = 0.0
    with ThreadPoolExecutor(count) as pool:
        for _ in range(5):
            streams = [pool.submit(run, prompt) for prompt in prompts]
            while not all(stream.done() for stream in streams):
                most = max(most, server.gauge("num_requests_running"))
                time.sleep(0.01)
            assert [stream.result() for stream in streams] == expected
            if most == count:
                return
    pytest.fail(f"at most {most:.0f} of {count} ran at once")


def text_of(result: Any) -> str:
    text: bytes = result.as_numpy("text_output").reshape(-1)[0]
    return text.decode()


def test_tokens_stream_without_text(server: TritonServer, offline: LLM) -> None:
    token_ids = offline.generate(PROMPT, SamplingParams(temperature=0, max_tokens=30)).prompt_token_ids
    expected = offline.generate(token_ids, SamplingParams(temperature=0, max_tokens=30)).outputs[0].token_ids
    stream = Stream(server)
    stream.ask("tensorrt_llm", token_tensors(token_ids, 30))
    found = [token for result in stream.responses() for token in result.as_numpy("output_ids")[0, 0].tolist()]
    stream.close()
    assert found == expected


def runs(server: TritonServer, count: int) -> Callable[[], bool]:
    return lambda: server.gauge("num_requests_running") == count


@pytest.mark.parametrize("model", ["tensorrt_llm", "tensorrt_llm_bls"])
def test_who_leaves_is_not_worked_for(server: TritonServer, model: str) -> None:
    before = server.gauge("generation_tokens_total")
    stream = Stream(server)
    stream.ask(model, token_tensors([5, 6, 7], 3500) if model == "tensorrt_llm" else text_tensors(PROMPT, 3500))
    next(stream.responses())
    eventually(runs(server, 1))
    stream.close(cancel=True)
    eventually(runs(server, 0))
    assert 0 < server.gauge("generation_tokens_total") - before < 2500


def test_a_stop_ends_the_request_of_its_id(server: TritonServer) -> None:
    stream, stopper = Stream(server), Stream(server)
    stream.ask("tensorrt_llm", token_tensors([5, 6, 7], 3500), request_id="mine")
    responses = stream.responses()
    next(responses)
    stopper.ask("tensorrt_llm", {**token_tensors([1], 1), "stop": np.array([[True]])}, request_id="mine")
    num_tokens = sum(result.as_numpy("output_ids").size for result in responses)
    assert sum(result.as_numpy("output_ids").size for result in stopper.responses()) == 0
    assert num_tokens < 2500
    for each in (stream, stopper):
        each.close()
    eventually(runs(server, 0))


# --- its end ---


def test_a_model_that_dies_ends_the_server(repository: Path) -> None:
    """Triton would go on calling it ready."""
    with serving(repository) as server:
        stub = max(server.children(), key=_resident)
        below = server.children()
        os.kill(stub, signal.SIGKILL)
        assert server.process.wait(timeout=30) == 2
        assert "error: The process of a model has ended" in server.log.read_text()
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))
        assert not list(Path("/dev/shm").glob(f"slipstream_{server.process.pid}_*"))


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1])


def test_it_stops_cleanly_once_a_stream_has_ended(repository: Path, offline: LLM, tmp_path: Path) -> None:
    """And two settings of its own: accumulate_tokens, and --log."""
    other, log = tmp_path / "accumulating", tmp_path / "log.txt"
    shutil.copytree(repository, other)
    config = other / "tensorrt_llm_bls" / "config.pbtxt"
    before = 'key: "accumulate_tokens" value { string_value: "False" }'
    assert before in config.read_text()
    config.write_text(config.read_text().replace(before, before.replace("False", "True")))
    with serving(other, "--log", "--log_file", log) as server:
        assert "Started HTTPService" in log.read_text()
        so_far = [each["text_output"] for each in pieces(server, "tensorrt_llm_bls", **STREAMED)]
        assert len(so_far) > 5
        assert all(later.startswith(earlier) for earlier, later in pairwise(so_far))
        assert so_far[-1] == said(offline, PROMPT, 400)
        below = server.children()
        url = f"http://{server.http}/v2/models/ensemble/generate_stream"
        with httpx.stream("POST", url, json=STREAMED, timeout=60) as found:
            lines = found.iter_lines()
            first = next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [json.loads(line.removeprefix("data: ")) for line in [first, *lines] if line]
        assert "".join(piece["text_output"] for piece in rest) == said(offline, PROMPT, 400)
        assert server.process.wait(timeout=20) == 0, server.log.read_text()[-2000:]
        assert not any(Path(f"/proc/{pid}").exists() for pid in below)
        assert not list(Path("/dev/shm").glob(f"slipstream_{server.process.pid}_*"))


def test_an_engine_of_two_ranks(engine: Path, offline: LLM, tmp_path: Path) -> None:
    """The model starts the second one, over gloo here; without it the server ends, as where a model dies."""
    ranks, repository = tmp_path / "ranks", tmp_path / "repository"
    checkpoint = open_checkpoint(resolve(engine.with_name("talker")), "float32")
    build(checkpoint, ranks, BuildConfig(tp_size=2, max_batch_size=8, max_num_tokens=64))
    checkpoint.close()
    call("triton", "init", "--model_repo", repository, "--engine_dir", ranks)
    one = start(repository)
    assert one.process.wait(timeout=60) == 2
    assert "has 2 ranks; give --world_size 2" in one.log.read_text()
    with serving(repository, "--world_size", 2) as server:
        assert server.text("ensemble", text_input=PROMPT, max_tokens=40) == said(offline, PROMPT, 40)
        [rank] = [pid for pid in server.children() if "rank_process" in words_of(pid)]
        os.kill(rank, signal.SIGKILL)
        assert server.process.wait(timeout=60) == 2
        assert not Path(f"/proc/{rank}").exists()
    assert "rank 1 has ended, by signal 9" in server.log.read_text()


def test_a_start_that_fails_says_why(repository: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(repository, broken)
    config = broken / "tensorrt_llm" / "config.pbtxt"
    config.write_text(config.read_text().replace("inflight_fused_batching", "sometimes"))
    server = start(broken)
    assert server.process.wait(timeout=30) == 2
    last = server.log.read_text().splitlines()[-1]
    assert (
        last.startswith("error: tritonserver ended before it was ready") and "batching_strategy is 'sometimes'" in last
    )
