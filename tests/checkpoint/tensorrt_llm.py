"""A Hugging Face folder as TensorRT-LLM's convert_checkpoint.py would write it, told from what that program does."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

import tests.models.baichuan_reference  # noqa: F401 - what transformers lacks

Tensors = dict[str, Tensor]
ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM",
    "baichuan": "BaichuanForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM", "phi3": "Phi3ForCausalLM", "gemma2": "Gemma2ForCausalLM",
    "falcon": "FalconForCausalLM", "gpt_neox": "GPTNeoXForCausalLM",
}  # fmt: skip
RENAMED = {
    "model.embed_tokens": "transformer.vocab_embedding", "transformer.word_embeddings": "transformer.vocab_embedding",
    "gpt_neox.embed_in": "transformer.vocab_embedding", "model.norm": "transformer.ln_f",
    "gpt_neox.final_layer_norm": "transformer.ln_f", "embed_out": "lm_head",
    "model.layers": "transformer.layers", "transformer.h.": "transformer.layers.",
    "gpt_neox.layers": "transformer.layers", "self_attn.o_proj": "attention.dense",
    "self_attention.dense": "attention.dense", "self_attn.q_norm": "attention.q_layernorm",
    "self_attn.k_norm": "attention.k_layernorm", "mlp.gate_proj": "mlp.fc", "mlp.up_proj": "mlp.gate",
    "mlp.down_proj": "mlp.proj", "mlp.dense_h_to_4h": "mlp.fc", "mlp.dense_4h_to_h": "mlp.proj",
    "ln_attn": "input_layernorm", "ln_mlp": "mlp_layernorm",
    "self_attention.query_key_value": "attention.qkv", "attention.query_key_value": "attention.qkv",
}  # fmt: skip


def write_as_tensorrt_llm(hf: Path, folder: Path, tp_size: int = 1, **changes: Any) -> Path:
    config = AutoConfig.from_pretrained(hf)
    whole = dict(renamed(config, load_file(hf / "model.safetensors")))
    written = hyperparameters(config, tp_size) | changes
    folder.mkdir(exist_ok=True)
    for rank in range(tp_size):
        shares = {name: share(config, written, name, tensor, rank, tp_size) for name, tensor in whole.items()}
        save_file({name: tensor.contiguous() for name, tensor in shares.items()}, folder / f"rank{rank}.safetensors")
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def heads_of(config: Any) -> tuple[int, int, int]:
    """Queries', and keys' and values', and the width of one."""
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", num_heads)
    if config.model_type == "falcon":
        num_kv_heads = (
            config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else num_heads
        )
    return num_heads, num_kv_heads, getattr(config, "head_dim", None) or config.hidden_size // num_heads


def renamed(config: Any, tensors: Tensors) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        layer = f"transformer.layers.{name.split('.layers.')[-1].split('.')[0]}"
        if "q_proj" in name:
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            yield f"{layer}.attention.qkv.{name.rpartition('.')[2]}", torch.cat(parts)
        elif "W_pack" in name or "qkv_proj" in name:
            yield f"{layer}.attention.qkv.weight", tensor
        elif name.endswith((".experts.0.w1.weight", ".experts.0.gate_proj.weight")):
            yield from experts(tensors, name, layer)
        elif name.endswith(("block_sparse_moe.gate.weight", "mlp.gate.weight")):
            yield f"{layer}.mlp.router.weight", tensor
        elif "gate_up_proj" in name:
            yield f"{layer}.mlp.fc.weight", torch.cat(tensor.chunk(2)[::-1])
        elif not any(part in name for part in ("k_proj", "v_proj", ".experts.")):
            yield in_their_words(config, name), as_they_store_it(config, name, tensor)


def in_their_words(config: Any, name: str) -> str:
    words = dict(RENAMED)
    if config.model_type != "gpt_neox":
        words["post_attention_layernorm"] = "post_layernorm"
    for old, new in words.items():
        name = name.replace(old, new)
    return name


def as_they_store_it(config: Any, name: str, tensor: Tensor) -> Tensor:
    if config.model_type == "gemma2" and "norm" in name:
        return tensor + 1
    if "query_key_value" not in name:
        return tensor
    num_heads, num_kv_heads, head_dim = heads_of(config)
    grouped = tensor.unflatten(0, (num_kv_heads, num_heads // num_kv_heads + 2, head_dim))
    return torch.cat([part.flatten(0, 2) for part in (grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:])])


def experts(tensors: Tensors, first: str, layer: str) -> Iterator[tuple[str, Tensor]]:
    block, _, gate_name = first.partition(".experts.0.")
    names = ("w1", "w2", "w3") if gate_name == "w1.weight" else ("gate_proj", "down_proj", "up_proj")
    count = sum(name.startswith(f"{block}.experts.") for name in tensors) // 3
    gate, down, up = (
        torch.stack([tensors[f"{block}.experts.{expert}.{name}.weight"] for expert in range(count)]) for name in names
    )
    yield f"{layer}.mlp.fc.weight", torch.cat([up, gate], dim=-2)
    yield f"{layer}.mlp.proj.weight", down


def share(config: Any, written: dict[str, Any], name: str, tensor: Tensor, rank: int, tp_size: int) -> Tensor:
    def split(tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(tp_size, dim)[rank]

    if "attention.qkv" in name:
        num_heads, num_kv_heads, head_dim = heads_of(config)
        parts = tensor.split([num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim])
        return torch.cat([split(part, 0) for part in parts])
    if tensor.dim() == 3:
        if "mlp.fc" in name:
            return torch.cat([split(part, 1) for part in tensor.chunk(2, 1)], 1)
        return split(tensor, 2)
    if name == "lm_head.weight":
        padding = -len(tensor) % tp_size
        return split(torch.nn.functional.pad(tensor, (0, 0, 0, padding)), 0)
    if "vocab_embedding" in name and written["use_parallel_embedding"]:
        return split(tensor, written["embedding_sharding_dim"])
    if ".mlp.fc." in name or ".mlp.gate." in name:
        return split(tensor, 0)
    if name.endswith(("attention.dense.weight", "mlp.proj.weight")):
        return split(tensor, 1)
    return tensor


def hyperparameters(config: Any, tp_size: int) -> dict[str, Any]:
    num_heads, num_kv_heads, head_dim = heads_of(config)
    rope = getattr(config, "rope_parameters", None) or {}
    eps = [getattr(config, name, None) for name in ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")]
    return {
        "producer": {"name": "modelopt", "version": "0.17"},
        "architecture": ARCHITECTURES[config.model_type],
        "dtype": "float32",
        "logits_dtype": "float32",
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "hidden_size": config.hidden_size,
        "head_size": head_dim,
        "intermediate_size": getattr(config, "intermediate_size", None),
        "norm_epsilon": next(value for value in eps if value is not None),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": rope.get("rope_theta", 10000.0),
        "rotary_scaling": None,
        "residual_mlp": False,
        "attn_bias": bool(getattr(config, "attention_bias", False)) and config.model_type == "llama",
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "share_embedding_table": False,
        "embedding_multiplier": 1.0,
        "disable_weight_only_quant_plugin": False,
        "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": None},
        "mapping": {"world_size": tp_size, "gpus_per_node": 8, "tp_size": tp_size, "pp_size": 1, "cp_size": 1,
                    "moe_tp_size": tp_size, "moe_ep_size": 1},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None, "group_size": 128, "has_zero_point": False,
                         "pre_quant_scale": False, "exclude_modules": None},
    } | SPECIAL.get(config.model_type, lambda config: {})(config)  # fmt: skip


def qwen(config: Any) -> dict[str, Any]:
    has_norms = config.model_type != "qwen2"
    more = {"qk_layernorm": True} if has_norms else {}
    return {"qwen_type": config.model_type, "attn_bias": not has_norms, "seq_length": 8192, "use_logn_attn": False,
            "moe_intermediate_size": getattr(config, "moe_intermediate_size", 0),
            "moe_shared_expert_intermediate_size": 0, **more}  # fmt: skip


def phi3(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    found = {"hidden_act": "swiglu", "rotary_pct": rope.get("partial_rotary_factor", 1.0)}
    if rope["rope_type"] == "longrope":
        found |= {
            "position_embedding_type": "long_rope",
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
            "longrope_scaling_short_factors": rope["short_factor"],
            "longrope_scaling_long_factors": rope["long_factor"],
        }
    return found


SPECIAL: dict[str, Callable[[Any], dict[str, Any]]] = {
    "baichuan": lambda config: {
        "model_version": "v2_7b" if config.max_position_embeddings else "v2_13b",
        "max_position_embeddings": config.max_position_embeddings or config.model_max_length,
        "position_embedding_type": "rope_gpt_neox" if config.max_position_embeddings else "alibi",
    },
    "mixtral": lambda config: {
        "hidden_act": "swiglu",
        "moe": {"num_experts": config.num_local_experts, "top_k": config.num_experts_per_tok, "normalization_mode": 1},
    },
    "qwen2": qwen,
    "qwen3": qwen,
    "qwen3_moe": lambda config: qwen(config) | {
        "hidden_act": "swiglu",
        "moe": {"num_experts": config.num_experts, "top_k": config.num_experts_per_tok,
                "normalization_mode": int(config.norm_topk_prob)},
    },
    "phi3": phi3,
    "gemma2": lambda config: {
        "hidden_act": "gelu_pytorch_tanh", "inter_layernorms": True, "share_embedding_table": True,
        "query_pre_attn_scalar": config.query_pre_attn_scalar, "rotary_embedding_dim": config.head_dim,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    },
    "falcon": lambda config: {
        "hidden_act": "gelu", "bias": config.bias, "parallel_attention": config.parallel_attn,
        "new_decoder_architecture": config.new_decoder_architecture,
        "position_embedding_type": "alibi_with_scale" if config.alibi else "rope_gpt_neox",
        "attn_bias": None, "mlp_bias": None, "intermediate_size": config.ffn_hidden_size,
    },
    "gpt_neox": lambda config: {
        "hidden_act": "gelu", "position_embedding_type": "learned_absolute",
        "rotary_emb_base": config.rope_parameters["rope_theta"],
        "rotary_pct": config.rope_parameters["partial_rotary_factor"],
    },
}  # fmt: skip


def add_head(folder: Path, head: Path, method: str, tp_size: int) -> Path:
    """To a folder of a model the head that convert_checkpoint.py of examples/{medusa,redrafter,eagle} writes there."""
    config, theirs = json.loads((head / "config.json").read_text()), dict[str, Tensor]()
    weights = load_file(head / ("medusa_lm_head.safetensors" if method == "medusa" else "model.safetensors"))
    written = json.loads((folder / "config.json").read_text())
    more = HEADS[method](config, weights, theirs)
    (folder / "config.json").write_text(json.dumps(written | more))
    for rank in range(tp_size):
        shares = {name: head_share(name, tensor, config, rank, tp_size) for name, tensor in theirs.items()}
        file = folder / f"rank{rank}.safetensors"
        save_file(load_file(file) | {name: share.contiguous() for name, share in shares.items()}, file)
    return folder


def head_share(name: str, tensor: Tensor, config: dict[str, Any], rank: int, tp_size: int) -> Tensor:
    if name.endswith(("attention.dense.weight", "mlp.proj.weight")):
        return tensor.chunk(tp_size, 1)[rank]
    if name.endswith("attention.qkv.weight"):
        heads = [config["num_attention_heads"], *[config["num_key_value_heads"]] * 2]
        parts = tensor.split([count * config["head_dim"] for count in heads])
        return torch.cat([part.chunk(tp_size)[rank] for part in parts])
    return tensor if name.endswith(("vocab_embedding.weight", "layernorm.weight")) else tensor.chunk(tp_size)[rank]


def medusa_head(config: dict[str, Any], weights: Tensors, theirs: Tensors) -> dict[str, Any]:
    num_layers, heads = config["medusa_num_layers"], 1 + max(int(name.split(".")[0]) for name in weights)
    for head in range(heads):
        for layer in range(num_layers):
            for part in ("weight", "bias"):
                own = f"{head}.{layer}.linear.{part}"
                theirs[f"medusa_heads.{head}.medusa_layers.{layer}.linear.{part}"] = weights[own]
        theirs[f"medusa_heads.{head}.lm_head.weight"] = weights[f"{head}.{num_layers}.weight"]
    return {"architecture": "MedusaForCausalLM", "num_medusa_heads": heads, "num_medusa_layers": num_layers,
            "max_draft_len": 63}  # fmt: skip


def redrafter_head(config: dict[str, Any], weights: Tensors, theirs: Tensors) -> dict[str, Any]:
    for name, tensor in weights.items():
        if name == f"lm_head.{config['num_draft_layers']}.weight":
            name = "lm_head.weight"
        elif name.startswith("lm_head."):
            name = name.replace("lm_head.", "layers.")
        theirs[f"drafter.{name}"] = tensor
    return {"architecture": "ReDrafterForCausalLM", "base_model_architecture": "LlamaForCausalLM",
            "redrafter_num_layers": config["num_draft_layers"], "redrafter_hidden_size": config["hidden_size"],
            "redrafter_exit_dim": config["exit_dim"], "redrafter_is_rnn": config["rnn"], "redrafter_num_beams": 5,
            "redrafter_draft_len_per_beam": 5, "redrafter_greedy_search": True}  # fmt: skip


def eagle_head(config: dict[str, Any], weights: Tensors, theirs: Tensors) -> dict[str, Any]:
    qkv = torch.cat([weights[f"layers.0.self_attn.{part}_proj.weight"] for part in "qkv"])
    words = {
        "fc.weight": "fc.weight", "fc.bias": "fc.bias", "vocab_embedding.weight": "embed_tokens.weight",
        "layers.0.post_layernorm.weight": "layers.0.post_attention_layernorm.weight",
        "layers.0.attention.dense.weight": "layers.0.self_attn.o_proj.weight",
        "layers.0.mlp.fc.weight": "layers.0.mlp.gate_proj.weight",
        "layers.0.mlp.gate.weight": "layers.0.mlp.up_proj.weight",
        "layers.0.mlp.proj.weight": "layers.0.mlp.down_proj.weight",
    }  # fmt: skip
    for net in range(4):  # a copy of the layer for each level of a tree
        for name, own in words.items():
            theirs[f"eagle_nets.{net}.drafter.{name}"] = weights[own].clone()
        theirs[f"eagle_nets.{net}.drafter.layers.0.attention.qkv.weight"] = qkv.clone()
        theirs[f"eagle_nets.{net}.lm_head.weight"] = torch.zeros(config["vocab_size"], config["hidden_size"])
    names = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size",
             "vocab_size", "head_dim")  # fmt: skip
    net_config = {name: config[name] for name in names} | {
        "architecture": "LlamaForCausalLM", "dtype": "float32", "logits_dtype": "float32", "norm_epsilon": 1e-6,
        "position_embedding_type": "rope_gpt_neox", "max_position_embeddings": 2048, "hidden_act": "silu",
        "rotary_base": 10000.0, "rotary_scaling": None, "head_size": config["head_dim"],
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None}, "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
    }  # fmt: skip
    return {"architecture": "EagleForCausalLM", "max_draft_len": 63, "num_eagle_layers": 4,
            "max_non_leaves_per_layer": 10, "eagle_net_config": net_config}  # fmt: skip


HEADS: dict[str, Callable[[dict[str, Any], Tensors, Tensors], dict[str, Any]]] = {
    "medusa": medusa_head, "redrafter": redrafter_head, "eagle": eagle_head
}  # fmt: skip
