"""gpt-oss as it is published: experts in MXFP4. The oracle is transformers, which dequantizes them too."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from slipstream.build import build
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import CorruptFile
from slipstream.models.gpt_oss import TINY
from slipstream.schema.build import BuildConfig
from tests.oracle import GraphRunner

NUM_EXPERTS, SIZE = TINY["num_local_experts"], 64  # hidden_size and intermediate_size: two blocks of 32


def write_published(folder: Path) -> Path:
    """Random bytes for every expert's weights, scales near those of real ones."""
    write_random_model(folder, TINY | {"intermediate_size": SIZE}, seed=3)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(4)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        num_out = tensors.pop(name).shape[2]
        blocks = torch.randint(0, 256, (NUM_EXPERTS, num_out, SIZE // 32, 16), generator=generator)
        scales = torch.randint(121, 126, (NUM_EXPERTS, num_out, SIZE // 32), generator=generator)
        tensors |= {f"{name}_blocks": blocks.to(torch.uint8), f"{name}_scales": scales.to(torch.uint8)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_mxfp4_experts_give_the_logits_of_transformers(tmp_path: Path) -> None:
    model = write_published(tmp_path / "model")
    dequantized = Mxfp4Config(dequantize=True)
    reference = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, quantization_config=dequantized, attn_implementation="eager"
    )
    token_ids = list(range(3, 40))
    with torch.no_grad():
        expected = reference.eval()(torch.tensor([token_ids])).logits[0]
    assert expected.std() > 0.1
    build(open_checkpoint(resolve(model), "float32"), tmp_path / "engine", BuildConfig(max_num_tokens=64))
    torch.testing.assert_close(GraphRunner(tmp_path / "engine").logits(token_ids), expected, atol=1e-4, rtol=0)


def test_blocks_without_their_scales_are_refused(tmp_path: Path) -> None:
    model = write_published(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CorruptFile, match=r"lacks the tensor model\.layers\.1\.mlp\.experts\.down_proj_scales"):
        open_checkpoint(resolve(model))
