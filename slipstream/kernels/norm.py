"""RMSNorm (arXiv:1910.07467), alone and with the residual sum before it."""

import torch
from torch import Tensor

from slipstream.kernels.registry import op


@op("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
def rms_norm(x_TN: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Normalise each group of len(weight) columns: a whole row, or one attention head of it.

    The mean square is taken in float32 and the result rounded before the weight, as Hugging Face's Llama does.
    """
    x = x_TN.unflatten(1, (-1, weight_H.shape[0])).float()
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps))
    return (x * inverse).to(x_TN.dtype).mul_(weight_H).flatten(1)


def _two_like(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_TH), torch.empty_like(x_TH)


@op("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)", shapes=_two_like)
def add_rms_norm(x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual)"""
    total_TH = x_TH + residual_TH
    return rms_norm.reference(total_TH, weight_H, eps), total_TH
