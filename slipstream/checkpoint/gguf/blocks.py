"""Blocks of a GGUF file as parts of our formats: the numbers and scales that are stored, and nothing rounded.

A block is 32 columns of a row: a float16 scale (in Q4_1 a minimum, too), then the numbers. In 4 bits the first 16 are
in the low halves of bytes and the others in the high ones. The types: https://github.com/ggml-org/ggml, ggml-common.h.
"""

from dataclasses import replace

import torch
from torch import Tensor

from slipstream.checkpoint.gguf.file import GGMLType
from slipstream.kernels.linear.w4a16 import pack
from slipstream.schema.format import WeightFormat

COLUMNS = 32
# Activations are rounded in groups of as many columns as share a scale, as llama.cpp rounds them.
_FOUR = WeightFormat(kind="w4a8", group_size=COLUMNS, input_group_size=COLUMNS, scale_dtype="float16")
FORMATS = {
    GGMLType.Q4_0: _FOUR,
    GGMLType.Q4_1: replace(_FOUR, has_zeros=True),
    GGMLType.Q8_0: replace(_FOUR, kind="w8a8"),
}


def part_of(blocks: Tensor, format: WeightFormat, part: str) -> Tensor:
    """One part of a weight [N, K], from uint8 [N, K / 32, bytes of a block]."""
    halves = blocks[..., : 4 if format.has_zeros else 2].contiguous().view(torch.float16)
    if part == "scale":
        return halves[..., 0].contiguous()
    if part == "shift":  # what is taken off, where Q4_1 adds a minimum
        return -halves[..., 1]
    numbers = blocks[..., 2 * halves.shape[-1] :]
    if format.bits == 8:
        return numbers.flatten(1).view(torch.int8)
    return pack(torch.cat([numbers & 15, numbers >> 4], 2).flatten(1))
