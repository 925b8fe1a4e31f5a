"""Norms and gated activations, a row a program: read once, written once, quantized on the way where that is asked for.

One kernel for each of the two, whose parts are chosen by constants: the residual sum before, the mean taken off
(LayerNorm), the numbers and scales that an 8-bit product reads after (kernels/quantized.py).
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.collectives import ShownRows
from slipstream.kernels.quantized import quantize_by_reference
from slipstream.kernels.triton.launch import starts_early, wait_for_previous

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
SMALLEST_AMAX = tl.constexpr(1e-12)  # of a row of zeros, as in kernels/linear/groups.py


@dataclass(frozen=True)
class Quantized:
    """How a result is quantized: kernels/quantized.py."""

    input_scale: float
    group_size: int
    dtype: str
    # A product of one row does not use tensor cores, and multiplies what is not rounded as fast: a row alone is left
    # as it is, with scales of 1.
    keeps_one_row: bool = False

    def keeps(self, x_TN: Tensor) -> bool:
        return self.keeps_one_row and x_TN.shape[0] == 1 and x_TN.dtype in (torch.bfloat16, torch.float16)

    def kept_scales(self, num_columns: int, device: torch.device) -> Tensor:
        return _ones(triton.cdiv(num_columns, self.group_size or num_columns), device)

    @property
    def fits_tiles(self) -> bool:
        """Tiles are powers of two; other groups are rounded by the reference, in a step of their own."""
        return self.group_size & (self.group_size - 1) == 0


@cache
def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones((1, count), device=device)


@triton.jit
def nearest_even(x):
    """Rounded half to even, for |x| < 2^22: adding 1.5 · 2^23 leaves no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _store_quantized(
    y, out, scales, row, num_columns, static_scale,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, IS_STATIC: tl.constexpr,
):  # fmt: skip
    """y [BLOCK] in float32 → y / scale, and the scale, of each GROUP columns; zeros lie beyond num_columns."""
    y_GC = tl.reshape(y, (BLOCK // GROUP, GROUP))
    groups = tl.arange(0, BLOCK // GROUP)
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if IS_STATIC:
        scale_G = tl.zeros((BLOCK // GROUP,), tl.float32) + static_scale
    else:
        scale_G = tl.maximum(tl.max(tl.abs(y_GC), 1), SMALLEST_AMAX) / LARGEST
    num_groups = tl.cdiv(num_columns, GROUP)
    tl.store(scales + row * num_groups + groups, scale_G, mask=groups < num_groups)
    scaled_GC = y_GC * (1 / scale_G)[:, None]  # a division for each number would take as long as reading it
    if out.dtype.element_ty == tl.int8:
        # Its largest is one more than the largest below zero.
        scaled_GC = tl.minimum(tl.maximum(nearest_even(scaled_GC), -LARGEST - 1), LARGEST)
    else:
        scaled_GC = tl.minimum(tl.maximum(scaled_GC, -LARGEST), LARGEST)
    tl.store(out + row * num_columns + columns, scaled_GC.to(out.dtype.element_ty), mask=columns < num_columns)


@triton.jit
def _sum_of_ranks(
    value, addresses, calls_S, row, columns, is_inside,
    RANK: tl.constexpr, SIZE: tl.constexpr, PLACES: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """value [BLOCK] of a row, added up over the ranks in their order, so that all have the same bits.

    A rank writes its part where the others see it, tells each of them so by the number of the call, and reads theirs
    once they have told it. Calls take turns between two places: when one is written again, whoever read it has told
    of the call after, and so had ended the one before.
    """
    dtype = value.dtype
    call = tl.load(calls_S + row) + 1
    place = ((call % 2) * PLACES + row) * BYTES
    mine = tl.multiple_of((addresses[RANK] + place).to(tl.pointer_type(dtype)), 16)
    tl.store(mine + columns, value, mask=is_inside)
    tl.debug_barrier()
    for other in tl.static_range(SIZE):
        if other != RANK:
            told = addresses[other] + 2 * PLACES * BYTES + 4 * (RANK * PLACES + row)
            tl.atomic_xchg(told.to(tl.pointer_type(tl.int32)), call, sem="release", scope="sys")
    for other in tl.static_range(SIZE):
        if other != RANK:
            told = (addresses[RANK] + 2 * PLACES * BYTES + 4 * (other * PLACES + row)).to(tl.pointer_type(tl.int32))
            while tl.atomic_add(told, 0, sem="acquire", scope="sys") - call < 0:
                pass
    tl.debug_barrier()
    total = tl.zeros(value.shape, tl.float32)
    for other in tl.static_range(SIZE):
        if other == RANK:
            total += value.to(tl.float32)
        else:
            theirs = tl.multiple_of((addresses[other] + place).to(tl.pointer_type(dtype)), 16)
            total += tl.load(theirs + columns, mask=is_inside, other=0.0, volatile=True).to(tl.float32)
    tl.store(calls_S + row, call)
    return total.to(dtype)


@triton.jit
def _norm(
    x, residual, weight, bias, out, total, scales, addresses, calls_S, x_stride, residual_stride, size, num_groups,
    eps, weight_offset, static_scale,
    BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, IS_LAYER: tl.constexpr,
    HAS_OFFSET: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, IS_STATIC: tl.constexpr,
    IS_EARLY: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, PLACES: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """`size` columns of a row; num_groups such lie side by side in a row of x (the heads of queries and keys)."""
    place = tl.program_id(0).to(tl.int64)
    row, group = place // num_groups, place % num_groups
    columns = tl.arange(0, BLOCK)
    is_inside = columns < size
    dtype = x.dtype.element_ty
    scale = tl.load(weight + columns, mask=is_inside, other=0.0).to(tl.float32)
    wait_for_previous(IS_EARLY)
    value = tl.load(x + row * x_stride + group * size + columns, mask=is_inside, other=0.0)
    if HAS_RESIDUAL:
        added = tl.load(residual + row * residual_stride + columns, mask=is_inside, other=0.0)
    if SIZE > 1:
        value = _sum_of_ranks(value, addresses, calls_S, row, columns, is_inside, RANK, SIZE, PLACES, BYTES)
    if HAS_RESIDUAL:
        value = (value.to(tl.float32) + added.to(tl.float32)).to(dtype)
        tl.store(total + row * size + columns, value, mask=is_inside)
    value = value.to(tl.float32)
    if IS_LAYER:
        value = tl.where(is_inside, value - tl.sum(value, 0) / size, 0.0)
    normed = value * tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    if HAS_OFFSET:
        scale += weight_offset
    elif not IS_LAYER:
        normed = normed.to(dtype).to(tl.float32)  # as Hugging Face's Llama rounds
    y = normed * scale
    if HAS_BIAS:
        y += tl.load(bias + columns, mask=is_inside, other=0.0).to(tl.float32)
    if GROUP:
        y = tl.where(is_inside, y.to(dtype).to(tl.float32), 0.0)
        _store_quantized(y, out, scales, place, size, static_scale, BLOCK, GROUP, LARGEST, IS_STATIC)
    else:
        tl.store(out + place * size + columns, y.to(dtype), mask=is_inside)


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "none":
        return x
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    if ACTIVATION == "gelu_tanh":
        return 0.5 * x * (1 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _activation(
    x, out, scales, x_stride, size, static_scale,
    BLOCK: tl.constexpr, IS_GATED: tl.constexpr, ACTIVATION: tl.constexpr, GROUP: tl.constexpr,
    LARGEST: tl.constexpr, IS_STATIC: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """A row without quantization is cut into blocks of columns; with it, a program has the whole row."""
    wait_for_previous(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < size
    dtype = x.dtype.element_ty
    y = _activate(tl.load(x + row * x_stride + columns, mask=is_inside, other=0.0).to(tl.float32), ACTIVATION)
    if IS_GATED:
        up = tl.load(x + row * x_stride + size + columns, mask=is_inside, other=0.0).to(tl.float32)
        y = y.to(dtype).to(tl.float32) * up
    if GROUP:
        y = tl.where(is_inside, y.to(dtype).to(tl.float32), 0.0)
        _store_quantized(y, out, scales, row, size, static_scale, BLOCK, GROUP, LARGEST, IS_STATIC)
    else:
        tl.store(out + row * size + columns, y.to(dtype), mask=is_inside)


def norm(
    x_TN: Tensor, residual_TH: Tensor | None, weight_H: Tensor, bias_H: Tensor | None, eps: float,
    *, weight_offset: float = 0.0, is_layer: bool = False, how: Quantized | None = None,
    shown: ShownRows | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(result, its scales, x + residual); what was not asked for is an empty tensor. shown: x is added up there first,
    over all ranks."""
    if how is not None and (how.keeps(x_TN) or not how.fits_tiles):
        plain = norm(
            x_TN, residual_TH, weight_H, bias_H, eps, weight_offset=weight_offset, is_layer=is_layer, shown=shown
        )
        normed_TN, _, total_TH = plain
        if how.keeps(x_TN):
            return normed_TN, how.kept_scales(normed_TN.shape[1], x_TN.device), total_TH
        return *quantize_by_reference(normed_TN, how.input_scale, how.group_size, how.dtype), total_TH
    size = weight_H.shape[0]
    num_groups = x_TN.shape[1] // size
    out, scales, options = _results(x_TN, x_TN.shape[1], how)
    total = torch.empty(x_TN.shape if residual_TH is not None else 0, dtype=x_TN.dtype, device=x_TN.device)
    x_TN, residual_TH = _with_dense_rows(x_TN), None if residual_TH is None else _with_dense_rows(residual_TH)
    block = triton.next_power_of_2(size)
    if x_TN.shape[0]:
        _norm[(x_TN.shape[0] * num_groups,)](
            x_TN, residual_TH, weight_H, bias_H, out, total, scales, *(shown[:2] if shown else ((), None)),
            x_TN.stride(0), 0 if residual_TH is None else residual_TH.stride(0), size, num_groups, eps, weight_offset,
            0.0 if how is None else how.input_scale,
            BLOCK=block, HAS_RESIDUAL=residual_TH is not None, HAS_BIAS=bias_H is not None, IS_LAYER=is_layer,
            HAS_OFFSET=bool(weight_offset), **options(block), num_warps=_num_warps(block), **_early(x_TN.device),
            **_ranks(shown),
        )  # fmt: skip
    return out, scales, total


def activate(x_TX: Tensor, name: str, *, is_gated: bool, how: Quantized | None = None) -> tuple[Tensor, Tensor]:
    """(result, its scales). name: silu, gelu_tanh or gelu; gated: of the first half of each row, times the second."""
    if how is not None and (how.keeps(x_TX) or not how.fits_tiles):
        plain_TX = x_TX if name == "none" else activate(x_TX, name, is_gated=is_gated)[0]
        if how.keeps(x_TX):
            return plain_TX, how.kept_scales(plain_TX.shape[1], x_TX.device)
        return quantize_by_reference(plain_TX, how.input_scale, how.group_size, how.dtype)
    size = x_TX.shape[1] // 2 if is_gated else x_TX.shape[1]
    out, scales, options = _results(x_TX, size, how)
    x_TX = _with_dense_rows(x_TX)
    block = triton.next_power_of_2(size) if how is not None else min(1024, triton.next_power_of_2(size))
    if x_TX.shape[0]:
        _activation[(x_TX.shape[0], triton.cdiv(size, block))](
            x_TX, out, scales, x_TX.stride(0), size, 0.0 if how is None else how.input_scale,
            BLOCK=block, IS_GATED=is_gated, ACTIVATION=name, **options(block), num_warps=_num_warps(block),
            **_early(x_TX.device),
        )  # fmt: skip
    return out, scales


def quantize(x_TX: Tensor, how: Quantized) -> tuple[Tensor, Tensor]:
    """(the numbers, their scales)"""
    return activate(x_TX, "none", is_gated=False, how=how)


def _results(x_TX: Tensor, num_columns: int, how: Quantized | None) -> tuple[Tensor, Tensor, Any]:
    """Where the result and its scales go, and the constants that say how it is quantized, for a block of columns."""
    dtype = x_TX.dtype if how is None else getattr(torch, how.dtype)
    out = torch.empty((x_TX.shape[0], num_columns), dtype=dtype, device=x_TX.device)
    groups = 0 if how is None else triton.cdiv(num_columns, how.group_size) if how.group_size else 1
    scales = torch.empty((x_TX.shape[0], groups), dtype=torch.float32, device=x_TX.device)

    def options(block: int) -> dict[str, Any]:
        if how is None:
            return {"GROUP": 0, "LARGEST": 0.0, "IS_STATIC": False}
        return {
            "GROUP": min(how.group_size or block, block),
            "LARGEST": LARGEST[how.dtype],
            "IS_STATIC": how.input_scale != 0,
        }

    return out, scales, options


def _with_dense_rows(x_TX: Tensor) -> Tensor:
    return x_TX if x_TX.stride(1) == 1 else x_TX.contiguous()


def _ranks(shown: ShownRows | None) -> dict[str, int]:
    if shown is None:
        return {"RANK": 0, "SIZE": 1, "PLACES": 0, "BYTES": 0}
    return {
        "RANK": shown.rank, "SIZE": len(shown.addresses), "PLACES": len(shown.calls), "BYTES": shown.row_bytes,
    }  # fmt: skip


def _num_warps(block: int) -> int:
    return min(16, max(1, block // 512))


def _early(device: torch.device) -> dict[str, bool]:
    is_early = starts_early(device)
    return {"IS_EARLY": is_early, "launch_pdl": is_early}
