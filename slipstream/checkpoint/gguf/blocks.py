"""Blocks of a GGUF file as parts of our formats: the numbers that are stored, and none of them rounded.

A block of the older types is 32 columns of a row: a float16 scale (in Q4_1 a minimum, too), then the numbers. Those
named _K are 256 columns in groups of 16 or 32, each with a small whole number that the block's float16 scale
multiplies; we keep the product, in float16. Numbers of 2 and 3 bits become 4, of 5 and 6 bits 8, and those that look
themselves up in a list (IQ4) are what they find there. The types: https://github.com/ggml-org/ggml, ggml-common.h.

Shape suffixes: N rows, B blocks of a row, K columns.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from slipstream.checkpoint.gguf.file import GGMLType
from slipstream.kernels.linear.w4a16 import SYMMETRIC_ZERO, pack
from slipstream.schema.format import WeightFormat

# Activations are rounded in groups of 32, as llama.cpp rounds them for the older types.
_FOUR = WeightFormat(kind="w4a8", group_size=32, input_group_size=32, scale_dtype="float16")
_FOUR_SHIFTED = replace(_FOUR, has_zeros=True)
_EIGHT = replace(_FOUR, kind="w8a8")
_EIGHT_SHIFTED = replace(_EIGHT, has_zeros=True)
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class Parts(NamedTuple):
    """Of blocks [N, B, bytes]: numbers [N, B, columns of a block], and per group [N, B, groups] a scale and a shift."""

    numbers: Tensor
    scale: Tensor
    shift: Tensor | None = None  # what is taken off


class BlockType(NamedTuple):
    format: WeightFormat
    read: Callable[[Tensor], Parts]


def part_of(blocks: Tensor, ggml_type: GGMLType, part: str) -> Tensor:
    """One part of a weight [N, K], from uint8 [N, B, bytes of a block]."""
    format, read = TYPES[ggml_type]
    found = read(blocks)
    if part != "packed":
        return getattr(found, part).to(torch.float16).flatten(1)
    numbers_NK = found.numbers.flatten(1)
    if format.bits == 8:
        return numbers_NK.to(torch.int8)
    zero = 0 if format.has_zeros else SYMMETRIC_ZERO
    return pack((numbers_NK + zero).to(torch.uint8))


def _fields(data: Tensor, bits: int, run: int) -> Tensor:
    """Of each `run` bytes the lowest `bits` of all, then the next of all, and so on."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return (data.unflatten(-1, (-1, 1, run)) >> shifts & (1 << bits) - 1).flatten(-3).char()


def _halves(blocks: Tensor, *places: int) -> Tensor:
    """The float16 numbers at these bytes, in float32 [N, B, places]."""
    return torch.cat([blocks[..., place : place + 2].contiguous().view(torch.float16) for place in places], -1).float()


def _q4_0(blocks: Tensor) -> Parts:
    return Parts(_fields(blocks[..., 2:], 4, 16) - 8, _halves(blocks, 0))


def _q4_1(blocks: Tensor) -> Parts:
    return Parts(_fields(blocks[..., 4:], 4, 16), _halves(blocks, 0), -_halves(blocks, 2))


def _q5_0(blocks: Tensor) -> Parts:
    return Parts((_fields(blocks[..., 6:], 4, 16) | _fields(blocks[..., 2:6], 1, 1) << 4) - 16, _halves(blocks, 0))


def _q5_1(blocks: Tensor) -> Parts:
    numbers = _fields(blocks[..., 8:], 4, 16) | _fields(blocks[..., 4:8], 1, 1) << 4
    return Parts(numbers, _halves(blocks, 0), -_halves(blocks, 2))


def _q8_0(blocks: Tensor) -> Parts:
    return Parts(blocks[..., 2:].contiguous().view(torch.int8), _halves(blocks, 0))


def _q2_k(blocks: Tensor) -> Parts:
    scales, minima = blocks[..., :16] & 15, blocks[..., :16] >> 4
    return Parts(_fields(blocks[..., 16:80], 2, 32), _halves(blocks, 80) * scales, _halves(blocks, 82) * minima)


def _q3_k(blocks: Tensor) -> Parts:
    high, low, scales = blocks[..., :32], blocks[..., 32:96], blocks[..., 96:108]
    factors = (_fields(scales[..., :8], 4, 8) | _fields(scales[..., 8:], 2, 4) << 4) - 32
    return Parts((_fields(low, 2, 32) | _fields(high, 1, 32) << 2) - 4, _halves(blocks, 108) * factors)


def _q4_k(blocks: Tensor) -> Parts:
    return Parts(_fields(blocks[..., 16:], 4, 32), *_scales_and_minima(blocks))


def _q5_k(blocks: Tensor) -> Parts:
    numbers = _fields(blocks[..., 48:], 4, 32) | _fields(blocks[..., 16:48], 1, 32) << 4
    return Parts(numbers, *_scales_and_minima(blocks))


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: 8 of 6 bits each in 12 bytes. The last four of either lie in pieces."""
    first, second, third = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat([first & 63, third & 15 | first >> 2 & 48], -1)
    minima = torch.cat([second & 63, third >> 4 | second >> 2 & 48], -1)
    return _halves(blocks, 0) * scales, _halves(blocks, 2) * minima


def _q6_k(blocks: Tensor) -> Parts:
    low, high, scales = blocks[..., :128], blocks[..., 128:192], blocks[..., 192:208]
    numbers = (_fields(low, 4, 64) | _fields(high, 2, 32) << 4) - 32
    return Parts(numbers, _halves(blocks, 208) * scales.contiguous().view(torch.int8))


def _iq4_nl(blocks: Tensor) -> Parts:
    return Parts(_listed(blocks[..., 2:]), _halves(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Parts:
    high, low = blocks[..., 2:4], blocks[..., 4:8]
    factors = (_fields(low, 4, 1) | _fields(high, 2, 1) << 4) - 32
    return Parts(_listed(blocks[..., 8:]), _halves(blocks, 0) * factors)


def _listed(data: Tensor) -> Tensor:
    return torch.tensor(_IQ4_VALUES, dtype=torch.int8)[_fields(data, 4, 16).int()]


TYPES = {
    GGMLType.Q4_0: BlockType(_FOUR, _q4_0),
    GGMLType.Q4_1: BlockType(_FOUR_SHIFTED, _q4_1),
    GGMLType.Q5_0: BlockType(_EIGHT, _q5_0),
    GGMLType.Q5_1: BlockType(_EIGHT_SHIFTED, _q5_1),
    GGMLType.Q8_0: BlockType(_EIGHT, _q8_0),
    GGMLType.Q2_K: BlockType(replace(_FOUR_SHIFTED, group_size=16), _q2_k),
    GGMLType.Q3_K: BlockType(replace(_FOUR, group_size=16), _q3_k),
    GGMLType.Q4_K: BlockType(_FOUR_SHIFTED, _q4_k),
    GGMLType.Q5_K: BlockType(_EIGHT_SHIFTED, _q5_k),
    GGMLType.Q6_K: BlockType(replace(_EIGHT, group_size=16), _q6_k),
    GGMLType.IQ4_NL: BlockType(_EIGHT, _iq4_nl),
    GGMLType.IQ4_XS: BlockType(_EIGHT, _iq4_xs),
}
