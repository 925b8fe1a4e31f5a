"""The shape of a decoder, read once from a Hugging Face config.json; an option nobody understands is refused."""

from dataclasses import dataclass
from typing import Any, TypeVar

from slipstream.errors import CorruptFile, UnsupportedModel

Number = TypeVar("Number", int, float)

# Options that say nothing about the numbers a decoder computes.
_SILENT_OPTIONS = frozenset(
    """
    architectures attention_dropout auto_map bos_token_id cache_implementation dtype eos_token_id initializer_range
    is_llama_config max_length model_type pad_token_id pretraining_tp torch_dtype transformers.js_config
    transformers_version unk_token_id use_cache _name_or_path _attn_implementation
    """.split()  # noqa: SIM905 - a table of words
)


MAX_LAYERS = 1024  # a config.json that asks for more is not a model; each layer costs time before any weight is read
MAX_HEAD_DIM = 8192  # the rotary table, half as long, is made before any weight is read


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: the base and how it is stretched to longer contexts."""

    theta: float = 10000.0
    kind: str = "default"  # default, linear, llama3, factors
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position_embeddings: int = 8192  # llama3
    factors: tuple[float, ...] = ()  # factors: each frequency's own divisor (GGUF's rope_freqs)


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
    kv_planes: int = 2  # keys and values; 1 where a value is the start of its key (latent attention)
    windows: tuple[
        int, ...
    ] = ()  # of each layer: how many tokens a token sees, itself included, 0 for all; () for none

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CorruptFile(f"num_key_value_heads is {self.num_kv_heads}; it must divide {self.num_heads} heads.")
        if self.head_dim % 2:
            raise CorruptFile(f"head_dim is {self.head_dim}; rotary embedding needs an even number.")
        if self.windows and len(self.windows) != self.num_layers:
            raise CorruptFile(f"{len(self.windows)} attention windows are given for {self.num_layers} layers.")


class Options:
    """A config.json being read: every option is taken once, and what nobody took is an error."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self._values = {name: value for name, value in values.items() if name not in _SILENT_OPTIONS}
        self._source = source

    def integer(self, name: str, default: int | None = None, *, low: int = 1, high: int = 2**31) -> int:
        value = self._values.pop(name, None)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise CorruptFile(f"{self._source}: {name} is {value!r}; it must be a whole number from {low} to {high}.")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        value = self._values.pop(name, None)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e30:
            raise CorruptFile(f"{self._source}: {name} is {value!r}; it must be a number that is not negative.")
        return float(value)

    def cap(self, name: str, default: float) -> float:
        """A soft cap: 0 for none, which a config spells null."""
        return self.real(name, default) if self._values.get(name, default) is not None else 0.0

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self._values.pop(name, default)
        if not isinstance(value, bool):
            raise CorruptFile(f"{self._source}: {name} is {value!r}; it must be true or false.")
        return value

    def section(self, name: str) -> "Options | None":
        value = self._values.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise CorruptFile(f"{self._source}: {name} is {value!r}; it must be an object.")
        return Options(value, f"{self._source}: {name}")

    def sections(self) -> "list[Options]":
        """Every option that is left, as an object of its own."""
        return [each for name in list(self._values) if (each := self.section(name)) is not None]

    def value(self, name: str) -> Any:
        """Whatever is there, None where nothing is; the caller checks it."""
        return self._values.pop(name, None)

    def skip(self, *names: str) -> None:
        """Options that are known and change nothing here."""
        for name in names:
            self._values.pop(name, None)

    def choice(self, name: str, known: tuple[Any, ...], default: Any = None) -> Any:
        value = self._values.pop(name, None)
        value = default if value is None else value
        if value not in known:
            listed = ", ".join(map(str, known))
            raise UnsupportedModel(f"{self._source}: {name} is {value!r}; the known values are {listed}.")
        return value

    def reals(self, name: str) -> tuple[float, ...] | None:
        value = self._values.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(x, int | float) and 0 < x < 1e30 for x in value):
            raise CorruptFile(f"{self._source}: {name} must be a list of positive numbers.")
        return tuple(float(x) for x in value)

    def words(self, name: str, known: tuple[str, ...]) -> tuple[str, ...] | None:
        value = self._values.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, list) or not all(word in known for word in value):
            raise CorruptFile(f"{self._source}: {name} must be a list of {', '.join(known)}.")
        return tuple(value)

    def finish(self, known: str) -> None:
        """Refuse what is left. `known` describes the reader, for the message."""
        left = [name for name, value in self._values.items() if value not in (None, False)]
        if left:
            value = self._values[left[0]]
            raise UnsupportedModel(f"{self._source}: {known} does not know the option {left[0]!r} ({value!r}).")


def read_windows(options: Options, num_layers: int, window: int, *, full_every: int) -> tuple[int, ...]:
    """Each layer's attention window, by layer_types; where there are none, each `full_every`th layer sees all."""
    kinds = options.words("layer_types", ("sliding_attention", "full_attention"))
    if kinds is None:
        return tuple(window if (layer + 1) % full_every else 0 for layer in range(num_layers))
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def read_rope(
    options: Options, head_dim: int, *, theta: float = 10000.0, section: str = "rope_parameters"
) -> RopeConfig:
    """RoPE from either spelling: rope_theta + rope_scaling, or transformers 5's rope_parameters.

    theta: where none is given. section: what the second spelling is called, in a model with several.
    """
    rope = _read_rope(options, theta, section)
    for name in ("theta", "factor"):
        if not getattr(rope, name):
            raise CorruptFile(f"{name} of RoPE is {getattr(rope, name)}; it must be above 0.")
    if rope.kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise CorruptFile(
            f"low_freq_factor of RoPE is {rope.low_freq_factor}; it must be below high_freq_factor, "
            f"{rope.high_freq_factor}."
        )
    if rope.kind == "factors" and len(rope.factors) != head_dim // 2:
        raise CorruptFile(
            f"rope_freq_factors has {len(rope.factors)} numbers; a head_dim of {head_dim} takes {head_dim // 2}."
        )
    return rope


def _read_rope(options: Options, theta: float, section: str) -> RopeConfig:
    parameters = options.section(section)
    scaling = options.section("rope_scaling")
    theta = options.real("rope_theta", theta)
    factors = options.reals("rope_freq_factors")
    if parameters is not None:
        theta = parameters.real("rope_theta", theta)
    if factors is not None:
        return RopeConfig(theta=theta, kind="factors", factors=factors)
    chosen = scaling or parameters
    if chosen is None:
        return RopeConfig(theta=theta)
    legacy_kind = chosen.choice("type", ("default", "linear", "llama3"), "default")
    kind = chosen.choice("rope_type", ("default", "linear", "llama3"), legacy_kind)
    rope = RopeConfig(theta=theta)
    if kind == "linear":
        rope = RopeConfig(theta=theta, kind=kind, factor=chosen.real("factor"))
    elif kind == "llama3":
        rope = RopeConfig(
            theta=theta,
            kind=kind,
            factor=chosen.real("factor"),
            low_freq_factor=chosen.real("low_freq_factor"),
            high_freq_factor=chosen.real("high_freq_factor"),
            original_max_position_embeddings=chosen.integer("original_max_position_embeddings"),
        )
    chosen.finish(f"{kind} RoPE scaling")
    return rope
