"""gpt-oss (arXiv:2508.10925): attention sinks, every other layer with a window, experts of a clamped SwiGLU, YaRN."""

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
from slipstream.schema.model import DecoderConfig, Options, read_decoder, read_windows
from slipstream.schema.weights import Rows

# Of a config that says nothing about RoPE.
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    intermediate_size: int
    num_experts: int
    top_k: int
    swiglu_alpha: float
    swiglu_limit: float
    rms_norm_eps: float
    attention_bias: bool

    @classmethod
    def from_options(cls, options: Options) -> Self:
        options.choice("hidden_act", ("silu",), "silu")
        # experts_per_token, initial_context_length: what num_experts_per_tok and RoPE's scaling say already.
        options.skip("output_router_logits", "router_aux_loss_coef", "experts_per_token", "initial_context_length")
        options.assume("rope_theta", 150000.0)
        options.assume("rope_parameters", YARN)
        decoder = read_decoder(options, max_position_embeddings=131072, num_kv_heads=8, head_dim=64)
        num_experts = options.integer("num_local_experts", 128)
        window = options.optional_integer("sliding_window", 128)
        return cls(
            **decoder,
            windows=read_windows(options, decoder["num_layers"], window, lambda layer: layer % 2 == 0),
            intermediate_size=options.integer("intermediate_size", 2880),
            num_experts=num_experts,
            top_k=options.integer("num_experts_per_tok", 4, high=num_experts),
            swiglu_alpha=options.real("swiglu_alpha", 1.702),
            swiglu_limit=options.real("swiglu_limit", 7.0),
            rms_norm_eps=options.real("rms_norm_eps", 1e-5),
            attention_bias=options.boolean("attention_bias", True),
        )


def layer(config: Config, window: int) -> PreNormLayer:
    return PreNormLayer(
        RMSNorm(config.hidden_size, config.rms_norm_eps),
        Attention(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, bias=config.attention_bias,
            window=window, has_sinks=True,
        ),
        RMSNorm(config.hidden_size, config.rms_norm_eps),
        MixtureOfExperts(
            SoftmaxRouter(config.hidden_size, config.num_experts, config.top_k, is_normalized=True, bias=True),
            Experts(
                config.num_experts, config.hidden_size, config.intermediate_size, bias=True,
                alpha=config.swiglu_alpha, limit=config.swiglu_limit, up_offset=1.0,
            ),
        ),
    )  # fmt: skip


class Model(Decoder):
    def __init__(self, config: Config) -> None:
        layers = [layer(config, window) for window in config.windows]
        super().__init__(config, layers, RMSNorm(config.hidden_size, config.rms_norm_eps))


_EXPERTS = "layers.{i}.mlp.experts"

WEIGHTS = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{i}.input_layernorm.weight": "layers.{i}.input_norm.weight",
    "model.layers.{i}.self_attn.sinks": "layers.{i}.attention.sinks",
    "model.layers.{i}.self_attn.{p}_proj.weight": "layers.{i}.attention.{p}_proj.weight",
    "model.layers.{i}.self_attn.{p}_proj.bias": "layers.{i}.attention.{p}_proj.bias",
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.post_norm.weight",
    "model.layers.{i}.mlp.router.weight": "layers.{i}.mlp.router.weight",
    "model.layers.{i}.mlp.router.bias": "layers.{i}.mlp.router.bias",
    # gate and up in turn
    f"model.{_EXPERTS}.gate_up_proj": Rows(
        (f"{_EXPERTS}.gate_proj.weight", f"{_EXPERTS}.up_proj.weight"),
        groups="intermediate_size",
        is_transposed=True,
        dim=1,
    ),
    f"model.{_EXPERTS}.gate_up_proj_bias": Rows(
        (f"{_EXPERTS}.gate_proj.bias", f"{_EXPERTS}.up_proj.bias"), groups="intermediate_size", dim=1
    ),
    f"model.{_EXPERTS}.down_proj": Rows((f"{_EXPERTS}.down_proj.weight",), is_transposed=True),
    f"model.{_EXPERTS}.down_proj_bias": f"{_EXPERTS}.down_proj.bias",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}

IGNORED_WEIGHTS = ()

PROMISED_PASSES = ("fuse_qkv", "fuse_rope_kv_write", "fuse_add_norm", "last_token")

TINY = {
    "model_type": "gpt_oss",
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 12,
    "swiglu_limit": 1.5,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rope_scaling": YARN | {"factor": 8.0, "original_max_position_embeddings": 32},
}
