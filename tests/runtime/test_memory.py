"""How large a KV cache becomes, and weights that go to a device by way of buffers."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.api import LLM
from slipstream.build.cache import tuned_choices
from slipstream.engine.folder import open_engine
from slipstream.engine.manifest import Manifest
from slipstream.errors import CapacityError
from slipstream.runtime.engine import start_engine
from slipstream.runtime.worker.memory import check_kv_dtype, count_blocks, free_in_groups
from slipstream.runtime.worker.recorded import StepOutputs
from slipstream.runtime.worker.weights import copy_through, load_weights
from slipstream.runtime.worker.worker import Worker
from tests.runtime.fake_worker import make_request

GPU = torch.device("cuda")  # a name: nothing here touches one


@pytest.fixture(scope="module")
def engine(tiny_llm: LLM) -> Iterator[Any]:
    folder = open_engine(tiny_llm._folder.path)
    yield folder
    folder.close()


@pytest.fixture(scope="module")
def manifest(engine: Any) -> Manifest:
    return replace(engine.manifest, max_batch_size=64, max_seq_len=1 << 20)


def blocks(manifest: Manifest, left: int, **asked: Any) -> int:
    return count_blocks(manifest, manifest.kv_groups, GPU, left, **{"fraction": 0.5, **asked})


def test_the_pool_is_a_part_of_what_is_left(manifest: Manifest) -> None:
    block = manifest.kv_block_bytes(manifest.kv_groups)
    assert blocks(manifest, 200 * block) == 100
    assert blocks(manifest, 200 * block, fraction=1.0) == 200
    assert blocks(manifest, 200 * block, max_tokens=33) == 4  # three of 16 tokens and the null block
    assert blocks(manifest, 200 * block, max_bytes=10 * block + 1) == 10
    assert blocks(manifest, 200 * block, max_bytes=10 * block, max_tokens=33) == 4
    assert blocks(replace(manifest, max_seq_len=32, max_batch_size=2), 200 * block) == 5  # no more than can be used


def test_fp8_is_refused_by_a_gpu_without_it(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_kv_dtype(manifest, GPU)
    check_kv_dtype(replace(manifest, kv_dtype="int8"), GPU)
    narrow = replace(manifest, kv_dtype="float8_e4m3fn")
    check_kv_dtype(narrow, torch.device("cpu"))
    with pytest.raises(CapacityError, match=r"capability 8\.9 .* cuda has 8\.0; build with --kv_cache_dtype float32"):
        check_kv_dtype(narrow, GPU)


def test_what_does_not_fit_names_a_value_that_does(manifest: Manifest) -> None:
    block = manifest.kv_block_bytes(manifest.kv_groups)
    for flag, size in (("tokens", 10_000), ("bytes", 150 * block)):
        with pytest.raises(CapacityError, match=f"lower --kv_cache_max_{flag} to (\\d+)") as caught:
            blocks(manifest, 200 * block, **{f"max_{flag}": size})
        fits = int(str(caught.value).partition(f"max_{flag} to ")[2].split()[0])
        assert blocks(manifest, 200 * block, **{f"max_{flag}": fits}) == 100
    with pytest.raises(CapacityError, match=r"No KV block fits: .* raise --kv_cache_free_memory_fraction \(now 0.5\)"):
        blocks(manifest, 3 * block)


class Turn:
    """An event that notes when a buffer was given and waited for."""

    def __init__(self, index: int, log: list[tuple[str, int]]) -> None:
        self.index, self.log = index, log

    def record(self) -> None:
        self.log.append(("full", self.index))

    def synchronize(self) -> None:
        self.log.append(("wait", self.index))


def test_tensors_of_all_sizes_pass_the_buffers_whole() -> None:
    torch.manual_seed(0)
    shapes = [(), (3,), (0, 4), (7, 5), (300,), (2, 129), (1,)]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.int8, torch.int64, torch.float32, torch.float8_e4m3fn]
    sources = [(torch.randn(shape) * 50).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    targets = [torch.empty_like(source) for source in sources]
    log: list[tuple[str, int]] = []
    buffers = [torch.empty(256, dtype=torch.uint8) for _ in range(3)]
    copy_through(buffers, [Turn(index, log) for index in range(3)], zip(sources, targets, strict=True))
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(source.reshape(-1).view(torch.uint8), target.reshape(-1).view(torch.uint8))
    # A buffer is left full, and the next one waited for before it is written again.
    assert log[:6] == [("full", 0), ("wait", 1), ("full", 1), ("wait", 2), ("full", 2), ("wait", 0)]
    assert len(log) >= 2 * (sum(source.nbytes for source in sources) // 256 - 1)


def test_a_cpu_looks_at_the_file(engine: Any) -> None:
    weights = load_weights(engine.weights, list(engine.graph.weights), torch.device("cpu"))
    assert all(torch.equal(weights[name], engine.weights.read(name)) for name in engine.graph.weights)


def test_a_pool_in_bytes(tiny_model: Path) -> None:
    with LLM(tiny_model, max_batch_size=8, max_num_tokens=64, kv_cache_max_bytes=1 << 20) as llm:
        block = llm.manifest.kv_block_bytes(llm.manifest.kv_groups)
        assert llm.runtime_config.num_blocks == (1 << 20) // block
        assert len(llm.generate([1, 2, 3]).outputs[0].token_ids) > 0


def test_the_step_that_is_measured_is_the_largest_and_needs_no_block(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr("slipstream.runtime.worker.worker.peak_memory", lambda call, device: made.append(call()) or 5)
    cpu = torch.device("cpu")
    worker = Worker(engine, tuned_choices(engine, cpu), engine.manifest.kv_groups, 8, cpu)
    worker.allocate_kv(1)
    longest = engine.manifest.max_seq_len
    for num_tokens, num_rows in ((3, 3), (longest + 5, longest + 5), (longest + 5, 2)):
        assert worker._largest_step(num_tokens, num_rows) == 5
        logits_RV, token_ids_R, *_ = made.pop()
        assert logits_RV.shape == (num_rows, engine.manifest.vocab_size) and token_ids_R.shape == (num_rows,)


def test_a_step_that_verifies_drafts_is_measured_with_its_ending(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, made = iter((5, 7)), list[StepOutputs]()
    monkeypatch.setattr(
        "slipstream.runtime.worker.worker.peak_memory", lambda call, device: made.append(call()) or next(found)
    )
    cpu = torch.device("cpu")
    worker = Worker(engine, tuned_choices(engine, cpu), engine.manifest.kv_groups, 8, cpu, max_draft_len=3)
    worker.allocate_kv(1)
    assert worker._largest_step(22, 22) == 7
    prompt, verification = made
    assert prompt.ended is None and len(prompt.logits) == 22
    assert verification.ended is not None and len(verification.ended) == 5 and len(verification.logits) == 20


def test_a_step_that_finds_no_memory_says_what_to_lower(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*inputs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Worker, "_run", fail)
    cpu = torch.device("cpu")
    started = start_engine(engine, tuned_choices(engine, cpu), cpu, kv_cache_max_tokens=64)
    started.add(make_request("a"))
    (event,) = started.step()
    assert event.error is not None and "a step of 3 tokens found no memory on cpu; lower" in event.error.lower()
    assert "CapacityError" not in event.error
    with monkeypatch.context() as patch, pytest.raises(CapacityError, match=r"lower --max_num_tokens to 32\."):
        patch.setattr("slipstream.runtime.worker.worker.peak_memory", lambda call, device: call())
        started._worker._largest_step(64, 64)


def test_a_container_has_what_its_limits_leave(tmp_path: Path) -> None:
    def group(path: str, limit: str, current: int) -> None:
        folder = tmp_path / "cgroup" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{current}\n")
        (folder / "memory.stat").write_text("anon 700\ninactive_file 100\nactive_file 200\n")

    def left(own: str) -> int:
        (tmp_path / "own").write_text(own)
        return free_in_groups(tmp_path / "cgroup", tmp_path / "own")

    group("pod/container", "max", 1000)
    assert left("0::/pod/container\n") == sys.maxsize
    group("pod", "5000", 1000)
    assert left("0::/pod/container\n") == 5000 - 1000 + 300
    group("pod/container", "2000", 1000)
    assert left("1:memory:/other\n0::/pod/container\n") == 2000 - 1000 + 300
    assert left("4:memory:/pod\n") == left("0::/gone\n") == sys.maxsize  # version 1; not ours to see
