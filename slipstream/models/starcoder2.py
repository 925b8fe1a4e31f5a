"""StarCoder 2 (arXiv:2402.19173): LayerNorm and a plain MLP, biases everywhere, grouped queries and a window."""

from dataclasses import dataclass
from typing import Self

from slipstream.layers import ACTIVATIONS, MLP, Attention, Decoder, LayerNorm, PreNormLayer
from slipstream.schema.model import DecoderConfig, Options, read_decoder


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    intermediate_size: int
    activation: str
    norm_epsilon: float
    use_bias: bool

    @classmethod
    def from_options(cls, options: Options) -> Self:
        options.choice("mlp_type", ("default",), "default")
        options.choice("norm_type", ("layer_norm",), "layer_norm")
        # Of the first published files; transformers reads none of them.
        options.skip(
            "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "scale_attn_weights", "layer_norm_epsilon"
        )
        decoder = read_decoder(options, max_position_embeddings=4096, num_kv_heads=2, tie_word_embeddings=True)
        window = options.optional_integer("sliding_window", None)
        return cls(
            **decoder,
            windows=(window or 0,) * decoder["num_layers"],
            intermediate_size=options.integer("intermediate_size"),
            activation=options.choice("hidden_act", tuple(ACTIVATIONS), "gelu_pytorch_tanh"),
            norm_epsilon=options.real("norm_epsilon", 1e-5),
            use_bias=options.boolean("use_bias", True),
        )


def layer(config: Config, window: int) -> PreNormLayer:
    attention = Attention(
        config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, bias=config.use_bias, window=window
    )
    activation = ACTIVATIONS[config.activation]
    return PreNormLayer(
        LayerNorm(config.hidden_size, config.norm_epsilon),
        attention,
        LayerNorm(config.hidden_size, config.norm_epsilon),
        MLP(config.hidden_size, config.intermediate_size, bias=config.use_bias, activation=activation),
    )


class Model(Decoder):
    def __init__(self, config: Config) -> None:
        layers = [layer(config, window) for window in config.windows]
        super().__init__(config, layers, LayerNorm(config.hidden_size, config.norm_epsilon))


WEIGHTS = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{i}.input_layernorm.{p}": "layers.{i}.input_norm.{p}",
    "model.layers.{i}.self_attn.q_proj.{p}": "layers.{i}.attention.q_proj.{p}",
    "model.layers.{i}.self_attn.k_proj.{p}": "layers.{i}.attention.k_proj.{p}",
    "model.layers.{i}.self_attn.v_proj.{p}": "layers.{i}.attention.v_proj.{p}",
    "model.layers.{i}.self_attn.o_proj.{p}": "layers.{i}.attention.o_proj.{p}",
    "model.layers.{i}.post_attention_layernorm.{p}": "layers.{i}.post_norm.{p}",
    "model.layers.{i}.mlp.c_fc.{p}": "layers.{i}.mlp.up_proj.{p}",
    "model.layers.{i}.mlp.c_proj.{p}": "layers.{i}.mlp.down_proj.{p}",
    "model.norm.{p}": "norm.{p}",
    "lm_head.weight": "lm_head.weight",
}

IGNORED_WEIGHTS = ()

PROMISED_PASSES = ("fuse_qkv", "fuse_rope_kv_write", "fuse_add_norm", "last_token")

TINY = {
    "model_type": "starcoder2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "sliding_window": 12,
}
