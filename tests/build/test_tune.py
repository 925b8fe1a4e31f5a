"""tune() takes what is faster, and a table of choices counts only where it was measured."""

import time
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from torch import Tensor

from slipstream.build import build
from slipstream.build.cache import tuned_choices
from slipstream.build.example import trace
from slipstream.build.rewrite import ops
from slipstream.build.tune import describe_device, tune
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.engine.choices import ROW_BUCKETS, Choices, bucket_of, load_choices
from slipstream.engine.folder import CACHE_FILE, open_engine
from slipstream.engine.graph import Node, TensorType
from slipstream.engine.shapes import infer_types
from slipstream.kernels import activation
from slipstream.kernels.registry import Kernel, kernel, known_ops
from slipstream.schema.build import PLUGINS, BuildConfig

CPU = torch.device("cpu")


@pytest.fixture
def fake_kernels() -> Iterator[None]:
    """silu has a kernel that sleeps, one that returns at once, and one for another device."""
    before = dict(activation.silu.kernels)
    activation.silu.kernels.clear()

    @kernel(activation.silu, "slow", lambda device, dtype: True)
    def slow(x: Tensor) -> Tensor:
        time.sleep(0.02)
        return x

    @kernel(activation.silu, "fast", lambda device, dtype: True)
    def fast(x: Tensor) -> Tensor:
        return x

    @kernel(activation.silu, "elsewhere", lambda device, dtype: device.type == "cuda")
    def elsewhere(x: Tensor) -> Tensor:
        raise AssertionError("not on this device")

    yield
    activation.silu.kernels.clear()
    activation.silu.kernels.update(before)


def test_tune_picks_the_faster_kernel_at_every_number_of_rows(fake_kernels: None) -> None:
    graph = trace(lambda x: ops.silu(x), {"x": ("T", 4096)}, {})
    seen: list[tuple[int, int]] = []
    choices = tune(graph, CPU, max_num_tokens=8, max_batch_size=8, progress=lambda *done: seen.append(done))
    assert choices == Choices(describe_device(CPU), {"silu(float32[T, 4096])": ["fast"] * len(ROW_BUCKETS)})
    assert seen == [(0, 1), (1, 1)]


def test_equal_ops_are_measured_once_and_ops_without_a_choice_never(fake_kernels: None) -> None:
    def block(x, y):  # type: ignore[no-untyped-def]
        return ops.add(ops.silu(x), ops.silu(y))

    choices = tune(trace(block, {"x": ("T", 8), "y": ("T", 8)}, {}), CPU, max_num_tokens=2, max_batch_size=2)
    assert list(choices.kernels) == ["silu(float32[T, 8])"]


def test_products_of_quantized_activations_are_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = known_ops()["linear_w8a8"]
    twin = Kernel("twin", linear.reference, lambda device, dtype: True)
    monkeypatch.setitem(linear.kernels, "twin", twin)

    graph = trace(lambda x: ops.quantize_w8a8(x, input_scale=0.0, input_group_size=0), {"x": ("T", 8)}, {})
    graph.weights = {"packed": TensorType((4, 8), "int8"), "scale": TensorType((4, 1), "float32")}
    how = {"group_size": 0, "input_group_size": 0, "dtype": "float32"}
    graph.nodes.append(Node("linear_w8a8", (*graph.outputs, "packed", "scale", None, None), ("y",), how))
    graph.types, graph.outputs = infer_types(graph), ("y",)
    (names,) = tune(graph, CPU, max_num_tokens=2, max_batch_size=2).kernels.values()
    assert set(names) <= {"reference", "twin"}


def test_a_step_takes_the_smallest_bucket_that_holds_its_rows() -> None:
    found = [ROW_BUCKETS[bucket_of(rows)] for rows in (0, 1, 2, 3, 5, 256, 257, 10**6)]
    assert found == [1, 1, 2, 4, 8, 256, 512, 2048]


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "{", '{"device": "here"}', '{"kernels": {}}', '{"device": "there", "kernels": {}}',
        '{"device": "here", "kernels": []}', '{"device": "here", "kernels": {"silu()": ["fast"]}}',
        '{"device": "here", "kernels": {"silu()": [1, 2, 3, 4, 5, 6, 7, 8, 9]}}',
        '{"device": "here", "kernels": {"silu()": "fastfastf"}}',
    ],
)  # fmt: skip
def test_choices_that_are_damaged_or_of_another_device_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / CACHE_FILE).write_text(text)
    assert load_choices(tmp_path / CACHE_FILE, "here") is None


def test_choices_survive_their_file(tmp_path: Path) -> None:
    choices = Choices("here", {"silu()": ["fast"] * len(ROW_BUCKETS)})
    choices.save(tmp_path / CACHE_FILE)
    assert load_choices(tmp_path / CACHE_FILE, "here") == choices
    assert load_choices(tmp_path / CACHE_FILE, "there") is None
    assert load_choices(tmp_path / "none", "here") is None


def test_choices_of_another_device_are_measured_again_and_stored(tiny_model: Path, tmp_path: Path) -> None:
    build(open_checkpoint(resolve(tiny_model)), tmp_path / "engine", BuildConfig(max_batch_size=2, max_num_tokens=2))
    engine = open_engine(tmp_path / "engine")
    path = tmp_path / "engine" / CACHE_FILE
    first = load_choices(path, describe_device(CPU))
    assert first is not None
    Choices("another device", first.kernels).save(path)
    again = tuned_choices(engine, CPU)
    assert again.device == describe_device(CPU)
    assert set(again.kernels) == set(first.kernels)
    assert load_choices(path, describe_device(CPU)) == again
    assert tuned_choices(engine, CPU) == again  # stored, not measured a third time


def test_every_plugin_is_made_of_ops_there_are() -> None:
    for name, patterns in PLUGINS.items():
        for pattern in patterns:
            assert [op for op in known_ops() if fnmatchcase(op, pattern)], f"{name}: no op is called {pattern}"


def test_a_disabled_plugin_takes_the_reference_unmeasured(fake_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLUGINS, "gemm", ("silu",))
    graph = trace(lambda x: ops.silu(x), {"x": ("T", 8)}, {})
    choices = tune(graph, CPU, max_num_tokens=8, max_batch_size=8, disabled_plugins=["gemm"])
    assert choices.kernels == {"silu(float32[T, 8])": ["reference"] * len(ROW_BUCKETS)}


def test_known_choices_are_kept_and_nothing_is_measured_where_nobody_waits(fake_kernels: None) -> None:
    graph = trace(lambda x: ops.silu(x), {"x": ("T", 8)}, {})
    known = {"silu(float32[T, 8])": ["slow"] * len(ROW_BUCKETS), "silu(float32[T, 9])": ["slow"] * len(ROW_BUCKETS)}
    choices = tune(graph, CPU, max_num_tokens=8, max_batch_size=8, known=known)
    assert choices.kernels == {"silu(float32[T, 8])": ["slow"] * len(ROW_BUCKETS)}
    assert tune(graph, CPU, max_num_tokens=8, max_batch_size=8, measure=False).kernels == {}
