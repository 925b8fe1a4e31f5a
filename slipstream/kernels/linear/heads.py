"""A linear for each attention head, and joining what two of them make: latent attention in its absorbed form."""

import torch
from torch import Tensor

from slipstream.kernels.registry import op


def _head_linear_shapes(x_TX: Tensor, weight_ND: Tensor, num_heads: int, is_transposed: bool) -> Tensor:
    num_out = num_heads * weight_ND.shape[1] if is_transposed else weight_ND.shape[0]
    return x_TX.new_empty(x_TX.shape[0], num_out)


@op("head_linear(Tensor x, Tensor weight, int num_heads, bool is_transposed) -> Tensor", shapes=_head_linear_shapes)
def head_linear(x_TX: Tensor, weight_ND: Tensor, num_heads: int, is_transposed: bool) -> Tensor:
    """y = x Wᵀ, or y = x W where is_transposed, each head by its own rows of the weight.

    In DeepSeek-V2's latent attention (arXiv:2405.04434 §2.1.2) the first makes a head's value of what it gathered from
    the latents, the second moves the up-projection of keys over to the query.
    """
    weight_HND = weight_ND.unflatten(0, (num_heads, -1))
    x_HTX = x_TX.unflatten(1, (num_heads, -1)).transpose(0, 1)
    y_HTY = torch.bmm(x_HTX, weight_HND if is_transposed else weight_HND.transpose(1, 2))
    return y_HTY.transpose(0, 1).flatten(1)


def _join_heads_shapes(x_TX: Tensor, y_TY: Tensor, num_heads: int) -> Tensor:
    return x_TX.new_empty(x_TX.shape[0], x_TX.shape[1] + y_TY.shape[1])


@op("join_heads(Tensor x, Tensor y, int num_heads) -> Tensor", shapes=_join_heads_shapes)
def join_heads(x_TX: Tensor, y_TY: Tensor, num_heads: int) -> Tensor:
    """Each head's numbers of x, then its numbers of y."""
    return torch.cat([x_TX.unflatten(1, (num_heads, -1)), y_TY.unflatten(1, (num_heads, -1))], 2).flatten(1)
