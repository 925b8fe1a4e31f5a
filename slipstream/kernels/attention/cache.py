"""A layer's KV cache: one tensor kv_PNBKD, P planes (keys and values), N blocks of B tokens, K heads, D numbers a head.

It is kept in the engine's dtype, for float32 also in bfloat16 or float16, or in 8 bits with a float32 scale for each
plane and head, kv_scales [P, K]:

    stored = round(number / scale), number = stored · scale

What is larger than the largest number of the format is stored as that. A scale is the largest number that calibration
saw, divided by the format's largest; 1 does for E4M3, whose step follows the number, and for no int8.
"""

import torch
from torch import Tensor

from slipstream.kernels.fits import need, need_shape

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}  # of a cache's 8-bit dtypes


def need_cache(kv_PNBKD: Tensor, kv_scales_PK: Tensor | None) -> None:
    need(
        kv_PNBKD.dim() == 5 and kv_PNBKD.shape[0] in (1, 2), "a cache must be [planes, blocks, tokens, heads, numbers]"
    )
    need(
        (kv_PNBKD.dtype in LARGEST) == (kv_scales_PK is not None),
        "a cache of 8 bits, and no other, must have kv_scales",
    )
    need_shape("kv_scales", kv_scales_PK, kv_PNBKD.shape[0], kv_PNBKD.shape[3])
    need(kv_scales_PK is None or kv_scales_PK.dtype == torch.float32, "kv_scales must be float32")


def need_query(q_TX: Tensor, kv_PNBKD: Tensor, kv_scales_PK: Tensor | None) -> None:
    """That a query of this dtype may meet what such a cache holds."""
    need_cache(kv_PNBKD, kv_scales_PK)
    known = (q_TX.dtype, *LARGEST, *([torch.bfloat16, torch.float16] if q_TX.dtype == torch.float32 else []))
    need(kv_PNBKD.dtype in known, f"kv must be {q_TX.dtype}, or a narrower dtype that goes with it")


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As a cache without scales keeps them."""
    if dtype == torch.float16 != x.dtype:
        x = x.clamp(-65504, 65504)
    return x.to(dtype)


def to_stored(x_TKD: Tensor, scale_K: Tensor, dtype: torch.dtype) -> Tensor:
    """As a cache of 8 bits keeps them."""
    scaled_TKD = (_exact(x_TKD) / scale_K[:, None]).clamp(-LARGEST[dtype], LARGEST[dtype])
    return (scaled_TKD.round() if dtype == torch.int8 else scaled_TKD).to(dtype)


def to_numbers(stored: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What a cache holds, [..., K, D], in the dtype to compute with; scale [..., K], of 8 bits only."""
    if scale is None:
        return stored.to(dtype)
    return (stored.to(torch.promote_types(dtype, torch.float32)) * scale[..., None]).to(dtype)


def _exact(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
