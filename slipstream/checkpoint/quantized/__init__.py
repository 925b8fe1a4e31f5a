"""Quantized models as the tools of the field store them, read strictly: one file a method, METHODS lists them.
LAYOUTS lists those that are written, too.

`quantization_config` of config.json says which method; older tools wrote quantize_config.json (AutoGPTQ) or
quant_config.json (AutoAWQ), ModelOpt writes hf_quant_config.json. Whatever of a linear is packed stays packed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from slipstream.checkpoint.kv_cache import announced_dtype, read_scales, scale_names
from slipstream.checkpoint.packed import PackedLinear, PackedTensors
from slipstream.checkpoint.quantized import awq, compressed_export, compressed_tensors, fp8, gptq, modelopt
from slipstream.checkpoint.quantized.linears import Parts
from slipstream.checkpoint.quantized.mxfp4 import MXFP4Experts
from slipstream.checkpoint.quantized.outgoing import Layout, QuantizedModel
from slipstream.checkpoint.tensors import TensorSource
from slipstream.engine.bounded_json import read_json
from slipstream.errors import CorruptFile, UnsupportedModel
from slipstream.schema.model import Options

METHODS: dict[str, Callable[[Options, Parts], dict[str, PackedLinear]]] = {
    "awq": awq.read,
    "compressed-tensors": compressed_tensors.read,
    "fp8": fp8.read,
    "gptq": gptq.read,
    "modelopt": modelopt.read,
}
LAYOUTS: dict[str, Layout] = {
    "awq": awq,
    "compressed-tensors": compressed_export,
    "fp8": fp8,
    "gptq": gptq,
    "modelopt": modelopt,
}
GENERAL = "compressed-tensors"
# Beside config.json: what says the same as its quantization_config.
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


def open_quantized(folder: Path, options: dict[str, Any], tensors: TensorSource) -> TensorSource | None:
    """The model's tensors with its quantized linears packed (PackedTensors); None where nothing is quantized.

    Raises UnsupportedModel for a method, format or option that is not known, CorruptFile where the tensors are not
    those that the config announces.
    """
    found = _find_config(folder, options)
    if found is None:
        return None
    method, where, values = found
    if method == "mxfp4":  # of experts alone
        return MXFP4Experts(tensors, Options(values, where))
    if method not in METHODS:
        known = ", ".join((*METHODS, "mxfp4"))
        raise UnsupportedModel(f"{where}: quant_method is {method!r}; the known ones are {known}.")
    parts = Parts(tensors)
    linears = METHODS[method](Options(values, where), parts)
    kv_cache = read_scales(tensors, announced_dtype(values, where))
    if not linears and not kv_cache.dtype:
        raise CorruptFile(f"{where} announces {method}, but no tensor in {folder} is quantized that way.")
    return PackedTensors(tensors, linears, parts.used | scale_names(parts.names), kv_cache)


def layout_for(model: QuantizedModel, expected: str = "") -> str:
    """Of LAYOUTS: the expected one where it can hold the whole model, else the most general, compressed-tensors.

    expected "": what other engines mostly store such numbers as. Symmetric integers are GPTQ's and compressed-tensors'
    alike, so GPTQ must be asked for, but where its act-order is: newer versions of compressed-tensors have none.
    """
    formats = {linear.format for linear in model.linears}
    if not expected:
        signs = {
            "gptq": any(format.order for format in formats),
            "awq": any(format.has_zeros for format in formats),
            "fp8": any(format.input_group_size for format in formats),
        }
        expected = next((name for name, is_so in signs.items() if is_so), GENERAL)
    return GENERAL if LAYOUTS[expected].refusal(model) else expected


def _find_config(folder: Path, options: dict[str, Any]) -> tuple[str, str, dict[str, Any]] | None:
    """Method, where it is described, and its options."""
    values = options.get("quantization_config")
    if isinstance(values, dict) and values:
        method = str(values.get("quant_method", "")).lower()
        return method, f"{folder}: quantization_config", {k: v for k, v in values.items() if k != "quant_method"}
    if values:
        raise CorruptFile(f"{folder}: quantization_config is {str(values)[:80]!r}; it must be an object.")
    for name, method in FILES.items():
        if (folder / name).is_file():
            values = read_json(folder / name)
            return method, str(folder / name), {k: v for k, v in values.items() if k != "quant_method"}
    return None
