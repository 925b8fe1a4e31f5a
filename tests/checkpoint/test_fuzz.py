"""Damaged files: whatever the damage, a reader succeeds or raises ModelError, and allocates in proportion to the file.

The budget is fixed and the examples are the same each time (derandomize), so a failure here is always a real change.
"""

import json
import struct
import tracemalloc
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slipstream.checkpoint.gguf import GGUFModel
from slipstream.checkpoint.source import resolve
from slipstream.checkpoint.tensors import ShardedTensors, TensorSource
from slipstream.engine.bounded_json import read_json
from slipstream.engine.tensor_file import TensorFile
from slipstream.errors import ModelError
from tests.checkpoint.tiny_gguf import write_llama

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # dequantizing nonsense overflows
BUDGET = settings(
    max_examples=500,
    derandomize=True,
    database=None,
    deadline=timedelta(seconds=5),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
HOSTILE_NUMBERS = [0, 1, 2, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
HOSTILE_VALUES = st.one_of(
    st.sampled_from(
        [*HOSTILE_NUMBERS, -1, 2**70, 0.5, float("nan"), float("inf"), True, None, "", "F32", "BF16", "x" * 300]
    ),
    st.lists(st.sampled_from([0, 1, 4, -1, 2**32, 2**63, None, "F32", 1.0]), max_size=10),
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a", "../x"]), st.integers(), max_size=3),
)


@st.composite
def damage(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Callable[[bytes], bytes]:
    """A function that flips bytes, overwrites 4 or 8 bytes with a number, cuts, inserts or repeats."""
    edits = draw(
        st.lists(
            st.tuples(st.sampled_from("fnnnciir"), st.floats(0, 1), st.integers(0, 2**64 - 1)), min_size=1, max_size=4
        )
    )

    def apply(data: bytes) -> bytes:
        for kind, where, number in edits:
            # squared: half of all damage falls into the first quarter, where the headers are
            position = int(where * where * len(data))
            hostile = HOSTILE_NUMBERS[number % len(HOSTILE_NUMBERS)]
            if kind == "f":
                data = data[:position] + bytes([number & 255]) + data[position + 1 :]
            elif kind == "n":
                packed = struct.pack("<Q", hostile)[: 4 if number & 1024 else 8]
                data = data[:position] + packed + data[position + len(packed) :]
            elif kind == "c":
                data = data[:position]
            elif kind == "i":
                data = data[:position] + struct.pack("<Q", number)[: number % 9] + data[position:]
            else:
                data = data[:position] + data[position : position + number % 64] * 2 + data[position + number % 64 :]
        return data

    return apply


@st.composite
def edited_json(draw: Callable[[st.SearchStrategy[Any]], Any], original: dict[str, Any]) -> dict[str, Any]:
    """The object with up to three values, anywhere in it, replaced, removed or added."""
    value = json.loads(json.dumps(original))
    for _ in range(draw(st.integers(1, 3))):
        parent = value
        while True:
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            key = draw(st.sampled_from(keys)) if keys else None
            if key is None or not isinstance(parent[key], dict | list) or draw(st.booleans()):
                break
            parent = parent[key]
        if isinstance(parent, list):
            parent.append(0) if key is None else parent.__setitem__(key, draw(HOSTILE_VALUES))
        elif key is None or draw(st.booleans()):
            parent[draw(st.sampled_from(["__metadata__", "new", "dtype", "format"]))] = draw(HOSTILE_VALUES)
        elif draw(st.booleans()):
            del parent[key]
        else:
            parent[key] = draw(HOSTILE_VALUES)
    return value


def survives(action: Callable[[], Any], num_bytes: int) -> Any:
    """The result, or None after a ModelError. Anything else, or a large allocation by Python or numpy, is a failure."""
    tracemalloc.start()
    try:
        return action()
    except ModelError:
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < (64 << 10) + 20 * num_bytes


def read_all(tensors: TensorSource | None) -> None:
    """A tensor read back is as large as it says, and every byte of it can be touched."""
    if tensors is None:
        return
    for name in tensors.names():
        try:
            tensor = tensors.read(name)
        except ModelError:
            continue
        assert tuple(tensor.shape) == tensors.shape(name)
        tensor.clone()
    tensors.close()


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [4, 2], "data_offsets": [0, 32]},
    "b": {"dtype": "BF16", "shape": [8], "data_offsets": [32, 48]},
    "c": {"dtype": "U8", "shape": [0], "data_offsets": [48, 48]},
}
INDEX = {"metadata": {"total_size": 1}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
CONFIG = {"model_type": "llama", "format": "slipstream-engine", "layers": [1, {"deep": [2]}]}


def safetensors_bytes(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(48)


@BUDGET
@given(damage())
def test_safetensors_with_damaged_bytes(tmp_path: Path, apply: Callable[[bytes], bytes]) -> None:
    path, data = tmp_path / "x.safetensors", apply(safetensors_bytes(HEADER))
    path.write_bytes(data)
    read_all(survives(lambda: TensorFile.open(path), len(data)))


@BUDGET
@given(edited_json(HEADER))
def test_safetensors_with_an_edited_header(tmp_path: Path, header: dict[str, Any]) -> None:
    path, data = tmp_path / "x.safetensors", safetensors_bytes(header)
    path.write_bytes(data)
    read_all(survives(lambda: TensorFile.open(path), len(data)))


@BUDGET
@given(st.one_of(edited_json(INDEX).map(lambda index: json.dumps(index).encode()), damage()))
def test_index(tmp_path: Path, index: bytes | Callable[[bytes], bytes]) -> None:
    data = index if isinstance(index, bytes) else index(json.dumps(INDEX).encode())
    for shard, name in [("x", "a"), ("y", "b")]:
        safetensors.torch.save_file({name: torch.ones(2)}, tmp_path / f"{shard}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(data)
    read_all(survives(lambda: ShardedTensors.open(tmp_path), len(data) + 500))


@BUDGET
@given(st.one_of(edited_json(CONFIG).map(lambda config: json.dumps(config).encode()), damage()))
def test_config(tmp_path: Path, config: bytes | Callable[[bytes], bytes]) -> None:
    data = config if isinstance(config, bytes) else config(json.dumps(CONFIG).encode())
    (tmp_path / "config.json").write_bytes(data)
    survives(lambda: read_json(tmp_path / "config.json"), len(data))
    survives(lambda: resolve(tmp_path), len(data))


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_llama(tmp_path_factory.mktemp("gguf") / "x.gguf").read_bytes()


def use_gguf(path: Path, num_bytes: int) -> None:
    model = survives(lambda: GGUFModel.open(path), num_bytes)
    if model is not None:
        for use in (model.hf_config, model.generation_config, model.tokenizer_facts):
            survives(use, num_bytes)
    read_all(model)


@BUDGET
@given(damage())
def test_gguf_with_damaged_bytes(tmp_path: Path, gguf_bytes: bytes, apply: Callable[[bytes], bytes]) -> None:
    path, data = tmp_path / "x.gguf", apply(gguf_bytes)
    path.write_bytes(data)
    use_gguf(path, len(data))


@pytest.mark.parametrize("number", [b"\xff" * 8, struct.pack("<Q", 2**32), b"\x09"])
def test_gguf_with_a_hostile_number_at_every_byte_of_the_header(
    tmp_path: Path, gguf_bytes: bytes, number: bytes
) -> None:
    path, end = tmp_path / "x.gguf", gguf_bytes.index(b"output_norm.weight") + 60
    for position in range(end):
        path.write_bytes(gguf_bytes[:position] + number + gguf_bytes[position + len(number) :])
        use_gguf(path, len(gguf_bytes))
