"""NVIDIA ModelOpt's Hugging Face export: hf_quant_config.json, or the same below quantization_config.

FP8               weight E4M3 [N, K], weight_scale and input_scale one number each
FP8_PER_CHANNEL_PER_TOKEN  weight_scale [N], activations by token
NVFP4, W4A16_NVFP4  weight uint8 [N, K/2] of E2M1, weight_scale E4M3 [N, K/16], weight_scale_2 one number for all.
                  NVFP4 rounds activations, too, by input_scale; here they stay as they are.
"""

from typing import Any

import torch

from slipstream.checkpoint.packed import PackedLinear
from slipstream.checkpoint.quantized.linears import Parts, eight_bit_linear, nvfp4_linear
from slipstream.checkpoint.quantized.outgoing import (
    QuantizedLinear,
    QuantizedModel,
    first_refusal,
    no_cache_tensors,
    refusal_of_groups,
    refusal_of_row_scales,
)
from slipstream.engine.tensor_file import TensorEntry
from slipstream.schema.format import NVFP4, WeightFormat
from slipstream.schema.model import Options

FP8, FP8_PER_CHANNEL, FP8_BLOCKS = "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES"
NVFP4_ALGORITHMS = W4A4, W4A16 = "NVFP4", "W4A16_NVFP4"
ALGORITHMS = (FP8, FP8_PER_CHANNEL, FP8_BLOCKS, *NVFP4_ALGORITHMS)
WRITTEN = {WeightFormat(kind="fp8"): FP8_PER_CHANNEL, NVFP4: W4A16}
BLOCK = (128, 128)
CONFIG_FILE = "hf_quant_config.json"
cache_tensors = no_cache_tensors


def read(options: Options, parts: Parts) -> dict[str, PackedLinear]:
    options.skip("producer", "quant_library", "quant_library_version")
    section = options.section("quantization") or options
    algorithm = section.choice("quant_algo", (*ALGORITHMS, None))
    section.skip("config_groups", "exclude_modules", "group_size", "ignore", "kv_cache_quant_algo", "kv_cache_scheme")
    for each in (section, options):
        each.finish("ModelOpt")
    return {f"{owner}.weight": _linear(parts, owner, algorithm) for owner in parts.owners(".weight_scale")}


def _linear(parts: Parts, owner: str, algorithm: str) -> PackedLinear:
    if algorithm in NVFP4_ALGORITHMS:
        return nvfp4_linear(parts, owner, "weight", "weight_scale_2")
    return eight_bit_linear(
        parts, owner, "fp8", f"{owner}.weight_scale", block=BLOCK if algorithm == FP8_BLOCKS else None,
        input_group_size=BLOCK[1] if algorithm == FP8_BLOCKS else 0,
        input_scale=parts.scalar(f"{owner}.input_scale") if algorithm == FP8 else 0.0,
    )  # fmt: skip


def refusal(model: QuantizedModel) -> str:
    if model.kv_cache.dtype:
        return "ModelOpt is written without a KV cache in 8 bits; give compressed-tensors, or another --kv_cache_dtype"
    if len({linear.format for linear in model.linears}) > 1:
        return "ModelOpt is written with one format for all linears, and here they differ; give compressed-tensors"
    return first_refusal(model, _refusal)


def _refusal(linear: QuantizedLinear) -> str:
    if linear.format not in WRITTEN:
        return "is neither NVFP4 nor FP8 by row and token, which ModelOpt is written with; give compressed-tensors"
    return refusal_of_groups(linear) or (refusal_of_row_scales(linear) if linear.format == NVFP4 else "")


def tensors(linear: QuantizedLinear) -> list[TensorEntry]:
    owner, num_out = linear.owner, linear.num_out
    if linear.format != NVFP4:
        return [
            (f"{owner}.weight", (num_out, linear.num_in), torch.float8_e4m3fn, lambda: linear.read("packed")),
            (f"{owner}.weight_scale", (num_out,), torch.float32, lambda: linear.read("scale")[:, 0].contiguous()),
        ]
    scales = num_out, linear.num_groups
    return [
        (f"{owner}.weight", (num_out, linear.num_in // 2), torch.uint8, lambda: linear.read("packed")),
        (f"{owner}.weight_scale", scales, torch.float8_e4m3fn, lambda: linear.read("scale")),
        (f"{owner}.weight_scale_2", (), torch.float32, lambda: linear.read("row_scale")[0, 0].clone()),
    ]


def config(model: QuantizedModel) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": _algorithm(model), "ignore": list(model.dense)}


def files(model: QuantizedModel) -> dict[str, dict[str, Any]]:
    """As TensorRT-LLM reads it."""
    said = {"quant_algo": _algorithm(model), "kv_cache_quant_algo": None, "exclude_modules": list(model.dense)}
    group_size = model.linears[0].format.group_size
    return {CONFIG_FILE: {"quantization": said | ({"group_size": group_size} if group_size else {})}}


def _algorithm(model: QuantizedModel) -> str:
    return WRITTEN[model.linears[0].format]
