"""Hugging Face → ours → Hugging Face: the same tensors, byte for byte, under the same names, for every model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tests.models.baichuan_reference  # noqa: F401 - what transformers lacks
from slipstream.checkpoint import convert, open_checkpoint, resolve
from slipstream.checkpoint.export import save_hugging_face
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import ModelError, UnsupportedModel
from slipstream.models import known_models, llama, model_file
from tests.checkpoint.tiny_gguf import llama_metadata, llama_tensors, write_gguf


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", known_models())
def test_the_round_trip_gives_the_same_bytes(model_type: str, dtype: str, tmp_path: Path) -> None:
    first = write_random_model(tmp_path / "first", model_file(model_type).TINY, seed=3, dtype=dtype)
    convert(first, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again", output_format="hf")
    before, after = load_file(first / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape)
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    assert open_checkpoint(resolve(tmp_path / "again")).config == open_checkpoint(resolve(first)).config


@pytest.mark.parametrize("model_type", known_models())
def test_transformers_loads_what_came_back(model_type: str, tmp_path: Path) -> None:
    first = write_random_model(tmp_path / "first", model_file(model_type).TINY, seed=3)
    convert(first, tmp_path / "again", output_format="hf")
    token_ids = torch.arange(3, 20)[None]
    logits = []
    for folder in (first, tmp_path / "again"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(token_ids).logits)
    assert torch.equal(*logits)


def test_large_models_come_in_shards(tmp_path: Path) -> None:
    first = write_random_model(tmp_path / "first", llama.TINY)
    checkpoint = open_checkpoint(resolve(first))
    save_hugging_face(checkpoint, tmp_path / "out", shard_bytes=100_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert index["metadata"]["total_size"] == checkpoint.num_bytes
    assert all((tmp_path / "out" / shard).stat().st_size < 110_000 for shard in shards)
    found = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / "out" / shard).items()}
    before = load_file(first / "model.safetensors")
    assert before.keys() == found.keys()
    assert all(torch.equal(before[name], found[name]) for name in before)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_gguf_becomes_a_hugging_face_folder(tmp_path: Path) -> None:
    metadata = {key: value for key, value in llama_metadata().items() if not key.endswith("merges")}
    gguf = write_gguf(tmp_path / "tiny.gguf", llama_tensors(), metadata)
    convert(gguf, tmp_path / "out", output_format="hf")
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} < set(
        files_of(tmp_path / "out")
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = open_checkpoint(resolve(gguf))
    assert torch.equal(
        theirs.get_parameter("model.layers.0.mlp.up_proj.weight"), ours.read("layers.0.mlp.up_proj.weight")
    )
    assert theirs.generation_config.eos_token_id == [2]


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    first = write_random_model(tmp_path / "first", llama.TINY)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match="out is not empty; give an --output_dir that is new or empty"):
        convert(first, tmp_path / "out", output_format="hf")
    assert files_of(tmp_path / "out") == ["thesis.txt"]


def test_an_unknown_output_format_is_refused(tmp_path: Path) -> None:
    first = write_random_model(tmp_path / "first", llama.TINY)
    with pytest.raises(
        ModelError, match="output_format is 'gguf'; it must be slipstream, hf, awq, compressed-tensors, fp8, gptq"
    ):
        convert(first, tmp_path / "out", output_format="gguf")


def test_what_a_config_has_no_place_for_is_refused(tmp_path: Path) -> None:
    first = write_random_model(tmp_path / "first", llama.TINY | {"rope_freq_factors": [1.0] * 8})
    with pytest.raises(UnsupportedModel, match="has rope_freq_factors"):
        convert(first, tmp_path / "out", output_format="hf")
