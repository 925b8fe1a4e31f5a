"""Qwen3-MoE (arXiv:2505.09388): Qwen3 with a mixture of experts, in all of its layers or some."""

from dataclasses import dataclass
from typing import Self

from torch import nn

from slipstream.layers import (
    Attention,
    Decoder,
    Experts,
    GatedMLP,
    MixtureOfExperts,
    PreNormLayer,
    RMSNorm,
    SoftmaxRouter,
)
from slipstream.schema.model import DecoderConfig, Options, read_decoder
from slipstream.schema.weights import Stacked


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    intermediate_size: int  # of a layer without experts
    moe_intermediate_size: int  # of an expert
    num_experts: int
    top_k: int
    norm_topk_prob: bool
    is_sparse: tuple[bool, ...]  # of each layer: it has experts
    rms_norm_eps: float
    attention_bias: bool

    @classmethod
    def from_options(cls, options: Options) -> Self:
        options.choice("hidden_act", ("silu",), "silu")
        options.skip("output_router_logits", "router_aux_loss_coef", "max_window_layers")
        options.rename("num_local_experts", "num_experts")  # as transformers 5 saves it
        decoder = read_decoder(options, max_position_embeddings=32768, num_kv_heads=4)
        num_layers, num_experts = decoder["num_layers"], options.integer("num_experts", 128)
        window = options.optional_integer("sliding_window", 4096) or 0
        dense, step = options.integers("mlp_only_layers"), options.integer("decoder_sparse_step", 1)
        return cls(
            **decoder,
            windows=((window if options.boolean("use_sliding_window") else 0),) * num_layers,
            intermediate_size=options.integer("intermediate_size", 6144),
            moe_intermediate_size=options.integer("moe_intermediate_size", 768),
            num_experts=num_experts,
            top_k=options.integer("num_experts_per_tok", 8, high=num_experts),
            norm_topk_prob=options.boolean("norm_topk_prob"),
            is_sparse=tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)),
            rms_norm_eps=options.real("rms_norm_eps", 1e-6),
            attention_bias=options.boolean("attention_bias"),
        )


def feed_forward(config: Config, is_sparse: bool) -> nn.Module:
    if not is_sparse:
        return GatedMLP(config.hidden_size, config.intermediate_size, bias=False)
    return MixtureOfExperts(
        SoftmaxRouter(config.hidden_size, config.num_experts, config.top_k, is_normalized=config.norm_topk_prob),
        Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size),
    )


def layer(config: Config, window: int, is_sparse: bool) -> PreNormLayer:
    return PreNormLayer(
        RMSNorm(config.hidden_size, config.rms_norm_eps),
        Attention(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, bias=config.attention_bias,
            window=window, q_norm=RMSNorm(config.head_dim, config.rms_norm_eps),
            k_norm=RMSNorm(config.head_dim, config.rms_norm_eps),
        ),
        RMSNorm(config.hidden_size, config.rms_norm_eps),
        feed_forward(config, is_sparse),
    )  # fmt: skip


class Model(Decoder):
    def __init__(self, config: Config) -> None:
        layers = [layer(config, *each) for each in zip(config.windows, config.is_sparse, strict=True)]
        super().__init__(config, layers, RMSNorm(config.hidden_size, config.rms_norm_eps))


WEIGHTS = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{i}.input_layernorm.weight": "layers.{i}.input_norm.weight",
    "model.layers.{i}.self_attn.{p}_proj.weight": "layers.{i}.attention.{p}_proj.weight",
    "model.layers.{i}.self_attn.{p}_proj.bias": "layers.{i}.attention.{p}_proj.bias",
    "model.layers.{i}.self_attn.{p}_norm.weight": "layers.{i}.attention.{p}_norm.weight",
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.post_norm.weight",
    "model.layers.{i}.mlp.gate.weight": "layers.{i}.mlp.router.weight",
    "model.layers.{i}.mlp.experts.{e}.{p}_proj.weight": Stacked("layers.{i}.mlp.experts.{p}_proj.weight"),
    "model.layers.{i}.mlp.{p}_proj.weight": "layers.{i}.mlp.{p}_proj.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}

IGNORED_WEIGHTS = ()

PROMISED_PASSES = ("fuse_qkv", "fuse_rope_kv_write", "fuse_add_norm", "last_token")

TINY = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
}
