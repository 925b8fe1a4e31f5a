"""A quantized tensor of theirs that holds rows of several of ours (Phi-3's qkv_proj): its packed rows are ours."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slipstream.checkpoint import convert, open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.models import llama
from slipstream.schema.weights import Rows
from tests.checkpoint.naive_formats import FORMATS
from tests.checkpoint.test_formats import SHAPES

FUSED = "model.layers.{i}.self_attn.qkv_proj.weight"
ROWS = [192, 96, 96]  # of q, k and v


@pytest.mark.parametrize("name", ["gptq-4-act-order", "awq", "ct-pack-4-asym", "fp8-blocks", "modelopt-fp8"])
def test_packed_rows_are_split_and_joined_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tuple(f"layers.{{i}}.attention.{part}_proj.weight" for part in "qkv")
    monkeypatch.setattr(llama, "WEIGHTS", {FUSED: Rows(parts)} | llama.WEIGHTS)
    format = FORMATS[name]
    folder = write_random_model(tmp_path / "model", SHAPES)
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for layer in range(SHAPES["num_hidden_layers"]):
        owner = f"model.layers.{layer}.self_attn.qkv_proj"
        quantized = format.quantize(tensors.pop(f"{owner}.weight").double(), None)  # type: ignore[arg-type]
        tensors |= {f"{owner}.{suffix}": tensor for suffix, tensor in quantized.stored.items()}
        for part, weight in zip(parts, quantized.weight.float().split(ROWS), strict=True):
            meant[part.format(i=layer)] = weight
    save_file(tensors, folder / "model.safetensors")
    if format.extra_file:
        (folder / format.extra_file[0]).write_text(json.dumps(format.extra_file[1]))
    if format.config:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": format.config}))

    checkpoint = open_checkpoint(resolve(folder))
    assert checkpoint.formats.keys() == meant.keys()
    convert(folder, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again", output_format="hf")
    for opened in (
        checkpoint,
        open_checkpoint(resolve(tmp_path / "ours")),
        open_checkpoint(resolve(tmp_path / "again")),
    ):
        for ours, weight in meant.items():
            torch.testing.assert_close(opened.read(ours), weight, atol=1e-6, rtol=1e-6)
    assert not any("q_proj" in each for each in load_file(tmp_path / "again" / "model.safetensors"))
