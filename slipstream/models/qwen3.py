"""Qwen 3 (arXiv:2505.09388): each head of query and key is normalised before its rotation; no biases."""

from dataclasses import dataclass
from typing import Self

from slipstream.layers import Attention, Decoder, GatedMLP, PreNormLayer, RMSNorm
from slipstream.models import llama
from slipstream.models.qwen2 import read_upper_windows
from slipstream.schema.model import DecoderConfig, Options, read_decoder


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    intermediate_size: int
    rms_norm_eps: float
    attention_bias: bool

    @classmethod
    def from_options(cls, options: Options) -> Self:
        options.choice("hidden_act", ("silu",), "silu")
        decoder = read_decoder(options, max_position_embeddings=32768, num_kv_heads=32, head_dim=128)
        return cls(
            **decoder,
            windows=read_upper_windows(options, decoder["num_layers"]),
            intermediate_size=options.integer("intermediate_size"),
            rms_norm_eps=options.real("rms_norm_eps", 1e-6),
            attention_bias=options.boolean("attention_bias"),
        )


def layer(config: Config, window: int) -> PreNormLayer:
    attention = Attention(
        config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim,
        bias=config.attention_bias, window=window,
        q_norm=RMSNorm(config.head_dim, config.rms_norm_eps), k_norm=RMSNorm(config.head_dim, config.rms_norm_eps),
    )  # fmt: skip
    return PreNormLayer(
        RMSNorm(config.hidden_size, config.rms_norm_eps),
        attention,
        RMSNorm(config.hidden_size, config.rms_norm_eps),
        GatedMLP(config.hidden_size, config.intermediate_size, bias=False),
    )


class Model(Decoder):
    def __init__(self, config: Config) -> None:
        layers = [layer(config, window) for window in config.windows]
        super().__init__(config, layers, RMSNorm(config.hidden_size, config.rms_norm_eps))


WEIGHTS = llama.WEIGHTS | {
    "model.layers.{i}.self_attn.{p}_norm.weight": "layers.{i}.attention.{p}_norm.weight",
}

IGNORED_WEIGHTS = ()

PROMISED_PASSES = ("fuse_qkv", "fuse_gate_up", "fuse_rope_kv_write", "fuse_add_norm", "last_token")

TINY = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
