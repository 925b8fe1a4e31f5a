"""Normalisation of each token's vector."""

import torch
from torch import Tensor, nn

from slipstream.kernels import norm


class RMSNorm(nn.Module):
    """weight_offset: what stored weights are the distance from (Gemma: 1)."""

    def __init__(self, size: int, eps: float, *, weight_offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.weight_offset = eps, weight_offset

    def forward(self, x_TH: Tensor) -> Tensor:
        return norm.rms_norm(x_TH, self.weight, self.eps, self.weight_offset)


class LayerNorm(nn.Module):
    def __init__(self, size: int, eps: float, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if bias else None
        self.eps = eps

    def forward(self, x_TH: Tensor) -> Tensor:
        return norm.layer_norm(x_TH, self.weight, self.bias, self.eps)
