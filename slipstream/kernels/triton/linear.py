"""y = x Wᵀ + b for few rows of x: the time is that of reading W once, in whatever format it is stored.

One row is summed without tensor cores (`_row`), more are padded to the tiles of tensor cores (`_rows`). A weight is
dense, bytes (int8, E4M3) or nibbles (two columns a byte), and w = (packed - zero) · scale by row or group of columns.
Scales are applied to sums of products, never to the products: what is multiplied is exact.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.triton.launch import arrivals, prefetch, starts_early, wait_for_previous


class Tiles(NamedTuple):
    """How one product is cut up."""

    rows: int  # of W in a program
    columns: int  # of W at a time; words where splits is 0
    # programs that share rows, each with its part of the columns; 0: one row of x, without tensor cores
    splits: int = 1
    warps: int = 4
    stages: int = 4  # tiles in flight
    is_swapped: bool = False  # W on the left of the tensor cores' product: Hopper's wgmma wants 64 rows there


class Weight(NamedTuple):
    """A weight as it is stored, and the scales of what it is multiplied with."""

    packed: Tensor  # [N, K] of x's dtype, int8 or E4M3; uint8 [N, K/2]
    scale_NG: Tensor | None = None
    zero_NG: Tensor | None = None
    group_size: int = 0
    x_scale_MG: Tensor | None = None
    x_group_size: int = 0


@triton.jit
def _load(pointers, is_inside, IS_EVEN: tl.constexpr):
    if IS_EVEN:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=is_inside, other=0.0)
    return values


@triton.jit
def _nibble(words, x, index: tl.constexpr):
    """x times the four bits at 4 · index, up to 16, of each word; times 2**-85.

    The bits as they are, masked, are those of a float below all normal ones, q · 2**(4 · index - 149), which is
    multiplied as fast as any: an instruction for a number instead of four. x moves the product among the normal ones.
    """
    q = (words & (15 << (4 * index))).to(tl.float32, bitcast=True)
    scale: tl.constexpr = 2.0 ** (64 - 4 * index)
    return q * (x * scale)[None, :]


@triton.jit
def _row_part(
    w, first, x_K, x_scale_G, scale_NG, zero_NG, scale_rows_N,
    K: tl.constexpr, GROUP: tl.constexpr, X_GROUP: tl.constexpr, PER_WORD: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_EVEN: tl.constexpr,
):  # fmt: skip
    """Sums [ROWS, COLUMNS / VECTOR] of the products of words w, from word `first` of the rows, and x."""
    words = first + tl.arange(0, COLUMNS)
    if PER_WORD > 1:
        columns = words[:, None] * PER_WORD + tl.arange(0, PER_WORD)[None, :]
        x = _load(x_K + columns, columns < K, IS_EVEN).to(tl.float32)
        if not IS_EVEN:  # Triton 3.6 has other E4M3 numbers there than the zeros that were asked for
            x = tl.where(columns < K, x, 0.0)
        even, odd = tl.split(tl.reshape(x, (COLUMNS, 2, 2, 2)))
        x_04, x_26 = tl.split(even)
        x_15, x_37 = tl.split(odd)
        x_0, x_4 = tl.split(x_04)
        x_1, x_5 = tl.split(x_15)
        x_2, x_6 = tl.split(x_26)
        x_3, x_7 = tl.split(x_37)
        high = w >> 12
        per_word = _nibble(w, x_0, 0)
        per_word += _nibble(w, x_1, 1)
        per_word += _nibble(w, x_2, 2)
        per_word += _nibble(w, x_3, 3)
        per_word += _nibble(w, x_4, 4)
        per_word += _nibble(high, x_5, 2)
        per_word += _nibble(high, x_6, 3)
        per_word += _nibble(high, x_7, 4)
        x = ((x_0 + x_1) + (x_2 + x_3)) + ((x_4 + x_5) + (x_6 + x_7))
    else:
        x = _load(x_K + words, words < K, IS_EVEN).to(tl.float32)
        per_word = w.to(tl.float32) * x[None, :]
    part = tl.sum(tl.reshape(per_word, (ROWS, COLUMNS // VECTOR, VECTOR)), 2)
    columns = (first + tl.arange(0, COLUMNS // VECTOR) * VECTOR) * PER_WORD
    inside = columns < K
    group = columns // GROUP if GROUP else columns * 0
    if PER_WORD > 1 or zero_NG is not None:
        x_part = tl.sum(tl.reshape(x, (COLUMNS // VECTOR, VECTOR)), 1)
        zero = tl.full((ROWS, COLUMNS // VECTOR), 8, tl.float32)
        if zero_NG is not None:
            zero = tl.load(zero_NG + scale_rows_N + group[None, :], mask=inside[None, :], other=0).to(tl.float32)
        if PER_WORD > 1:
            part = part * (2.0**85) - zero * x_part[None, :]
        else:
            part -= zero * x_part[None, :]
    if GROUP:
        scale = tl.load(scale_NG + scale_rows_N + group[None, :], mask=inside[None, :], other=0.0)
        part *= scale.to(tl.float32)
    if X_GROUP:
        part *= tl.load(x_scale_G + columns // X_GROUP, mask=inside, other=0.0)[None, :]
    return part


@triton.jit
def _row(
    x_K, x_scale_G, w_NK, scale_NG, zero_NG, bias_N, y_N, N, num_groups,
    K: tl.constexpr, GROUP: tl.constexpr, X_GROUP: tl.constexpr, PER_WORD: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, IS_EVEN: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """ROWS rows of W by one row of x. A thread reads VECTOR words (16 bytes) of a row at once and sums them first.

    A word is a column of W, or PER_WORD = 8 columns of 4 bits. COLUMNS counts words.
    """
    num_words: tl.constexpr = K // PER_WORD
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start_N = w_NK + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * num_words
    scale_rows_N = tl.minimum(rows, N - 1)[:, None] * num_groups
    words = tl.arange(0, COLUMNS)
    w = _load(start_N + words[None, :], (words < num_words)[None, :], IS_EVEN)  # on its way while x is being made
    wait_for_previous(IS_EARLY)
    sums = _row_part(
        w, 0, x_K, x_scale_G, scale_NG, zero_NG, scale_rows_N,
        K, GROUP, X_GROUP, PER_WORD, VECTOR, ROWS, COLUMNS, IS_EVEN,
    )  # fmt: skip
    for first in tl.range(COLUMNS, num_words, COLUMNS, num_stages=1):
        words = first + tl.arange(0, COLUMNS)
        w = _load(start_N + words[None, :], (words < num_words)[None, :], IS_EVEN)
        sums += _row_part(
            w, first, x_K, x_scale_G, scale_NG, zero_NG, scale_rows_N,
            K, GROUP, X_GROUP, PER_WORD, VECTOR, ROWS, COLUMNS, IS_EVEN,
        )  # fmt: skip
    y = tl.sum(sums, 1)
    if scale_NG is not None and not GROUP:
        y *= tl.load(scale_NG + rows, mask=rows < N).to(tl.float32)
    if x_scale_G is not None and not X_GROUP:
        y *= tl.load(x_scale_G)
    if bias_N is not None:
        y += tl.load(bias_N + rows, mask=rows < N).to(tl.float32)
    tl.store(y_N + rows, y.to(y_N.dtype.element_ty), mask=rows < N)


@triton.jit
def _product(x, w, sums, IS_SWAPPED: tl.constexpr):
    """sums + x wᵀ, or its transpose."""
    if IS_SWAPPED:
        sums = tl.dot(w, tl.trans(x), sums, input_precision="ieee", out_dtype=sums.dtype)
    else:
        sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee", out_dtype=sums.dtype)
    return sums


@triton.jit
def _four_bits(words, shift: tl.constexpr, zero_N, dtype: tl.constexpr):
    """q - zero, exact: q as the last bits of a float's fraction is 128 + q, or 1024 + q, without converting."""
    base: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
    offset: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
    shifted = ((words >> shift) & 15 | base).to(dtype, bitcast=True)
    return shifted - (offset + zero_N).to(dtype)[:, None]


@triton.jit
def products(
    x_rows, is_row, x_scale_rows, w_rows, scale_rows, zero_rows, first_step, num_steps,
    K: tl.constexpr, GROUP: tl.constexpr, X_GROUP: tl.constexpr, PER_WORD: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, IS_EVEN: tl.constexpr, IS_SWAPPED: tl.constexpr,
):  # fmt: skip
    """x wᵀ in float32 over num_steps steps of BLOCK_K columns; rows are given by where each, and its scales, begin.

    A word is a column of W, or PER_WORD = 2 or 4 columns of 4 bits, multiplied by every second or fourth of x.
    Where is_row is false, x is zeros and not read.
    """
    BLOCK_M: tl.constexpr = x_rows.shape[0]
    BLOCK_N: tl.constexpr = w_rows.shape[0]
    words: tl.constexpr = BLOCK_K // PER_WORD
    x_type: tl.constexpr = x_rows.dtype.element_ty
    integers: tl.constexpr = x_type == tl.int8
    sum_type: tl.constexpr = tl.int32 if integers else tl.float32
    is_e4m3: tl.constexpr = x_type.primitive_bitwidth == 8 and not integers
    # Groups are scaled one by one; and Hopper's sums of E4M3 products have few bits, so that they are kept short.
    is_grouped: tl.constexpr = (GROUP > 0) or (X_GROUP > 0) or is_e4m3
    shape_m: tl.constexpr = BLOCK_N if IS_SWAPPED else BLOCK_M
    shape_n: tl.constexpr = BLOCK_M if IS_SWAPPED else BLOCK_N
    total = tl.zeros((shape_m, shape_n), tl.float32 if is_grouped else sum_type)
    for index in tl.range(0, num_steps, num_stages=STAGES):
        step = first_step + index
        columns = step * BLOCK_K + tl.arange(0, BLOCK_K)
        packed = step * words + tl.arange(0, words)
        x_mask = is_row[:, None] if IS_EVEN else is_row[:, None] & (columns < K)[None, :]
        x = tl.load(x_rows[:, None] + columns[None, :], mask=x_mask, other=0.0)
        if PER_WORD > 1 and is_e4m3:  # exact, and four bits become halves faster than E4M3
            x = x.to(tl.float16)
        w = _load(w_rows[:, None] + packed[None, :], (packed < K // PER_WORD)[None, :], IS_EVEN)
        first = tl.minimum(step * BLOCK_K, K - 1)  # the last part may end after K: it multiplies zeros, by any scale
        group = first // GROUP if GROUP else 0
        sums = tl.zeros((shape_m, shape_n), sum_type) if is_grouped else total
        if PER_WORD > 1:
            zero = tl.full((BLOCK_N,), 8, tl.float32)
            if zero_rows is not None:
                zero = tl.load(zero_rows + group).to(tl.float32)
            w = w.to(tl.int16)
            if PER_WORD == 2:
                x_0, x_1 = tl.split(tl.reshape(x, (BLOCK_M, words, 2)))
            else:
                even, odd = tl.split(tl.reshape(x, (BLOCK_M, words, 2, 2)))
                x_0, x_2 = tl.split(even)
                x_1, x_3 = tl.split(odd)
                sums = _product(x_2, _four_bits(w, 8, zero, x.dtype), sums, IS_SWAPPED)
                sums = _product(x_3, _four_bits(w, 12, zero, x.dtype), sums, IS_SWAPPED)
            sums = _product(x_0, _four_bits(w, 0, zero, x.dtype), sums, IS_SWAPPED)
            sums = _product(x_1, _four_bits(w, 4, zero, x.dtype), sums, IS_SWAPPED)
        else:
            if zero_rows is not None:
                zero = tl.load(zero_rows + group).to(tl.int16)
                w = (w.to(tl.int16) - zero[:, None]).to(x.dtype)
            sums = _product(x, w.to(x.dtype), sums, IS_SWAPPED)
        if GROUP:
            scale = tl.load(scale_rows + group).to(tl.float32)
            sums = sums.to(tl.float32) * (scale[:, None] if IS_SWAPPED else scale[None, :])
        if X_GROUP:
            x_scale = tl.load(x_scale_rows + first // X_GROUP, mask=is_row, other=0.0)
            sums = sums.to(tl.float32) * (x_scale[None, :] if IS_SWAPPED else x_scale[:, None])
        total = total + sums if is_grouped else sums

    y = total.to(tl.float32)
    if IS_SWAPPED:
        y = tl.trans(y)
    if x_scale_rows is not None and X_GROUP == 0:
        y *= tl.load(x_scale_rows, mask=is_row, other=0.0)[:, None]
    if scale_rows is not None and GROUP == 0:
        y *= tl.load(scale_rows).to(tl.float32)[None, :]
    return y


@triton.jit
def _prefetch(w_rows, first, num_words, AHEAD: tl.constexpr):
    """AHEAD words of each row, as far as there are."""
    per_line: tl.constexpr = 1024 // w_rows.dtype.element_ty.primitive_bitwidth  # of 128 bytes
    words = tl.minimum(first + tl.arange(0, AHEAD // per_line) * per_line, num_words - 1)
    prefetch(w_rows[:, None] + words[None, :])


@triton.jit(do_not_specialize=["M"])
def _rows(
    x_MK, x_scale_MG, w_NK, scale_NG, zero_NG, bias_N, y_MN, parts_SMN, arrived, M, N, num_groups, x_groups,
    K: tl.constexpr, GROUP: tl.constexpr, X_GROUP: tl.constexpr, PER_WORD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr, IS_EVEN: tl.constexpr, IS_SWAPPED: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of x by BLOCK_N rows of W on tensor cores, BLOCK_K columns at a time, a group at most."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    inside_n = tl.minimum(n, N - 1)
    x_rows = x_MK + m.to(tl.int64) * K
    w_rows = w_NK + inside_n.to(tl.int64) * (K // PER_WORD)
    x_scale_rows = None if x_scale_MG is None else x_scale_MG + m * x_groups
    scale_rows = None if scale_NG is None else scale_NG + inside_n * num_groups
    zero_rows = None if zero_NG is None else zero_NG + inside_n * num_groups
    steps: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)
    if IS_EARLY:
        _prefetch(w_rows, split * steps * (BLOCK_K // PER_WORD), K // PER_WORD, AHEAD)
    wait_for_previous(IS_EARLY)
    y = products(
        x_rows, m < M, x_scale_rows, w_rows, scale_rows, zero_rows, split * steps, steps,
        K, GROUP, X_GROUP, PER_WORD, BLOCK_K, STAGES, IS_EVEN, IS_SWAPPED,
    )  # fmt: skip
    places = m.to(tl.int64)[:, None] * N + n[None, :]
    is_inside = (m < M)[:, None] & (n < N)[None, :]
    is_last = True
    if SPLITS > 1:
        # Whoever comes last adds all parts in their order: the sum is the same every time.
        tl.store(parts_SMN + split.to(tl.int64) * M * N + places, y, mask=is_inside)
        tl.debug_barrier()
        counter = arrived + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        is_last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for each in range(SPLITS):
                part = parts_SMN + tl.cast(each, tl.int64) * M * N + places
                y += tl.load(part, mask=is_inside, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)
    if is_last:
        if bias_N is not None:
            y += tl.load(bias_N + inside_n).to(tl.float32)[None, :]
        tl.store(y_MN + places, y.to(y_MN.dtype.element_ty), mask=is_inside)


@triton.jit
def _widen(
    w_NK, scale_NG, zero_NG, out_NK, num_groups, K: tl.constexpr, GROUP: tl.constexpr, IS_PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """A row's next COLUMNS columns of W as numbers of x's dtype."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < K
    if IS_PAIRS:
        halves = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        pairs = tl.load(w_NK + row * (K // 2) + halves, mask=halves < K // 2, other=0)
        w = tl.interleave(pairs & 15, pairs >> 4).to(tl.float32)
        zero = 8.0
    else:
        w = tl.load(w_NK + row * K + columns, mask=inside, other=0.0).to(tl.float32)
        zero = 0.0
    group = row * num_groups + (columns // GROUP if GROUP else columns * 0)
    if zero_NG is not None:
        w -= tl.load(zero_NG + group, mask=inside, other=0).to(tl.float32)
    else:
        w -= zero
    w *= tl.load(scale_NG + group, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_NK + row * K + columns, w.to(out_NK.dtype.element_ty), mask=inside)


def _through_dense(x_MK: Tensor, weight: Weight, bias_N: Tensor | None) -> Tensor:
    """For many rows: W as numbers of x's dtype, a part after the other, and the library's product."""
    assert weight.scale_NG is not None
    (num_rows, num_columns), num_out = x_MK.shape, weight.packed.shape[0]
    group, is_pairs = whole_group(weight.group_size, num_columns), weight.packed.dtype == torch.uint8
    at_once = min(num_out, max(128, _WIDE_BYTES // (num_columns * x_MK.itemsize) // 128 * 128))
    wide_NK = x_MK.new_empty(at_once, num_columns)
    y_MN = x_MK.new_empty(num_rows, num_out)
    for first in range(0, num_out, at_once):
        part = slice(first, min(first + at_once, num_out))
        packed, scale_NG, zero_NG = (None if each is None else each[part] for each in weight[:3])
        grid = part.stop - first, triton.cdiv(num_columns, 2048)
        _widen[grid](
            packed, scale_NG, zero_NG, wide_NK, weight.scale_NG.shape[1], num_columns, group, is_pairs, 2048
        )  # fmt: skip
        w_KN, out_MN = wide_NK[: part.stop - first].t(), y_MN[:, part]
        if bias_N is None:
            torch.mm(x_MK, w_KN, out=out_MN)
        else:
            torch.addmm(bias_N[part], x_MK, w_KN, out=out_MN)
    return y_MN


INVARIANT_ROWS = 64  # that tiles are chosen for where a row's sums must not depend on how many rows there are
_WIDE_BYTES = 128 << 20  # of a packed weight that are dense at a time


def supports(x_MK: Tensor, weight: Weight) -> bool:
    """Whether groups hold whole vectors, rows start at whole vectors, and the dtypes are the tensor cores'."""
    num_columns, is_packed = x_MK.shape[1], weight.packed.dtype == torch.uint8
    groups = [size for size in (weight.group_size, weight.x_group_size) if size and size < num_columns]
    return (
        x_MK.dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)
        and num_columns % (32 if is_packed else 16) == 0
        and all(size >= 32 and size & (size - 1) == 0 for size in groups)
        and x_MK.shape[0] > 0
    )


def product(
    x_MK: Tensor, weight: Weight, bias_N: Tensor | None, dtype: torch.dtype, tiles: Tiles | None = None,
    is_batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """x Wᵀ + b in dtype, for what `supports` allows, and for float32.

    is_batch_invariant: the tiles, and so the order of each row's sums, are the same for any number of rows.
    """
    x_MK = x_MK.contiguous()
    num_rows, num_columns = x_MK.shape
    num_out = weight.packed.shape[0]
    planned_rows = INVARIANT_ROWS if is_batch_invariant else num_rows
    if tiles is None and planned_rows > 256 and weight.x_scale_MG is None and weight.scale_NG is not None:
        return _through_dense(x_MK, weight, bias_N)
    group = whole_group(weight.group_size, num_columns)
    x_group = whole_group(weight.x_group_size, num_columns)
    tiles = tiles or choose_tiles(planned_rows, num_out, num_columns, group, x_MK.dtype, weight.packed.dtype)
    num_groups = weight.scale_NG.shape[1] if weight.scale_NG is not None else 1
    y_MN = x_MK.new_empty(num_rows, num_out, dtype=dtype)
    is_early = starts_early(x_MK.device)
    launch = {"num_warps": tiles.warps, "num_stages": tiles.stages, "launch_pdl": is_early}
    words = weight.packed
    if tiles.splits == 0:
        if words.dtype == torch.uint8:
            words = words.view(torch.int32)
        _row[(triton.cdiv(num_out, tiles.rows),)](
            x_MK, weight.x_scale_MG, words, weight.scale_NG, weight.zero_NG, bias_N, y_MN, num_out, num_groups,
            num_columns, group, x_group, num_columns // words.shape[1], 16 // words.itemsize, tiles.rows,
            tiles.columns, words.shape[1] % tiles.columns == 0, is_early, **launch,
        )  # fmt: skip
        return y_MN
    block_m = 16 if x_MK.dtype == torch.float32 else min(128, max(16, triton.next_power_of_2(planned_rows)))
    block_k = min(tiles.columns, group or tiles.columns, x_group or tiles.columns)
    if words.dtype == torch.uint8 and block_k >= 64:  # a product on tensor cores sums 16 columns or more
        words = words.view(torch.int16)
    grid = triton.cdiv(num_rows, block_m), triton.cdiv(num_out, tiles.rows), tiles.splits
    parts_SMN = arrived = None
    if tiles.splits > 1:
        parts_SMN = y_MN.new_empty(tiles.splits, num_rows, num_out, dtype=torch.float32)
        arrived = arrivals(x_MK.device)
    x_groups = weight.x_scale_MG.shape[1] if weight.x_scale_MG is not None else 1
    per_word = num_columns // words.shape[1]
    _rows[grid](
        x_MK, weight.x_scale_MG, words, weight.scale_NG, weight.zero_NG, bias_N, y_MN,
        parts_SMN, arrived, num_rows, num_out, num_groups, x_groups, num_columns, group, x_group,
        per_word, block_m, tiles.rows, block_k, tiles.splits, tiles.stages,
        _words_ahead(words.shape[1], block_k // per_word, tiles.splits),
        num_columns % (block_k * tiles.splits) == 0, tiles.is_swapped, is_early, **launch,
    )  # fmt: skip
    return y_MN


def _words_ahead(num_words: int, at_a_time: int, splits: int) -> int:
    """Of each row, fetched while the kernel ahead still runs: all that a program reads, where that is little."""
    num_read = -(-num_words // (at_a_time * splits)) * at_a_time
    return max(128, triton.next_power_of_2(num_read) if num_read <= 1024 else 2 * at_a_time)


def whole_group(group_size: int, num_columns: int) -> int:
    """A group that holds the whole row is none."""
    return group_size if group_size < num_columns else 0


def choose_tiles(
    num_rows: int, num_out: int, num_columns: int, group: int, x_type: torch.dtype, packed_type: torch.dtype
) -> Tiles:
    """Tiles by shape alone, those that were fastest on an H100 or an H200 (benchmarks/gpu_linear.py)."""
    columns, is_narrow, is_wide = 256 // x_type.itemsize, num_out < 6144, num_out >= 16384
    if x_type == torch.float32:  # exact products run outside the tensor cores, from registers
        return Tiles(32, 32, stages=2)
    if num_rows == 1:
        return _tiles_of_a_row(num_out, num_columns, packed_type)
    if num_rows <= 64 and packed_type == x_type and x_type.itemsize == 2 and num_columns <= 2048 and num_out <= 8192:
        return _tiles_of_little(num_rows, num_out, num_columns)
    if num_rows <= 64 and packed_type != x_type:
        return _tiles_to_widen(num_rows, num_out, group, columns)
    if num_rows <= 16 and group:
        return Tiles(32, group, splits=2 if is_narrow else 1, stages=6)
    if num_rows <= 16:
        return Tiles(64, columns, splits=4 if is_narrow else 1, is_swapped=True)
    if num_rows <= 64 and group:
        return Tiles(32 if is_narrow else 64, columns)
    if num_rows <= 64 and x_type.itemsize == 1:
        if is_narrow:
            return Tiles(32, columns, stages=6)
        return Tiles(64, columns, stages=3 if is_wide else 4, is_swapped=True)
    if num_rows <= 64 and is_narrow:
        return Tiles(32, columns, stages=6)
    if num_rows <= 64:
        return Tiles(128, columns, stages=3) if is_wide else Tiles(64, columns)
    return Tiles(128, columns // 2, warps=8, stages=3)


def _tiles_of_a_row(num_out: int, num_columns: int, packed_type: torch.dtype) -> Tiles:
    """What is read at once ends with the row where it can; where rows are many, there are few threads for each."""
    if packed_type == torch.uint8:
        words = num_columns // 8
        if words > 512:
            return Tiles(8, 512, splits=0)
        if words % 256 or (num_out >= 16384 and words <= 256):
            return Tiles(16, 128, splits=0, warps=2 if words <= 256 else 4)
        return Tiles(16, 256, splits=0)
    if packed_type.itemsize == 2:
        return Tiles(2, 2048, splits=0, warps=8)
    return Tiles(2 if packed_type == torch.int8 else 4, 2048, splits=0)


def _tiles_of_little(num_rows: int, num_out: int, num_columns: int) -> Tiles:
    """For W of which a program has little: what counts is that all of it is on its way before x is there."""
    if num_out > 4096:
        return Tiles(64, 128 if num_rows <= 32 else 64, is_swapped=True)
    if num_columns > 1024:
        return Tiles(32, 128, splits=4, stages=3)
    if num_out > 1024:
        return Tiles(64, 128, is_swapped=True) if num_rows <= 16 else Tiles(32, 128, stages=6)
    return Tiles(16, 64, warps=2, stages=6) if num_rows <= 32 else Tiles(32, 64, stages=6)


def _tiles_to_widen(num_rows: int, num_out: int, group: int, columns: int) -> Tiles:
    """For W in another dtype than x: tiles wait for conversions, so that more programs share the work."""
    splits = 4 if num_out <= 8192 else 1
    if num_rows <= 16 and group:
        return Tiles(64, group, splits)
    if num_rows <= 16:
        return Tiles(32, 2 * columns, splits)
    if num_out >= 16384:
        return Tiles(128, columns, stages=3, is_swapped=group > 0)
    return Tiles(64, columns, splits, stages=3, is_swapped=True)
