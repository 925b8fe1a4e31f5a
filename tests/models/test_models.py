"""Every architecture against transformers: the same logits from the same random weights, however the prompt is cut.

The runner walks slipstream/models; what is added there is tested here.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slipstream.build import build
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
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
}
CASES = [
    pytest.param(name, options, id=f"{name}-{variant}")
    for name in known_models()
    for variant, options in {"tiny": {}, **VARIANTS.get(name, {})}.items()
]


@pytest.mark.parametrize(("name", "changes"), CASES)
@pytest.mark.parametrize("passes", ["all", "none"])
def test_logits_equal_transformers(name: str, changes: dict[str, Any], passes: str, tmp_path: Path) -> None:
    model = write_random_model(tmp_path / "model", model_file(name).TINY | changes, seed=1)
    engine = build_engine(model, tmp_path / "engine", passes)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    assert AutoConfig.from_pretrained(model).model_type == name
    token_ids = torch.randint(0, reference.config.vocab_size, (NUM_TOKENS,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = reference(token_ids[None]).logits[0]
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
