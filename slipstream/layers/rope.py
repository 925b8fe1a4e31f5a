"""The rotary table: positions to cosines and sines, once a step for all layers."""

import math

import torch
from torch import Tensor, nn

from slipstream.kernels import rope
from slipstream.schema.model import RopeConfig


class RotaryTable(nn.Module):
    """max_seq_len: what the engine is built for. It decides where transformers looks at each sequence's length so far
    (dynamic, longrope): a token's keys are then the same however its sequence is cut and however long it gets."""

    def __init__(self, config: RopeConfig, max_seq_len: int) -> None:
        super().__init__()
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", inverse_frequencies(config, max_seq_len), persistent=False)
        self.attention_factor = config.attention_factor

    def forward(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        return rope.rope_cos_sin(positions_T, self.inv_freq, self.attention_factor)


def inverse_frequencies(config: RopeConfig, max_seq_len: int) -> Tensor:
    """Radians per position of each rotated pair of numbers in a head: float32 [rotary_dim / 2], on the CPU."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device="cpu") / config.rotary_dim
    base = _dynamic_base(config, max_seq_len) if config.kind == "dynamic" else config.theta
    frequencies = 1.0 / (base**exponents)
    if config.kind == "linear":
        return frequencies / config.factor
    if config.kind == "llama3":
        return _stretch_long_waves(frequencies, config)
    if config.kind == "yarn":
        return _stretch_slow_turns(frequencies, config)
    if config.kind == "longrope":
        is_long = max_seq_len > config.original_max_position_embeddings
        return frequencies / torch.tensor(config.long_factors if is_long else config.short_factors, device="cpu")
    return frequencies


def _dynamic_base(config: RopeConfig, max_seq_len: int) -> float:
    """NTK-aware scaling as transformers does it: a base that grows with the length beyond the old context."""
    stretch = max(1.0, max_seq_len / config.original_max_position_embeddings)
    exponent = config.rotary_dim / (config.rotary_dim - 2)
    return config.theta * (config.factor * stretch - (config.factor - 1)) ** exponent


def _stretch_long_waves(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """Llama 3.1: waves longer than the old context are slowed by `factor`, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    old_context = config.original_max_position_embeddings
    low, high = config.low_freq_factor, config.high_freq_factor
    keep = ((old_context / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / config.factor + keep * frequencies


def _stretch_slow_turns(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """YaRN (arXiv:2309.00071): what turns beta_fast times in the old context or more is kept, what turns beta_slow
    times or less is slowed by `factor`, those between are blended by their place in the list."""

    def place(num_turns: float) -> float:
        waves = math.log(config.original_max_position_embeddings / (num_turns * 2 * math.pi))
        return config.rotary_dim * waves / (2 * math.log(config.theta))

    first, last = place(config.beta_fast), place(config.beta_slow)
    if config.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.rotary_dim - 1)
    if first == last:
        last += 0.001
    stretch = ((torch.arange(len(frequencies), device="cpu") - first) / (last - first)).clamp(0, 1)
    return stretch * frequencies / config.factor + (1 - stretch) * frequencies
