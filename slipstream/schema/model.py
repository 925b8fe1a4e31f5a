"""The shape of a decoder, read once from a Hugging Face config.json; an option nobody understands is refused."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slipstream.errors import CorruptFile
from slipstream.schema.options import Options
from slipstream.schema.rope import RopeConfig, read_rope

MAX_LAYERS = 1024  # a config.json that asks for more is not a model; each layer costs time before any weight is read
MAX_HEAD_DIM = 8192  # the rotary table, half as long, is made before any weight is read
MAX_SEQ_LEN = 2**31

__all__ = [
    "MAX_HEAD_DIM",
    "MAX_LAYERS",
    "DecoderConfig",
    "Options",
    "RopeConfig",
    "read_decoder",
    "read_rope",
    "read_windows",
]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What the build and the runtime must know of any decoder; each model file may add to it."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    max_seq_len: int = 0  # prompt + output that an engine is built for; 0 until a build has decided
    kv_planes: int = 2  # keys and values; 1 where a value is the start of its key (latent attention)
    windows: tuple[
        int, ...
    ] = ()  # of each layer: how many tokens a token sees, itself included, 0 for all; () for none
    rope: RopeConfig | None = None  # None where positions are told otherwise
    tie_word_embeddings: bool = False  # the embedding is also lm_head

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CorruptFile(f"num_key_value_heads is {self.num_kv_heads}; it must divide {self.num_heads} heads.")
        if self.head_dim % 2:
            raise CorruptFile(f"head_dim is {self.head_dim}; rotary embedding needs an even number.")
        if self.windows and len(self.windows) != self.num_layers:
            raise CorruptFile(f"{len(self.windows)} attention windows are given for {self.num_layers} layers.")

    @property
    def longest_seq_len(self) -> int:
        """The highest max_seq_len an engine may be built for."""
        reach = self.rope.reach if self.rope else 1.0
        return int(min(self.max_position_embeddings * reach, MAX_SEQ_LEN))


def read_decoder(
    options: Options,
    *,
    max_position_embeddings: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    tie_word_embeddings: bool = False,
) -> dict[str, Any]:
    """The fields of DecoderConfig by the names that most architectures since Llama give them.

    The arguments are an architecture's own defaults; without them there are as many KV heads as heads, which divide
    hidden_size.
    """
    hidden_size = options.integer("hidden_size")
    num_heads = options.integer("num_attention_heads")
    head_dim = options.integer("head_dim", head_dim or hidden_size // num_heads, high=MAX_HEAD_DIM)
    max_position_embeddings = options.integer("max_position_embeddings", max_position_embeddings)
    return {
        "vocab_size": options.integer("vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": options.integer("num_hidden_layers", high=MAX_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": options.optional_integer("num_key_value_heads", num_kv_heads) or num_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_position_embeddings,
        "rope": read_rope(options, head_dim, max_position_embeddings),
        "tie_word_embeddings": options.boolean("tie_word_embeddings", tie_word_embeddings),
    }


def read_windows(
    options: Options, num_layers: int, window: int | None, slides: Callable[[int], bool]
) -> tuple[int, ...]:
    """Each layer's attention window. slides: which layers have one, where the config does not list layer_types."""
    kinds = options.words("layer_types", ("sliding_attention", "full_attention"))
    if kinds is None:
        kinds = tuple("sliding_attention" if slides(layer) else "full_attention" for layer in range(num_layers))
    if window is None and "sliding_attention" in kinds:
        raise CorruptFile("layer_types has sliding_attention, and no sliding_window says how far it sees.")
    return tuple(window or 0 if kind == "sliding_attention" else 0 for kind in kinds)
