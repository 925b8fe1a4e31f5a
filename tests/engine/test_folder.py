"""An engine folder opens as it was written; where its parts disagree, an error names the file and the thing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from slipstream.engine.folder import open_engine
from slipstream.errors import EngineError
from tests.engine.support import Change, changed_engine, read_header, write_header


def test_a_written_engine_opens_as_it_was(tiny_engine: Path) -> None:
    engine = open_engine(tiny_engine)
    assert engine.manifest.to_dict() == json.loads((tiny_engine / "config.json").read_text())
    assert engine.graph.digest() == engine.manifest.graph_sha256
    assert set(engine.weights.names()) == set(engine.graph.weights)
    assert engine.manifest.eos_token_ids == {2}
    assert engine.manifest.kv_bytes_per_token == 4 * 1 * 2 * 2 * 16  # layers, K and V, heads, numbers a head
    assert set(engine.manifest.memory) == {"weights", "activations", "recorded"}
    assert engine.weights.read("norm.weight").dtype == torch.float32
    engine.close()


def test_the_weights_lie_in_the_order_in_which_the_step_reads_them(tiny_engine: Path) -> None:
    engine = open_engine(tiny_engine)
    order = dict.fromkeys(name for node in engine.graph.nodes for name in node.inputs if name in engine.graph.weights)
    assert engine.weights.names() == list(order)


def test_a_joined_weight_is_its_parts_one_after_the_other(tiny_engine: Path) -> None:
    from slipstream.checkpoint import open_checkpoint, resolve

    parts = open_checkpoint(resolve(tiny_engine.parent / "model"))
    joined = open_engine(tiny_engine).weights.read("layers.0.attention.q_proj+k_proj+v_proj.weight")
    assert torch.equal(joined, torch.cat([parts.read(f"layers.0.attention.{p}_proj.weight") for p in "qkv"]))


def set_to(**changes: Any) -> Change:
    return lambda values: values.update(changes)


def without(name: str) -> Change:
    return lambda values: values.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_to(format="other"), "is not an engine; make one with slipstream build"),
        (set_to(version=2), "has engine format 2, .*build it again"),
        (set_to(version=None), "has engine format None"),
        (without("max_seq_len"), r"config\.json: the key 'max_seq_len' is missing"),
        (set_to(surprise=1), r"config\.json: the key 'surprise' is unknown"),
        (set_to(graph_sha256="0" * 64), r"rank0\.engine and config\.json are of different builds"),
        (set_to(vocab_size=-1), r"config\.json: vocab_size is '-1'"),
        (set_to(vocab_size=0), "vocab_size is '0'"),
        (set_to(vocab_size=127), r"outputs are not the selected logits of config\.json"),
        (set_to(logits="all"), r"outputs are not the all logits of config\.json"),
        (set_to(logits="none"), "logits is 'none'; it must be selected or all"),
        (set_to(max_batch_size=2**31), "max_batch_size is '2147483648'"),
        (set_to(max_num_tokens=2**63), "max_num_tokens is"),
        (set_to(max_num_tokens=1.5), "max_num_tokens is '1.5'"),
        (set_to(max_num_tokens=True), "max_num_tokens is 'True'"),
        (set_to(num_layers=2, windows=[0, 0], layers=[0, 2]), "the graph's KV caches are not those"),
        (set_to(num_layers=2, windows=[0, 0]), r"layers is \[0, 1\]; it must be a range of the 2"),
        (set_to(layers=[0, True]), "layers is"),
        (set_to(num_layers=2**31), "num_layers is"),
        (set_to(num_layers=2), "windows must be a whole number for each layer"),
        (set_to(kv_planes=3), "kv_planes is"),
        (set_to(num_kv_heads=1), "the graph's KV caches are not those"),
        (set_to(head_dim=17), "the graph's KV caches are not those"),
        (set_to(tokens_per_block=8), "the graph's KV caches are not those"),
        (set_to(dtype="bfloat16", kv_dtype="bfloat16"), "the graph's KV caches are not those"),
        (set_to(kv_dtype="int8"), "the graph's KV caches are not those"),
        (set_to(kv_dtype="bfloat16"), "the graph's KV caches are not those"),
        (set_to(kv_dtype="float16"), "the graph's KV caches are not those"),
        (set_to(kv_dtype="float64"), "kv_dtype is 'float64'; .* one of float32, float8_e4m3fn, int8, .*float16"),
        (set_to(dtype="load"), "dtype is 'load'; it must be one of float32"),
        (set_to(name=["x"]), "name is"),
        (set_to(memory={"activations": "much"}), "memory is"),
        (set_to(memory={"activations": -1}), "memory is"),
        (set_to(passes={}), "passes is"),
        (set_to(generation=[]), "generation is"),
        (set_to(generation={"eos_token_id": 128}), "eos_token_id is 128; it must be token ids"),
        (set_to(generation={"eos_token_id": [2, -1]}), "eos_token_id is"),
        (set_to(generation={"eos_token_id": "2"}), "eos_token_id is '2'"),
        (set_to(generation={"eos_token_id": float("inf")}), "eos_token_id is inf"),
        (set_to(generation={"eos_token_id": {}}), "eos_token_id is {}"),
        (set_to(generation={"eos_token_id": [[2]]}), r"eos_token_id is \[\[2\]\]"),
    ],
)
def test_a_config_that_no_build_writes_is_an_error_that_names_the_key(
    tiny_engine: Path, tmp_path: Path, change: Change, message: str
) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        open_engine(changed_engine(tiny_engine, tmp_path / "engine", manifest=change))
    assert str(tmp_path / "engine") in str(caught.value)


def rename_weight(header: dict[str, Any]) -> None:
    header["norm.weights"] = header.pop("norm.weight")


def reshape_weight(header: dict[str, Any]) -> None:
    header["norm.weight"]["shape"] = [8, 8]


def retype_weight(header: dict[str, Any]) -> None:
    header["norm.weight"]["dtype"] = "I32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_weight, r"rank0\.engine lacks the weight norm\.weight; build the engine again"),
        (reshape_weight, r"norm\.weight is float32\[8, 8\]; the graph asks for float32\[64\]"),
        (retype_weight, r"norm\.weight is int32\[64\]; the graph asks for float32\[64\]"),
        (without("__metadata__"), "not a stored graph"),
        (set_to(__metadata__={}), "not a stored graph"),
        (set_to(__metadata__={"graph": 1}), "__metadata__"),
        (set_to(__metadata__={"graph": "{"}), "not a stored graph"),
    ],
)
def test_weights_that_are_not_the_graph_s_are_named(
    tiny_engine: Path, tmp_path: Path, change: Change, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        open_engine(changed_engine(tiny_engine, tmp_path / "engine", header=change))


@pytest.mark.parametrize("name", ["config.json", "rank0.engine"])
def test_a_missing_file_is_named(tiny_engine: Path, tmp_path: Path, name: str) -> None:
    engine = shutil.copytree(tiny_engine, tmp_path / "engine")
    (engine / name).unlink()
    with pytest.raises(EngineError, match=name):
        open_engine(engine)
    (engine / name).mkdir()
    with pytest.raises(EngineError, match=name):
        open_engine(engine)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="nowhere is not an engine folder"):
        open_engine(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1, 0.5])
def test_a_truncated_rank_file_is_named(tiny_engine: Path, tmp_path: Path, keep: float) -> None:
    engine = shutil.copytree(tiny_engine, tmp_path / "engine")
    data = (engine / "rank0.engine").read_bytes()
    (engine / "rank0.engine").write_bytes(data[: int(len(data) * keep) if keep == 0.5 else int(keep)])
    with pytest.raises(EngineError, match=r"rank0\.engine"):
        open_engine(engine)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, '{"format": 1' + "0" * 5000 + "}", "\xff"])
def test_a_config_that_is_no_object_is_an_error(tiny_engine: Path, tmp_path: Path, text: str) -> None:
    engine = shutil.copytree(tiny_engine, tmp_path / "engine")
    (engine / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(EngineError, match=r"config\.json|is not an engine"):
        open_engine(engine)


def test_a_weight_more_than_the_graph_reads_is_harmless(tiny_engine: Path, tmp_path: Path) -> None:
    engine = shutil.copytree(tiny_engine, tmp_path / "engine")
    header, data = read_header(engine / "rank0.engine")
    header["unread"] = {"dtype": "U8", "shape": [3], "data_offsets": [len(data), len(data) + 3]}
    write_header(engine / "rank0.engine", header, data + b"abc")
    assert "unread" not in open_engine(engine).graph.weights


def test_the_cache_of_choices_may_be_missing_or_damaged(tiny_engine: Path, tmp_path: Path) -> None:
    engine = shutil.copytree(tiny_engine, tmp_path / "engine")
    (engine / "model.cache").write_text("[")
    open_engine(engine).close()
    (engine / "model.cache").unlink()
    open_engine(engine).close()
