"""A Hugging Face folder as llama.cpp's convert_hf_to_gguf.py would write it, told from what that program does.

Tensor names come from the gguf package's own map, hyperparameters from transformers' reading of the config.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

import tests.models.baichuan_reference  # noqa: F401 - what transformers lacks
from tests.checkpoint.tiny_gguf import write_gguf

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "granite": "granite", "baichuan": "baichuan",
    "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "phi3": "phi3", "gemma2": "gemma2",
    "gemma3_text": "gemma3", "gpt2": "gpt2", "gpt_neox": "gptneox", "falcon": "falcon", "starcoder2": "starcoder2",
    "olmo2": "olmo2", "gpt_oss": "gpt-oss", "deepseek_v3": "deepseek2",
}  # fmt: skip
PERMUTED = ("llama", "granite", "baichuan")
Named = Iterator[tuple[str, Tensor]]


def write_as_llama_cpp(folder: Path, path: Path) -> Path:
    config = AutoConfig.from_pretrained(folder)
    arch = ARCHITECTURES[config.model_type]
    tensors = load_file(folder / "model.safetensors")
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    enum = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(enum, layers_of(config))
    stored: dict[str, np.ndarray] = {}
    for name, tensor in MODIFY.get(arch, as_it_is)(config, tensors):
        if name.endswith(("q_proj.weight", "q_proj.bias")) and arch in PERMUTED:
            tensor = permuted(tensor, config.num_attention_heads)
        if name.endswith(("k_proj.weight", "k_proj.bias")) and arch in PERMUTED:
            tensor = permuted(tensor, getattr(config, "num_key_value_heads", config.num_attention_heads))
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found, name
        stored[found] = tensor.contiguous().numpy()
    stored |= {name: np.array(values, np.float32) for name, values in rope_tensors(config).items()}
    pairs = {f"{arch}.{name}": value for name, value in hyperparameters(config, arch).items() if value is not None}
    return write_gguf(path, stored, pairs | vocabulary(config.vocab_size), arch=arch)


def layers_of(config: Any) -> int:
    return getattr(config, "num_hidden_layers", None) or config.n_layer


def permuted(tensor: Tensor, num_heads: int) -> Tensor:
    halves = tensor.unflatten(0, (num_heads, 2, -1))
    return halves.transpose(1, 2).reshape(tensor.shape)


def vocabulary(size: int) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [f"t{index}" for index in range(size)],
        "tokenizer.ggml.token_type": [1] * size,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    }


def as_it_is(config: Any, tensors: dict[str, Tensor]) -> Named:
    yield from tensors.items()


def with_stacked_experts(config: Any, tensors: dict[str, Tensor]) -> Named:
    """model.layers.0.mlp.experts.7.up_proj.weight → model.layers.0.mlp.experts.up_proj.weight, in order."""
    stacks: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        before, experts, after = name.partition(".experts.")
        if not experts:
            yield name, tensor
            continue
        number, _, rest = after.partition(".")
        stack = stacks.setdefault(before + experts + rest, [])
        assert int(number) == len(stack)
        stack.append(tensor)
    for name, stack in stacks.items():
        if config.model_type == "mixtral":  # its stacked weights have names of the first Mixtral's
            name = name.replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")
        yield name, torch.stack(stack)


def deepseek(config: Any, tensors: dict[str, Tensor]) -> Named:
    for name, tensor in with_stacked_experts(config, tensors):
        if not name.endswith("kv_b_proj.weight"):
            yield name.replace("e_score_correction_bias", "e_score_correction.bias"), tensor
            continue
        by_head = tensor.unflatten(0, (config.num_attention_heads, -1))
        keys, values = by_head.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        yield name.replace("kv_b_proj", "k_b_proj"), keys.transpose(1, 2)
        yield name.replace("kv_b_proj", "v_b_proj"), values


def baichuan(config: Any, tensors: dict[str, Tensor]) -> Named:
    for name, tensor in tensors.items():
        parts = tensor.chunk(3) if "W_pack" in name else ()
        yield from ((name.replace("W_pack", f"{part}_proj"), each) for part, each in zip("qkv", parts, strict=False))
        if not parts:
            yield name, tensor


def gemma(config: Any, tensors: dict[str, Tensor]) -> Named:
    yield from ((name, tensor + 1 if name.endswith("norm.weight") else tensor) for name, tensor in tensors.items())


def gpt2(config: Any, tensors: dict[str, Tensor]) -> Named:
    for name, tensor in tensors.items():
        is_conv = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
        yield name, tensor.T if is_conv else tensor


def with_plain_qkv(config: Any, tensors: dict[str, Tensor]) -> Named:
    """Falcon's and GPT-NeoX's groups of heads become queries, then keys, then values."""
    num_heads = config.num_attention_heads
    num_groups = num_heads
    if config.model_type == "falcon":
        num_groups = config.num_kv_heads if config.new_decoder_architecture else 1
    for name, tensor in tensors.items():
        if "query_key_value" in name:
            grouped = tensor.unflatten(0, (num_groups, num_heads // num_groups + 2, config.hidden_size // num_heads))
            parts = (grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:])
            tensor = torch.cat([part.flatten(0, 2) for part in parts])
        yield name, tensor


def gpt_oss(config: Any, tensors: dict[str, Tensor]) -> Named:
    for name, tensor in tensors.items():
        is_bias = name.endswith("_bias")
        name = f"{name}.weight" if name.endswith("sinks") else name
        if ".experts." not in name:
            yield name, tensor
            continue
        stem = name.removesuffix("_bias") + (".bias" if is_bias else ".weight")
        rows_first = tensor if is_bias else tensor.transpose(1, 2)
        if "gate_up_proj" in stem:
            yield stem.replace("gate_up", "gate"), rows_first[:, 0::2]
            yield stem.replace("gate_up", "up"), rows_first[:, 1::2]
        else:
            yield stem, rows_first


MODIFY: dict[str, Callable[[Any, dict[str, Tensor]], Named]] = {
    "llama": with_stacked_experts, "qwen3moe": with_stacked_experts, "deepseek2": deepseek, "baichuan": baichuan,
    "gemma2": gemma, "gemma3": gemma, "gpt2": gpt2, "gptneox": with_plain_qkv, "falcon": with_plain_qkv,
    "gpt-oss": gpt_oss,
}  # fmt: skip


def hyperparameters(config: Any, arch: str) -> dict[str, Any]:
    """Without the architecture's prefix; None is left out."""
    if arch == "gpt2":
        return {
            "block_count": config.n_layer,
            "context_length": config.n_positions,
            "embedding_length": config.n_embd,
            "feed_forward_length": 4 * config.n_embd,
            "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        "attention.layer_norm_epsilon": one_of(config, "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
        "expert_count": one_of(config, "num_local_experts", "num_experts", "n_routed_experts"),
        "expert_used_count": getattr(config, "num_experts_per_tok", None),
        "rope.dimension_count": head_dim,
        "vocab_size": config.vocab_size,
        **rope(config),
    }
    if head_dim != config.hidden_size // config.num_attention_heads:
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    return found | SPECIAL.get(arch, lambda config: {})(config)


def one_of(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def rope(config: Any) -> dict[str, Any]:
    values = getattr(config, "rope_parameters", None) or {}
    values = values.get("full_attention", values)
    found = {"rope.freq_base": values.get("rope_theta")}
    if values.get("rope_type") in ("linear", "yarn"):
        found |= {"rope.scaling.type": values["rope_type"], "rope.scaling.factor": float(values["factor"])}
    if values.get("rope_type") == "yarn":
        found["rope.scaling.original_context_length"] = values["original_max_position_embeddings"]
    return found


def rope_tensors(config: Any) -> dict[str, list[float]]:
    values = getattr(config, "rope_parameters", None) or {}
    if values.get("rope_type") != "longrope":
        return {}
    return {f"rope_factors_{each}.weight": values[f"{each}_factor"] for each in ("short", "long")}


def phi3(config: Any) -> dict[str, Any]:
    values, head_dim = config.rope_parameters, config.hidden_size // config.num_attention_heads
    original = values.get("original_max_position_embeddings", config.max_position_embeddings)
    found = {
        "rope.dimension_count": int(values.get("partial_rotary_factor", 1.0) * head_dim),
        "rope.scaling.original_context_length": original,
        "attention.sliding_window": config.sliding_window or 0,
    }
    if values["rope_type"] == "longrope":
        stretched = np.log(config.max_position_embeddings / original) / np.log(original)
        found["rope.scaling.attn_factor"] = float(np.sqrt(1 + stretched))
    return found


def deepseek_hyperparameters(config: Any) -> dict[str, Any]:
    return {
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + config.qk_rope_head_dim,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": config.qk_rope_head_dim,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": config.routed_scaling_factor,
        "expert_weights_norm": config.norm_topk_prob,
        "expert_gating_func": 2,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        "rope.scaling.yarn_log_multiplier": 0.1 * config.rope_parameters["mscale_all_dim"]
        if "mscale_all_dim" in config.rope_parameters else None,
    }  # fmt: skip


def window_and_caps(config: Any) -> dict[str, Any]:
    return {
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.sliding_window": config.sliding_window if "sliding_attention" in config.layer_types else None,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


SPECIAL: dict[str, Callable[[Any], dict[str, Any]]] = {
    "baichuan": lambda config: {"rope.freq_base": None, "tensor_data_layout": "Meta AI original pth"},
    "deepseek2": deepseek_hyperparameters,
    "falcon": lambda config: {
        "attention.head_count_kv": config.num_kv_heads if config.new_decoder_architecture else 1,
        "rope.dimension_count": None,
        "rope.freq_base": None,
        "tensor_data_layout": "jploski",
    },
    "gemma2": window_and_caps,
    "gemma3": window_and_caps,
    "gpt-oss": lambda config: {
        "attention.sliding_window": config.sliding_window,
        "expert_feed_forward_length": config.intermediate_size,
    },
    "gptneox": lambda config: {
        "attention.head_count_kv": None,
        "rope.freq_base": None,
        "rope.dimension_count": int(
            config.rope_parameters["partial_rotary_factor"] * config.hidden_size // config.num_attention_heads
        ),
        "use_parallel_residual": config.use_parallel_residual,
    },
    "granite": lambda config: {
        "attention.scale": config.attention_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "residual_scale": config.residual_multiplier,
        "logit_scale": config.logits_scaling,
    },
    "phi3": phi3,
    "qwen3moe": lambda config: {"expert_feed_forward_length": config.moe_intermediate_size},
}
