"""Packed weights as compressed-tensors, whatever tool they came from: what transformers and vLLM read."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slipstream.checkpoint.kv_cache import KVCache
from slipstream.errors import UnsupportedModel
from slipstream.kernels.linear import w4a16
from slipstream.schema.build import KV_DTYPES
from slipstream.schema.format import QUANTIZES_ACTIVATIONS, WeightFormat

BLOCK_ROWS = 128  # of FP8 blocks, whose scales every row repeats here
_STORED_AS = {"w4a16": "pack-quantized", "w8a16": "pack-quantized", "w8a8": "int-quantized", "fp8": "float-quantized",
              "fp8a16": "naive-quantized"}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """One tensor of a quantized linear: its shape and dtype, and what makes it of our parts."""

    suffix: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[Callable[[str], Tensor]], Tensor]  # takes what reads a part


def exported(format: WeightFormat, num_out: int, num_in: int) -> list[Exported]:
    """The tensors that a linear [num_out, num_in] of this format becomes."""
    if format.kind in ("w4a16", "w8a16"):
        return _packed(format, num_out, num_in)
    num_groups = format.num_groups(num_in)
    num_scales = -(-num_out // BLOCK_ROWS) if _is_blocks(format) else num_out
    dtype = torch.int8 if format.kind == "w8a8" else torch.float8_e4m3fn
    found = [
        Exported("weight", (num_out, num_in), dtype, lambda read: read("packed")),
        Exported("weight_scale", (num_scales, num_groups), torch.float32, lambda read: _scales(format, read("scale"))),
    ]
    if format.input_scale:
        found.append(Exported("input_scale", (1,), torch.float32, lambda read: torch.tensor([format.input_scale])))
    return found


def _packed(format: WeightFormat, num_out: int, num_in: int) -> list[Exported]:
    bits, num_groups = 4 if format.kind == "w4a16" else 8, format.num_groups(num_in)

    def weight(read: Callable[[str], Tensor]) -> Tensor:
        values = w4a16.unpack(read("packed"), num_in) if bits == 4 else read("packed").view(torch.uint8) ^ 0x80
        if format.order:
            values = torch.empty_like(values).index_copy_(1, read("order").long(), values)
        return _words(values, bits)

    def zero(read: Callable[[str], Tensor]) -> Tensor:
        values = read("zero") if bits == 4 else read("zero").view(torch.uint8) ^ 0x80
        return _words(values.t(), bits).t().contiguous()

    def group_of_column(read: Callable[[str], Tensor]) -> Tensor:
        groups = torch.arange(num_in, dtype=torch.int32) // (format.group_size or num_in)
        return torch.empty_like(groups).index_copy_(0, read("order").long(), groups)

    scale_dtype = getattr(torch, format.scale_dtype)
    found = [
        Exported("weight_packed", (num_out, -(-num_in * bits // 32)), torch.int32, weight),
        Exported("weight_scale", (num_out, num_groups), scale_dtype, lambda read: read("scale")),
        Exported("weight_shape", (2,), torch.int64, lambda read: torch.tensor([num_out, num_in])),
    ]
    if format.has_zeros:
        found.append(Exported("weight_zero_point", (-(-num_out * bits // 32), num_groups), torch.int32, zero))
    if format.order:
        found.append(Exported("weight_g_idx", (num_in,), torch.int32, group_of_column))
    return found


def _words(values_RC: Tensor, bits: int) -> Tensor:
    """uint8 values → int32 words [R, ⌈C·bits/32⌉], the first value lowest."""
    packed = w4a16.pack(values_RC) if bits == 4 else values_RC
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4))
    return padded.contiguous().view(torch.int32)


def _is_blocks(format: WeightFormat) -> bool:
    return format.kind.startswith("fp8") and format.group_size > 0


def _scales(format: WeightFormat, scale_NG: Tensor) -> Tensor:
    if not _is_blocks(format):
        return scale_NG
    blocks = scale_NG[::BLOCK_ROWS].contiguous()
    if not torch.equal(blocks.repeat_interleave(BLOCK_ROWS, dim=0)[: len(scale_NG)], scale_NG):
        raise UnsupportedModel(
            f"A weight has FP8 scales of other rows than blocks of {BLOCK_ROWS}; it cannot be exported."
        )
    return blocks


def exported_scales(cache: KVCache) -> list[tuple[int, Exported]]:
    """The layer, and k_scale and v_scale of its attention: one number, or one a head."""
    is_per_head = _has_scale_per_head(cache)
    found = []
    for layer, scales_PK in cache.scales.items():
        for letter, scale_K in zip("kv", scales_PK, strict=False):
            scale = scale_K[:, None, None] if is_per_head else scale_K[:1]
            make = partial(_given, scale)
            found.append((layer, Exported(f"{letter}_scale", tuple(scale.shape), scale.dtype, make)))
    return found


def _given(tensor: Tensor, read: Callable[[str], Tensor]) -> Tensor:
    return tensor


def _has_scale_per_head(cache: KVCache) -> bool:
    return any(bool((scales_PK != scales_PK[:, :1]).any()) for scales_PK in cache.scales.values())


def quantization_config(formats: dict[str, WeightFormat], ignored: list[str], cache: KVCache) -> dict[str, Any]:
    """quantization_config of config.json. formats: by the names of the linears; ignored: linears that are dense."""
    schemes: dict[WeightFormat, list[str]] = {}
    for name, format in formats.items():  # the order and the static scale are tensors, not part of a scheme
        scheme = replace(format, order="any" if format.order else "", input_scale=float(format.input_scale > 0))
        schemes.setdefault(scheme, []).append(name)
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
        "ignore": ignored,
        "kv_cache_scheme": _cache_scheme(cache),
    }


def _cache_scheme(cache: KVCache) -> dict[str, Any] | None:
    kinds = {KV_DTYPES["fp8"]: "float", KV_DTYPES["int8"]: "int"}
    if not cache.dtype:
        return None
    strategy = "attn_head" if _has_scale_per_head(cache) else "tensor"
    return {"num_bits": 8, "type": kinds[cache.dtype], "symmetric": True, "strategy": strategy, "dynamic": False}


def _scheme(format: WeightFormat) -> dict[str, Any]:
    number: dict[str, Any] = {
        "type": "float" if format.kind.startswith("fp8") else "int",
        "num_bits": 8,
        "symmetric": True,
    }
    weights = number | {"num_bits": 4 if format.kind == "w4a16" else 8, "symmetric": not format.has_zeros}
    weights |= {"strategy": "channel", "dynamic": False}
    if format.group_size:
        weights |= {"strategy": "group", "group_size": format.group_size}
    if _is_blocks(format):
        weights |= {"strategy": "block", "group_size": None, "block_structure": [BLOCK_ROWS, format.group_size]}
    if format.order:
        weights["actorder"] = "group"
    inputs = None
    if format.kind in QUANTIZES_ACTIVATIONS:
        inputs = number | {"strategy": "token", "dynamic": True}
        if format.input_scale:
            inputs |= {"strategy": "tensor", "dynamic": False}
        if format.input_group_size:
            inputs |= {"strategy": "group", "group_size": format.input_group_size}
    return {"weights": weights, "input_activations": inputs, "output_activations": None}
