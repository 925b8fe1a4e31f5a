"""GGUF files of every architecture, as llama.cpp's converter writes them, against the model behind them."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slipstream.build import build
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.gguf import GGUFFile, GGUFModel
from slipstream.checkpoint.gguf.architectures import ARCHITECTURES, FALCON_TWO_NORMS, ROPE_TENSORS
from slipstream.checkpoint.random import write_random_model
from slipstream.errors import CorruptFile, ModelError, UnsupportedModel
from slipstream.models import model_file
from slipstream.schema.build import BuildConfig
from tests.checkpoint import llama_cpp
from tests.checkpoint.llama_cpp import write_as_llama_cpp
from tests.checkpoint.tiny_gguf import write_gguf
from tests.oracle import GraphRunner

TOKEN_IDS = list(range(3, 120, 7))
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

# What a GGUF cannot say: its converter drops it, or llama.cpp's code fixes it.
FIXED_BY_GGUF: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "starcoder2": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window_pattern": 6, "num_hidden_layers": 6},
    "gpt_oss": {"swiglu_limit": 7.0},
    "baichuan": {"z_loss_weight": None},  # the first; the second is known by its vocabulary
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-yarn": ("llama", {"rope_scaling": YARN}),
    "llama-biases-wide-heads": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "phi3-longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 16, "max_position_embeddings": 128, "sliding_window": 12,
            "partial_rotary_factor": 0.5,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0] * 4},
        },
    ),
    "gemma3_text-no-windows-linear": (
        "gemma3_text", {"sliding_window_pattern": 1, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.5}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    "deepseek_v3-yarn-no-q-latent": (
        "deepseek_v3", {"q_lora_rank": None, "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
}  # fmt: skip
CASES = {name: (name, {}) for name in llama_cpp.ARCHITECTURES} | VARIANTS
# transformers reads these files too, so that ours are not only what we think they are.
READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gpt2", "starcoder2", "falcon", "phi3")


def write_model(folder: Path, name: str) -> Path:
    model_type, changes = CASES[name]
    options = model_file(model_type).TINY | FIXED_BY_GGUF.get(model_type, {}) | changes
    write_random_model(folder / "hf", options, seed=5)
    return write_as_llama_cpp(folder / "hf", folder / "model.gguf")


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([TOKEN_IDS])).logits[0]


@pytest.mark.parametrize("name", CASES)
def test_a_gguf_gives_the_models_logits(tmp_path: Path, name: str) -> None:
    path = write_model(tmp_path, name)
    expected = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval())
    assert expected.std() > 0.1
    build(open_checkpoint(resolve(path)), tmp_path / "engine", BuildConfig(max_batch_size=1, max_num_tokens=32))
    torch.testing.assert_close(GraphRunner(tmp_path / "engine").logits(TOKEN_IDS), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_from_it(tmp_path: Path, name: str) -> None:
    """With the folder's config: its reader does not take all hyperparameters."""
    write_model(tmp_path, name)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", config=expected.config, dtype=torch.float32
    )
    for key, tensor in expected.state_dict().items():
        torch.testing.assert_close(theirs.get_parameter(key), tensor, msg=key)


def edited(path: Path, edit: Callable[[dict[str, Any], dict[str, Any]], None]) -> GGUFModel:
    """The file again, after an edit of its tensors and metadata."""
    file = GGUFFile.open(path)
    tensors, metadata = {name: file.read(name).numpy() for name in file.names()}, dict(file.metadata)
    arch = metadata.pop("general.architecture")
    edit(tensors, metadata)
    return GGUFModel.open(write_gguf(path.with_name("edited.gguf"), tensors, metadata, arch=arch))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tensor_names_are_llama_cpps(arch: str) -> None:
    enum = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    known = {gguf.TENSOR_NAMES[tensor].replace("{bid}", "{i}") for tensor in gguf.MODEL_TENSORS[enum]}
    table = {name.rpartition(".")[0] for name in ARCHITECTURES[arch].weights}
    table |= {name.rpartition(".")[0] for name in (FALCON_TWO_NORMS if arch == "falcon" else ())}
    table |= {name.removesuffix(".weight") for name in ROPE_TENSORS}
    assert known - {"blk.{i}.attn_rot_embd"} <= table, "every tensor of the architecture has a place"


def test_files_of_deepseek_before_the_split_of_kv_b(tmp_path: Path) -> None:
    """As llama.cpp wrote them until April 2025: kv_b whole, sizes of heads as they are run without absorption."""
    path = write_model(tmp_path, "deepseek_v3")
    theirs = load_file(tmp_path / "hf" / "model.safetensors")

    def edit(tensors: dict[str, Any], metadata: dict[str, Any]) -> None:
        for layer in range(3):
            del tensors[f"blk.{layer}.attn_k_b.weight"], tensors[f"blk.{layer}.attn_v_b.weight"]
            whole = theirs[f"model.layers.{layer}.self_attn.kv_b_proj.weight"]
            tensors[f"blk.{layer}.attn_kv_b.weight"] = whole.numpy()
        for name in ("key_length", "value_length"):
            metadata[f"deepseek2.attention.{name}"] = metadata.pop(f"deepseek2.attention.{name}_mla")
        metadata["deepseek2.attention.head_count_kv"] = metadata["deepseek2.attention.head_count"]

    old = edited(path, edit)
    before, after = open_checkpoint(resolve(path)), open_checkpoint(resolve(old.path))
    assert before.config == after.config
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.shapes)


def config_of(path: Path, **changes: Any) -> dict[str, Any]:
    def edit(tensors: dict[str, Any], metadata: dict[str, Any]) -> None:
        metadata.update({key.replace("__", "."): value for key, value in changes.items()})
        for layer in range(100):
            tensors[f"more.{layer}"] = tensors["output_norm.weight"]

    return edited(path, edit).hf_config()


def test_what_llama_cpp_tells_by_the_number_of_layers(tmp_path: Path) -> None:
    gemma2 = write_model(tmp_path / "gemma2", "gemma2")
    assert config_of(gemma2)["query_pre_attn_scalar"] == 16, "the width of a head"
    assert config_of(gemma2, gemma2__block_count=46, gemma2__embedding_length=96)["query_pre_attn_scalar"] == 24
    gemma3 = write_model(tmp_path / "gemma3", "gemma3_text")
    assert config_of(gemma3, gemma3__block_count=62, gemma3__embedding_length=96)["query_pre_attn_scalar"] == 24
    baichuan = write_model(tmp_path / "baichuan", "baichuan")
    assert config_of(baichuan)["max_position_embeddings"] == 256
    ours = config_of(baichuan, baichuan__block_count=40)
    assert "max_position_embeddings" not in ours, "13B, with ALiBi"
    assert ours["model_max_length"] == 256


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("deepseek_v3", {"deepseek2__expert_gating_func": 1}, UnsupportedModel, "is a DeepSeek-V2, which is not known"),
        ("olmo2", {"olmo2__attention__sliding_window": 8}, UnsupportedModel, "does not know olmo2.attention.sliding"),
        ("qwen2", {"qwen2__clamp_kqv": 8.0}, UnsupportedModel, "reader of qwen2 does not know qwen2.clamp_kqv"),
        ("qwen2", {"qwen2__attention__value_length": 8}, UnsupportedModel, "value_length is 8; only 16 is known"),
        ("qwen2", {"qwen2__rope__dimension_count": 8}, UnsupportedModel, "rotates 8 of 16 dimensions a head"),
        ("llama-yarn", {"llama__rope__scaling__attn_factor": 2.0}, UnsupportedModel, "attn_factor is 2.0; only 1.0"),
        ("mixtral", {"llama__expert_used_count": 0}, CorruptFile, "llama.expert_used_count is 0; it must be at least"),
        ("gemma3_text", {"gemma3__attention__sliding_window_pattern": [1, 0]}, CorruptFile, "must be of type int"),
    ],
)
def test_refusals(tmp_path: Path, name: str, changes: dict[str, Any], error: type[ModelError], message: str) -> None:
    with pytest.raises(error, match=message):
        config_of(write_model(tmp_path, name), **changes)


@pytest.mark.parametrize("name", llama_cpp.ARCHITECTURES)
def test_hostile_hyperparameters_end_in_one_sentence(tmp_path: Path, name: str) -> None:
    file = GGUFFile.open(write_model(tmp_path, name))
    tensors, metadata = {each: file.read(each).numpy() for each in file.names()}, dict(file.metadata)
    arch = metadata.pop("general.architecture")
    numbers = [key for key, value in metadata.items() if key.startswith(f"{arch}.") and type(value) in (int, float)]
    for key in numbers:
        for hostile in (0, 3, 2**32 - 1):
            changed = metadata | {key: type(metadata[key])(hostile)}
            path = write_gguf(tmp_path / "hostile.gguf", tensors, changed, arch=arch)
            with contextlib.suppress(ModelError):
                open_checkpoint(resolve(path)).close()
