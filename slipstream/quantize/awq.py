"""AWQ (arXiv:2306.00978): columns that meet large activations are scaled before rounding, by a power found by search.

s = mean|x|^r over a grid of r, normalised so that its largest and smallest are each other's inverse; then each group's
range is cut off where that brings the product's result nearer.
"""

import torch
from torch import Tensor

from slipstream.quantize.numbers import Scales, find_scales, from_values, grouped, round_to
from slipstream.schema.format import WeightFormat

RATIOS = tuple(step / 20 for step in range(20))  # r; 0 scales nothing
SHRINKS = tuple(1 - step / 20 for step in range(10))  # of the range: 1.0 to 0.55


def awq_scales(x_mean_K: Tensor, ratio: float) -> Tensor:
    scale_K = x_mean_K.clamp_min(1e-4) ** ratio
    scale_K = scale_K.clamp_min(1e-4)
    return scale_K / (scale_K.max() * scale_K.min()).sqrt()


def clipped_scales(weight_NK: Tensor, x_MK: Tensor, format: WeightFormat) -> Scales:
    """The shrink of each group of each row that leaves its part of W x nearest. x: a sample of rows."""
    x_MGC = grouped(x_MK, format.group_size)
    best_NG = torch.full((len(weight_NK), x_MGC.shape[1]), torch.inf, device=weight_NK.device)
    shrink_NG = torch.ones_like(best_NG)
    for shrink in SHRINKS:
        scales = find_scales(weight_NK, format, shrink=shrink)
        error_NK = from_values(round_to(weight_NK, scales, format), scales, format) - weight_NK
        error_NGC = grouped(error_NK, format.group_size)
        loss_NG = torch.einsum("mgc,ngc->mng", x_MGC, error_NGC).square_().mean(0)
        is_better = loss_NG < best_NG
        best_NG = torch.where(is_better, loss_NG, best_NG)
        shrink_NG.masked_fill_(is_better, shrink)
    return find_scales(weight_NK, format, shrink=shrink_NG)
