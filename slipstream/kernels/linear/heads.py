"""A linear for each attention head, and joining what two of them make: latent attention in its absorbed form."""

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.kernels.fits import need, need_floats, need_same_dtype, need_shape
from slipstream.kernels.registry import op

_ROWS_AT_ONCE = 64


def _head_linear_shapes(x_TX: Tensor, weight_ND: Tensor, num_heads: int, is_transposed: bool) -> Tensor:
    need_floats(x=x_TX)
    need_same_dtype(x_TX, weight=weight_ND)
    num_tokens, _ = x_TX.shape
    num_rows, num_columns = weight_ND.shape
    _need_heads("weight", num_rows, num_heads)
    if is_transposed:
        need_shape("x", x_TX, num_tokens, num_rows)
        return x_TX.new_empty(num_tokens, num_heads * num_columns)
    need_shape("x", x_TX, num_tokens, num_heads * num_columns)
    return x_TX.new_empty(num_tokens, num_rows)


def _need_heads(name: str, size: int, num_heads: int) -> None:
    need(num_heads > 0 and size % num_heads == 0, f"{name} must be of {num_heads} heads")


@op("head_linear(Tensor x, Tensor weight, int num_heads, bool is_transposed) -> Tensor", shapes=_head_linear_shapes)
def head_linear(
    x_TX: Tensor, weight_ND: Tensor, num_heads: int, is_transposed: bool, is_batch_invariant: bool = False
) -> Tensor:
    """y = x Wᵀ, or y = x W where is_transposed, each head by its own rows of the weight.

    In DeepSeek-V2's latent attention (arXiv:2405.04434 §2.1.2) the first makes a head's value of what it gathered from
    the latents, the second moves the up-projection of keys over to the query. is_batch_invariant: the library is asked
    for products of one shape alone, since it chooses the order of sums by shapes.
    """
    if is_batch_invariant:
        num_tokens = len(x_TX)
        padded_TX = functional.pad(x_TX, (0, 0, 0, -num_tokens % _ROWS_AT_ONCE))
        parts = [
            head_linear.reference(part, weight_ND, num_heads, is_transposed) for part in padded_TX.split(_ROWS_AT_ONCE)
        ]
        return torch.cat(parts)[:num_tokens]
    weight_HND = weight_ND.unflatten(0, (num_heads, -1))
    x_HTX = x_TX.unflatten(1, (num_heads, -1)).transpose(0, 1)
    weight_HXY = weight_HND if is_transposed else weight_HND.transpose(1, 2)
    y_THY = x_TX.new_empty(x_TX.shape[0], num_heads, weight_HXY.shape[2])
    torch.bmm(x_HTX, weight_HXY, out=y_THY.transpose(0, 1))  # in place: a result by heads would be copied
    return y_THY.flatten(1)


def _join_heads_shapes(x_TX: Tensor, y_TY: Tensor, num_heads: int) -> Tensor:
    need_floats(x=x_TX)
    need_same_dtype(x_TX, y=y_TY)
    (num_tokens, num_x), num_y = x_TX.shape, y_TY.shape[1]
    need_shape("y", y_TY, num_tokens, num_y)
    _need_heads("x", num_x, num_heads)
    _need_heads("y", num_y, num_heads)
    return x_TX.new_empty(num_tokens, num_x + num_y)


@op("join_heads(Tensor x, Tensor y, int num_heads) -> Tensor", shapes=_join_heads_shapes, is_row_by_row=True)
def join_heads(x_TX: Tensor, y_TY: Tensor, num_heads: int) -> Tensor:
    """Each head's numbers of x, then its numbers of y."""
    return torch.cat([x_TX.unflatten(1, (num_heads, -1)), y_TY.unflatten(1, (num_heads, -1))], 2).flatten(1)
