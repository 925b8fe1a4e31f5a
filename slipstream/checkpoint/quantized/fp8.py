"""FP8 as DeepSeek and Hugging Face store it (quant_method "fp8"): E4M3 with one scale, or one a 128 × 128 block."""

from typing import Any

import torch

from slipstream.checkpoint.packed import PackedLinear
from slipstream.checkpoint.quantized.linears import FP8, Parts, eight_bit_linear
from slipstream.checkpoint.quantized.outgoing import (
    QuantizedLinear,
    QuantizedModel,
    no_cache_tensors,
    no_files,
    refusal_of_groups,
    refusal_of_layout,
)
from slipstream.engine.tensor_file import TensorEntry
from slipstream.errors import CorruptFile
from slipstream.schema.model import Options

BLOCK = 128  # rows and columns


def read(options: Options, parts: Parts) -> dict[str, PackedLinear]:
    is_static = options.choice("activation_scheme", ("dynamic", "static"), "dynamic") == "static"
    options.choice("fmt", ("e4m3",), "e4m3")
    options.choice("scale_fmt", ("float", "ue8m0"), "float")  # of the weights' scales, which are float32 all the same
    block = read_block(options, "weight_block_size")
    options.skip("dequantize", "ignored_layers", "modules_to_not_convert", "kv_cache_scheme", "quant_storage_dtype")
    options.finish("FP8")
    linears = {}
    for suffix in (".weight_scale_inv", ".weight_scale"):
        for owner in parts.owners(suffix):
            linears[f"{owner}.weight"] = eight_bit_linear(
                parts, owner, "fp8", owner + suffix, block=block, input_group_size=block[1] if block else 0,
                input_scale=parts.scalar(f"{owner}.input_scale") if is_static else 0.0,
            )  # fmt: skip
    return linears


def read_block(options: Options, name: str) -> tuple[int, int] | None:
    """[rows, columns] of a block that shares a scale."""
    value = options.value(name)
    if value is None:
        return None
    ok = isinstance(value, list) and len(value) == 2 and all(type(x) is int and 1 <= x <= 2**20 for x in value)
    if not ok:
        raise CorruptFile(f"{name} is {str(value)[:80]}; it must be two sizes, such as [128, 128].")
    return value[0], value[1]


def refusal(model: QuantizedModel) -> str:
    return refusal_of_layout(model, "FP8", _refusal)


def _refusal(linear: QuantizedLinear) -> str:
    format = linear.format
    if (format.kind, format.group_size or linear.num_in, format.input_group_size) != ("fp8", BLOCK, BLOCK):
        return f"is not FP8 in blocks of {BLOCK} by {BLOCK}, as FP8's are; give compressed-tensors"
    return refusal_of_groups(linear) or refusal_of_blocks(linear)


def refusal_of_blocks(linear: QuantizedLinear) -> str:
    """Every row repeats the scales of its block here."""
    scale_NG = linear.read("scale")
    if torch.equal(scale_NG[::BLOCK].repeat_interleave(BLOCK, dim=0)[: len(scale_NG)], scale_NG):
        return ""
    return f"has scales of other rows than blocks of {BLOCK}; give slipstream, or the model that it was made of"


def block_scales(linear: QuantizedLinear, name: str) -> TensorEntry:
    shape = (-(-linear.num_out // BLOCK), linear.num_groups)
    return name, shape, torch.float32, lambda: linear.read("scale")[::BLOCK].contiguous()


def tensors(linear: QuantizedLinear) -> list[TensorEntry]:
    owner = linear.owner
    return [
        (f"{owner}.weight", (linear.num_out, linear.num_in), FP8, lambda: linear.read("packed")),
        block_scales(linear, f"{owner}.weight_scale_inv"),
    ]


cache_tensors = no_cache_tensors
files = no_files


def config(model: QuantizedModel) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": list(model.dense) or None,
    }
