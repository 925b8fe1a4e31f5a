"""AWQ (arXiv:2306.00978) as AutoAWQ stores it, version "gemm": 4 bits, groups, zero points.
GPTQModel stores it so, too, and symmetric weights with zero points of 8 (zero_point false).

qweight int32 [K, N/8], qzeros int32 [K/g, N/8], scales [K/g, N]; the eight values of a word belong to the columns
0 2 4 6 1 3 5 7, lowest bits first (awq/utils/packing_utils.py).
"""

from typing import Any

import torch
from torch import Tensor

from slipstream.checkpoint.packed import PackedLinear
from slipstream.checkpoint.quantized.gptq import HOW_FOUND
from slipstream.checkpoint.quantized.linears import FLOATS, Parts, integer_linear, values_of_words, words_of_values
from slipstream.checkpoint.quantized.outgoing import (
    QuantizedLinear,
    QuantizedModel,
    no_cache_tensors,
    no_files,
    refusal_of_groups,
    refusal_of_layout,
    shared_group_size,
)
from slipstream.engine.tensor_file import TensorEntry
from slipstream.errors import CorruptFile
from slipstream.schema.model import Options

_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word's values
_PLACE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)  # the inverse


def read(options: Options, parts: Parts) -> dict[str, PackedLinear]:
    options.choice("bits", (4,), options.choice("w_bit", (4,), 4))
    group_size = options.integer("group_size", options.integer("q_group_size", 128, low=-1), low=-1)
    for name in ("version", "format", "checkpoint_format"):  # AutoAWQ's word, and GPTQModel's two for the same
        options.choice(name, ("gemm", "GEMM"), "gemm")
    options.choice("method", ("awq",), "awq")
    options.choice("pack_dtype", ("int32",), "int32")
    has_zeros = options.boolean("zero_point", True)
    options.skip("do_fuse", "fuse_max_seq_len", "modules_to_fuse", "modules_to_not_convert", "sym", *HOW_FOUND)
    options.finish("AWQ")
    return {f"{owner}.weight": _linear(parts, owner, group_size, has_zeros) for owner in parts.owners(".qweight")}


def _linear(parts: Parts, owner: str, group_size: int, has_zeros: bool) -> PackedLinear:
    num_in, num_words = parts.shape(f"{owner}.qweight", 2)
    num_out = num_words * 8
    group_size = 0 if group_size < 1 or group_size >= num_in else group_size
    num_groups = -(-num_in // group_size) if group_size else 1
    qweight = parts.use(f"{owner}.qweight", (num_in, num_words), (torch.int32,))
    qzeros = parts.use(f"{owner}.qzeros", (num_groups, num_words), (torch.int32,))
    scales = parts.use(f"{owner}.scales", (num_groups, num_out), FLOATS)

    def zero() -> Tensor:
        return _columns(qzeros()).t()

    def values() -> Tensor:
        if not has_zeros and not (zero() == 8).all():
            raise CorruptFile(
                f"The tensor {owner}.qzeros has zero points other than 8; zero_point must be true for it."
            )
        return _columns(qweight()).t()

    return integer_linear(
        4, (num_out, num_in), group_size, parts.scale_dtype(f"{owner}.scales"),
        values=values, scale=lambda: scales().t(), zero=zero if has_zeros else None,
    )  # fmt: skip


def _columns(words_RW: Tensor) -> Tensor:
    """uint8 [R, 8 W]"""
    values = values_of_words(words_RW, 4, 8 * words_RW.shape[1])
    return values.unflatten(1, (-1, 8))[:, :, _PLACE_OF_COLUMN].flatten(1)


def _words(values_RC: Tensor) -> Tensor:
    """int32 [R, C / 8]"""
    return words_of_values(values_RC.unflatten(1, (-1, 8))[:, :, _COLUMNS].flatten(1), 4)


def refusal(model: QuantizedModel) -> str:
    return refusal_of_layout(model, "AWQ", _refusal)


def _refusal(linear: QuantizedLinear) -> str:
    if linear.format.kind != "w4a16":
        return "is not of 4 bits with activations as they are, as AWQ's are; give compressed-tensors"
    if linear.format.order:
        return "has its columns in act-order, which AWQ does not know; give gptq"
    if linear.num_out % 8:
        return f"has {linear.num_out} rows, and AWQ packs eight in a word; give compressed-tensors"
    if linear.format.scale_dtype != "float16":
        return f"has scales in {linear.format.scale_dtype}, and AWQ's are in float16; give compressed-tensors"
    return refusal_of_groups(linear)


def tensors(linear: QuantizedLinear) -> list[TensorEntry]:
    owner, num_groups, num_words = linear.owner, linear.num_groups, linear.num_out // 8
    return [
        (f"{owner}.qweight", (linear.num_in, num_words), torch.int32, lambda: _words(linear.values().t())),
        (f"{owner}.qzeros", (num_groups, num_words), torch.int32, lambda: _words(linear.zeros().t())),
        (f"{owner}.scales", (num_groups, linear.num_out), torch.float16, lambda: linear.read("scale").t().contiguous()),
    ]


cache_tensors = no_cache_tensors
files = no_files


def config(model: QuantizedModel) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": shared_group_size(model),
        "zero_point": True,
        "modules_to_not_convert": list(model.dense) or None,
    }
