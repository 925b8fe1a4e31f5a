"""llama.cpp's architectures: hyperparameters as the options of a Hugging Face config, tensors as our weights.

What llama.cpp's converter changes on the way is undone here or in model.py: fused queries, keys and values lie one
after another whatever their order was, experts are stacked, and what its code fixes for an architecture (Gemma's scale
of scores, Baichuan 13B's ALiBi) is not in the file. Facts: conversion/*.py and src/models/*.cpp of
https://github.com/ggml-org/llama.cpp. What the converter drops is lost: the windows of Mistral and StarCoder 2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slipstream.checkpoint.gguf.header import Header
from slipstream.errors import UnsupportedModel
from slipstream.schema.weights import Rows, WeightTable

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")  # read with the header
SIGMOID = 2  # expert_gating_func

Config = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    model_type: str  # Hugging Face's
    options: Callable[[Header], Config]
    weights: WeightTable
    # llama.cpp rotates neighbouring rows of q and k together and Hugging Face rows half a head apart; for some
    # families llama.cpp's converter reorders the rows to suit.
    reorders_rope: bool = False
    adds_one_to_norms: bool = False


def find_architecture(header: Header) -> Architecture:
    """Raises UnsupportedModel, with the known ones."""
    if header.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedModel(f"{header.path} has the architecture {header.architecture!r}; known are: {known}.")
    telling_tensor, variant = VARIANTS.get(header.architecture, ("", None))
    return variant if variant and header.has_tensor(telling_tensor) else ARCHITECTURES[header.architecture]


# Options.


def _decoder(header: Header, *, may_rotate_part: bool = False) -> Config:
    """What most configs name alike."""
    hidden_size, num_heads = header.positive("embedding_length"), header.positive("attention.head_count")
    head_dim = header.positive("attention.key_length", hidden_size // num_heads)
    header.only("attention.value_length", head_dim)
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": header.num_layers(),
        "num_attention_heads": num_heads,
        "num_key_value_heads": header.positive("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "intermediate_size": header.positive("feed_forward_length"),
        "max_position_embeddings": header.positive("context_length"),
        **_rope(header, head_dim, may_rotate_part),
    }


def _rope(header: Header, head_dim: int, may_rotate_part: bool) -> Config:
    """`rope_freq_factors` is ours: Llama 3's scaling, stored as a divisor a frequency and not as its parameters."""
    found: Config = {"rope_theta": header.real("rope.freq_base", 10000.0), "rope_scaling": _rope_scaling(header)}
    rotated = header.positive("rope.dimension_count", head_dim)
    if rotated != head_dim:
        if not may_rotate_part:
            raise UnsupportedModel(f"{header.path} rotates {rotated} of {head_dim} dimensions a head; only all can be.")
        found["partial_rotary_factor"] = rotated / head_dim
    if header.has_tensor("rope_freqs.weight"):
        found["rope_freq_factors"] = header.factors("rope_freqs.weight", rotated // 2)
    if header.has_tensor("rope_factors_long.weight"):
        found["rope_scaling"] = _longrope(header, rotated // 2)
    return found


def _rope_scaling(header: Header) -> Config | None:
    """Like llama.cpp: a factor without a type is linear scaling, and 0 or 1 is none at all."""
    kind = header.text("rope.scaling.type", "linear")
    factor = header.real("rope.scaling.factor", header.real("rope.scale_linear", 0.0))
    original = header.integer("rope.scaling.original_context_length", 0)
    if kind in ("none", "longrope") or factor in (0, 1):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UnsupportedModel(f"{header.path} has the rope scaling {kind!r}; known are none, linear, yarn, longrope.")
    for name in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_ext_factor"):
        header.only(name, 1.0)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original or header.positive("context_length"),
        "beta_fast": header.real("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": header.real("rope.scaling.yarn_beta_slow", 1.0),
    }


def _longrope(header: Header, count: int) -> Config:
    found: Config = {
        "rope_type": "longrope",
        "short_factor": header.factors("rope_factors_short.weight", count),
        "long_factor": header.factors("rope_factors_long.weight", count),
    }
    if header.has("rope.scaling.attn_factor"):
        found["attention_factor"] = header.real("rope.scaling.attn_factor")
    return found


def _with_rms_norm(header: Header, **more: Any) -> Config:
    return _decoder(header, **more) | {"rms_norm_eps": header.real("attention.layer_norm_rms_epsilon")}


def _layer_norm_eps(header: Header) -> float:
    return header.real("attention.layer_norm_epsilon")


def _renamed(config: Config, **names: str | None) -> Config:
    """Options under an architecture's own names; None drops one."""
    given = {names.get(name, name): value for name, value in config.items()}
    return {name: value for name, value in given.items() if name is not None}


def _has_attention_bias(header: Header) -> bool:
    return header.has_tensor("blk.0.attn_q.bias")


def _llama(header: Header) -> Config:
    return _with_rms_norm(header) | {
        "attention_bias": _has_attention_bias(header),
        "mlp_bias": header.has_tensor("blk.0.ffn_up.bias"),
        "hidden_act": "silu",
    }


def _mixtral(header: Header) -> Config:
    return _with_rms_norm(header) | {
        "num_local_experts": header.positive("expert_count"),
        "num_experts_per_tok": header.positive("expert_used_count"),
    }


def _granite(header: Header) -> Config:
    return _llama(header) | {
        "embedding_multiplier": header.real("embedding_scale", 1.0),
        "residual_multiplier": header.real("residual_scale", 1.0),
        "attention_multiplier": header.real("attention.scale", 1.0),
        "logits_scaling": header.real("logit_scale", 1.0),
    }


def _with_attention_bias(header: Header) -> Config:
    return _with_rms_norm(header) | {"attention_bias": _has_attention_bias(header)}


def _qwen3_moe(header: Header) -> Config:
    return _with_attention_bias(header) | {
        "moe_intermediate_size": header.positive("expert_feed_forward_length"),
        "num_experts": header.positive("expert_count"),
        "num_experts_per_tok": header.positive("expert_used_count"),
        "norm_topk_prob": True,
    }


def _phi3(header: Header) -> Config:
    found = _with_rms_norm(header, may_rotate_part=True)
    return found | {
        "original_max_position_embeddings": header.positive(
            "rope.scaling.original_context_length", found["max_position_embeddings"]
        ),
        "sliding_window": header.integer("attention.sliding_window", 0) or None,
    }


def _gemma(header: Header, *, layers_of_27b: int, final_cap: float) -> Config:
    found = _with_rms_norm(header)
    is_27b = found["num_hidden_layers"] == layers_of_27b
    width = found["hidden_size"] // found["num_attention_heads"] if is_27b else found["head_dim"]
    return found | {
        "query_pre_attn_scalar": width,
        "final_logit_softcapping": header.real("final_logit_softcapping", final_cap) or None,
    }


def _gemma2(header: Header) -> Config:
    return _gemma(header, layers_of_27b=46, final_cap=30.0) | {
        "attn_logit_softcapping": header.real("attn_logit_softcapping", 50.0) or None,
        "sliding_window": header.positive("attention.sliding_window", 4096),
    }


def _gemma3(header: Header) -> Config:
    window = header.integer("attention.sliding_window", 0)
    found = _gemma(header, layers_of_27b=62, final_cap=0.0)
    if not header.has("rope.freq_base"):
        found["rope_theta"] = 1e6
    return found | {
        "rope_local_base_freq": header.real("rope.freq_base_swa", 10000.0),
        "sliding_window_pattern": header.positive("attention.sliding_window_pattern", 6) if window else 1,
        "sliding_window": window or 4096,
    }


def _gpt2(header: Header) -> Config:
    return {
        "n_embd": header.positive("embedding_length"),
        "n_layer": header.num_layers(),
        "n_head": header.positive("attention.head_count"),
        "n_positions": header.positive("context_length"),
        "n_inner": header.positive("feed_forward_length"),
        "layer_norm_epsilon": _layer_norm_eps(header),
    }


def _gpt_neox(header: Header) -> Config:
    found = _decoder(header, may_rotate_part=True)
    header.only("attention.head_count_kv", found["num_attention_heads"])
    rotated = found.pop("partial_rotary_factor", 1.0)
    return _renamed(found, num_key_value_heads=None, head_dim=None) | {
        "rotary_pct": rotated,
        "use_parallel_residual": header.boolean("use_parallel_residual", True),
        "layer_norm_eps": _layer_norm_eps(header),
    }


def _falcon(header: Header, num_norms: int) -> Config:
    """Falcon 7B too is written in the terms of 40B: one group of heads."""
    return _renamed(
        _decoder(header), num_key_value_heads="num_kv_heads", intermediate_size="ffn_hidden_size", head_dim=None
    ) | {
        "new_decoder_architecture": True,
        "num_ln_in_parallel_attn": num_norms,
        "layer_norm_epsilon": _layer_norm_eps(header),
    }


def _starcoder2(header: Header) -> Config:
    return _decoder(header) | {
        "norm_epsilon": _layer_norm_eps(header),
        "use_bias": _has_attention_bias(header),
        "sliding_window": header.integer("attention.sliding_window", 0) or None,
    }


def _baichuan(header: Header) -> Config:
    """13B is told by its 40 layers; Baichuan 2, whose head is normalised, by its vocabulary (models/baichuan.py)."""
    found = _with_rms_norm(header)
    if found["num_hidden_layers"] == 40:
        return _renamed(found, max_position_embeddings="model_max_length")
    return found


def _deepseek_v3(header: Header) -> Config:
    """Files without expert groups have one, which is how llama.cpp runs them."""
    if header.integer("expert_gating_func", 0) != SIGMOID:
        raise UnsupportedModel(f"{header.path} is a DeepSeek-V2, which is not known; DeepSeek-V3 and its kin are.")
    header.skip("attention.head_count_kv", "attention.key_length", "attention.value_length")
    rope_dim = header.positive("rope.dimension_count")
    key_length = header.positive("attention.key_length_mla", header.positive("attention.key_length"))
    scaling = _rope_scaling(header)
    if scaling and header.has("rope.scaling.yarn_log_multiplier"):
        magnitude = 10 * header.real("rope.scaling.yarn_log_multiplier")
        scaling |= {"mscale": magnitude, "mscale_all_dim": magnitude}
    return {
        "hidden_size": header.positive("embedding_length"),
        "num_hidden_layers": header.num_layers(),
        "num_attention_heads": header.positive("attention.head_count"),
        "intermediate_size": header.positive("feed_forward_length"),
        "max_position_embeddings": header.positive("context_length"),
        "rms_norm_eps": header.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": header.real("rope.freq_base", 10000.0),
        "rope_scaling": scaling,
        "q_lora_rank": header.positive("attention.q_lora_rank") if header.has("attention.q_lora_rank") else None,
        "kv_lora_rank": header.positive("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key_length - rope_dim,
        "v_head_dim": header.positive("attention.value_length_mla", header.positive("attention.value_length")),
        "first_k_dense_replace": header.integer("leading_dense_block_count", 0),
        "moe_intermediate_size": header.positive("expert_feed_forward_length"),
        "n_routed_experts": header.positive("expert_count"),
        "n_shared_experts": header.positive("expert_shared_count"),
        "num_experts_per_tok": header.positive("expert_used_count"),
        "n_group": header.positive("expert_group_count", 1),
        "topk_group": header.positive("expert_group_used_count", 1),
        "norm_topk_prob": header.boolean("expert_weights_norm", False),
        "routed_scaling_factor": header.real("expert_weights_scale", 1.0),
    }


def _gpt_oss(header: Header) -> Config:
    found = _with_attention_bias(header) | {
        "intermediate_size": header.positive("expert_feed_forward_length"),
        "num_local_experts": header.positive("expert_count"),
        "num_experts_per_tok": header.positive("expert_used_count"),
        "sliding_window": header.positive("attention.sliding_window"),
    }
    if found["rope_scaling"]:
        found["rope_scaling"]["truncate"] = False
    return found


# Weights.


def _qkv(suffix: str) -> tuple[str, ...]:
    return tuple(f"layers.{{i}}.attention.{part}_proj.{suffix}" for part in "qkv")


# A model has no parameter for the names that are not its own, and then they are refused.
COMMON: WeightTable = {
    "token_embd.weight": "embed.weight",
    "position_embd.weight": "embed_position.weight",
    "output_norm.{p}": "norm.{p}",
    "output.weight": "lm_head.weight",
    "blk.{i}.attn_norm.{p}": "layers.{i}.input_norm.{p}",
    "blk.{i}.attn_q.{p}": "layers.{i}.attention.q_proj.{p}",
    "blk.{i}.attn_k.{p}": "layers.{i}.attention.k_proj.{p}",
    "blk.{i}.attn_v.{p}": "layers.{i}.attention.v_proj.{p}",
    "blk.{i}.attn_qkv.weight": Rows(_qkv("weight")),
    "blk.{i}.attn_qkv.bias": Rows(_qkv("bias")),
    "blk.{i}.attn_q_norm.weight": "layers.{i}.attention.q_norm.weight",
    "blk.{i}.attn_k_norm.weight": "layers.{i}.attention.k_norm.weight",
    "blk.{i}.attn_sinks.weight": "layers.{i}.attention.sinks",
    "blk.{i}.attn_output.{p}": "layers.{i}.attention.o_proj.{p}",
    "blk.{i}.ffn_norm.{p}": "layers.{i}.post_norm.{p}",
    "blk.{i}.ffn_gate.{p}": "layers.{i}.mlp.gate_proj.{p}",
    "blk.{i}.ffn_up.{p}": "layers.{i}.mlp.up_proj.{p}",
    "blk.{i}.ffn_down.{p}": "layers.{i}.mlp.down_proj.{p}",
    "blk.{i}.ffn_gate_inp.{p}": "layers.{i}.mlp.router.{p}",
    "blk.{i}.ffn_gate_exps.{p}": "layers.{i}.mlp.experts.gate_proj.{p}",
    "blk.{i}.ffn_up_exps.{p}": "layers.{i}.mlp.experts.up_proj.{p}",
    "blk.{i}.ffn_down_exps.{p}": "layers.{i}.mlp.experts.down_proj.{p}",
}
PHI3 = {
    **COMMON,
    "blk.{i}.ffn_up.{p}": Rows(("layers.{i}.mlp.gate_proj.{p}", "layers.{i}.mlp.up_proj.{p}")),
}
GEMMA = {
    **COMMON,
    "blk.{i}.post_attention_norm.weight": "layers.{i}.post_attention_norm.weight",
    "blk.{i}.ffn_norm.{p}": "layers.{i}.pre_mlp_norm.{p}",
    "blk.{i}.post_ffw_norm.weight": "layers.{i}.post_mlp_norm.weight",
}
OLMO2 = {
    **COMMON,
    "blk.{i}.post_attention_norm.weight": "layers.{i}.attention_norm.weight",
    "blk.{i}.post_ffw_norm.weight": "layers.{i}.mlp_norm.weight",
}
FALCON_TWO_NORMS = {
    **COMMON,
    "blk.{i}.attn_norm.{p}": "layers.{i}.mlp_norm.{p}",
    "blk.{i}.attn_norm_2.{p}": "layers.{i}.attention_norm.{p}",
}
GPT_OSS = {**COMMON, "blk.{i}.post_attention_norm.weight": "layers.{i}.post_norm.weight"}
_LATENT = "layers.{i}.attention"
DEEPSEEK_V3 = {
    **COMMON,
    "blk.{i}.attn_q.{p}": Rows((f"{_LATENT}.q_proj.nope.{{p}}", f"{_LATENT}.q_proj.rope.{{p}}"), groups="num_heads"),
    "blk.{i}.attn_q_a.weight": f"{_LATENT}.q_down.weight",
    "blk.{i}.attn_q_a_norm.weight": f"{_LATENT}.q_norm.weight",
    "blk.{i}.attn_q_b.weight": Rows((f"{_LATENT}.q_up.nope.weight", f"{_LATENT}.q_up.rope.weight"), groups="num_heads"),
    "blk.{i}.attn_kv_a_mqa.weight": Rows((f"{_LATENT}.kv_down.weight", f"{_LATENT}.k_rope.weight")),
    "blk.{i}.attn_kv_a_norm.weight": f"{_LATENT}.kv_norm.weight",
    "blk.{i}.attn_kv_b.weight": Rows((f"{_LATENT}.k_up.weight", f"{_LATENT}.v_up.weight"), groups="num_heads"),
    "blk.{i}.attn_k_b.weight": f"{_LATENT}.k_up.weight",
    "blk.{i}.attn_v_b.weight": f"{_LATENT}.v_up.weight",
    "blk.{i}.exp_probs_b.bias": "layers.{i}.mlp.router.correction",
    "blk.{i}.ffn_gate_shexp.weight": "layers.{i}.mlp.shared.gate_proj.weight",
    "blk.{i}.ffn_up_shexp.weight": "layers.{i}.mlp.shared.up_proj.weight",
    "blk.{i}.ffn_down_shexp.weight": "layers.{i}.mlp.shared.down_proj.weight",
}

ARCHITECTURES = {  # by general.architecture
    "llama": Architecture("llama", _llama, COMMON, reorders_rope=True),
    "baichuan": Architecture("baichuan", _baichuan, COMMON, reorders_rope=True),
    "deepseek2": Architecture("deepseek_v3", _deepseek_v3, DEEPSEEK_V3),
    "falcon": Architecture("falcon", lambda header: _falcon(header, 1), COMMON),
    "gemma2": Architecture("gemma2", _gemma2, GEMMA, adds_one_to_norms=True),
    "gemma3": Architecture("gemma3_text", _gemma3, GEMMA, adds_one_to_norms=True),
    "gpt2": Architecture("gpt2", _gpt2, COMMON),
    "gpt-oss": Architecture("gpt_oss", _gpt_oss, GPT_OSS),
    "gptneox": Architecture("gpt_neox", _gpt_neox, COMMON),
    "granite": Architecture("granite", _granite, COMMON, reorders_rope=True),
    "olmo2": Architecture("olmo2", _with_attention_bias, OLMO2),
    "phi3": Architecture("phi3", _phi3, PHI3),
    "qwen2": Architecture("qwen2", _with_rms_norm, COMMON),
    "qwen3": Architecture("qwen3", _with_attention_bias, COMMON),
    "qwen3moe": Architecture("qwen3_moe", _qwen3_moe, COMMON),
    "starcoder2": Architecture("starcoder2", _starcoder2, COMMON),
}
VARIANTS = {  # Another model under the same name, and the tensor that tells it.
    "llama": ("blk.0.ffn_gate_inp.weight", Architecture("mixtral", _mixtral, COMMON, reorders_rope=True)),
    "falcon": (
        "blk.0.attn_norm_2.weight", Architecture("falcon", lambda header: _falcon(header, 2), FALCON_TWO_NORMS),
    ),
}  # fmt: skip
