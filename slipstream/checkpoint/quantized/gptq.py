"""GPTQ (arXiv:2210.17323) as AutoGPTQ and GPTQModel store it: 2, 3, 4 or 8 bits, groups, act-order.

qweight int32 [K·bits/32, N] packed along K, qzeros int32 [K/g, N·bits/32], scales [K/g, N], g_idx int32 [K]. In the
first version ("gptq") a stored zero point is one less than the real one; in "gptq_v2" it is the real one.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from slipstream.checkpoint.packed import PackedLinear
from slipstream.checkpoint.quantized.linears import (
    FLOATS,
    Parts,
    column_order,
    integer_linear,
    values_of_words,
    words_of_values,
)
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
from slipstream.errors import CorruptFile, UnsupportedModel
from slipstream.schema.model import Options

VERSIONS = ("gptq", "gptq_v2")
# Options of AutoGPTQ, GPTQModel and transformers that say how the numbers were found; desc_act shows in g_idx.
HOW_FOUND = (
    "act_group_aware", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs",
    "damp_auto_increment", "damp_percent", "dataset", "desc_act", "disable_exllama", "exllama_config", "hyb_act",
    "lm_head", "max_input_length", "meta", "model_file_base_name", "model_name_or_path", "model_seqlen",
    "module_name_preceding_first_block", "modules_in_block_to_quantize", "mse", "pad_token_id", "quantizer",
    "static_groups", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama", "v2", "vram_strategy",
)  # fmt: skip
_SKIPPED = "-:"  # before an expression in `dynamic`: linears that are not quantized
_ROWS = 32  # and columns: what the kernels of AutoGPTQ and those after it take at a time


def read(options: Options, parts: Parts) -> dict[str, PackedLinear]:
    bits = options.choice("bits", (2, 3, 4, 8))
    group_size = options.integer("group_size", low=-1)
    is_symmetric = options.boolean("sym", True)
    version = options.choice("checkpoint_format", VERSIONS, options.choice("format", VERSIONS, "gptq"))
    options.choice("method", ("gptq",), "gptq")
    options.choice("pack_dtype", ("int32",), "int32")
    _check_dynamic(options.value("dynamic"))
    options.skip(*HOW_FOUND)
    options.finish("GPTQ")
    return {
        f"{owner}.weight": _linear(parts, owner, bits, group_size, is_symmetric, version)
        for owner in parts.owners(".qweight")
    }


def _check_dynamic(dynamic: Any) -> None:
    """Which linears are not quantized shows in the tensors; what else GPTQModel may say there is not known."""
    if dynamic is not None and not isinstance(dynamic, dict):
        raise CorruptFile(f"dynamic is {str(dynamic)[:80]}; it must be an object.")
    other = next((key for key in dynamic or {} if not key.startswith(_SKIPPED)), None)
    if other is not None:
        raise UnsupportedModel(f"dynamic has {other[:80]!r}; only linears left out, as '-:expression', can be read.")


def _linear(parts: Parts, owner: str, bits: int, group_size: int, is_symmetric: bool, version: str) -> PackedLinear:
    num_words, num_out = parts.shape(f"{owner}.qweight", 2)
    num_in = num_words * 32 // bits
    group_size = 0 if group_size < 1 or group_size >= num_in else group_size
    num_groups = -(-num_in // group_size) if group_size else 1
    qweight = parts.use(f"{owner}.qweight", (num_words, num_out), (torch.int32,))
    qzeros = parts.use(f"{owner}.qzeros", (num_groups, -(-num_out * bits // 32)), (torch.int32,))
    scales = parts.use(f"{owner}.scales", (num_groups, num_out), FLOATS)
    order_K = None
    if f"{owner}.g_idx" in parts.names:
        g_idx = parts.use(f"{owner}.g_idx", (num_in,), (torch.int32, torch.int64))
        order_K = column_order(g_idx(), group_size, f"{owner}.g_idx")

    def zero() -> Tensor:
        stored = values_of_words(qzeros(), bits, num_out)
        return ((stored + 1) & ((1 << bits) - 1) if version == "gptq" else stored).t()

    def values() -> Tensor:
        if is_symmetric and not (zero() == 1 << (bits - 1)).all():
            raise CorruptFile(f"The tensor {owner}.qzeros has zero points off the middle; sym must be false for it.")
        return values_of_words(qweight().t(), bits, num_in)

    return integer_linear(
        bits, (num_out, num_in), group_size, parts.scale_dtype(f"{owner}.scales"),
        values=values, scale=lambda: scales().t(), zero=None if is_symmetric else zero, order_K=order_K,
    )  # fmt: skip


def refusal(model: QuantizedModel) -> str:
    why = refusal_of_layout(model, "GPTQ", lambda linear: _refusal(linear, model.linears[0].bits), has_head=True)
    mixed = set(_in_layers(linear.owner for linear in model.linears)) & set(_in_layers(model.dense))
    if not why and mixed:
        return f"{min(mixed)} is packed in some layers, and GPTQ has the same linears in all; give compressed-tensors"
    return why


def _in_layers(owners: Iterable[str]) -> Iterator[str]:
    """model.layers.3.mlp.up_proj → mlp.up_proj"""
    return (match[1] for owner in owners if (match := re.match(r"\D*\.\d+\.(.+)", owner)))


def _refusal(linear: QuantizedLinear, bits: int) -> str:
    if linear.format.kind not in ("w4a16", "w8a16"):
        return "has quantized activations or floats, and GPTQ has integer weights alone; give compressed-tensors"
    if linear.bits != bits:
        return f"is of {linear.bits} bits and others of {bits}, and GPTQ has one for all; give compressed-tensors"
    if linear.format.scale_dtype != "float16":
        return f"has scales in {linear.format.scale_dtype}, and GPTQ's are in float16; give compressed-tensors"
    if linear.num_out % _ROWS or linear.num_in % _ROWS:
        shape = f"{linear.num_out} rows and {linear.num_in} columns"
        return f"has {shape}, and GPTQ's are multiples of {_ROWS}; give compressed-tensors"
    if linear.format.has_zeros and not linear.zeros().all():
        return "has zero points of 0, and GPTQ stores one less; give awq or compressed-tensors"
    return refusal_of_groups(linear)


def tensors(linear: QuantizedLinear) -> list[TensorEntry]:
    owner, bits, num_groups, num_out = linear.owner, linear.bits, linear.num_groups, linear.num_out
    return [
        (
            f"{owner}.qweight", (linear.num_in * bits // 32, num_out), torch.int32,
            lambda: words_of_values(linear.values(), bits).t().contiguous(),
        ),
        (
            f"{owner}.qzeros", (num_groups, num_out * bits // 32), torch.int32,
            lambda: words_of_values(linear.zeros().t() - 1, bits),
        ),
        (f"{owner}.scales", (num_groups, num_out), torch.float16, lambda: linear.read("scale").t().contiguous()),
        (f"{owner}.g_idx", (linear.num_in,), torch.int32, linear.group_of_column),
    ]  # fmt: skip


cache_tensors = no_cache_tensors
files = no_files


def config(model: QuantizedModel) -> dict[str, Any]:
    options: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": model.linears[0].bits,
        "group_size": shared_group_size(model),
        "desc_act": any(linear.format.order for linear in model.linears),
        "sym": not any(linear.format.has_zeros for linear in model.linears),
        "lm_head": any(linear.owner == model.head for linear in model.linears),
    }
    left_out = sorted(set(_in_layers(model.dense)))
    if (
        left_out
    ):  # the first is GPTQModel's, vLLM's and SGLang's, the second optimum's, through which transformers reads
        options["dynamic"] = {rf"{_SKIPPED}.*\.\d+\.{re.escape(name)}$": {} for name in left_out}
        packed = sorted(set(_in_layers(linear.owner for linear in model.linears)))
        options["modules_in_block_to_quantize"] = [packed]
    return options
