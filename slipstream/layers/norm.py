"""Normalisation of each token's vector."""

import torch
from torch import Tensor, nn

from slipstream.kernels import norm


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x_TH: Tensor) -> Tensor:
        return norm.rms_norm(x_TH, self.weight, self.eps)
