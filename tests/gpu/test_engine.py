"""An engine on the GPU says what it says on the CPU: recorded steps, steps launched ahead, prompts in chunks.

In float32, where the two differ by rounding alone. Only on a GPU.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.checkpoint.random import write_random_model
from slipstream.models import known_models, model_file
from slipstream.runtime.speculation import methods
from tests.api.test_kv_cache import write_calibrated
from tests.speculative.test_methods import METHODS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LIMITS: dict[str, Any] = {"dtype": "float32", "max_batch_size": 8, "max_num_tokens": 48, "max_seq_len": 128}


def prompts(count: int, seed: int) -> list[list[int]]:
    """Of mixed lengths, longer than a step too; half of them begin alike."""
    chooser = random.Random(seed)
    shared = [chooser.randrange(128) for _ in range(40)]
    own = [[chooser.randrange(128) for _ in range(chooser.randint(1, 60))] for _ in range(count)]
    return [shared[: len(each)] + each[:3] if index % 2 else each for index, each in enumerate(own)]


def tokens(llm: LLM, asked: list[list[int]], sampling: Any) -> list[list[int]]:
    outputs = llm.generate(asked, sampling)
    assert not any(output.error for output in outputs)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("model_type", known_models())
def test_greedy_tokens_are_those_of_the_cpu(model_type: str, tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", model_file(model_type).TINY, seed=2)
    asked = prompts(12, seed=3)
    sampling = [SamplingParams(temperature=0, max_tokens=5 + 4 * index, ignore_eos=True) for index in range(len(asked))]
    found = {}
    for device in ("cpu", "cuda"):
        with LLM(model, device=device, **LIMITS) as llm:
            found[device] = tokens(llm, asked, sampling)
    assert found["cuda"] == found["cpu"]


@pytest.mark.parametrize("method", methods())
def test_drafts_change_no_text(method: str, tmp_path: Path) -> None:
    """Chains and trees, in recorded steps; a draft model's steps are recorded as well."""
    model = write_random_model(tmp_path / "model", model_file("llama").TINY, seed=2)
    asked = prompts(12, seed=3)
    sampling = [
        SamplingParams(temperature=index % 2, seed=index, max_tokens=5 + 4 * index, ignore_eos=True)
        for index in range(len(asked))
    ]
    with LLM(model, device="cuda", **LIMITS) as llm:
        plain = tokens(llm, asked, sampling)
    speculative = METHODS[method](model, tmp_path / "draft")
    with LLM(model, device="cuda", **LIMITS, speculative=speculative) as llm:  # some steps ask for none, and run ahead
        assert tokens(llm, asked, sampling) == plain
    with LLM(model, device="cuda", **LIMITS, speculative=speculative | {"adaptive": False}) as llm:
        assert tokens(llm, asked, sampling) == plain
        assert 0 < sum(llm.stats.num_accepted_tokens) < llm.stats.num_draft_tokens


@pytest.mark.parametrize("method", ["medusa", "eagle", "redrafter", "draft_model"])
def test_a_step_with_drafts_is_one_launch(method: str, tmp_path: Path) -> None:
    """Verified, accepted and drafted again; nobody waits in between."""
    model = write_random_model(tmp_path / "model", model_file("llama").TINY, seed=2)
    speculative = METHODS[method](model, tmp_path / "draft") | {"adaptive": False}
    asked, sampling = [1, 2, 3], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with LLM(model, device="cuda", **LIMITS, enable_block_reuse=False, speculative=speculative) as llm:
        llm.generate(asked, sampling)
        steps, drafts = llm.stats.num_steps, llm.stats.num_drafts
        with torch.profiler.profile() as profile:
            llm.generate(asked, sampling)
        steps, drafts = llm.stats.num_steps - steps, llm.stats.num_drafts - drafts
    calls = {each.key: each.count for each in profile.key_averages() if each.key.startswith("cu")}
    assert drafts > 10
    assert calls["cudaGraphLaunch"] == steps, calls
    single = sum(count for key, count in calls.items() if "LaunchKernel" in key)
    assert single <= 8 + 2 * (steps - drafts), calls
    assert calls.get("cudaStreamSynchronize", 0) + calls.get("cudaDeviceSynchronize", 0) <= 4, calls


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_those_of_the_cpu(pooling: str, tmp_path: Path) -> None:
    """In recorded steps and beside requests that generate; texts longer than a step come in pieces."""
    model = write_random_model(tmp_path / "model", model_file("llama").TINY, seed=2)
    asked = prompts(12, seed=3)
    found = {}
    for device in ("cpu", "cuda"):
        with LLM(model, device=device, **LIMITS) as llm:
            stream = llm.stream([1, 2, 3], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
            next(stream)
            found[device] = torch.tensor([each.embedding.tolist() for each in llm.embed(asked, pooling=pooling)])
            assert len([*stream][-1].outputs[0].token_ids) == 100
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=0, atol=1e-5)


def test_sinks_are_kept_as_on_the_cpu(tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", model_file("llama").TINY, seed=6)
    asked, sampling = prompts(12, seed=7), SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    found = {}
    for device in ("cpu", "cuda"):
        with LLM(model, device=device, max_attention_window_size=30, sink_token_length=3, **LIMITS) as llm:
            found[device] = tokens(llm, asked, sampling)
    assert found["cuda"] == found["cpu"]


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_caches_of_8_bits_hold_what_they_hold_on_the_cpu(name: str, tmp_path: Path) -> None:
    """With sinks too. A number between two steps may round either way."""
    model = write_calibrated(tmp_path / "model", name)
    for options in ({}, {"max_attention_window_size": 40, "sink_token_length": 2}):
        found = {}
        for device in ("cpu", "cuda"):
            with LLM(model, device=device, **LIMITS, **options) as llm:
                assert llm.manifest.kv_cache_dtype == name
                found[device] = torch.tensor([llm.score(each).logprobs[1:] for each in [list(range(1, 90))]])
                tokens(llm, prompts(12, seed=3), SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        torch.testing.assert_close(found["cuda"], found["cpu"], rtol=0, atol=2e-2)


@pytest.mark.parametrize("model_type", known_models())
def test_every_model_keeps_its_cache_in_8_bits(model_type: str, tmp_path: Path) -> None:
    """Beside the CPU's; a choice of experts may go the other way where a number rounds the other way."""
    model = write_random_model(tmp_path / "model", model_file(model_type).TINY, seed=2)
    found = {}
    for device in ("cpu", "cuda"):
        with LLM(model, device=device, kv_cache_dtype="fp8", **LIMITS) as llm:
            found[device] = torch.tensor([llm.score(each).logprobs[1:] for each in [list(range(1, 60))]])
    assert (found["cuda"] - found["cpu"]).abs().median() < 1e-2


def test_stops_aborts_and_sampling_in_one_batch(tmp_path: Path) -> None:
    """What ends early, what is drawn by a seed, and what needs the host between steps, beside each other and alone."""
    model = write_random_model(tmp_path / "model", model_file("llama").TINY, seed=4)
    asked = prompts(9, seed=5)
    sampling = [
        SamplingParams(
            max_tokens=30,
            temperature=0.8 if index % 3 == 1 else 0.0,
            seed=index,
            top_k=(0, 40)[index % 2],
            top_p=(1.0, 0.9, 0.95)[index % 3],
            min_p=0.01 if index == 7 else 0.0,
            typical_p=0.95 if index == 1 else 1.0,
            min_tokens=12 if index == 5 else 0,
            stop_token_ids=(7, 11, 19, 23, 42) if index % 2 else (),
            repetition_penalty=1.3 if index % 4 == 3 else 1.0,
            logprobs=1 if index == 4 else None,
        )
        for index in range(len(asked))
    ]
    with LLM(model, device="cuda", **LIMITS) as llm:
        together = tokens(llm, asked, sampling)
        alone = [tokens(llm, [prompt], [each])[0] for prompt, each in zip(asked, sampling, strict=True)]
    with LLM(model, device="cpu", **LIMITS) as llm:
        on_cpu = tokens(llm, asked, sampling)
    assert together == alone == on_cpu


def mixed(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of all lengths, of which half begin alike; greedy and random, filtered and penalized, with logprobs."""
    sampling = [
        SamplingParams(
            max_tokens=4 + index % 21,
            temperature=(0.0, 0.7, 1.0, 0.0)[index % 4],
            seed=1000 + index,
            top_k=(0, 20)[index % 3 == 1],
            top_p=(1.0, 0.9)[index % 5 == 1],
            min_p=(0.0, 0.02)[index % 7 == 1],
            typical_p=(1.0, 0.95)[index % 11 == 1],
            repetition_penalty=(1.0, 1.2)[index % 6 == 3],
            logprobs=3,
            prompt_logprobs=2 if index % 8 == 5 else None,
            ignore_eos=True,
        )
        for index in range(count)
    ]
    return prompts(count, seed=8), sampling


def together_and_alone(model: Path, **options: Any) -> tuple[list[Any], list[Any]]:
    """The outputs of 64 requests at once, and of each by itself in an engine that cuts no prompt and reuses nothing."""
    asked, sampling = mixed(64)
    limits = {"dtype": "bfloat16", "device": "cuda", "max_seq_len": 128, "max_batch_size": 32, **options}
    with LLM(model, max_num_tokens=128, enable_block_reuse=False, **limits) as llm:
        alone = [llm.generate(prompt, each) for prompt, each in zip(asked, sampling, strict=True)]
        engine = llm._folder.path
    with LLM(engine, max_num_tokens=48, **limits) as llm:
        together = llm.generate(asked, sampling)
    return together, alone


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral", "deepseek_v3", "gpt_oss"])
def test_a_request_has_the_bits_that_it_has_alone(model_type: str, kv_cache_dtype: str, tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", model_file(model_type).TINY, seed=9)
    together, alone = together_and_alone(model, deterministic=True, kv_cache_dtype=kv_cache_dtype)

    def found(output: Any) -> Any:
        return output.outputs[0].token_ids, output.outputs[0].logprobs, output.prompt_logprobs

    assert not any(output.error for output in together)
    assert [index for index in range(64) if found(together[index]) != found(alone[index])] == []


def test_without_that_a_request_differs_by_roundings(tmp_path: Path) -> None:
    """Tokens are nearly always the same, and logprobs alike as long as they are."""
    model = write_random_model(tmp_path / "model", model_file("llama").TINY, seed=9)
    together, alone = together_and_alone(model)
    same, largest = 0, 0.0
    for one, other in zip(together, alone, strict=True):
        same += one.outputs[0].token_ids == other.outputs[0].token_ids
        for mine, its in zip(one.outputs[0].logprobs, other.outputs[0].logprobs, strict=True):
            if mine.token_id != its.token_id:
                break
            largest = max(largest, abs(mine.logprob - its.logprob))
    print(f"{same} of {len(alone)} requests have the same tokens; logprobs differ by {largest:.1e} at most")
    assert same >= 0.6 * len(alone) and largest < 0.1
