"""y = x Wᵀ + b for NVFP4 weights (kernels/linear/nvfp4.py), widened to the dtype of x in registers, tile by tile."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.triton.launch import starts_early, wait_for_previous

_COLUMNS = 128  # at a time
_INVARIANT_ROWS = 64  # of a tile where a row's sums must not depend on how many rows there are


@triton.jit
def _e2m1(codes, dtype: tl.constexpr):
    """Its bits as a float32's above an exponent of 126 are the number, but for 0 and 0.5, which are 0.5 and 0.75."""
    wide = codes.to(tl.int32)
    near = (((wide & 7) << 22) + (126 << 23)).to(tl.float32, bitcast=True)
    magnitude = tl.where((wide & 7) < 2, near + near - 1, near)
    return tl.where(wide < 8, magnitude, -magnitude).to(dtype)


@triton.jit(do_not_specialize=["M"])
def _rows(
    x_MK, w_NK, scale_NG, row_scale_N, bias_N, y_MN, M, N,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of x by BLOCK_N rows of W. Even and odd columns are multiplied apart, as they are packed."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = tl.minimum(n, N - 1).to(tl.int64)
    dtype: tl.constexpr = x_MK.dtype.element_ty
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    wait_for_previous(IS_EARLY)
    for first in range(0, K, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        pairs = first // 2 + tl.arange(0, BLOCK_K // 2)
        groups = first // 16 + tl.arange(0, BLOCK_K // 16)
        x_mask = (m < M)[:, None] & (columns < K)[None, :]
        x = tl.load(x_MK + m.to(tl.int64)[:, None] * K + columns[None, :], mask=x_mask, other=0.0)
        x_even, x_odd = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_K // 2, 2)))
        w = tl.load(w_NK + inside_n[:, None] * (K // 2) + pairs[None, :], mask=(pairs < K // 2)[None, :], other=0)
        scale_places = scale_NG + inside_n[:, None] * (K // 16) + groups[None, :]
        scale = tl.load(scale_places, mask=(groups < K // 16)[None, :], other=0.0).to(tl.float32).to(dtype)
        scale = tl.broadcast_to(scale[:, :, None], (BLOCK_N, BLOCK_K // 16, 8))
        scale = tl.reshape(scale, (BLOCK_N, BLOCK_K // 2))
        total = tl.dot(x_even, tl.trans(_e2m1(w & 15, dtype) * scale), total, input_precision="ieee")
        total = tl.dot(x_odd, tl.trans(_e2m1(w >> 4, dtype) * scale), total, input_precision="ieee")
    y = total * tl.load(row_scale_N + inside_n)[None, :]
    if bias_N is not None:
        y += tl.load(bias_N + inside_n).to(tl.float32)[None, :]
    places = y_MN + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(places, y.to(y_MN.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def supports(x_MK: Tensor) -> bool:
    return x_MK.dtype in (torch.bfloat16, torch.float16) and x_MK.shape[1] % 16 == 0 and x_MK.shape[0] > 0


def product(
    x_MK: Tensor, packed: Tensor, scale_NG: Tensor, row_scale_N1: Tensor, bias_N: Tensor | None,
    is_batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """x Wᵀ + b in x's dtype, for what `supports` allows."""
    x_MK = x_MK.contiguous()
    (num_rows, num_columns), num_out = x_MK.shape, packed.shape[0]
    block_m = _INVARIANT_ROWS if is_batch_invariant else min(128, max(16, triton.next_power_of_2(num_rows)))
    block_n = 32 if block_m <= 16 else 64
    y_MN, is_early = x_MK.new_empty(num_rows, num_out), starts_early(x_MK.device)
    _rows[triton.cdiv(num_rows, block_m), triton.cdiv(num_out, block_n)](
        x_MK, packed, scale_NG, row_scale_N1, bias_N, y_MN, num_rows, num_out, num_columns, block_m, block_n, _COLUMNS,
        is_early, num_warps=8 if block_m > 64 else 4, launch_pdl=is_early,
    )  # fmt: skip
    return y_MN
