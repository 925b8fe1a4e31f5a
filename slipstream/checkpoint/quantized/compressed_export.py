"""Packed weights as compressed-tensors, whatever tool they came from: what transformers and vLLM read."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slipstream.checkpoint.kv_cache import KVCache
from slipstream.checkpoint.quantized.fp8 import BLOCK, block_scales, refusal_of_blocks
from slipstream.checkpoint.quantized.linears import words_of_values
from slipstream.checkpoint.quantized.outgoing import (
    QuantizedLinear,
    QuantizedModel,
    first_refusal,
    no_files,
    refusal_of_groups,
    refusal_of_row_scales,
)
from slipstream.engine.tensor_file import TensorEntry
from slipstream.schema.build import KV_DTYPES
from slipstream.schema.format import INTEGERS_OF_4_BITS, PACKED_DTYPES, QUANTIZES_ACTIVATIONS, WeightFormat

_STORED_AS = {"w4a16": "pack-quantized", "w8a16": "pack-quantized", "w8a8": "int-quantized", "fp8": "float-quantized",
              "fp8a16": "naive-quantized", "w4afp8": "pack-quantized", "nvfp4a16": "nvfp4-pack-quantized"}  # fmt: skip

files = no_files


def refusal(model: QuantizedModel) -> str:
    if model.kv_cache.skip_layers:
        return "compressed-tensors has one dtype for the KV cache of all layers, and here some are left out of 8 bits"
    return first_refusal(model, _refusal)


def _refusal(linear: QuantizedLinear) -> str:
    if linear.format.kind == "nvfp4a16":
        return refusal_of_groups(linear) or refusal_of_row_scales(linear)
    return refusal_of_blocks(linear) if _is_blocks(linear.format) else refusal_of_groups(linear)


def tensors(linear: QuantizedLinear) -> list[TensorEntry]:
    format, owner = linear.format, linear.owner
    if format.kind == "nvfp4a16":
        return _nvfp4(linear)
    if format.kind in ("w4a16", "w8a16", "w4afp8"):
        return _packed(linear) + _input_scale(linear)
    dtype = getattr(torch, PACKED_DTYPES[format.kind])
    found: list[TensorEntry] = [
        (f"{owner}.weight", (linear.num_out, linear.num_in), dtype, lambda: linear.read("packed")),
        block_scales(linear, f"{owner}.weight_scale") if _is_blocks(format) else _scales(linear),
    ]
    return found + _input_scale(linear)


def _input_scale(linear: QuantizedLinear) -> list[TensorEntry]:
    scale = linear.format.input_scale
    return [(f"{linear.owner}.input_scale", (1,), torch.float32, lambda: torch.tensor([scale]))] if scale else []


def _nvfp4(linear: QuantizedLinear) -> list[TensorEntry]:
    owner, num_out = linear.owner, linear.num_out
    return [
        (f"{owner}.weight_packed", (num_out, linear.num_in // 2), torch.uint8, lambda: linear.read("packed")),
        _scales(linear),
        (f"{owner}.weight_global_scale", (1,), torch.float32, lambda: _inverse(linear.read("row_scale")[0])),
    ]


def _inverse(scale: Tensor) -> Tensor:
    """What comes back as this scale where a reader divides by it: 1 / scale, or a neighbour of that."""
    near = 1 / scale
    candidates = torch.cat([near, near.nextafter(torch.zeros(1)), near.nextafter(torch.full((1,), torch.inf))])
    return candidates[(1 / candidates == scale).int().argmax()].view(1)


def _scales(linear: QuantizedLinear) -> TensorEntry:
    shape = (linear.num_out, linear.num_groups)
    return f"{linear.owner}.weight_scale", shape, linear.scale_dtype, lambda: linear.read("scale")


def _packed(linear: QuantizedLinear) -> list[TensorEntry]:
    owner, bits, num_out, num_in = linear.owner, linear.bits, linear.num_out, linear.num_in
    num_words, num_zero_words = (-(-count * bits // 32) for count in (num_in, num_out))
    found: list[TensorEntry] = [
        (
            f"{owner}.weight_packed", (num_out, num_words), torch.int32,
            lambda: words_of_values(linear.values(), bits),
        ),
        _scales(linear),
        (f"{owner}.weight_shape", (2,), torch.int64, lambda: torch.tensor([num_out, num_in])),
    ]  # fmt: skip
    if linear.format.has_zeros:
        zeros = (num_zero_words, linear.num_groups)
        make = lambda: words_of_values(linear.zeros().t(), bits).t().contiguous()  # noqa: E731
        found.append((f"{owner}.weight_zero_point", zeros, torch.int32, make))
    if linear.format.order:
        found.append((f"{owner}.weight_g_idx", (num_in,), torch.int32, linear.group_of_column))
    return found


def _is_blocks(format: WeightFormat) -> bool:
    return format.kind.startswith("fp8") and format.group_size > 0


def cache_tensors(model: QuantizedModel) -> list[TensorEntry]:
    """k_scale and v_scale of each attention: one number, or one a head."""
    is_per_head = _has_scale_per_head(model.kv_cache)
    found: list[TensorEntry] = []
    for layer, scales_PK in model.kv_cache.scales.items():
        for letter, scale_K in zip("kv", scales_PK, strict=False):
            scale = scale_K[:, None, None] if is_per_head else scale_K[:1]
            name = f"{model.attentions[layer]}.{letter}_scale"
            found.append((name, tuple(scale.shape), scale.dtype, partial(torch.clone, scale)))
    return found


def _has_scale_per_head(cache: KVCache) -> bool:
    return any(bool((scales_PK != scales_PK[:, :1]).any()) for scales_PK in cache.scales.values())


def config(model: QuantizedModel) -> dict[str, Any]:
    schemes: dict[WeightFormat, list[str]] = {}
    for linear in model.linears:  # the order and the static scale are tensors, not part of a scheme
        format = linear.format
        scheme = replace(format, order="any" if format.order else "", input_scale=float(format.input_scale > 0))
        schemes.setdefault(scheme, []).append(linear.owner)
    groups = {}
    for number, (scheme, names) in enumerate(schemes.items()):
        targets = ["Linear"] if len(schemes) == 1 else names
        groups[f"group_{number}"] = {"targets": targets, "format": _STORED_AS[scheme.kind], **_scheme(scheme)}
    stored_as = {group["format"] for group in groups.values()} or {"dense"}
    return {
        "quant_method": "compressed-tensors",
        "format": stored_as.pop() if len(stored_as) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(model.dense),
        "kv_cache_scheme": _cache_scheme(model.kv_cache),
    }


def _cache_scheme(cache: KVCache) -> dict[str, Any] | None:
    kinds = {KV_DTYPES["fp8"]: "float", KV_DTYPES["int8"]: "int"}
    if not cache.dtype:
        return None
    strategy = "attn_head" if _has_scale_per_head(cache) else "tensor"
    return {"num_bits": 8, "type": kinds[cache.dtype], "symmetric": True, "strategy": strategy, "dynamic": False}


def _scheme(format: WeightFormat) -> dict[str, Any]:
    is_integer = PACKED_DTYPES[format.kind] == "int8" or format.kind in INTEGERS_OF_4_BITS
    weights: dict[str, Any] = {"type": "int" if is_integer else "float", "num_bits": format.bits}
    weights |= {"symmetric": not format.has_zeros, "strategy": "channel", "dynamic": False}
    if format.group_size:
        weights |= {"strategy": "group", "group_size": format.group_size}
    if format.kind == "nvfp4a16":
        weights |= {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    if _is_blocks(format):
        weights |= {"strategy": "block", "group_size": None, "block_structure": [BLOCK, format.group_size]}
    if format.order:
        weights["actorder"] = "group"
    inputs = None
    if format.kind in QUANTIZES_ACTIVATIONS:
        inputs = {"type": "int" if format.kind == "w8a8" else "float", "num_bits": 8, "symmetric": True}
        inputs |= {"strategy": "token", "dynamic": True}
        if format.input_scale:
            inputs |= {"strategy": "tensor", "dynamic": False}
        if format.input_group_size:
            inputs |= {"strategy": "group", "group_size": format.input_group_size}
    return {"weights": weights, "input_activations": inputs, "output_activations": None}
