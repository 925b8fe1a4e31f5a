"""Rotary position embedding (arXiv:2104.09864), halves paired as in Hugging Face, and its fusion with the KV write."""

import torch
from torch import Tensor

from slipstream.kernels.attention.paged import kv_write
from slipstream.kernels.registry import op


def _cos_sin_shapes(positions_T: Tensor, inv_freq_F: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    shape = (positions_T.shape[0], inv_freq_F.shape[0])
    return inv_freq_F.new_empty(shape), inv_freq_F.new_empty(shape)


@op("rope_cos_sin(Tensor positions, Tensor inv_freq, float scale) -> (Tensor, Tensor)", shapes=_cos_sin_shapes)
def rope_cos_sin(positions_T: Tensor, inv_freq_F: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The step's angles, once for all layers; float32, one column a frequency (head_dim / 2 of them)."""
    angles_TF = positions_T.float()[:, None] * inv_freq_F
    return angles_TF.cos() * scale, angles_TF.sin() * scale


def _like_first(x: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@op("rope(Tensor x, Tensor cos, Tensor sin) -> Tensor", shapes=_like_first)
def rope(x_TX: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotate each head of x; its first half pairs with its second half."""
    half = cos_TF.shape[1]
    x_T12F = x_TX.unflatten(1, (-1, 2, half))
    first, second = x_T12F[:, :, 0], x_T12F[:, :, 1]
    cos, sin = cos_TF[:, None].to(x_TX.dtype), sin_TF[:, None].to(x_TX.dtype)
    out = torch.empty(x_T12F.shape, dtype=x_TX.dtype, device=x_TX.device)
    torch.mul(first, cos, out=out[:, :, 0]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[:, :, 1]).addcmul_(first, sin)
    return out.flatten(1)


@op(
    "rope_kv_write(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) kv, Tensor slots) -> Tensor",
    shapes=_like_first,
)
def rope_kv_write(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, slots: Tensor) -> Tensor:
    """Rotate q and k, write k and v into their KV slots, return the rotated q."""
    kv_write.reference(rope.reference(k, cos, sin), v, kv, slots)
    return rope.reference(q, cos, sin)
