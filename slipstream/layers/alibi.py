"""ALiBi (arXiv:2108.12409): scores fall with distance, on a slope of each head's own."""

import math

import torch
from torch import Tensor


def alibi_slopes(num_heads: int) -> Tensor:
    """float32 [num_heads], on the CPU: 2^(-8/n), 2^(-16/n), ... for a power of two n; further heads in between."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = _geometric(power) + _geometric(2 * power)[0::2][: num_heads - power]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")


def _geometric(count: int) -> list[float]:
    return [2 ** (-8 * (head + 1) / count) for head in range(count)]
