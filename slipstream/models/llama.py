"""Llama 1 to 3.3 (arXiv:2302.13971, 2307.09288, 2407.21783) and models of its shape: SmolLM2, Vicuna, TinyLlama."""

from dataclasses import dataclass
from typing import Self

from slipstream.layers import Attention, Decoder, GatedMLP, PreNormLayer, RMSNorm
from slipstream.schema.model import DecoderConfig, Options, read_decoder


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    intermediate_size: int
    rms_norm_eps: float
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def from_options(cls, options: Options) -> Self:
        options.choice("hidden_act", ("silu",), "silu")
        return cls(
            **read_decoder(options, max_position_embeddings=2048),
            intermediate_size=options.integer("intermediate_size"),
            rms_norm_eps=options.real("rms_norm_eps", 1e-6),
            attention_bias=options.boolean("attention_bias"),
            mlp_bias=options.boolean("mlp_bias"),
        )


def layer(config: Config) -> PreNormLayer:
    return PreNormLayer(
        RMSNorm(config.hidden_size, config.rms_norm_eps),
        Attention(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, bias=config.attention_bias
        ),
        RMSNorm(config.hidden_size, config.rms_norm_eps),
        GatedMLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias),
    )


class Model(Decoder):
    def __init__(self, config: Config) -> None:
        layers = [layer(config) for _ in range(config.num_layers)]
        super().__init__(config, layers, RMSNorm(config.hidden_size, config.rms_norm_eps))


WEIGHTS = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{i}.input_layernorm.weight": "layers.{i}.input_norm.weight",
    "model.layers.{i}.self_attn.{p}_proj.weight": "layers.{i}.attention.{p}_proj.weight",
    "model.layers.{i}.self_attn.{p}_proj.bias": "layers.{i}.attention.{p}_proj.bias",
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.post_norm.weight",
    "model.layers.{i}.mlp.{p}_proj.weight": "layers.{i}.mlp.{p}_proj.weight",
    "model.layers.{i}.mlp.{p}_proj.bias": "layers.{i}.mlp.{p}_proj.bias",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}

IGNORED_WEIGHTS = ("model.layers.{i}.self_attn.rotary_emb.inv_freq",)  # old exports carry the table we compute

# Rewrites that must find something in this model; a build where one does not is refused.
PROMISED_PASSES = ("fuse_qkv", "fuse_gate_up", "fuse_rope_kv_write", "fuse_add_norm", "last_token")

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
