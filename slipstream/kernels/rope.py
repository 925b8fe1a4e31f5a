"""Rotary position embedding (arXiv:2104.09864), halves paired as in Hugging Face, and its fusion with the KV write."""

import torch
from torch import Tensor

from slipstream.kernels.attention.cache import need_cache
from slipstream.kernels.attention.paged import kv_write
from slipstream.kernels.cpu.library import native
from slipstream.kernels.fits import need, need_floats, need_heads, need_shape
from slipstream.kernels.registry import kernel, on_gpu, op


def _cos_sin_shapes(positions_T: Tensor, inv_freq_F: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    need(inv_freq_F.dtype == torch.float32, "inv_freq must be float32")
    (num_tokens,), (num_frequencies,) = positions_T.shape, inv_freq_F.shape
    return inv_freq_F.new_empty(num_tokens, num_frequencies), inv_freq_F.new_empty(num_tokens, num_frequencies)


@op(
    "rope_cos_sin(Tensor positions, Tensor inv_freq, float scale) -> (Tensor, Tensor)",
    shapes=_cos_sin_shapes,
    is_row_by_row=True,
)
def rope_cos_sin(positions_T: Tensor, inv_freq_F: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The step's angles, once for all layers; float32, one column a frequency (head_dim / 2 of them)."""
    angles_TF = positions_T[:, None] * inv_freq_F
    cos_TF, sin_TF = angles_TF.cos(), angles_TF.sin()
    return (cos_TF, sin_TF) if scale == 1 else (cos_TF.mul_(scale), sin_TF.mul_(scale))


@op(
    "far_cos_sin(Tensor positions, Tensor inv_freq, float scale) -> (Tensor, Tensor)",
    shapes=_cos_sin_shapes,
    is_row_by_row=True,
)
def far_cos_sin(positions_T: Tensor, inv_freq_F: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """rope_cos_sin by angles in float64: a million radians in float32 are wrong by up to 1/32."""
    angles_TF = positions_T.double()[:, None] * inv_freq_F
    return (angles_TF.cos() * scale).float(), (angles_TF.sin() * scale).float()


def _rope_shapes(x_TX: Tensor, cos_TF: Tensor, sin_TF: Tensor, head_dim: int) -> Tensor:
    need_floats(x=x_TX, cos=cos_TF, sin=sin_TF)
    num_tokens, num_columns = x_TX.shape
    num_frequencies = cos_TF.shape[1]
    for name, table in (("cos", cos_TF), ("sin", sin_TF)):
        need_shape(name, table, num_tokens, num_frequencies)
    need_heads("x", num_columns, head_dim)
    need(2 * num_frequencies <= head_dim, f"a head of {head_dim} numbers has no {num_frequencies} pairs")
    return x_TX.new_empty(x_TX.shape)


@op("rope(Tensor x, Tensor cos, Tensor sin, int head_dim) -> Tensor", shapes=_rope_shapes)
def rope(x_TX: Tensor, cos_TF: Tensor, sin_TF: Tensor, head_dim: int) -> Tensor:
    """Rotate the first 2F of each head's head_dim numbers, the first F paired with the next F; the rest stays."""
    num_frequencies = cos_TF.shape[1]
    x_THD = x_TX.unflatten(1, (-1, head_dim))
    first, second = x_THD[:, :, :num_frequencies], x_THD[:, :, num_frequencies : 2 * num_frequencies]
    cos, sin = cos_TF[:, None].to(x_TX.dtype), sin_TF[:, None].to(x_TX.dtype)
    out = torch.empty(x_THD.shape, dtype=x_TX.dtype, device=x_TX.device)
    torch.mul(first, cos, out=out[:, :, :num_frequencies]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[:, :, num_frequencies : 2 * num_frequencies]).addcmul_(first, sin)
    out[:, :, 2 * num_frequencies :] = x_THD[:, :, 2 * num_frequencies :]
    return out.flatten(1)


@kernel(rope, "triton", on_gpu, is_row_by_row=True)
def rope_triton(x_TX: Tensor, cos_TF: Tensor, sin_TF: Tensor, head_dim: int) -> Tensor:
    from slipstream.kernels.triton import rope as rotation

    return rotation.rope(x_TX, cos_TF, sin_TF, head_dim)


def _pairs_shapes(x_TX: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    return _rope_shapes(x_TX, cos_TF, sin_TF, 2 * cos_TF.shape[1])


@op("rope_pairs(Tensor x, Tensor cos, Tensor sin) -> Tensor", shapes=_pairs_shapes)
def rope_pairs(x_TX: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotate all 2F numbers of each head, each paired with its neighbour (DeepSeek's order)."""
    first, second = x_TX.unflatten(1, (-1, cos_TF.shape[1], 2)).unbind(3)
    cos, sin = cos_TF[:, None].to(x_TX.dtype), sin_TF[:, None].to(x_TX.dtype)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], 3).flatten(1)


@kernel(rope_pairs, "triton", on_gpu, is_row_by_row=True)
def rope_pairs_triton(x_TX: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    from slipstream.kernels.triton import rope as rotation

    return rotation.rope_pairs(x_TX, cos_TF, sin_TF)


def _rope_write_shapes(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, slots: Tensor,
    kv_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    need_cache(kv, kv_scales)
    kv_write.shapes(_rope_shapes(k, cos, sin, kv.shape[4]), v, kv, slots, kv_scales)
    return _rope_shapes(q, cos, sin, kv.shape[4])


@op(
    "rope_kv_write(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) kv, Tensor slots, "
    "Tensor? kv_scales=None) -> Tensor",
    shapes=_rope_write_shapes,
)
def rope_kv_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, slots: Tensor,
    kv_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rotate q and k, write k and v into their KV slots, return the rotated q; heads are as wide as the cache's."""
    head_dim = kv.shape[4]
    kv_write.reference(rope.reference(k, cos, sin, head_dim), v, kv, slots, kv_scales)
    return rope.reference(q, cos, sin, head_dim)


@kernel(rope_kv_write, "triton", on_gpu, is_row_by_row=True)
def rope_kv_write_triton(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, slots: Tensor,
    kv_scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    from slipstream.kernels.triton import rope as rotation

    return rotation.rope_kv_write(q, k, v, cos, sin, kv, slots, kv_scales)


for each in (rope_cos_sin, rope, rope_kv_write):
    native(each)
