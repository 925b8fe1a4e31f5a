"""The largest numbers of each row, in two launches: of each part of a row, and then of what the parts have found.

    row     3.0  -1.0   7.0 │  0.5   8.0   2.0        of each part the first two, as keys
    keys    (7.0, 2) (3.0, 0) │ (8.0, 4) (2.0, 5)      a number's order above its place: no two are alike
    found   (8.0, 4) (7.0, 2)

torch's topk has one program for a row, which goes over it once for each few bits: 38 to 49 us for 8,192 numbers on an
H200 (benchmarks/2026-11-23-h200.md).

Shape suffixes: R rows, N numbers of each, P parts, K that are looked for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 1024  # numbers that a program sorts; more of longer rows, so that MOST_FOUND are found at most
MOST_FOUND = 2048

_PLACES = tl.constexpr(0x7FFFFFFF)
_NOTHING = tl.constexpr(-(2**63))


@triton.jit
def _largest(
    x, keys, values, places, x_stride, size, num_parts,
    IS_FIRST: tl.constexpr, IS_LAST: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr, ASKED: tl.constexpr,
):  # fmt: skip
    """Of BLOCK numbers of a row the COUNT largest; x: numbers, or the keys of those that were found."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place_N = part * BLOCK + tl.arange(0, BLOCK)
    is_there_N = place_N < size
    found_N = tl.load(x + row * x_stride + place_N, mask=is_there_N, other=0)
    if IS_FIRST:
        number_N = found_N.to(tl.float32)
        bits_N = tl.where(number_N == 0, 0.0, number_N).to(tl.int32, bitcast=True)  # -0 is 0
        order_N = (bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF)).to(tl.int64)
        found_N = (order_N << 32) + (place_N ^ _PLACES)
    key_K = tl.topk(tl.where(is_there_N, found_N, _NOTHING), COUNT)
    rank_K = tl.arange(0, COUNT)
    if IS_LAST:
        order_K = (key_K >> 32).to(tl.int32)
        number_K = (order_K ^ ((order_K >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        is_asked_K = rank_K < ASKED
        tl.store(values + row * ASKED + rank_K, number_K.to(values.dtype.element_ty), mask=is_asked_K)
        tl.store(places + row * ASKED + rank_K, (key_K & _PLACES) ^ _PLACES, mask=is_asked_K)
    else:
        tl.store(keys + (row * num_parts + part) * COUNT + rank_K, key_K)


def largest(x_RN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As torch.topk of the last dimension; of equals the first come first. Rows have at least `count` numbers."""
    rows, size = x_RN.reshape(-1, x_RN.shape[-1]), x_RN.shape[-1]
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    block_of_count = max(2, triton.next_power_of_2(count))
    values = x_RN.new_empty(*x_RN.shape[:-1], count)
    places = torch.empty(values.shape, dtype=torch.int64, device=x_RN.device)
    part = PART
    while triton.cdiv(size, part) * block_of_count > MOST_FOUND:
        part *= 2
    num_parts = triton.cdiv(size, part)
    if not len(rows):
        return values, places
    if num_parts == 1:
        block = max(block_of_count, triton.next_power_of_2(size))
        _largest[len(rows), 1](
            rows, None, values, places, rows.stride(0), size, 1, True, True, block, block_of_count, count
        )
        return values, places
    num_found = num_parts * block_of_count
    keys_RP = torch.empty(len(rows), num_found, dtype=torch.int64, device=x_RN.device)
    _largest[len(rows), num_parts](
        rows, keys_RP, None, None, rows.stride(0), size, num_parts, True, False, part, block_of_count, count
    )
    _largest[len(rows), 1](
        keys_RP, None, values, places, num_found, num_found, 1, False, True, triton.next_power_of_2(num_found),
        block_of_count, count,
    )  # fmt: skip
    return values, places
