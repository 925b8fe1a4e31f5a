"""What fits, against numbers counted by hand, and against what the runtime then allocates."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from slipstream.build import BuildPlan, plan_build
from slipstream.build.fit import GPUS, Device, fit, gpu
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.engine.memory import plan_memory
from slipstream.errors import CapacityError, UsageError
from slipstream.models.llama import TINY
from slipstream.runtime.worker import memory
from slipstream.schema.build import BuildConfig

MIB = 1 << 20


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> BuildPlan:
    folder = write_random_model(tmp_path_factory.mktemp("fit") / "model", TINY)
    checkpoint = open_checkpoint(resolve(folder), "float32")
    plan = plan_build(checkpoint, BuildConfig(max_batch_size=4, max_num_tokens=32))
    checkpoint.close()
    return plan


def fitting(plan: BuildPlan, **changes: Any) -> Any:
    return fit(plan.graph, plan.manifest, Device(**{"name": "x", "memory": 8 * MIB} | changes), 0.5)


def test_the_derivation_is_the_hand_count(plan: BuildPlan) -> None:
    manifest = plan.manifest
    found = fitting(plan, taken=MIB)
    assert [size for _, size in found.taken] == [
        MIB, manifest.memory["weights"], manifest.memory["activations"], manifest.memory["activations"],
    ]  # fmt: skip
    # Steps of 32 tokens are few enough to be recorded, too.
    assert found.left == 7 * MIB - manifest.memory["weights"] - 2 * manifest.memory["activations"]
    assert found.kv_bytes == found.left // 2
    # 3 layers × K and V × 2 heads × 16 wide × 4 bytes; 16 tokens a block, of which the first is nobody's
    assert found.kv_tokens == (found.kv_bytes // (16 * 768) - 1) * 16
    assert found.max_batch_size == found.kv_tokens // 256
    assert found.max_seq_len == max(found.kv_tokens, 256)
    room = 7 * MIB - manifest.memory["weights"] - 256 * 768 * 2
    fitting_plan, next_plan = (
        plan_memory(plan.graph, max_num_tokens=found.max_num_tokens + more, max_batch_size=4) for more in (0, 1)
    )
    assert fitting_plan["activations"] + fitting_plan["recorded"] <= room
    assert next_plan["activations"] + next_plan["recorded"] > room


def test_a_cpu_maps_its_weights_and_has_a_limit(plan: BuildPlan) -> None:
    found = fitting(plan, maps_weights=True, kv_limit=MIB)
    assert found.left == 8 * MIB - plan.manifest.memory["activations"]
    assert found.kv_bytes == MIB


@pytest.mark.parametrize("free", [2 * MIB, 100 * MIB])
def test_the_runtime_allocates_what_was_derived(plan: BuildPlan, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    cpu = torch.device("cpu")
    left = memory.left_by_plan(plan.manifest, cpu)
    blocks = memory.count_blocks(plan.manifest, plan.manifest.kv_groups, cpu, left, fraction=0.9)
    found = fit(plan.graph, plan.manifest, Device("cpu", free, maps_weights=True), 0.9)
    useful = plan.manifest.max_batch_size * plan.manifest.max_seq_len  # a runtime takes no more than can be used
    assert (blocks - 1) * 16 == min(found.kv_tokens, useful)


def test_windows_leave_room_for_more_and_longer_sequences(plan: BuildPlan) -> None:
    full = fitting(plan)
    windowed = replace(plan, manifest=replace(plan.manifest, windows=[32, 32, 32]))
    found = fitting(windowed)
    assert found.kv_tokens == full.kv_tokens
    assert found.max_batch_size == found.kv_tokens // 16 // 3  # of 32 tokens anywhere, three blocks hold some
    mixed = fitting(replace(plan, manifest=replace(plan.manifest, windows=[32, 0, 32])))
    # Three groups of one layer: 16 blocks of the full one and 3 of each window, each a third of a block above.
    assert mixed.max_batch_size == (mixed.kv_bytes // (16 * 256) - 1) // (16 + 3 + 3)


def test_a_block_of_each_group_is_the_least_that_fits(plan: BuildPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = replace(plan.manifest, windows=[32, 0, 32])
    taken, block = plan.manifest.memory["activations"], 16 * 256
    for num_blocks, fits in ((3, False), (4, True)):  # the null block, and one each of three groups
        device = Device("cpu", taken + num_blocks * block, maps_weights=True)
        monkeypatch.setattr(memory, "free_memory", lambda _, device=device: device.memory)
        cpu = torch.device("cpu")
        left = memory.left_by_plan(mixed, cpu)
        if fits:
            assert fit(plan.graph, mixed, device, 1.0).kv_tokens == 16
            assert memory.count_blocks(mixed, mixed.kv_groups, cpu, left, fraction=1.0) == 4
        else:
            with pytest.raises(CapacityError, match="No KV block fits"):
                fit(plan.graph, mixed, device, 1.0)
            with pytest.raises(CapacityError, match="No KV block fits"):
                memory.count_blocks(mixed, mixed.kv_groups, cpu, left, fraction=1.0)


def test_a_plan_counts_a_row_of_logits_for_every_token(plan: BuildPlan) -> None:
    """Prompt logprobs ask for them all: float32 [T, V] and its input, where that is the widest moment."""
    wide = plan_memory(plan.graph, max_num_tokens=1000, max_batch_size=1)["activations"]
    assert wide >= 4 * 1000 * (64 + 128)


def test_what_would_fit_is_named(plan: BuildPlan) -> None:
    with pytest.raises(CapacityError, match=r"beside weights .*; take a larger GPU, such as T4-16GB\.$"):
        fitting(plan, memory=MIB // 8)
    long = replace(
        plan.manifest, max_num_tokens=2048, memory=plan_memory(plan.graph, max_num_tokens=2048, max_batch_size=4)
    )
    with pytest.raises(CapacityError, match=r"lower --max_num_tokens to \d+ or take a larger GPU, such as T4-16GB\.$"):
        fit(plan.graph, long, Device("x", 2 * MIB), 0.5)
    huge = replace(plan.manifest, memory={"weights": 1 << 40, "activations": 0, "recorded": 0})
    with pytest.raises(CapacityError, match="no single GPU known here is large enough"):
        fit(plan.graph, huge, gpu("B200-180GB"), 0.5)


def test_gpus_by_name() -> None:
    assert gpu("h100-80gb").name == "H100-80GB"
    assert all(gpu(name).memory > gpu(name).taken for name in GPUS)
    with pytest.raises(UsageError, match="--gpu is 'H101'; the known ones are T4-16GB"):
        gpu("H101")
