"""Starting an engine on a GPU: weights by way of buffers, a KV pool in what is left, recordings that share memory."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream import LLM, SamplingParams
from slipstream.checkpoint.random import write_random_model
from slipstream.engine.folder import open_engine
from slipstream.errors import CapacityError
from slipstream.models import model_file
from slipstream.runtime.worker import weights as loading
from slipstream.runtime.worker.recorded import RecordedSteps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LIMITS: dict[str, Any] = {"dtype": "float32", "max_batch_size": 8, "max_num_tokens": 64, "max_seq_len": 128}
SAMPLING = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = [[1 + i, 2, 3 + i, 5] * (1 + 3 * i) for i in range(7)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("llama"), model_file("llama").TINY, seed=11)


def tokens(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(PROMPTS, SAMPLING)
    assert not any(output.error for output in outputs), outputs[0].error
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def on_cpu(model: Path) -> list[list[int]]:
    with LLM(model, device="cpu", **LIMITS) as llm:
        return tokens(llm)


def test_weights_arrive_whole(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(model, device="cuda", **LIMITS) as llm:
        engine = open_engine(llm._folder.path)
    names = list(engine.graph.weights)
    for size in (1 << 12, loading.BUFFER_BYTES):  # buffers that take turns many times, and one that holds it all
        monkeypatch.setattr(loading, "BUFFER_BYTES", size)
        found = loading.load_weights(engine.weights, names, torch.device("cuda"))
        assert all(torch.equal(found[name].cpu(), engine.weights.read(name)) for name in names)
    engine.close()


def test_the_pool_is_what_is_asked_of_what_is_left(model: Path) -> None:
    """And what a start takes in all stays within what is free."""
    long: dict[str, Any] = LIMITS | {"max_seq_len": 256, "max_batch_size": 64, "max_num_tokens": 64}
    with LLM(model, device="cuda", kv_cache_max_bytes=1 << 20, **long) as llm:
        block = llm.manifest.kv_block_bytes(llm.manifest.kv_groups)
        assert llm.runtime_config.num_blocks == (1 << 20) // block
        assert len(tokens(llm)) == len(PROMPTS)
    with pytest.raises(CapacityError, match=r"lower --kv_cache_max_bytes to \d+"):
        LLM(model, device="cuda", kv_cache_max_bytes=1 << 50, **LIMITS)


def test_recordings_of_all_sizes_take_no_more_than_was_set_aside(model: Path, on_cpu: list[list[int]]) -> None:
    with LLM(model, device="cuda", **LIMITS) as llm:
        torch.cuda.synchronize()
        before = torch.cuda.memory_reserved()
        assert tokens(llm) == on_cpu
        assert tokens(llm) == on_cpu  # from recordings that were made in another order
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() - before <= 16 << 20, "small pieces alone, a segment of 2 MiB each"


def test_a_step_that_cannot_be_recorded_runs_from_python(
    model: Path, on_cpu: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: RecordedSteps, sizes: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(RecordedSteps, "_record_now", fail)
    with warnings.catch_warnings(record=True) as caught, LLM(model, device="cuda", **LIMITS) as llm:
        warnings.simplefilter("always")
        assert tokens(llm) == on_cpu
    assert any("lower --kv_cache_free_memory_fraction" in str(each.message) for each in caught)


class Enormous:
    """A file with one weight of 64 MiB."""

    shape = staticmethod(lambda name: (64 << 20,))
    dtype = staticmethod(lambda name: torch.uint8)
    read = staticmethod(lambda name: torch.empty(64 << 20, dtype=torch.uint8))


def test_weights_that_do_not_fit_are_one_sentence() -> None:
    torch.cuda.empty_cache()
    hog = torch.empty(torch.cuda.mem_get_info()[0] - (16 << 20), dtype=torch.uint8, device="cuda")
    file: Any = Enormous()
    with pytest.raises(CapacityError, match=r"The weights take 0\.1 GiB .* set --device cpu"):
        loading.load_weights(file, ["enormous"], torch.device("cuda"))
    del hog
    torch.cuda.empty_cache()
