"""Granite 3 (IBM, 2024): Llama whose embedding, residuals, scores and logits are multiplied by constants."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from slipstream.errors import CorruptFile
from slipstream.layers import Attention, Decoder, GatedMLP, RMSNorm, StepTensors, scale
from slipstream.models import llama
from slipstream.schema.model import Options


@dataclass(frozen=True, kw_only=True)
class Config(llama.Config):
    embedding_multiplier: float
    residual_multiplier: float
    attention_multiplier: float
    logits_scaling: float  # logits are divided by it

    @classmethod
    def from_options(cls, options: Options) -> Self:
        logits_scaling = options.real("logits_scaling", 1.0)
        if not logits_scaling:
            raise CorruptFile("logits_scaling is 0.0; logits are divided by it, so it must be above 0.")
        return cls(
            **vars(llama.Config.from_options(options)),
            embedding_multiplier=options.real("embedding_multiplier", 1.0),
            residual_multiplier=options.real("residual_multiplier", 1.0),
            attention_multiplier=options.real("attention_multiplier", 1.0),
            logits_scaling=logits_scaling,
        )


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim,
            bias=config.attention_bias, scale=config.attention_multiplier,
        )  # fmt: skip
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.multiplier = config.residual_multiplier

    def forward(self, x_TH: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, step: StepTensors) -> Tensor:
        x_TH = x_TH + scale(self.attention(self.input_norm(x_TH), cos, sin, kv, step), self.multiplier)
        return x_TH + scale(self.mlp(self.post_norm(x_TH)), self.multiplier)


class Model(Decoder):
    def __init__(self, config: Config) -> None:
        layers = [Layer(config) for _ in range(config.num_layers)]
        super().__init__(config, layers, RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.embedding_multiplier, self.logits_multiplier = config.embedding_multiplier, 1 / config.logits_scaling

    def forward(self, step: StepTensors, kv: list[Tensor]) -> Tensor:
        x_TH = scale(self.embed(step.token_ids), self.embedding_multiplier)
        return scale(self.lm_head(self.run_layers(x_TH, step, kv)), self.logits_multiplier)


WEIGHTS = llama.WEIGHTS

IGNORED_WEIGHTS = ()

PROMISED_PASSES = ("fuse_qkv", "fuse_gate_up", "fuse_rope_kv_write", "fuse_add_norm", "last_token")

TINY = {
    "model_type": "granite",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0625,
    "logits_scaling": 0.5,
}
