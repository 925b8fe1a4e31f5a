"""TensorRT-LLM checkpoint folders, written here after checkpoint.md, against the Hugging Face model behind them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from slipstream.build import build
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.engine.folder import open_engine
from slipstream.errors import CorruptFile, ModelError
from slipstream.models import llama
from slipstream.schema.build import BuildConfig
from tests.checkpoint.naive_formats import STATIC_SCALE, fp8, rounded, to_e4m3
from tests.oracle import GraphRunner

TOKEN_IDS = list(range(3, 60, 7))
CONFIG = {
    "producer": {"name": "modelopt", "version": "0.17"},
    "architecture": "LlamaForCausalLM",
    "dtype": "float32",
    "logits_dtype": "float32",
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "head_size": 16,
    "intermediate_size": 96,
    "norm_epsilon": 1e-5,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "position_embedding_type": "rope_gpt_neox",
    "rotary_base": 10000.0,
    "rotary_scaling": None,
    "residual_mlp": False,
    "attn_bias": False,
    "mlp_bias": False,
    "use_parallel_embedding": False,
    "embedding_sharding_dim": 0,
    "embedding_multiplier": 1.0,
    "disable_weight_only_quant_plugin": False,
    "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": None},
    "mapping": {"world_size": 1, "gpus_per_node": 8, "tp_size": 1, "pp_size": 1, "cp_size": 1, "moe_tp_size": 1},
    "quantization": {"quant_algo": None, "kv_cache_quant_algo": None, "group_size": 128, "has_zero_point": False,
                     "pre_quant_scale": False, "exclude_modules": None},
}  # fmt: skip
LINEARS = {"attention.dense": "self_attn.o_proj", "mlp.fc": "mlp.gate_proj", "mlp.gate": "mlp.up_proj",
           "mlp.proj": "mlp.down_proj"}  # fmt: skip


def write_folder(tmp_path: Path, **changes: Any) -> Path:
    """A folder of one rank; the Hugging Face model it is made of lies beside it."""
    theirs = load_file(write_random_model(tmp_path / "hf", llama.TINY, seed=4) / "model.safetensors")
    tensors = {
        "transformer.vocab_embedding.weight": theirs["model.embed_tokens.weight"],
        "transformer.ln_f.weight": theirs["model.norm.weight"],
        "lm_head.weight": theirs["lm_head.weight"],
    }
    for layer in range(3):
        old, new = f"model.layers.{layer}", f"transformer.layers.{layer}"
        tensors[f"{new}.input_layernorm.weight"] = theirs[f"{old}.input_layernorm.weight"]
        tensors[f"{new}.post_layernorm.weight"] = theirs[f"{old}.post_attention_layernorm.weight"]
        qkv = [theirs[f"{old}.self_attn.{part}_proj.weight"] for part in "qkv"]
        tensors[f"{new}.attention.qkv.weight"] = torch.cat(qkv)
        for mine, its in LINEARS.items():
            tensors[f"{new}.{mine}.weight"] = theirs[f"{old}.{its}.weight"]
    folder = tmp_path / "trtllm"
    folder.mkdir()
    save_file(tensors, folder / "rank0.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "rank0.safetensors")
    edit(tensors)
    save_file(tensors, folder / "rank0.safetensors")


def test_a_float_folder_gives_the_models_logits(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    build(open_checkpoint(resolve(folder)), tmp_path / "engine", BuildConfig(max_batch_size=2, max_num_tokens=32))
    with torch.no_grad():
        expected = reference(torch.tensor([TOKEN_IDS])).logits[0]
    torch.testing.assert_close(GraphRunner(tmp_path / "engine").logits(TOKEN_IDS), expected, atol=1e-4, rtol=0)


def test_an_fp8_folder_stays_fp8(tmp_path: Path) -> None:
    """One scale for q, k and v together, as its plugin wants them; static scales of the activations."""
    quantization = CONFIG["quantization"] | {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    folder = write_folder(tmp_path, quantization=quantization)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    activations = rounded(to_e4m3, 448, static=float(np.float32(STATIC_SCALE)))
    tensors = load_file(folder / "rank0.safetensors")
    for name in [name for name in tensors if ".attention." in name or ".mlp." in name]:
        owner = name.removesuffix(".weight")
        quantized = fp8("tensor", static=True)(tensors[name].double(), None)
        tensors[name] = quantized.stored["weight"]
        tensors[f"{owner}.weights_scaling_factor"] = quantized.stored["weight_scale"].reshape(1)
        tensors[f"{owner}.activation_scaling_factor"] = quantized.stored["input_scale"].reshape(1)
        layer, _, leaf = owner.removeprefix("transformer.layers.").partition(".")
        modules, rows = [LINEARS.get(leaf, "")], [len(quantized.weight)]
        if leaf == "attention.qkv":
            modules, rows = [f"self_attn.{part}_proj" for part in "qkv"], [64, 32, 32]
        for module, part in zip(modules, quantized.weight.float().split(rows), strict=True):
            linear = reference.get_submodule(f"model.layers.{layer}.{module}")
            linear.weight.data = part
            linear.register_forward_pre_hook(lambda _, inputs: (activations(inputs[0]),))
    for layer in range(3):
        tensors[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"] = torch.ones(1)
    save_file(tensors, folder / "rank0.safetensors")

    with pytest.warns(UserWarning, match="has 3 scales of a quantized KV cache, which are not used"):
        checkpoint = open_checkpoint(resolve(folder))
    build(checkpoint, tmp_path / "engine", BuildConfig(max_batch_size=2, max_num_tokens=32))
    with torch.no_grad():
        expected = reference(torch.tensor([TOKEN_IDS])).logits[0]
    torch.testing.assert_close(GraphRunner(tmp_path / "engine").logits(TOKEN_IDS), expected, atol=2e-2, rtol=0)
    assert open_engine(tmp_path / "engine").graph.count_ops()["linear_fp8"] == 4 * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "OPTForCausalLM"}, "architecture is 'OPTForCausalLM'; the known values are LlamaForCausalLM"),
        ({"mapping": {"world_size": 2, "tp_size": 2}}, "mapping: world_size is 2; the known values are 1"),
        ({"quantization": {"quant_algo": "W4A16_AWQ"}}, "quant_algo is 'W4A16_AWQ'; the known values are FP8"),
        ({"quantization": {"quant_algo": "W8A16"}}, "quant_algo is 'W8A16'; the known values are FP8"),
        ({"quantization": {"quant_algo": "FP8"}}, "no tensor is called weights_scaling_factor"),
        ({"moe": {"num_experts": 8}}, "num_experts is 8; the known values are 0"),
        ({"residual_mlp": True}, "does not know the option 'residual_mlp'"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0; the known values are 1"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
        ({"num_key_value_heads": 4}, r"attention\.qkv\.weight is \[128, 64\]; by the config it has 192 rows"),
        ({"hidden_size": 2**40}, "hidden_size is 1099511627776"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = write_folder(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        open_checkpoint(resolve(folder))


def test_a_tensor_that_is_not_the_models_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    change(folder, lambda t: t.update({"transformer.layers.0.mlp.router.weight": torch.ones(1)}))
    with pytest.raises(CorruptFile, match=r"holds the tensor model\.layers\.0\.mlp\.router\.weight"):
        open_checkpoint(resolve(folder))
