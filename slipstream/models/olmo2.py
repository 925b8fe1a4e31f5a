"""OLMo 2 (arXiv:2501.00656): norms behind attention and MLP instead of before, and over whole queries and keys."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from slipstream.layers import Attention, Decoder, GatedMLP, RMSNorm, StepTensors
from slipstream.schema.model import DecoderConfig, Options, read_decoder


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    intermediate_size: int
    rms_norm_eps: float
    attention_bias: bool

    @classmethod
    def from_options(cls, options: Options) -> Self:
        options.choice("hidden_act", ("silu",), "silu")
        return cls(
            **read_decoder(options, max_position_embeddings=2048),
            intermediate_size=options.integer("intermediate_size"),
            rms_norm_eps=options.real("rms_norm_eps", 1e-5),
            attention_bias=options.boolean("attention_bias"),
        )


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = Attention(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, bias=config.attention_bias,
            q_norm=RMSNorm(config.num_heads * config.head_dim, config.rms_norm_eps),
            k_norm=RMSNorm(config.num_kv_heads * config.head_dim, config.rms_norm_eps),
        )  # fmt: skip
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_TH: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, step: StepTensors) -> Tensor:
        x_TH = x_TH + self.attention_norm(self.attention(x_TH, cos, sin, kv, step))
        return x_TH + self.mlp_norm(self.mlp(x_TH))


class Model(Decoder):
    def __init__(self, config: Config) -> None:
        layers = [Layer(config) for _ in range(config.num_layers)]
        super().__init__(config, layers, RMSNorm(config.hidden_size, config.rms_norm_eps))


WEIGHTS = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{i}.self_attn.{p}_proj.weight": "layers.{i}.attention.{p}_proj.weight",
    "model.layers.{i}.self_attn.{p}_proj.bias": "layers.{i}.attention.{p}_proj.bias",
    "model.layers.{i}.self_attn.{p}_norm.weight": "layers.{i}.attention.{p}_norm.weight",
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.attention_norm.weight",
    "model.layers.{i}.mlp.{p}_proj.weight": "layers.{i}.mlp.{p}_proj.weight",
    "model.layers.{i}.post_feedforward_layernorm.weight": "layers.{i}.mlp_norm.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}

IGNORED_WEIGHTS = ()

PROMISED_PASSES = ("fuse_qkv", "fuse_gate_up", "fuse_rope_kv_write", "fuse_add_norm", "last_token")

TINY = {
    "model_type": "olmo2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
