"""The rotary table: positions to cosines and sines, once a step for all layers."""

import math

import torch
from torch import Tensor, nn

from slipstream.kernels import rope
from slipstream.schema.model import RopeConfig


class RotaryTable(nn.Module):
    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", inverse_frequencies(config, head_dim), persistent=False)

    def forward(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        return rope.rope_cos_sin(positions_T, self.inv_freq, 1.0)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair of numbers in a head: float32 [head_dim / 2], on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / (config.theta**exponents)
    if config.kind == "linear":
        return frequencies / config.factor
    if config.kind == "llama3":
        return _stretch_long_waves(frequencies, config)
    if config.kind == "factors":
        return frequencies / torch.tensor(config.factors, device="cpu")
    return frequencies


def _stretch_long_waves(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """Llama 3.1: waves longer than the old context are slowed by `factor`, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    old_context = config.original_max_position_embeddings
    low, high = config.low_freq_factor, config.high_freq_factor
    keep = ((old_context / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / config.factor + keep * frequencies
