"""Phi-3, 3.5 and 4 (arXiv:2404.14219, 2412.08905): Llama, with LongRoPE (arXiv:2402.13753) and windows."""

from dataclasses import dataclass
from typing import Self

from slipstream.layers import Attention, Decoder, GatedMLP, PreNormLayer, RMSNorm
from slipstream.schema.model import DecoderConfig, Options, read_decoder
from slipstream.schema.weights import Rows


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    intermediate_size: int
    rms_norm_eps: float

    @classmethod
    def from_options(cls, options: Options) -> Self:
        options.choice("hidden_act", ("silu",), "silu")
        options.skip("full_attn_mod", "interpolate_factor")  # of Phi-4-mini; nobody reads them
        decoder = read_decoder(options, max_position_embeddings=4096)
        window = options.optional_integer("sliding_window", None)
        if window is not None and window >= decoder["max_position_embeddings"]:
            window = None  # the 128k models give a window that no sequence outgrows
        return cls(
            **decoder,
            windows=(window or 0,) * decoder["num_layers"],
            intermediate_size=options.integer("intermediate_size"),
            rms_norm_eps=options.real("rms_norm_eps", 1e-5),
        )


def layer(config: Config, window: int) -> PreNormLayer:
    return PreNormLayer(
        RMSNorm(config.hidden_size, config.rms_norm_eps),
        Attention(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, bias=False, window=window
        ),
        RMSNorm(config.hidden_size, config.rms_norm_eps),
        GatedMLP(config.hidden_size, config.intermediate_size, bias=False),
    )


class Model(Decoder):
    def __init__(self, config: Config) -> None:
        layers = [layer(config, window) for window in config.windows]
        super().__init__(config, layers, RMSNorm(config.hidden_size, config.rms_norm_eps))


WEIGHTS = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{i}.input_layernorm.weight": "layers.{i}.input_norm.weight",
    "model.layers.{i}.self_attn.qkv_proj.weight": Rows(
        (
            "layers.{i}.attention.q_proj.weight",
            "layers.{i}.attention.k_proj.weight",
            "layers.{i}.attention.v_proj.weight",
        )
    ),
    "model.layers.{i}.self_attn.o_proj.weight": "layers.{i}.attention.o_proj.weight",
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.post_norm.weight",
    "model.layers.{i}.mlp.gate_up_proj.weight": Rows(
        ("layers.{i}.mlp.gate_proj.weight", "layers.{i}.mlp.up_proj.weight")
    ),
    "model.layers.{i}.mlp.down_proj.weight": "layers.{i}.mlp.down_proj.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}

IGNORED_WEIGHTS = ()

PROMISED_PASSES = ("fuse_qkv", "fuse_gate_up", "fuse_rope_kv_write", "fuse_add_norm", "last_token")

TINY = {
    "model_type": "phi3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
