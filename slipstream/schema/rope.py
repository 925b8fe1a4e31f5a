"""RopeConfig: rotary positions and how they are stretched to longer contexts, read from a config.json."""

import math
from dataclasses import dataclass, replace

from slipstream.errors import CorruptFile
from slipstream.schema.options import Options

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su")  # "su" is what Phi-3 first called longrope


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: the base and how it is stretched to longer contexts (layers/rope.py has the formulas)."""

    rotary_dim: int  # numbers of a head that are rotated, the first ones
    theta: float = 10000.0
    kind: str = "default"  # default, linear, dynamic, llama3, yarn, longrope
    factor: float = 1.0  # new context length / old one
    original_max_position_embeddings: int = 8192  # the old one: dynamic, llama3, yarn, longrope
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn: waves that turn more often than this in the old context are kept
    beta_slow: float = 1.0  # yarn: those that turn less often are stretched by the whole factor
    truncate: bool = True  # yarn: the border between them falls on whole frequencies
    short_factors: tuple[float, ...] = ()  # longrope: each frequency's own divisor, in the old context
    long_factors: tuple[float, ...] = ()  # longrope: and beyond it
    attention_factor: float = 1.0  # yarn, longrope: cosines and sines are multiplied by it
    mscale_all_dim: float = 0.0  # yarn, in latent attention: scores too, by the square of yarn_magnitude(factor, this)

    @property
    def reach(self) -> float:
        """How many times max_position_embeddings an engine may be built for: some configs give the old length there."""
        return max(1.0, self.factor) if self.kind in ("linear", "dynamic", "yarn") else 1.0


def read_rope(
    options: Options,
    head_dim: int,
    max_position_embeddings: int,
    *,
    theta: float = 10000.0,
    part: float = 1.0,
    section: str = "rope_parameters",
) -> RopeConfig:
    """RoPE from either spelling: rope_theta + rope_scaling, or transformers 5's rope_parameters.

    theta, and part, the fraction of a head that is rotated: where none is given. section: what the second spelling is
    called, in a model with several.
    """
    theta = options.real("rope_theta", theta)
    part = options.real("partial_rotary_factor", part)
    original = options.integer("original_max_position_embeddings", 0, low=0)
    divisors = options.reals("rope_freq_factors")  # of a GGUF, whose writer worked the scaling out
    parameters, scaling = options.section(section), options.section("rope_scaling")
    chosen = scaling or parameters
    if chosen is not None:
        theta = chosen.real("rope_theta", theta)
        part = chosen.real("partial_rotary_factor", part)
        original = original or chosen.integer("original_max_position_embeddings", 0, low=0)
    rope = RopeConfig(
        rotary_dim=int(head_dim * min(part, 1.0)),
        theta=theta,
        original_max_position_embeddings=original or max_position_embeddings,
    )
    if divisors is not None:
        rope = replace(rope, kind="longrope", short_factors=divisors, long_factors=divisors)
    elif chosen is not None:
        rope = _read_scaling(rope, chosen, max_position_embeddings)
    _check(rope)
    return rope


def yarn_magnitude(factor: float, weight: float = 1.0) -> float:
    """What YaRN multiplies attention by: 0.1 · weight · ln(factor) + 1 (arXiv:2309.00071, equation 22)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _read_scaling(rope: RopeConfig, options: Options, max_position_embeddings: int) -> RopeConfig:
    kind = options.choice("rope_type", KINDS, options.choice("type", KINDS, "default"))
    if kind == "su":
        kind = "longrope"
    rope = replace(rope, kind=kind)
    if kind in ("linear", "dynamic", "llama3"):
        rope = replace(rope, factor=options.real("factor"))
    if kind == "dynamic":
        rope = replace(rope, original_max_position_embeddings=max_position_embeddings)
    elif kind == "llama3":
        low, high = options.real("low_freq_factor"), options.real("high_freq_factor")
        rope = replace(rope, low_freq_factor=low, high_freq_factor=high)
    elif kind in ("yarn", "longrope"):
        stretched = max_position_embeddings / rope.original_max_position_embeddings
        rope = replace(rope, factor=options.real("factor", stretched))
        rope = _read_yarn(rope, options) if kind == "yarn" else _read_longrope(rope, options)
    options.finish(f"{kind} RoPE scaling")
    return rope


def _read_yarn(rope: RopeConfig, options: Options) -> RopeConfig:
    over, under = options.real("mscale", 0.0), options.real("mscale_all_dim", 0.0)
    magnitude = yarn_magnitude(rope.factor)
    if over and under:  # DeepSeek
        magnitude = yarn_magnitude(rope.factor, over) / yarn_magnitude(rope.factor, under)
    return replace(
        rope,
        beta_fast=options.real("beta_fast", 32.0) or 32.0,
        beta_slow=options.real("beta_slow", 1.0) or 1.0,
        truncate=options.boolean("truncate", True),
        attention_factor=options.real("attention_factor", magnitude),
        mscale_all_dim=under,
    )


def _read_longrope(rope: RopeConfig, options: Options) -> RopeConfig:
    original = rope.original_max_position_embeddings
    magnitude = math.sqrt(1 + math.log(rope.factor) / math.log(original)) if rope.factor > 1 and original > 1 else 1.0
    return replace(
        rope,
        short_factors=options.reals("short_factor") or (),
        long_factors=options.reals("long_factor") or (),
        attention_factor=options.real("attention_factor", magnitude),
    )


def _check(rope: RopeConfig) -> None:
    for name in ("theta", "factor"):
        if not getattr(rope, name):
            raise CorruptFile(f"{name} of RoPE is {getattr(rope, name)}; it must be above 0.")
    if rope.rotary_dim < 2 or rope.rotary_dim % 2:
        raise CorruptFile(f"RoPE rotates {rope.rotary_dim} numbers a head; it must be an even number above 0.")
    if rope.kind == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        raise CorruptFile(
            f"low_freq_factor of RoPE is {rope.low_freq_factor}; it must be below high_freq_factor, "
            f"{rope.high_freq_factor}."
        )
    if rope.kind == "dynamic" and rope.rotary_dim == 2:
        raise CorruptFile("dynamic RoPE scaling rotates 2 numbers a head; it must be 4 or more.")
    if rope.kind == "yarn" and rope.theta == 1:
        raise CorruptFile("theta of RoPE is 1.0; YaRN needs another.")
    if rope.kind == "longrope":
        for name, factors in (("short", rope.short_factors), ("long", rope.long_factors)):
            if len(factors) != rope.rotary_dim // 2:
                raise CorruptFile(
                    f"RoPE has {len(factors)} {name} factors; rotating {rope.rotary_dim} numbers a head takes "
                    f"{rope.rotary_dim // 2}."
                )
