"""AWQ (arXiv:2306.00978) as AutoAWQ stores it, version "gemm": 4 bits, groups, zero points.

qweight int32 [K, N/8], qzeros int32 [K/g, N/8], scales [K/g, N]; the eight values of a word belong to the columns
0 2 4 6 1 3 5 7, lowest bits first (awq/utils/packing_utils.py).
"""

import torch
from torch import Tensor

from slipstream.checkpoint.packed import PackedLinear
from slipstream.checkpoint.quantized.linears import FLOATS, Parts, integer_linear, values_of_words
from slipstream.schema.model import Options

_PLACE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)  # the inverse of 0 2 4 6 1 3 5 7


def read(options: Options, parts: Parts) -> dict[str, PackedLinear]:
    options.choice("bits", (4,), options.choice("w_bit", (4,), 4))
    group_size = options.integer("group_size", options.integer("q_group_size", 128, low=-1), low=-1)
    options.choice("version", ("gemm", "GEMM"), "gemm")
    options.choice("zero_point", (True,), True)
    options.skip(
        "backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse", "modules_to_not_convert"
    )
    options.finish("AWQ")
    return {f"{owner}.weight": _linear(parts, owner, group_size) for owner in parts.owners(".qweight")}


def _linear(parts: Parts, owner: str, group_size: int) -> PackedLinear:
    num_in, num_words = parts.shape(f"{owner}.qweight", 2)
    num_out = num_words * 8
    group_size = 0 if group_size < 1 or group_size >= num_in else group_size
    num_groups = -(-num_in // group_size) if group_size else 1
    qweight = parts.use(f"{owner}.qweight", (num_in, num_words), (torch.int32,))
    qzeros = parts.use(f"{owner}.qzeros", (num_groups, num_words), (torch.int32,))
    scales = parts.use(f"{owner}.scales", (num_groups, num_out), FLOATS)
    return integer_linear(
        4, (num_out, num_in), group_size, parts.scale_dtype(f"{owner}.scales"),
        values=lambda: _columns(qweight()).t(), scale=lambda: scales().t(), zero=lambda: _columns(qzeros()).t(),
    )  # fmt: skip


def _columns(words_RW: Tensor) -> Tensor:
    """uint8 [R, 8 W]"""
    values = values_of_words(words_RW, 4, 8 * words_RW.shape[1])
    return values.unflatten(1, (-1, 8))[:, :, _PLACE_OF_COLUMN].flatten(1)
