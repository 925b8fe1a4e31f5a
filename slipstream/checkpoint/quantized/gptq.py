"""GPTQ (arXiv:2210.17323) as AutoGPTQ and GPTQModel store it: 2, 3, 4 or 8 bits, groups, act-order.

qweight int32 [K·bits/32, N] packed along K, qzeros int32 [K/g, N·bits/32], scales [K/g, N], g_idx int32 [K]. In the
first version ("gptq") a stored zero point is one less than the real one; in "gptq_v2" it is the real one.
"""

import torch
from torch import Tensor

from slipstream.checkpoint.packed import PackedLinear
from slipstream.checkpoint.quantized.linears import FLOATS, Parts, column_order, integer_linear, values_of_words
from slipstream.errors import CorruptFile
from slipstream.schema.model import Options

VERSIONS = ("gptq", "gptq_v2")


def read(options: Options, parts: Parts) -> dict[str, PackedLinear]:
    bits = options.choice("bits", (2, 3, 4, 8))
    group_size = options.integer("group_size", low=-1)
    is_symmetric = options.boolean("sym", True)
    version = options.choice("checkpoint_format", VERSIONS, options.choice("format", VERSIONS, "gptq"))
    options.choice("pack_dtype", ("int32",), "int32")
    # How the numbers were found; desc_act shows in g_idx.
    options.skip(
        "act_group_aware", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs",
        "damp_auto_increment", "damp_percent", "dataset", "desc_act", "disable_exllama", "exllama_config", "hyb_act",
        "lm_head", "max_input_length", "meta", "model_file_base_name", "model_name_or_path", "model_seqlen",
        "module_name_preceding_first_block", "modules_in_block_to_quantize", "mse", "pad_token_id", "quantizer",
        "static_groups", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama", "v2", "vram_strategy",
    )  # fmt: skip
    options.finish("GPTQ")
    return {
        f"{owner}.weight": _linear(parts, owner, bits, group_size, is_symmetric, version)
        for owner in parts.owners(".qweight")
    }


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
