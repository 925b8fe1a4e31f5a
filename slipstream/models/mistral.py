"""Mistral 7B (arXiv:2310.06825) and its successors: Llama, with a window in every layer of the first version."""

from dataclasses import dataclass
from typing import Self

from slipstream.layers import Attention, Decoder, GatedMLP, PreNormLayer, RMSNorm
from slipstream.models import llama
from slipstream.schema.model import DecoderConfig, Options, read_decoder


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    intermediate_size: int
    rms_norm_eps: float

    @classmethod
    def from_options(cls, options: Options) -> Self:
        options.choice("hidden_act", ("silu",), "silu")
        decoder = read_decoder(options, max_position_embeddings=131072, num_kv_heads=8)
        window = options.optional_integer("sliding_window", 4096)
        return cls(
            **decoder,
            windows=(window or 0,) * decoder["num_layers"],
            intermediate_size=options.integer("intermediate_size"),
            rms_norm_eps=options.real("rms_norm_eps", 1e-6),
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


WEIGHTS = llama.WEIGHTS

IGNORED_WEIGHTS = ()

PROMISED_PASSES = ("fuse_qkv", "fuse_gate_up", "fuse_rope_kv_write", "fuse_add_norm", "last_token")

TINY = {
    "model_type": "mistral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "sliding_window": 12,
}
