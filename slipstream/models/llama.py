"""Llama 1 to 3.3 (arXiv:2302.13971, 2307.09288, 2407.21783) and models of its shape: SmolLM2, Vicuna, TinyLlama."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from slipstream.layers import Attention, Embedding, GatedMLP, Linear, RMSNorm, RotaryTable, StepTensors
from slipstream.schema.model import MAX_HEAD_DIM, MAX_LAYERS, DecoderConfig, Options, RopeConfig, read_rope


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def from_options(cls, options: Options) -> Self:
        hidden_size = options.integer("hidden_size")
        num_heads = options.integer("num_attention_heads")
        head_dim = options.integer("head_dim", hidden_size // num_heads, high=MAX_HEAD_DIM)
        options.choice("hidden_act", ("silu",), "silu")
        return cls(
            vocab_size=options.integer("vocab_size"),
            hidden_size=hidden_size,
            num_layers=options.integer("num_hidden_layers", high=MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=options.integer("num_key_value_heads", num_heads),
            head_dim=head_dim,
            max_position_embeddings=options.integer("max_position_embeddings", 2048),
            intermediate_size=options.integer("intermediate_size"),
            rms_norm_eps=options.real("rms_norm_eps", 1e-6),
            rope=read_rope(options, head_dim),
            tie_word_embeddings=options.boolean("tie_word_embeddings"),
            attention_bias=options.boolean("attention_bias"),
            mlp_bias=options.boolean("mlp_bias"),
        )


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, bias=config.attention_bias
        )
        self.post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def forward(self, x_TH: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, step: StepTensors) -> Tensor:
        x_TH = x_TH + self.attention(self.input_norm(x_TH), cos, sin, kv, step)
        return x_TH + self.mlp(self.post_norm(x_TH))


class Model(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.rotary = RotaryTable(config.rope, config.head_dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed.weight

    def forward(self, step: StepTensors, kv: list[Tensor]) -> Tensor:
        """Logits [T, vocab_size] of every token in the step."""
        x_TH = self.embed(step.token_ids)
        cos, sin = self.rotary(step.positions)
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x_TH = layer(x_TH, cos, sin, layer_kv, step)
        return self.lm_head(self.norm(x_TH))


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
