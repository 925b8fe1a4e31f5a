"""Rotation of queries and keys and the write of keys and values into pages, in one launch.

A program has some heads of one token: of the queries, or else of the keys, or else of the values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.triton.launch import starts_early, wait_for_previous
from slipstream.kernels.triton.rows import nearest_even

_NUMBERS_A_PROGRAM = 1024


@triton.jit
def _stored(x, scale, dtype: tl.constexpr):
    """As it is kept (kernels/attention/cache.py); scale is None where that is no 8 bits."""
    if scale is not None:
        largest: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
        x = tl.clamp(tl.div_rn(x.to(tl.float32), scale + tl.zeros_like(x).to(tl.float32)), -largest, largest)
        if dtype == tl.int8:
            x = nearest_even(x)
    return x.to(dtype)


@triton.jit
def _place_heads(
    x, out, scales, cos, sin, first_head, out_head_stride,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_FREQUENCIES: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, ARE_NEIGHBOURS: tl.constexpr,
):  # fmt: skip
    """Heads first_head to first_head + HEADS of one token; the first 2 · NUM_FREQUENCIES numbers rotated, the rest not.

    PAIRS and REST are the numbers of both, as powers of two. ARE_NEIGHBOURS: pairs are 0 and 1, 2 and 3, and so on.
    """
    heads = (first_head + tl.arange(0, HEADS))[:, None]
    scale = None
    if scales is not None:
        scale = tl.load(scales + heads, mask=heads < NUM_HEADS, other=1.0)
    if NUM_FREQUENCIES:
        columns = tl.arange(0, PAIRS)[None, :]
        is_inside = (heads < NUM_HEADS) & (columns < NUM_FREQUENCIES)
        cosines = tl.load(cos + columns, mask=columns < NUM_FREQUENCIES, other=0.0)
        sines = tl.load(sin + columns, mask=columns < NUM_FREQUENCIES, other=0.0)
        step: tl.constexpr = 2 if ARE_NEIGHBOURS else 1
        distance: tl.constexpr = 1 if ARE_NEIGHBOURS else NUM_FREQUENCIES
        pointers = x + heads * HEAD_DIM + columns * step
        first = tl.load(pointers, mask=is_inside, other=0.0).to(tl.float32)
        second = tl.load(pointers + distance, mask=is_inside, other=0.0).to(tl.float32)
        targets = out + heads * out_head_stride + columns * step
        dtype = out.dtype.element_ty
        tl.store(targets, _stored(first * cosines - second * sines, scale, dtype), mask=is_inside)
        turned = _stored(second * cosines + first * sines, scale, dtype)
        tl.store(targets + distance, turned, mask=is_inside)
    if REST:
        columns = 2 * NUM_FREQUENCIES + tl.arange(0, REST)[None, :]
        is_inside = (heads < NUM_HEADS) & (columns < HEAD_DIM)
        numbers = tl.load(x + heads * HEAD_DIM + columns, mask=is_inside, other=0.0)
        kept = _stored(numbers, scale, out.dtype.element_ty)
        tl.store(out + heads * out_head_stride + columns, kept, mask=is_inside)


@triton.jit
def _place(
    q, k, v, cos, sin, out, kv, slots, k_scales, v_scales,
    q_stride, k_stride, v_stride, angle_stride, out_stride, plane_stride, page_stride, token_stride, head_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_FREQUENCIES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, ALL: tl.constexpr,
    Q_PARTS: tl.constexpr, KV_PARTS: tl.constexpr, ARE_NEIGHBOURS: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """Q_PARTS programs a token for queries, KV_PARTS for keys, as many for values. ALL: HEAD_DIM as a power of two."""
    wait_for_previous(IS_EARLY)
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if NUM_FREQUENCIES:
        cos += token * angle_stride
        sin += token * angle_stride
    if part < Q_PARTS:
        if Q_PARTS:
            _place_heads(
                q + token * q_stride, out + token * out_stride, None, cos, sin, part * HEADS, HEAD_DIM,
                NUM_HEADS, HEAD_DIM, NUM_FREQUENCIES, HEADS, PAIRS, REST, ARE_NEIGHBOURS,
            )  # fmt: skip
    elif KV_PARTS:
        slot = tl.load(slots + token)
        page = kv + slot // BLOCK_SIZE * page_stride + slot % BLOCK_SIZE * token_stride
        part -= Q_PARTS
        if part < KV_PARTS:
            _place_heads(
                k + token * k_stride, page, k_scales, cos, sin, part * HEADS, head_stride,
                NUM_KV_HEADS, HEAD_DIM, NUM_FREQUENCIES, HEADS, PAIRS, REST, ARE_NEIGHBOURS,
            )  # fmt: skip
        elif v is not None:
            _place_heads(
                v + token * v_stride, page + plane_stride, v_scales, cos, sin, (part - KV_PARTS) * HEADS, head_stride,
                NUM_KV_HEADS, HEAD_DIM, 0, HEADS, PAIRS, ALL, ARE_NEIGHBOURS,
            )  # fmt: skip


def rope(x_TX: Tensor, cos_TF: Tensor, sin_TF: Tensor, head_dim: int) -> Tensor:
    out_TX = torch.empty(x_TX.shape, dtype=x_TX.dtype, device=x_TX.device)
    _launch(x_TX, None, None, cos_TF, sin_TF, out_TX, None, None, None, head_dim)
    return out_TX


def rope_pairs(x_TX: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    out_TX = torch.empty(x_TX.shape, dtype=x_TX.dtype, device=x_TX.device)
    head_dim = 2 * cos_TF.shape[1]
    _launch(x_TX, None, None, cos_TF, sin_TF, out_TX, None, None, None, head_dim, are_neighbours=True)
    return out_TX


def kv_write(
    k_TY: Tensor, v_TY: Tensor | None, kv_PNBKD: Tensor, slots_T: Tensor, kv_scales_PK: Tensor | None = None
) -> None:
    _launch(None, k_TY, v_TY, None, None, None, kv_PNBKD, slots_T, kv_scales_PK, kv_PNBKD.shape[4])


def rope_kv_write(
    q_TX: Tensor, k_TY: Tensor, v_TY: Tensor, cos_TF: Tensor, sin_TF: Tensor, kv_PNBKD: Tensor, slots_T: Tensor,
    kv_scales_2K: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out_TX = torch.empty(q_TX.shape, dtype=q_TX.dtype, device=q_TX.device)
    _launch(q_TX, k_TY, v_TY, cos_TF, sin_TF, out_TX, kv_PNBKD, slots_T, kv_scales_2K, kv_PNBKD.shape[4])
    return out_TX


def _launch(
    q: Tensor | None, k: Tensor | None, v: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    out: Tensor | None, kv: Tensor | None, slots: Tensor | None, kv_scales: Tensor | None, head_dim: int,
    are_neighbours: bool = False,
) -> None:  # fmt: skip
    q, k, v, cos, sin = (x if x is None or x.stride(1) == 1 else x.contiguous() for x in (q, k, v, cos, sin))
    some = q if q is not None else k
    assert some is not None
    if not some.numel():
        return
    num_heads = 0 if q is None else q.shape[1] // head_dim
    num_frequencies = 0 if cos is None else cos.shape[1]
    num_planes, _, block_size, num_kv_heads, _ = (0, 0, 1, 0, 0) if kv is None else kv.shape
    assert v is not None or num_planes < 2, "a cache of two planes takes keys and values"
    whole = triton.next_power_of_2(head_dim)
    heads = max(1, _NUMBERS_A_PROGRAM // whole)
    parts, kv_parts = triton.cdiv(num_heads, heads), triton.cdiv(num_kv_heads, heads)
    is_early = starts_early(some.device)
    pairs, rest = triton.next_power_of_2(max(1, num_frequencies)), head_dim - 2 * num_frequencies
    _place[len(some), parts + num_planes * kv_parts](
        q, k, v if num_planes == 2 else None, cos, sin, out, kv, slots,
        kv_scales, kv_scales[-1] if kv_scales is not None else None,
        *(0 if x is None else x.stride(0) for x in (q, k, v, cos, out)),
        *((0, 0, 0, 0) if kv is None else kv.stride()[:4]),
        num_heads, num_kv_heads, head_dim, num_frequencies, block_size, heads, pairs,
        triton.next_power_of_2(rest) if rest else 0, whole, parts, kv_parts, are_neighbours, is_early,
        num_warps=max(1, heads * whole // _NUMBERS_A_PROGRAM), launch_pdl=is_early,
    )  # fmt: skip
