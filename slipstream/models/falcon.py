"""Falcon (arXiv:2311.16867): attention and MLP side by side; one KV head (7B), groups (40B, 180B), or ALiBi (RW)."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from slipstream.layers import ACTIVATIONS, MLP, Attention, Decoder, LayerNorm, StepTensors, alibi_slopes
from slipstream.schema.model import MAX_LAYERS, DecoderConfig, Options, read_rope
from slipstream.schema.weights import Rows


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    intermediate_size: int
    activation: str
    layer_norm_eps: float
    layer_kind: str  # a key of LAYERS
    bias: bool

    @classmethod
    def from_options(cls, options: Options) -> Self:
        hidden_size = options.integer("hidden_size", 4544)
        num_heads = options.integer("num_attention_heads", 71)
        num_kv_heads = options.integer("num_kv_heads", num_heads)
        is_multi_query = options.boolean("multi_query", True)
        is_parallel = options.boolean("parallel_attn", True)
        num_norms = options.integer("num_ln_in_parallel_attn", 2, high=2)
        if not options.boolean("new_decoder_architecture"):
            num_kv_heads = 1 if is_multi_query else num_heads
            layer_kind = "one_norm" if is_parallel else "sequential"
        else:
            layer_kind = "one_norm" if num_norms == 1 else "two_norms"
        longest = options.integer("max_position_embeddings", 2048)
        rope = read_rope(options, hidden_size // num_heads, longest)
        options.skip("hidden_dropout")
        return cls(
            vocab_size=options.integer("vocab_size", 65024),
            hidden_size=hidden_size,
            num_layers=options.integer("num_hidden_layers", 32, high=MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=hidden_size // num_heads,
            max_position_embeddings=longest,
            intermediate_size=options.integer("ffn_hidden_size", 4 * hidden_size),
            activation=options.choice("activation", tuple(ACTIVATIONS), "gelu"),
            layer_norm_eps=options.real("layer_norm_epsilon", 1e-5),
            rope=None if options.boolean("alibi") else rope,
            layer_kind=layer_kind,
            bias=options.boolean("bias"),
            tie_word_embeddings=options.boolean("tie_word_embeddings", True),
        )


class Layer(nn.Module):
    """Falcon 7B: attention and MLP read the same norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, bias=config.bias,
            alibi_slopes=None if config.rope else _slopes(config),
        )  # fmt: skip
        self.mlp = MLP(
            config.hidden_size, config.intermediate_size, bias=config.bias, activation=ACTIVATIONS[config.activation]
        )

    def forward(self, x_TH: Tensor, cos: Tensor | None, sin: Tensor | None, kv: Tensor, step: StepTensors) -> Tensor:
        normed_TH = self.input_norm(x_TH)
        return x_TH + (self.attention(normed_TH, cos, sin, kv, step) + self.mlp(normed_TH))


class TwoNormsLayer(Layer):
    """Falcon 40B and 180B: each reads a norm of its own."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        del self.input_norm
        self.attention_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x_TH: Tensor, cos: Tensor | None, sin: Tensor | None, kv: Tensor, step: StepTensors) -> Tensor:
        mlp_TH = self.mlp(self.mlp_norm(x_TH))
        return x_TH + (self.attention(self.attention_norm(x_TH), cos, sin, kv, step) + mlp_TH)


class SequentialLayer(Layer):
    """Falcon RW: the MLP reads what attention made of x."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.post_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x_TH: Tensor, cos: Tensor | None, sin: Tensor | None, kv: Tensor, step: StepTensors) -> Tensor:
        x_TH = x_TH + self.attention(self.input_norm(x_TH), cos, sin, kv, step)
        return x_TH + self.mlp(self.post_norm(x_TH))


LAYERS = {"one_norm": Layer, "two_norms": TwoNormsLayer, "sequential": SequentialLayer}


class Model(Decoder):
    def __init__(self, config: Config) -> None:
        layers = [LAYERS[config.layer_kind](config) for _ in range(config.num_layers)]
        super().__init__(config, layers, LayerNorm(config.hidden_size, config.layer_norm_eps))


def _slopes(config: Config) -> Tensor:
    """As in Falcon's own code: slopes rounded to bfloat16, and scores scaled after the slope was added to them."""
    return alibi_slopes(config.num_heads).to(torch.bfloat16).float() * config.head_dim**-0.5


_QKV = tuple(f"layers.{{i}}.attention.{p}_proj" for p in "qkv")

WEIGHTS = {
    "transformer.word_embeddings.weight": "embed.weight",
    "transformer.h.{i}.input_layernorm.{p}": "layers.{i}.input_norm.{p}",
    "transformer.h.{i}.post_attention_layernorm.{p}": "layers.{i}.post_norm.{p}",
    "transformer.h.{i}.ln_attn.{p}": "layers.{i}.attention_norm.{p}",
    "transformer.h.{i}.ln_mlp.{p}": "layers.{i}.mlp_norm.{p}",
    "transformer.h.{i}.self_attention.query_key_value.weight": Rows(
        tuple(f"{name}.weight" for name in _QKV), groups="num_kv_heads"
    ),
    "transformer.h.{i}.self_attention.query_key_value.bias": Rows(
        tuple(f"{name}.bias" for name in _QKV), groups="num_kv_heads"
    ),
    "transformer.h.{i}.self_attention.dense.{p}": "layers.{i}.attention.o_proj.{p}",
    "transformer.h.{i}.mlp.dense_h_to_4h.{p}": "layers.{i}.mlp.up_proj.{p}",
    "transformer.h.{i}.mlp.dense_4h_to_h.{p}": "layers.{i}.mlp.down_proj.{p}",
    "transformer.ln_f.{p}": "norm.{p}",
    "lm_head.weight": "lm_head.weight",
}

IGNORED_WEIGHTS = ("transformer.h.{i}.self_attention.rotary_emb.inv_freq",)

PROMISED_PASSES = ("fuse_qkv", "fuse_add_norm", "last_token")

TINY = {
    "model_type": "falcon",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
