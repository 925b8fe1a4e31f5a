"""TensorRT-LLM's architectures: its config.json as Hugging Face's options, its names as our weights.

mlp.fc is the gate's projection and mlp.gate the other one, but where there are experts or for Phi-3: there mlp.fc is
both, the gate's last. Facts: tensorrt_llm/models/*/config.py and convert.py of https://github.com/NVIDIA/TensorRT-LLM.
Windows of attention are not in the folder; those of Gemma 2 are known.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from slipstream.checkpoint.trtllm.ranks import MAX_RANKS, Split
from slipstream.errors import UnsupportedModel
from slipstream.schema.build import KV_DTYPES
from slipstream.schema.model import Options
from slipstream.schema.weights import Rows, WeightTable

Config = dict[str, Any]
POSITIONS = "position_embedding_type"  # among the options while they are read
RENORMALIZE = 1  # moe.normalization_mode: shares of the chosen experts add up to 1; 0: as the softmax gave them


@dataclass(frozen=True)
class Architecture:
    model_type: str  # Hugging Face's
    options: Callable[[Options, Config], Config]  # takes what is left; completes Hugging Face's
    weights: WeightTable
    positions: tuple[str, ...] = ("rope_gpt_neox",)
    activations: tuple[str, ...] = ("silu", "swiglu")
    has_experts: bool = False
    may_be_split: bool = True
    adds_one_to_norms: bool = False


@dataclass(frozen=True)
class Head:
    """What a folder of a model and its head has of the head (heads.py)."""

    method: str  # of slipstream/speculative
    prefix: str  # of its tensors
    options: tuple[str, ...]


HEADS = {
    "MedusaForCausalLM": Head("medusa", "medusa_heads.", ("num_medusa_heads", "num_medusa_layers")),
    "EagleForCausalLM": Head(
        "eagle", "eagle_nets.", ("num_eagle_layers", "max_non_leaves_per_layer", "eagle_net_config")
    ),
    "ReDrafterForCausalLM": Head(
        "redrafter",
        "drafter.",
        (
            "redrafter_num_layers", "redrafter_hidden_size", "redrafter_exit_dim", "redrafter_is_rnn",
            "redrafter_num_beams", "redrafter_draft_len_per_beam", "redrafter_greedy_search",
        ),
    ),
}  # fmt: skip


def read_config(options: Options) -> tuple[Architecture, Config, Split, str | None, str]:
    """Hugging Face's options, how the tensors are shared among ranks, the quantization, and the dtype of the cache."""
    name = options.choice("architecture", (*ARCHITECTURES, *HEADS))
    if name in HEADS:
        name = _base(options, HEADS[name])
    telling_option, variant = VARIANTS.get(name, ("", None))
    architecture = variant if variant and options.boolean(telling_option) else ARCHITECTURES[name]
    quantization = options.section("quantization") or Options({}, "quantization")
    algorithm = quantization.choice("quant_algo", ("FP8", "W8A16", "W4A16", None))
    kv_algorithm = quantization.choice("kv_cache_quant_algo", ("FP8", "INT8", None))
    if algorithm == "FP8" and architecture.has_experts:
        raise UnsupportedModel(f"quant_algo is FP8 for {name}; experts can be read as floats only.")
    config = read_decoder(options, architecture)
    split = _split(options, architecture, name, config)
    config = {"model_type": architecture.model_type, **architecture.options(options, config)}
    _finish(options)
    del config[POSITIONS]
    return architecture, config, split, algorithm, KV_DTYPES[kv_algorithm.lower()] if kv_algorithm else ""


def read_decoder(options: Options, architecture: Architecture) -> Config:
    """What most configs name alike."""
    hidden_size, num_heads = options.integer("hidden_size"), options.integer("num_attention_heads")
    head_dim = options.integer("head_size", hidden_size // num_heads)
    part = options.real("rotary_pct", 1.0)
    options.choice("rotary_embedding_dim", (int(head_dim * part),), int(head_dim * part))
    options.choice("hidden_act", architecture.activations)
    return {
        POSITIONS: options.choice("position_embedding_type", architecture.positions, architecture.positions[0]),
        "hidden_size": hidden_size,
        "num_attention_heads": num_heads,
        "num_key_value_heads": options.integer("num_key_value_heads", num_heads),
        "head_dim": head_dim,
        "num_hidden_layers": options.integer("num_hidden_layers"),
        "intermediate_size": options.integer("intermediate_size", 4 * hidden_size),
        "vocab_size": options.integer("vocab_size"),
        "max_position_embeddings": options.integer("max_position_embeddings", 2048),
        "rms_norm_eps": options.real("norm_epsilon", 1e-5),
        "rope_theta": options.real("rotary_base", 10000.0),
        "rope_scaling": options.value("rotary_scaling"),
        "partial_rotary_factor": part if part != 1 else None,
    }


def _split(options: Options, architecture: Architecture, name: str, config: Config) -> Split:
    mapping = options.section("mapping") or Options({}, "mapping")
    tp_size = mapping.integer("tp_size", 1, high=MAX_RANKS)
    for size in ("pp_size", "cp_size"):
        mapping.choice(size, (1,), 1)
    mapping.choice("world_size", (tp_size,), tp_size)
    if architecture.has_experts:
        mapping.choice("moe_ep_size", (1, -1), 1)
        mapping.choice("moe_tp_size", (tp_size, -1), tp_size)
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    if tp_size > 1 and not architecture.may_be_split:
        raise UnsupportedModel(f"tp_size is {tp_size}; how {name} is split is not known, convert it with --tp_size 1.")
    if num_heads % tp_size or num_kv_heads % tp_size:
        raise UnsupportedModel(
            f"tp_size is {tp_size}; it must divide {num_heads} heads and {num_kv_heads} heads of keys and values."
        )
    is_split = options.boolean("use_parallel_embedding")
    dim = options.choice("embedding_sharding_dim", (0, 1), 0)
    rows = (num_heads, num_kv_heads, num_kv_heads)
    return Split(
        tp_size, rows, config["vocab_size"], dim if is_split and tp_size > 1 else None, architecture.has_experts
    )


def _base(options: Options, head: Head) -> str:
    """The architecture beside the head, of which it says nothing itself but for ReDrafter's."""
    options.skip("head_dim", "max_draft_len", *head.options)
    default = "QWenForCausalLM" if options.has("qwen_type") else "LlamaForCausalLM"
    return options.choice("base_model_architecture", ("LlamaForCausalLM", "QWenForCausalLM"), default)


def _finish(options: Options) -> None:
    # What changes the numbers, and is not known: only its neutral value.
    for name in ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "output_multiplier_scale"):
        options.choice(name, (1, 1.0), 1)
    experts = options.section("moe")
    if experts is not None:
        experts.choice("num_experts", (0,), 0)
    # What says how its own engine is built, or again what the tensors say, and nothing of the numbers.
    options.skip(
        "disable_weight_only_quant_plugin", "gpu_weights_percent", "layer_idx_offset", "logits_dtype", "producer",
        "qk_layernorm_type", "remove_duplicated_kv_heads", "runtime_defaults", "share_embedding_table",
        "tie_word_embeddings", "use_input_layernorm_in_first_layer", "use_last_layernorm", "use_prompt_tuning",
    )  # fmt: skip
    options.finish("the reader of TensorRT-LLM checkpoints")


def _without_biases(options: Options, config: Config) -> Config:
    for name in ("attn_bias", "mlp_bias"):
        options.choice(name, (False,), False)
    return config


def _llama(options: Options, config: Config) -> Config:
    return config | {"attention_bias": options.boolean("attn_bias"), "mlp_bias": options.boolean("mlp_bias")}


def _mistral(options: Options, config: Config) -> Config:
    return _without_biases(options, config) | {"sliding_window": None}


def _baichuan(options: Options, config: Config) -> Config:
    """13B is told by ALiBi; z_loss_weight is what tells Baichuan 2 (models/baichuan.py)."""
    found = _without_biases(options, config)
    known = ("v1_7b", "v1_13b", "v2_7b", "v2_13b")
    version = options.choice("model_version", known, "v1_7b" if config["vocab_size"] == 64000 else "v2_7b")
    if found[POSITIONS] == "alibi":
        found["model_max_length"] = found.pop("max_position_embeddings")
    return found | ({"z_loss_weight": 0.0} if version.startswith("v2") else {})


def _qwen(options: Options, config: Config, kind: str) -> Config:
    options.choice("qwen_type", (kind,), kind)
    options.choice("use_logn_attn", (False,), False)
    options.choice("mlp_bias", (False,), False)
    options.choice("qk_layernorm", (kind.startswith("qwen3"), None), None)
    has_bias = options.boolean("attn_bias", kind == "qwen2")
    if kind == "qwen2" and not has_bias:
        raise UnsupportedModel("attn_bias is False; a Qwen2 has biases.")
    options.skip("seq_length", "num_labels")
    if kind != "qwen3_moe":
        options.skip("moe_intermediate_size", "moe_shared_expert_intermediate_size")
    return config | ({} if kind == "qwen2" else {"attention_bias": has_bias})


def _experts(options: Options, modes: tuple[int, ...]) -> tuple[int, int, int]:
    """Their number, how many a token takes, and the mode of normalization."""
    experts = options.section("moe") or Options({}, "moe")
    return experts.integer("num_experts"), experts.integer("top_k"), experts.choice("normalization_mode", modes)


def _mixtral(options: Options, config: Config) -> Config:
    num_experts, top_k, _ = _experts(options, (RENORMALIZE,))
    return _without_biases(options, config) | {"num_local_experts": num_experts, "num_experts_per_tok": top_k}


def _qwen3_moe(options: Options, config: Config) -> Config:
    num_experts, top_k, mode = _experts(options, (0, RENORMALIZE))
    options.choice("moe_shared_expert_intermediate_size", (0,), 0)
    return _qwen(options, config, "qwen3_moe") | {
        "moe_intermediate_size": options.integer("moe_intermediate_size"),
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": mode == RENORMALIZE,
    }


def _phi3(options: Options, config: Config) -> Config:
    original = options.integer("original_max_position_embeddings", config["max_position_embeddings"])
    short, long = options.value("longrope_scaling_short_factors"), options.value("longrope_scaling_long_factors")
    if short is not None:
        config = config | {"rope_scaling": {"type": "longrope", "short_factor": short, "long_factor": long}}
    return _without_biases(options, config) | {"original_max_position_embeddings": original}


def _gemma2(options: Options, config: Config) -> Config:
    options.choice("inter_layernorms", (True,), True)
    return _without_biases(options, config) | {
        "query_pre_attn_scalar": options.integer("query_pre_attn_scalar"),
        "attn_logit_softcapping": options.cap("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": options.cap("final_logit_softcapping", 30.0),
    }


def _falcon(options: Options, config: Config, is_new: bool) -> Config:
    num_kv_heads = config.pop("num_key_value_heads")
    config.pop("head_dim")
    return config | {
        "num_kv_heads": num_kv_heads,
        "multi_query": num_kv_heads == 1,
        "new_decoder_architecture": is_new,
        "parallel_attn": options.boolean("parallel_attention"),
        "bias": options.boolean("bias"),
        "alibi": config[POSITIONS] != "rope_gpt_neox",
        "ffn_hidden_size": config.pop("intermediate_size"),
        "layer_norm_epsilon": config.pop("rms_norm_eps"),
    }


def _gpt_neox(options: Options, config: Config) -> Config:
    config["rotary_pct"] = config.pop("partial_rotary_factor") or 1.0
    config["rope_theta"] = options.real("rotary_emb_base", config["rope_theta"])
    config["layer_norm_eps"] = config.pop("rms_norm_eps")
    for name in ("num_key_value_heads", "head_dim"):
        config.pop(name)
    return config


def _qkv(suffix: str) -> tuple[str, ...]:
    return tuple(f"layers.{{i}}.attention.{part}_proj.{suffix}" for part in "qkv")


COMMON: WeightTable = {
    "transformer.vocab_embedding.weight": "embed.weight",
    "transformer.ln_f.{p}": "norm.{p}",
    "lm_head.weight": "lm_head.weight",
    "transformer.layers.{i}.input_layernorm.{p}": "layers.{i}.input_norm.{p}",
    "transformer.layers.{i}.post_layernorm.{p}": "layers.{i}.post_norm.{p}",
    "transformer.layers.{i}.attention.qkv.weight": Rows(_qkv("weight")),
    "transformer.layers.{i}.attention.qkv.bias": Rows(_qkv("bias")),
    "transformer.layers.{i}.attention.q_layernorm.weight": "layers.{i}.attention.q_norm.weight",
    "transformer.layers.{i}.attention.k_layernorm.weight": "layers.{i}.attention.k_norm.weight",
    "transformer.layers.{i}.attention.dense.{p}": "layers.{i}.attention.o_proj.{p}",
    "transformer.layers.{i}.mlp.proj.{p}": "layers.{i}.mlp.down_proj.{p}",
}
PLAIN = {**COMMON, "transformer.layers.{i}.mlp.fc.{p}": "layers.{i}.mlp.up_proj.{p}"}
GATED = {
    **COMMON,
    "transformer.layers.{i}.mlp.fc.{p}": "layers.{i}.mlp.gate_proj.{p}",
    "transformer.layers.{i}.mlp.gate.{p}": "layers.{i}.mlp.up_proj.{p}",
}
UP_AND_GATE = {
    **COMMON,
    "transformer.layers.{i}.mlp.fc.weight": Rows(("layers.{i}.mlp.up_proj.weight", "layers.{i}.mlp.gate_proj.weight")),
}
_EXPERTS = "layers.{i}.mlp.experts"
EXPERTS = {
    **COMMON,
    "transformer.layers.{i}.mlp.router.weight": "layers.{i}.mlp.router.weight",
    "transformer.layers.{i}.mlp.fc.weight": Rows((f"{_EXPERTS}.up_proj.weight", f"{_EXPERTS}.gate_proj.weight"), dim=1),
    "transformer.layers.{i}.mlp.proj.{p}": f"{_EXPERTS}.down_proj.{{p}}",
}
GEMMA2 = {
    **GATED,
    "transformer.layers.{i}.post_layernorm.{p}": "layers.{i}.post_attention_norm.{p}",
    "transformer.layers.{i}.pre_feedforward_layernorm.weight": "layers.{i}.pre_mlp_norm.weight",
    "transformer.layers.{i}.post_feedforward_layernorm.weight": "layers.{i}.post_mlp_norm.weight",
}
FALCON_TWO_NORMS = {
    **PLAIN,
    "transformer.layers.{i}.input_layernorm.{p}": "layers.{i}.attention_norm.{p}",
    "transformer.layers.{i}.mlp_layernorm.{p}": "layers.{i}.mlp_norm.{p}",
}
GPT_NEOX = {**PLAIN, "transformer.layers.{i}.post_attention_layernorm.{p}": "layers.{i}.post_norm.{p}"}

_FALCON_POSITIONS = ("rope_gpt_neox", "alibi_with_scale")
_BAICHUAN = Architecture("baichuan", _baichuan, GATED, positions=("rope_gpt_neox", "alibi"))
_QWEN2 = Architecture("qwen2", partial(_qwen, kind="qwen2"), GATED)

ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", _llama, GATED),
    "MistralForCausalLM": Architecture("mistral", _mistral, GATED),
    "MixtralForCausalLM": Architecture("mixtral", _mixtral, EXPERTS, has_experts=True),
    "BaichuanForCausalLM": _BAICHUAN,
    "BaiChuanForCausalLM": _BAICHUAN,
    "FalconForCausalLM": Architecture(
        "falcon", partial(_falcon, is_new=False), PLAIN, _FALCON_POSITIONS, activations=("gelu",)
    ),
    "Gemma2ForCausalLM": Architecture(
        "gemma2", _gemma2, GEMMA2, activations=("gelu_pytorch_tanh",), adds_one_to_norms=True
    ),
    "GPTNeoXForCausalLM": Architecture(
        "gpt_neox", _gpt_neox, GPT_NEOX, ("rope_gpt_neox", "learned_absolute"), activations=("gelu",)
    ),
    "Phi3ForCausalLM": Architecture("phi3", _phi3, UP_AND_GATE, ("rope_gpt_neox", "long_rope"), may_be_split=False),
    "QWenForCausalLM": _QWEN2,
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": Architecture("qwen3", partial(_qwen, kind="qwen3"), GATED),
    "Qwen3MoeForCausalLM": Architecture("qwen3_moe", _qwen3_moe, EXPERTS, has_experts=True),
}
VARIANTS = {  # Another model under the same name, and the option that tells it.
    "FalconForCausalLM": (
        "new_decoder_architecture",
        Architecture(
            "falcon", partial(_falcon, is_new=True), FALCON_TWO_NORMS, _FALCON_POSITIONS, activations=("gelu",)
        ),
    ),
}
