"""Gemma 2 (arXiv:2408.00118): soft-capped scores and logits, every other layer with a window, four norms a layer."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from slipstream.layers import ACTIVATIONS, Attention, Decoder, GatedMLP, RMSNorm, StepTensors, scale, soft_cap
from slipstream.schema.model import (
    MAX_HEAD_DIM,
    MAX_LAYERS,
    DecoderConfig,
    Options,
    RopeConfig,
    read_rope,
    read_windows,
)


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    intermediate_size: int
    activation: str
    rms_norm_eps: float
    rope: RopeConfig
    attention_bias: bool
    query_pre_attn_scalar: int
    attn_soft_cap: float  # 0 for none
    final_soft_cap: float  # 0 for none

    @classmethod
    def from_options(cls, options: Options) -> Self:
        num_layers = options.integer("num_hidden_layers", high=MAX_LAYERS)
        head_dim = options.integer("head_dim", 256, high=MAX_HEAD_DIM)
        longest = options.integer("max_position_embeddings", 8192)
        options.choice("hidden_act", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")  # hidden_activation is what counts
        return cls(
            vocab_size=options.integer("vocab_size"),
            hidden_size=options.integer("hidden_size"),
            num_layers=num_layers,
            num_heads=options.integer("num_attention_heads"),
            num_kv_heads=options.integer("num_key_value_heads", 4),
            head_dim=head_dim,
            max_position_embeddings=longest,
            windows=read_windows(
                options, num_layers, options.integer("sliding_window", 4096), lambda layer: layer % 2 == 0
            ),
            intermediate_size=options.integer("intermediate_size"),
            activation=options.choice("hidden_activation", tuple(ACTIVATIONS), "gelu_pytorch_tanh"),
            rms_norm_eps=options.real("rms_norm_eps", 1e-6),
            rope=read_rope(options, head_dim, longest),
            tie_word_embeddings=options.boolean("tie_word_embeddings", True),
            attention_bias=options.boolean("attention_bias"),
            query_pre_attn_scalar=options.integer("query_pre_attn_scalar", 256),
            attn_soft_cap=options.cap("attn_logit_softcapping", 50.0),
            final_soft_cap=options.cap("final_logit_softcapping", 30.0),
        )


class Layer(nn.Module):
    def __init__(self, config: Config, window: int) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, weight_offset=1.0)
        self.attention = Attention(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, bias=config.attention_bias,
            scale=config.query_pre_attn_scalar**-0.5, window=window, soft_cap=config.attn_soft_cap,
        )  # fmt: skip
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, weight_offset=1.0)
        self.pre_mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, weight_offset=1.0)
        self.mlp = GatedMLP(
            config.hidden_size, config.intermediate_size, bias=False, activation=ACTIVATIONS[config.activation]
        )
        self.post_mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, weight_offset=1.0)

    def forward(self, x_TH: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, step: StepTensors) -> Tensor:
        x_TH = x_TH + self.post_attention_norm(self.attention(self.input_norm(x_TH), cos, sin, kv, step))
        return x_TH + self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x_TH)))


class Model(Decoder):
    def __init__(self, config: Config) -> None:
        layers = [Layer(config, window) for window in config.windows]
        super().__init__(config, layers, RMSNorm(config.hidden_size, config.rms_norm_eps, weight_offset=1.0))
        self.embed_scale, self.final_soft_cap = config.hidden_size**0.5, config.final_soft_cap

    def forward(self, step: StepTensors, kv: list[Tensor]) -> Tensor:
        x_TH = scale(self.embed(step.token_ids), self.embed_scale)
        logits_TV = self.lm_head(self.run_layers(x_TH, step, kv))
        return soft_cap(logits_TV, self.final_soft_cap) if self.final_soft_cap else logits_TV


WEIGHTS = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{i}.input_layernorm.weight": "layers.{i}.input_norm.weight",
    "model.layers.{i}.self_attn.{p}_proj.weight": "layers.{i}.attention.{p}_proj.weight",
    "model.layers.{i}.self_attn.{p}_proj.bias": "layers.{i}.attention.{p}_proj.bias",
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.post_attention_norm.weight",
    "model.layers.{i}.pre_feedforward_layernorm.weight": "layers.{i}.pre_mlp_norm.weight",
    "model.layers.{i}.mlp.{p}_proj.weight": "layers.{i}.mlp.{p}_proj.weight",
    "model.layers.{i}.post_feedforward_layernorm.weight": "layers.{i}.post_mlp_norm.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}

IGNORED_WEIGHTS = ()

PROMISED_PASSES = ("fuse_qkv", "fuse_gate_up", "fuse_rope_kv_write", "fuse_add_norm", "last_token")

TINY = {
    "model_type": "gemma2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "query_pre_attn_scalar": 24,
    "sliding_window": 12,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "pad_token_id": 0,
}
