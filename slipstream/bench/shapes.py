"""Model shapes by name, for a measurement without weights: the keys of their config.json.

The names are those of TensorRT-LLM's benchmarks/python/allowed_configs.py, where it has one; a shape is one row more.
"""

from collections.abc import Mapping
from typing import Any

Shape = dict[str, Any]


def _llama(
    hidden: int, inter: int, layers: int, heads: int, kv_heads: int, vocab: int, longest: int, **more: Any
) -> Shape:
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inter, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "max_position_embeddings": longest, "rms_norm_eps": 1e-5, **more,
    }  # fmt: skip


def _gpt(hidden: int, layers: int, heads: int) -> Shape:
    return {"model_type": "gpt2", "n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": 1024,
            "vocab_size": 51200}  # fmt: skip


def _baichuan(vocab: int) -> Shape:
    return _llama(4096, 11008, 32, 32, 32, vocab, 4096, tie_word_embeddings=False) | {"model_type": "baichuan"}


SHAPES: Mapping[str, Shape] = {
    "gpt_350m": _gpt(1024, 24, 16),
    "gpt_1.5b": _gpt(1600, 48, 25),
    "gptneox_20b": {
        "model_type": "gpt_neox", "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44,
        "num_attention_heads": 64, "vocab_size": 50432, "max_position_embeddings": 2048, "rotary_pct": 0.25,
    },
    "baichuan_7b": _baichuan(64000),
    "baichuan2_7b_chat": _baichuan(125696),
    "llama_7b": _llama(4096, 11008, 32, 32, 32, 32000, 2048),
    "llama_13b": _llama(5120, 13824, 40, 40, 40, 32000, 2048),
    "llama_30b": _llama(6656, 17920, 60, 52, 52, 32000, 2048),
    "llama_70b": _llama(8192, 28672, 80, 64, 8, 32000, 4096),
    "llama3_8b": _llama(4096, 14336, 32, 32, 8, 128256, 8192, rope_theta=500000.0),
    "llama3_70b": _llama(8192, 28672, 80, 64, 8, 128256, 8192, rope_theta=500000.0),
    "mistral_7b": _llama(4096, 14336, 32, 32, 8, 32000, 8192) | {"model_type": "mistral", "sliding_window": 4096},
    "mixtral_8x7b": _llama(4096, 14336, 32, 32, 8, 32000, 8192)
    | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_7b": _llama(3584, 18944, 28, 28, 4, 152064, 32768, rope_theta=1e6) | {"model_type": "qwen2"},
    "qwen3_8b": _llama(4096, 12288, 36, 32, 8, 151936, 32768, rope_theta=1e6, head_dim=128) | {"model_type": "qwen3"},
    "smollm2_135m": _llama(576, 1536, 30, 9, 3, 49152, 8192, rope_theta=1e5, tie_word_embeddings=True),
}  # fmt: skip
