"""Every architecture against transformers: the same logits from the same random weights, however the prompt is cut.

The runner walks slipstream/models; what is added there is tested here.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tests.models.baichuan_reference  # noqa: F401 - what transformers lacks
from slipstream.build import build
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.engine.folder import open_engine
from slipstream.models import known_models, model_file
from slipstream.schema.build import BuildConfig
from tests.oracle import GraphRunner

TOLERANCE = 1e-4  # absolute, float32 logits
NUM_TOKENS = 40

MID_SIZE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
}

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 1.2, 2.0, 3.0, 5.0, 8.0, 8.5, 9.0],
}

LINEAR = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}
SLIDING = {"use_sliding_window": True, "sliding_window": 12}
FALCON_MID_SIZE = MID_SIZE | {"intermediate_size": None, "ffn_hidden_size": 688}
ALIBI = {"max_position_embeddings": None}  # Baichuan 13B

# Beside TINY: what changes the numbers of an architecture.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "tied": {"tie_word_embeddings": True},
        "mha_biases": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
        "mqa_wide_head": {"num_key_value_heads": 1, "head_dim": 32},
        "linear_rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        "dynamic_rope": {"max_position_embeddings": 24, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        "dynamic_rope_in_old_context": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        "yarn_rope": {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 8.0,
                "original_max_position_embeddings": 32,
            },
        },
        "yarn_rope_all_options": {
            "rope_scaling": {
                "type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 4.0,
                "beta_slow": 0.25,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "truncate": False,
            },
        },
        "longrope_short": {"rope_scaling": LONGROPE | {"original_max_position_embeddings": 64}},
        "longrope_long": {"rope_scaling": LONGROPE | {"original_max_position_embeddings": 32}},
        "llama3_rope": {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        "mid_size": MID_SIZE,
    },
    "baichuan": {
        "first_7b": {"z_loss_weight": None, "model_max_length": None},
        "second_13b": ALIBI,
        "first_13b_six_heads": ALIBI | {"z_loss_weight": None, "num_attention_heads": 6, "hidden_size": 96},
        "mid_size": MID_SIZE,
        "mid_size_13b": MID_SIZE | ALIBI,
    },
    "falcon": {
        "untied_biases": {"tie_word_embeddings": False, "bias": True},
        "mha": {"multi_query": False},
        "sequential_alibi": {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
        "sequential_mqa": {"parallel_attn": False, "ffn_hidden_size": 96},
        "new_decoder": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "new_decoder_one_norm": {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "activation": "gelu_pytorch_tanh",
            "rope_theta": 500.0,
        },
        "mid_size": FALCON_MID_SIZE,
        "mid_size_new_decoder": FALCON_MID_SIZE | {"new_decoder_architecture": True, "num_kv_heads": 4, "bias": True},
    },
    "gemma2": {
        "untied_biases": {"tie_word_embeddings": False, "attention_bias": True},
        "no_caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        "layer_types": {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        "mid_size": MID_SIZE | {"head_dim": 48, "sliding_window": 16, "attn_logit_softcapping": 50.0},
    },
    "gemma3_text": {
        "untied_capped": {"tie_word_embeddings": False, "final_logit_softcapping": 3.0},
        "ropes_by_layer_type": {
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
            },
        },
        "old_rope_names": {"rope_theta": 30000.0, "rope_local_base_freq": 300.0},
        "mid_size": MID_SIZE | {"head_dim": 48, "sliding_window": 16},
    },
    "mistral": {
        "no_window": {"sliding_window": None},
        "tied": {"tie_word_embeddings": True},
        "window_of_one_block": {"sliding_window": 16, "head_dim": 32, **LINEAR},
        "mid_size": MID_SIZE | {"sliding_window": 20, "num_key_value_heads": 8},
    },
    "qwen2": {
        "tied_yarn": {"tie_word_embeddings": True, **YARN},
        "upper_windows": {**SLIDING, "max_window_layers": 1},
        "windows_by_layer_types": {
            **SLIDING,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "unused_windows": {"sliding_window": 12, "max_window_layers": 0, "use_sliding_window": False},
        "mid_size": MID_SIZE | {**SLIDING, "max_window_layers": 4, "num_key_value_heads": 1},
    },
    "qwen3": {
        "tied_biases": {"tie_word_embeddings": True, "attention_bias": True},
        "windows_yarn": {**SLIDING, "max_window_layers": 0, **YARN},
        "mid_size": MID_SIZE | {"num_key_value_heads": 8},
    },
    "phi3": {
        "window": {"sliding_window": 12, "tie_word_embeddings": True},
        "longrope_short": {"rope_scaling": LONGROPE, "original_max_position_embeddings": 64},
        "longrope_long": {"rope_scaling": LONGROPE | {"type": "su"}, "original_max_position_embeddings": 32},
        "partial_rotary_longrope": {
            "partial_rotary_factor": 0.5,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 2.0, 3.0, 4.0],
                "attention_factor": 1.25,
            },
            "original_max_position_embeddings": 16,
        },
        "mid_size": MID_SIZE | {"partial_rotary_factor": 0.75, "sliding_window": 1000},
    },
    "granite": {
        "tied_biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        "dynamic_rope": {"max_position_embeddings": 24, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "mid_size": MID_SIZE | {"logits_scaling": 0.3},
    },
    "olmo2": {
        "tied_biases_mqa": {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 1},
        "yarn": YARN,
        "mid_size": MID_SIZE | {"num_key_value_heads": None},
    },
    "starcoder2": {
        "untied_no_biases": {"tie_word_embeddings": False, "use_bias": False, "sliding_window": None},
        "exact_gelu": {"hidden_act": "gelu", **LINEAR},
        "mid_size": MID_SIZE | {"sliding_window": 20},
    },
    "gpt2": {
        "untied": {"tie_word_embeddings": False, "n_inner": 96},
        "scales": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
        "mid_size": {"n_embd": 256, "n_layer": 6, "n_head": 8, "vocab_size": 1024, "n_positions": 512},
    },
    "gpt_neox": {
        "tied_sequential": {"tie_word_embeddings": True, "use_parallel_residual": False},
        "no_biases": {"attention_bias": False, "hidden_act": "gelu_fast"},
        "whole_head_rotated": {"rotary_pct": 1.0, "rotary_emb_base": 500},
        "rope_parameters": {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        "mid_size": MID_SIZE,
    },
    "mixtral": {
        "window": {"sliding_window": 9},
        "one_expert": {"num_experts_per_tok": 1, "tie_word_embeddings": True},
        "all_experts": {"num_experts_per_tok": 4, "num_key_value_heads": 4},
        "mid_size": MID_SIZE | {"intermediate_size": 160, "num_local_experts": 8},
    },
    "qwen3_moe": {
        "not_normalized": {"norm_topk_prob": False, "num_experts_per_tok": 2},
        "some_layers_dense": {"mlp_only_layers": [0], "decoder_sparse_step": 2, "tie_word_embeddings": True},
        "biases_window": {"attention_bias": True, "use_sliding_window": True, "sliding_window": 11},
        "mid_size": MID_SIZE | {"moe_intermediate_size": 96, "num_experts": 24, "num_experts_per_tok": 5},
    },
    "gpt_oss": {
        "default_rope": {"rope_scaling": {"rope_type": "default"}},
        "no_rope_options": {"rope_scaling": None},
        "layer_types": {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        "no_attention_bias_alpha": {"attention_bias": False, "swiglu_alpha": 1.2, "swiglu_limit": 0.8},
        "mid_size": MID_SIZE | {"intermediate_size": 160, "num_local_experts": 8, "num_experts_per_tok": 4},
    },
    "deepseek_v3": {
        "plain_queries": {"q_lora_rank": None, "attention_bias": True},
        "biases": {"attention_bias": True, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
        "halves_rope": {"rope_interleave": False},
        "one_group": {"n_group": 1, "topk_group": 1, "n_shared_experts": 2, "num_experts_per_tok": 8},
        "no_dense_layer": {"first_k_dense_replace": 0, "tie_word_embeddings": True},
        "yarn": {
            "rope_scaling": {
                "type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
        "mid_size": MID_SIZE
        | {
            "num_key_value_heads": 8,
            "moe_intermediate_size": 96,
            "q_lora_rank": 96,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "n_routed_experts": 24,
            "num_experts_per_tok": 5,
        },
    },
}
CASES = [
    pytest.param(name, options, id=f"{name}-{variant}")
    for name in known_models()
    for variant, options in {"tiny": {}, **VARIANTS.get(name, {})}.items()
]


def transformers_logits(model: Path, token_ids: torch.Tensor) -> torch.Tensor:
    """In float64 where it can (its routed experts cannot): Gemma 2 in float32 is 9e-5 from that, ours half as far."""
    has_experts = any("experts" in key for key in json.loads((model / "config.json").read_text()))
    dtype = torch.float32 if has_experts else torch.float64
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    assert reference.config.model_type == json.loads((model / "config.json").read_text())["model_type"]
    with torch.no_grad():
        return reference(token_ids[None]).logits[0].float()


@pytest.mark.parametrize(("name", "changes"), CASES)
@pytest.mark.parametrize("passes", ["all", "none"])
def test_logits_equal_transformers(name: str, changes: dict[str, Any], passes: str, tmp_path: Path) -> None:
    options = model_file(name).TINY | changes
    model = write_random_model(tmp_path / "model", options, seed=1)
    engine = build_engine(model, tmp_path / "engine", passes)
    token_ids = torch.randint(0, options["vocab_size"], (NUM_TOKENS,), generator=torch.Generator().manual_seed(2))
    expected = transformers_logits(model, token_ids)
    assert expected.std() > 0.1, "flat logits would agree with anything"

    for cut in ([NUM_TOKENS], [17, 1, 16, 6], [1] * NUM_TOKENS):
        runner = GraphRunner(engine)
        parts = [runner.logits(part.tolist()) for part in token_ids.split(cut)]
        actual = torch.cat(parts)
        torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)
        assert torch.equal(actual.argmax(-1), expected.argmax(-1))


def build_engine(model: Path, folder: Path, passes: str) -> Path:
    from slipstream.build.pipeline import FUSIONS

    disabled = tuple(each.name for each in FUSIONS) if passes == "none" else ()
    # Where scaling depends on the length, transformers looks at the prompt's and an engine at its max_seq_len.
    config = BuildConfig(max_batch_size=4, max_num_tokens=64, max_seq_len=NUM_TOKENS, disabled_passes=disabled)
    build(open_checkpoint(resolve(model)), folder, config)
    return folder


def test_baichuan_7b_equals_a_llama_of_its_weights(tmp_path: Path) -> None:
    """What its own code says of it (arXiv:2309.10305): Llama's equations, with q, k and v in one tensor."""
    model = write_random_model(tmp_path / "baichuan", model_file("baichuan").TINY | {"z_loss_weight": None})
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if "W_pack" in name]:
        for projection, rows in zip("qkv", tensors.pop(name).chunk(3), strict=True):
            tensors[name.replace("W_pack", f"{projection}_proj")] = rows.contiguous()
    llama = tmp_path / "llama"
    llama.mkdir()
    save_file(tensors, llama / "model.safetensors")
    config = json.loads((model / "config.json").read_text()) | {"model_type": "llama", "auto_map": {}}
    (llama / "config.json").write_text(json.dumps(config))
    token_ids = torch.arange(NUM_TOKENS)
    actual = GraphRunner(build_engine(model, tmp_path / "engine", "all")).logits(token_ids.tolist())
    torch.testing.assert_close(actual, transformers_logits(llama, token_ids), atol=TOLERANCE, rtol=0)


def test_gpt2_of_the_first_exports_has_names_without_prefix(tmp_path: Path) -> None:
    """openai-community/gpt2 is stored so, with the causal mask among its weights."""
    model = write_random_model(tmp_path / "model", model_file("gpt2").TINY)
    tensors = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(model / "model.safetensors").items()
    }
    new = open_checkpoint(resolve(model))
    old_names = tensors | {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    (tmp_path / "old").mkdir()
    save_file(old_names, tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "config.json").write_text((model / "config.json").read_text())
    old = open_checkpoint(resolve(tmp_path / "old"))
    assert set(old.shapes) == set(new.shapes)
    assert all(torch.equal(old.read(name), new.read(name)) for name in new.shapes)


def test_normalising_the_head_of_baichuan_2_is_not_left_to_a_step(tmp_path: Path) -> None:
    engine = build_engine(
        write_random_model(tmp_path / "model", model_file("baichuan").TINY), tmp_path / "engine", "all"
    )
    opened = open_engine(engine)
    assert not [node for node in opened.graph.nodes if node.op == "normalize_rows"]
    head = opened.weights.read(opened.graph.nodes[-1].inputs[1])
    torch.testing.assert_close(head.norm(dim=1), torch.ones(len(head)))
