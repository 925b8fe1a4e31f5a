"""TensorRT-LLM checkpoint folders, as its own converter writes them, against the Hugging Face model behind them."""

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
from slipstream.models import model_file
from slipstream.schema.build import BuildConfig
from tests.checkpoint.naive_formats import STATIC_SCALE, fp8, rounded, to_e4m3
from tests.checkpoint.tensorrt_llm import ARCHITECTURES, write_as_tensorrt_llm
from tests.oracle import GraphRunner

TOKEN_IDS = list(range(3, 120, 7))
LINEARS = {"attention.dense": "self_attn.o_proj", "mlp.fc": "mlp.gate_proj", "mlp.gate": "mlp.up_proj",
           "mlp.proj": "mlp.down_proj"}  # fmt: skip
FP8 = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}

# What the folder does not say.
FIXED: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": None}, "gemma2": {"sliding_window": 4096}}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-biases-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "baichuan-13b": ("baichuan", {"max_position_embeddings": None}),
    "qwen3_moe-plain-shares": ("qwen3_moe", {"norm_topk_prob": False}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-rw": ("falcon", {"parallel_attn": False, "multi_query": False, "alibi": True, "bias": True}),
    "phi3-longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 16, "max_position_embeddings": 128, "partial_rotary_factor": 0.5,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0] * 4},
        },
    ),
}  # fmt: skip
CASES = {name: (name, {}) for name in ARCHITECTURES} | VARIANTS
SPLIT = {
    "llama": {}, "llama-biases-tied": {"use_parallel_embedding": True, "embedding_sharding_dim": 1}, "mixtral": {},
    "falcon-40b": {}, "gpt_neox": {"use_parallel_embedding": True}, "qwen2": {},
}  # fmt: skip


def write_model(folder: Path, name: str, **options: Any) -> Path:
    model_type, changes = CASES[name]
    return write_random_model(
        folder, model_file(model_type).TINY | FIXED.get(model_type, {}) | changes | options, seed=4
    )


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([TOKEN_IDS])).logits[0]


def write_folder(tmp_path: Path, **changes: Any) -> Path:
    """A Llama of one rank; the Hugging Face model it is made of lies beside it."""
    return write_as_tensorrt_llm(write_model(tmp_path / "hf", "llama"), tmp_path / "trtllm", **changes)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any], rank: int = 0) -> None:
    tensors = load_file(folder / f"rank{rank}.safetensors")
    edit(tensors)
    save_file(tensors, folder / f"rank{rank}.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_a_folder_gives_the_models_logits(tmp_path: Path, name: str) -> None:
    folder = write_as_tensorrt_llm(write_model(tmp_path / "hf", name), tmp_path / "trtllm")
    expected = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval())
    assert expected.std() > 0.1
    build(open_checkpoint(resolve(folder)), tmp_path / "engine", BuildConfig(max_batch_size=1, max_num_tokens=32))
    torch.testing.assert_close(GraphRunner(tmp_path / "engine").logits(TOKEN_IDS), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SPLIT)
def test_ranks_are_put_together(tmp_path: Path, name: str) -> None:
    """An odd vocabulary, which the last rank pads."""
    hf = write_model(tmp_path / "hf", name, vocab_size=127 if not SPLIT[name] else 128)
    one = open_checkpoint(resolve(write_as_tensorrt_llm(hf, tmp_path / "one")))
    two = open_checkpoint(resolve(write_as_tensorrt_llm(hf, tmp_path / "two", tp_size=2, **SPLIT[name])))
    assert two.config == one.config
    assert two.shapes == one.shapes
    for weight in one.recipes:
        assert torch.equal(two.read(weight), one.read(weight)), weight


def test_an_fp8_folder_stays_fp8(tmp_path: Path) -> None:
    """One scale for q, k and v together, as its plugin wants them; static scales of the activations."""
    folder = write_folder(tmp_path, quantization=FP8)
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
        tensors[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"] = torch.full((1,), 1.5 + layer)
    save_file(tensors, folder / "rank0.safetensors")

    checkpoint = open_checkpoint(resolve(folder))
    assert checkpoint.kv_cache.dtype == "float8_e4m3fn"
    assert [scales.tolist() for scales in checkpoint.kv_cache.scales.values()] == [
        [[1.5 + layer] * 2] * 2 for layer in range(3)
    ]
    config = BuildConfig(max_batch_size=2, max_num_tokens=32, kv_cache_dtype=checkpoint.dtype)
    build(checkpoint, tmp_path / "engine", config)
    logits = GraphRunner(tmp_path / "engine").logits(TOKEN_IDS)
    torch.testing.assert_close(logits, logits_of(reference), atol=2e-2, rtol=0)
    assert open_engine(tmp_path / "engine").graph.count_ops()["linear_fp8"] == 4 * 3


def test_scales_of_an_int8_cache_are_those_of_all_ranks(tmp_path: Path) -> None:
    folder = write_as_tensorrt_llm(
        write_model(tmp_path / "hf", "llama"), tmp_path / "two", tp_size=2, quantization={"kv_cache_quant_algo": "INT8"}
    )
    names = [f"transformer.layers.{layer}.attention.kv_cache_scaling_factor" for layer in range(3)]
    for rank in range(2):
        change(folder, lambda t: t.update({name: torch.full((1,), 0.1) for name in names}), rank=rank)
    cache = open_checkpoint(resolve(folder)).kv_cache
    assert cache.dtype == "int8"
    assert all(torch.equal(scales, torch.full((2, 2), 0.1)) for scales in cache.scales.values())
    assert len(cache.scales) == 3


def test_fp8_of_two_ranks_is_put_together_packed(tmp_path: Path) -> None:
    hf, stored = write_model(tmp_path / "hf", "llama"), []
    for tp_size in (1, 2):
        folder = write_as_tensorrt_llm(
            hf, tmp_path / f"of-{tp_size}", tp_size=tp_size, quantization={"quant_algo": "FP8"}
        )
        for rank in range(tp_size):
            change(folder, to_fp8, rank)
        stored.append(open_checkpoint(resolve(folder)))
    one, two = stored
    assert one.formats == two.formats
    assert len(one.formats) == 7 * 3
    for name in one.stored_names():
        assert one.read(name).tolist() == two.read(name).tolist(), name


def to_fp8(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if ".attention." in name or ".mlp." in name]:
        owner = name.removesuffix(".weight")
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{owner}.weights_scaling_factor"] = torch.tensor([0.5])
        tensors[f"{owner}.activation_scaling_factor"] = torch.tensor([0.25])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "OPTForCausalLM"}, "architecture is 'OPTForCausalLM'; the known values are LlamaForCausalLM"),
        ({"mapping": {"world_size": 2, "pp_size": 2}}, "mapping: pp_size is 2; the known values are 1"),
        ({"mapping": {"world_size": 2, "tp_size": 2}}, "rank1.safetensors is missing; tp_size is 2"),
        ({"mapping": {"world_size": 4, "tp_size": 4}}, "tp_size is 4; it must divide 4 heads and 2 heads of keys"),
        ({"quantization": {"quant_algo": "W4A16_AWQ"}}, "quant_algo is 'W4A16_AWQ'; the known values are FP8"),
        ({"quantization": {"quant_algo": "FP8"}}, "no tensor is called weights_scaling_factor"),
        ({"moe": {"num_experts": 8}}, "num_experts is 8; the known values are 0"),
        ({"residual_mlp": True}, "does not know the option 'residual_mlp'"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0; the known values are 1"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
        ({"num_key_value_heads": 4}, r"attention\.qkv\.weight is \[128, 64\]; its config asks for \[192, 64\]"),
        ({"architecture": "Phi3ForCausalLM", "mapping": {"tp_size": 2}}, "how Phi3ForCausalLM is split is not known"),
        ({"rotary_embedding_dim": 8}, "rotary_embedding_dim is 8; the known values are 16"),
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
    with pytest.raises(CorruptFile, match=r"holds the tensor transformer\.layers\.0\.mlp\.router\.weight"):
        open_checkpoint(resolve(folder))


def test_weights_that_trtllm_build_would_quantize_stay_floats(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, quantization={"quant_algo": "W8A16"})
    with pytest.warns(UserWarning, match="leaves W8A16 to trtllm-build, its weights are floats; here they stay floats"):
        assert not open_checkpoint(resolve(folder)).formats
    change(folder, lambda t: t.update({"transformer.layers.0.mlp.fc.weight": torch.ones(64, 96, dtype=torch.int8)}))
    with pytest.raises(ModelError, match=r"W8A16 weights are shuffled .* convert the model without --use_weight_only"):
        open_checkpoint(resolve(folder))


def test_ranks_that_do_not_fit_together(tmp_path: Path) -> None:
    hf, norm = write_model(tmp_path / "hf", "llama"), "transformer.ln_f.weight"
    folder = write_as_tensorrt_llm(hf, tmp_path / "two", tp_size=2)
    change(folder, lambda t: t.update({norm: t[norm] + 1}), rank=1)
    checkpoint = open_checkpoint(resolve(folder))
    with pytest.raises(CorruptFile, match=r"ln_f\.weight is not the same in all ranks"):
        checkpoint.read("norm.weight")
    change(folder, lambda t: t.update({norm: t[norm][:3]}), rank=1)
    with pytest.raises(CorruptFile, match=r"ln_f\.weight has another shape in rank1\.safetensors"):
        open_checkpoint(resolve(folder))
    change(folder, lambda t: t.pop(norm), rank=1)
    with pytest.raises(CorruptFile, match=r"rank1\.safetensors has not the same tensors"):
        open_checkpoint(resolve(folder))
