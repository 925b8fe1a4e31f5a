"""Qwen 2 and 2.5 (arXiv:2407.10671, 2412.15115): Llama with biases on query, key and value."""

from dataclasses import dataclass
from typing import Self

from slipstream.layers import Attention, Decoder, GatedMLP, PreNormLayer, RMSNorm
from slipstream.models import llama
from slipstream.schema.model import DecoderConfig, Options, read_decoder, read_windows


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    intermediate_size: int
    rms_norm_eps: float

    @classmethod
    def from_options(cls, options: Options) -> Self:
        options.choice("hidden_act", ("silu",), "silu")
        decoder = read_decoder(options, max_position_embeddings=32768, num_kv_heads=32)
        return cls(
            **decoder,
            windows=read_upper_windows(options, decoder["num_layers"]),
            intermediate_size=options.integer("intermediate_size"),
            rms_norm_eps=options.real("rms_norm_eps", 1e-6),
        )


def read_upper_windows(options: Options, num_layers: int) -> tuple[int, ...]:
    """Qwen's: windows are switched on by a flag, and the layers from max_window_layers on have one."""
    window = options.optional_integer("sliding_window", 4096)
    first = options.integer("max_window_layers", 28, low=0)
    if not options.boolean("use_sliding_window"):
        window = None
    return read_windows(options, num_layers, window, lambda layer: window is not None and layer >= first)


def layer(config: Config, window: int) -> PreNormLayer:
    attention = Attention(
        config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim,
        bias=True, out_bias=False, window=window,
    )  # fmt: skip
    return PreNormLayer(
        RMSNorm(config.hidden_size, config.rms_norm_eps),
        attention,
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
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
