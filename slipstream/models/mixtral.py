"""Mixtral (arXiv:2401.04088): Mistral with a mixture of experts in place of each feed-forward block."""

from dataclasses import dataclass
from typing import Self

from slipstream.layers import (
    Attention,
    Decoder,
    Experts,
    MixtureOfExperts,
    PreNormLayer,
    RMSNorm,
    SoftmaxRouter,
)
from slipstream.schema.model import DecoderConfig, Options, read_decoder
from slipstream.schema.weights import Stacked


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    intermediate_size: int
    num_experts: int
    top_k: int
    rms_norm_eps: float

    @classmethod
    def from_options(cls, options: Options) -> Self:
        options.choice("hidden_act", ("silu",), "silu")
        options.skip("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")  # training's
        options.assume("rope_theta", 1e6)
        decoder = read_decoder(options, max_position_embeddings=131072)
        num_experts = options.integer("num_local_experts", 8)
        window = options.integer("sliding_window", 0, low=0)
        return cls(
            **decoder,
            windows=(window,) * decoder["num_layers"],
            intermediate_size=options.integer("intermediate_size", 14336),
            num_experts=num_experts,
            top_k=options.integer("num_experts_per_tok", 2, high=num_experts),
            rms_norm_eps=options.real("rms_norm_eps", 1e-5),
        )


def layer(config: Config, window: int) -> PreNormLayer:
    return PreNormLayer(
        RMSNorm(config.hidden_size, config.rms_norm_eps),
        Attention(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, bias=False, window=window
        ),
        RMSNorm(config.hidden_size, config.rms_norm_eps),
        MixtureOfExperts(
            SoftmaxRouter(config.hidden_size, config.num_experts, config.top_k, is_normalized=True),
            Experts(config.num_experts, config.hidden_size, config.intermediate_size),
        ),
    )


class Model(Decoder):
    def __init__(self, config: Config) -> None:
        layers = [layer(config, window) for window in config.windows]
        super().__init__(config, layers, RMSNorm(config.hidden_size, config.rms_norm_eps))


WEIGHTS = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{i}.input_layernorm.weight": "layers.{i}.input_norm.weight",
    "model.layers.{i}.self_attn.{p}_proj.weight": "layers.{i}.attention.{p}_proj.weight",
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.post_norm.weight",
    "model.layers.{i}.block_sparse_moe.gate.weight": "layers.{i}.mlp.router.weight",
    "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight": Stacked("layers.{i}.mlp.experts.gate_proj.weight"),
    "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight": Stacked("layers.{i}.mlp.experts.up_proj.weight"),
    "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight": Stacked("layers.{i}.mlp.experts.down_proj.weight"),
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}

IGNORED_WEIGHTS = ()

PROMISED_PASSES = ("fuse_qkv", "fuse_rope_kv_write", "fuse_add_norm", "last_token")

TINY = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
}
