"""Quantized model folders as the original tools write them, quantized and packed naively from the formats' definitions.

Nothing of slipstream is used here. FORMATS is the list that the format tests walk, and the README's table names.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

Stored = dict[str, Tensor]
GROUP = 32
BLOCK = 128


@dataclass(frozen=True)
class Quantized:
    stored: Stored  # by suffix of the linear's name: "qweight", "weight_scale", …
    weight: Tensor  # what those mean, [N, K] in float64


@dataclass(frozen=True)
class Format:
    column: str  # of the README's table
    kind: str  # our number format
    quantize: Callable[[Tensor, np.random.Generator], Quantized]  # [N, K] and randomness
    config: dict[str, Any] = field(default_factory=dict)  # quantization_config of config.json
    extra_file: tuple[str, dict[str, Any]] | None = None  # a JSON file beside config.json
    activations: Callable[[Tensor, float], Tensor] | None = None  # naive: rows [..., K] and the static scale → rounded
    bits: float = 8  # about, a weight


# ----- integers


def to_integers(
    weight: np.ndarray, bits: int, group_of: np.ndarray, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(q, scale, zero, dequantized); q and zero from 0 to 2^bits - 1; scale and zero [N, G]."""
    num_groups, largest = int(group_of.max()) + 1, 2**bits - 1
    q = np.zeros(weight.shape, np.int64)
    scale, zero = np.zeros((len(weight), num_groups)), np.zeros((len(weight), num_groups), np.int64)
    dequantized = np.zeros(weight.shape)
    for group in range(num_groups):
        columns = weight[:, group_of == group]
        if symmetric:
            s = np.abs(columns).max(1) / (largest / 2)
            z = np.full(len(weight), 2 ** (bits - 1))
        else:
            low, high = np.minimum(columns.min(1), 0), np.maximum(columns.max(1), 0)
            s = (high - low) / largest
            z = np.clip(np.round(-low / s), 0, largest).astype(np.int64)
        s = torch.tensor(s).to(scale_dtype).double().numpy()
        values = np.clip(np.round(columns / s[:, None]) + z[:, None], 0, largest).astype(np.int64)
        q[:, group_of == group], scale[:, group], zero[:, group] = values, s, z
        dequantized[:, group_of == group] = (values - z[:, None]) * s[:, None]
    return q, scale, zero, dequantized


def words(values: np.ndarray, bits: int) -> Tensor:
    """[R, C] → int32 [R, ⌈C·bits/32⌉]: each row a stream of bits, the first value lowest."""
    stream = [[0] * (-(-values.shape[1] * bits // 32)) for _ in values]
    for row, numbers in enumerate(values.tolist()):
        total = 0
        for place, number in enumerate(numbers):
            total |= number << (place * bits)
        for word in range(len(stream[row])):
            stream[row][word] = (total >> (32 * word)) & 0xFFFFFFFF
    return torch.from_numpy(np.array(stream, np.uint32).view(np.int32))


def in_order(num_in: int, size: int) -> np.ndarray:
    return np.arange(num_in) // size


def awq(weight: Tensor, rng: np.random.Generator, symmetric: bool = False) -> Quantized:
    group_of = in_order(weight.shape[1], GROUP)
    q, scale, zero, dense = to_integers(weight.numpy(), 4, group_of, symmetric, torch.float16)

    def gemm(values_RN: np.ndarray) -> Tensor:
        packed = np.zeros((len(values_RN), values_RN.shape[1] // 8), np.uint32)
        for word in range(packed.shape[1]):
            for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                packed[:, word] |= (values_RN[:, 8 * word + column] << (4 * nibble)).astype(np.uint32)
        return torch.from_numpy(packed.view(np.int32))

    return Quantized(
        {"qweight": gemm(q.T), "qzeros": gemm(zero.T), "scales": torch.tensor(scale.T).half().contiguous()},
        torch.tensor(dense),
    )


def gptq(bits: int, symmetric: bool, act_order: bool = False, version: int = 1, group: int = GROUP) -> Any:
    def quantize(weight: Tensor, rng: np.random.Generator) -> Quantized:
        num_in = weight.shape[1]
        group_of = in_order(num_in, group if group > 0 else num_in)
        if act_order:  # seeded by what linears with one input share, as their Hessian is
            group_of = np.random.default_rng(num_in).permutation(group_of)
        q, scale, zero, dense = to_integers(weight.numpy(), bits, group_of, symmetric, torch.float16)
        if not symmetric and version == 1:
            zero = np.maximum(zero, 1)  # what version 1 can say
            for column, g in enumerate(group_of):
                dense[:, column] = (q[:, column] - zero[:, g]) * scale[:, g]
        return Quantized(
            {
                "qweight": words(q, bits).t().contiguous(),
                "qzeros": words((zero - (version == 1)).T, bits),
                "scales": torch.tensor(scale.T).half().contiguous(),
                "g_idx": torch.tensor(group_of, dtype=torch.int32),
            },
            torch.tensor(dense),
        )

    return quantize


def packed(bits: int, symmetric: bool, size: int, act_order: bool = False) -> Any:
    """compressed-tensors pack-quantized; size 0: one scale a row."""

    def quantize(weight: Tensor, rng: np.random.Generator) -> Quantized:
        num_out, num_in = weight.shape
        group_of = in_order(num_in, size or num_in)
        if act_order:
            group_of = np.random.default_rng(num_in).permutation(group_of)
        q, scale, zero, dense = to_integers(weight.numpy(), bits, group_of, symmetric, torch.bfloat16)
        stored = {
            "weight_packed": words(q, bits),
            "weight_scale": torch.tensor(scale).bfloat16(),
            "weight_shape": torch.tensor([num_out, num_in]),
        }
        if not symmetric:
            stored["weight_zero_point"] = words(zero.T, bits).t().contiguous()
        if act_order:
            stored["weight_g_idx"] = torch.tensor(group_of, dtype=torch.int32)
        return Quantized(stored, torch.tensor(dense))

    return quantize


def bytes_of(bits: int, symmetric: bool, size: int, static: bool = False) -> Any:
    """compressed-tensors int-quantized and naive-quantized: a byte each, around 0."""

    def quantize(weight: Tensor, rng: np.random.Generator) -> Quantized:
        group_of = in_order(weight.shape[1], size or weight.shape[1])
        q, scale, zero, dense = to_integers(weight.numpy(), bits, group_of, symmetric, torch.float32)
        middle = 2 ** (bits - 1)
        stored = {"weight": torch.tensor(q - middle).to(torch.int8), "weight_scale": torch.tensor(scale).float()}
        if not symmetric:
            stored["weight_zero_point"] = torch.tensor(zero - middle).to(torch.int8)
        if static:
            stored["input_scale"] = torch.tensor([STATIC_SCALE * 448 / 127])
        return Quantized(stored, torch.tensor(dense))

    return quantize


# ----- E4M3

E4M3 = np.array(
    sorted(
        {
            sign * (m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7))
            for sign in (-1, 1)
            for e in range(16)
            for m in range(8)
            if (e, m) != (15, 7)
        }
    )
)
STATIC_SCALE = 4 / 448  # of E4M3 activations, which are about normal: few lie beyond 4


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest of the 253 numbers, of two equally near the one whose last bit is 0."""
    above = np.searchsorted(E4M3, x).clip(1, len(E4M3) - 1)
    below = above - 1
    middle = (E4M3[below] + E4M3[above]) / 2
    zero = len(E4M3) // 2
    below_is_even = (below - zero) % 2 == 0
    take_below = (x < middle) | ((x == middle) & below_is_even)
    return np.where(take_below, E4M3[below], E4M3[above])


def fp8(layout: str, scale_name: str = "weight_scale", static: bool = False) -> Any:
    """layout: tensor, channel, block."""

    def quantize(weight: Tensor, rng: np.random.Generator) -> Quantized:
        w = weight.numpy()
        num_out, num_in = w.shape
        rows, columns = {"tensor": (num_out, num_in), "channel": (1, num_in), "block": (BLOCK, BLOCK)}[layout]
        scales = np.zeros((-(-num_out // rows), -(-num_in // columns)), np.float32)
        stored, dense = np.zeros_like(w), np.zeros_like(w)
        for r in range(scales.shape[0]):
            for c in range(scales.shape[1]):
                place = np.s_[r * rows : (r + 1) * rows, c * columns : (c + 1) * columns]
                scales[r, c] = np.abs(w[place]).max() / 448
                stored[place] = to_e4m3(w[place] / scales[r, c])
                dense[place] = stored[place] * float(scales[r, c])
        scale = torch.tensor(scales)
        found = {"weight": torch.tensor(stored).to(torch.float8_e4m3fn)}
        assert (found["weight"].double().numpy() == stored).all()
        found[scale_name] = scale.reshape(()) if layout == "tensor" else scale
        if static:
            found["input_scale"] = torch.tensor(STATIC_SCALE)
        return Quantized(found, torch.tensor(dense))

    return quantize


# ----- E2M1

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nvfp4(modelopt: bool) -> Any:
    """16 columns share a scale in E4M3; one number divides all scales (compressed-tensors), or multiplies them."""

    def quantize(weight: Tensor, rng: np.random.Generator) -> Quantized:
        w = weight.numpy()
        factor = float(1 / np.float32(448 * 6 / np.abs(w).max()))
        groups = w.reshape(len(w), -1, 16)
        scales = to_e4m3(np.abs(groups).max(2) / 6 / factor)
        magnitudes = np.abs(groups) / (scales * factor)[..., None]
        index = np.abs(magnitudes[..., None] - E2M1).argmin(-1)
        codes = (index + 8 * (groups < 0)).reshape(w.shape).astype(np.uint8)
        dense = np.where(groups < 0, -1, 1) * E2M1[index] * (scales * factor)[..., None]
        pairs = torch.tensor(codes[:, ::2] | codes[:, 1::2] << 4)
        stored = {"weight_scale": torch.tensor(scales).to(torch.float8_e4m3fn)}
        if modelopt:
            stored |= {"weight": pairs, "weight_scale_2": torch.tensor(factor), "input_scale": torch.tensor(0.01)}
        else:
            stored |= {"weight_packed": pairs, "weight_global_scale": torch.tensor([1 / factor])}
        return Quantized(stored, torch.tensor(dense.reshape(w.shape)))

    return quantize


# ----- activations: rows in float64, quantized and back


def rounded(values: Callable[[np.ndarray], np.ndarray], largest: float, size: int = 0, static: float = 0) -> Any:
    def quantize(x: Tensor) -> Tensor:
        rows = x.double().flatten(0, -2).numpy()
        result = np.zeros_like(rows)
        width = size or rows.shape[1]
        for start in range(0, rows.shape[1], width):
            part = rows[:, start : start + width]
            scale = np.full((len(rows), 1), static) if static else np.abs(part).max(1, keepdims=True) / largest
            result[:, start : start + width] = values(part / scale) * scale
        return torch.tensor(result).view(x.shape).to(x.dtype)

    return quantize


def to_int8(x: np.ndarray) -> np.ndarray:
    return np.clip(np.round(x), -128, 127)


# ----- the list


def ct(stored_as: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """As llm-compressor writes it."""
    common = {"actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "observer": "minmax",
              "observer_kwargs": {}, "symmetric": True, "type": "int"}  # fmt: skip
    group = {
        "targets": ["Linear"],
        "weights": common | weights,
        "input_activations": inputs and common | {"num_bits": 8} | inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors", "format": stored_as, "config_groups": {"group_0": group},
        "global_compression_ratio": None, "ignore": ["lm_head"], "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }  # fmt: skip


def gptq_config(bits: int, sym: bool, desc_act: bool = False, group: int = GROUP, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": bits, "group_size": group, "damp_percent": 0.01, "desc_act": desc_act,
        "sym": sym, "static_groups": False, "true_sequential": True, "model_name_or_path": None,
        "model_file_base_name": "model",
    } | more  # fmt: skip


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm",
              "modules_to_not_convert": None}  # fmt: skip
# As transformers saves it again, and as GPTQModel writes it.
AWQ_SAVED_AGAIN = AWQ_CONFIG | {
    "act_group_aware": True, "backend": "auto", "batch_size": 1, "cache_block_outputs": True, "damp_percent": 0.1,
    "desc_act": False, "format": "gemm", "meta": None, "sym": True, "tokenizer": None, "true_sequential": True,
}  # fmt: skip
GPTQMODEL_AWQ = {
    "bits": 4, "checkpoint_format": "gemm", "desc_act": False, "format": "gemm", "group_size": GROUP, "lm_head": False,
    "meta": {"fallback": {"strategy": "rtn"}}, "method": "awq", "pack_dtype": "int32", "quant_method": "awq",
    "version": "gemm", "zero_point": False,
}  # fmt: skip
GPTQMODEL_V2 = {
    "checkpoint_format": "gptq_v2", "format": "gptq_v2", "method": "gptq", "lm_head": False, "pack_dtype": "int32",
    "meta": {"act_group_aware": True},
}  # fmt: skip
FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
GROUPS = {"strategy": "group", "group_size": GROUP}
TOKEN_INT8 = rounded(to_int8, 127)
TOKEN_FP8 = rounded(to_e4m3, 448)

FORMATS: dict[str, Format] = {
    "awq": Format("AWQ", "w4a16", awq, AWQ_SAVED_AGAIN, bits=4),
    "awq-sym": Format("AWQ", "w4a16", partial(awq, symmetric=True), GPTQMODEL_AWQ, bits=4),
    "awq-old-file": Format(
        "AWQ", "w4a16", awq, bits=4,
        extra_file=("quant_config.json", {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}),
    ),
    "gptq-4-sym": Format("GPTQ", "w4a16", gptq(4, True), gptq_config(4, True), bits=4),
    "gptq-4-asym": Format("GPTQ", "w4a16", gptq(4, False), gptq_config(4, False), bits=4),
    "gptq-4-act-order": Format("GPTQ", "w4a16", gptq(4, False, True), gptq_config(4, False, True), bits=4),
    "gptq-4-one-group": Format("GPTQ", "w4a16", gptq(4, True, group=-1), gptq_config(4, True, group=-1), bits=4),
    "gptq-8-act-order": Format("GPTQ", "w8a16", gptq(8, True, True), gptq_config(8, True, True)),
    "gptq-8-asym": Format("GPTQ", "w8a16", gptq(8, False), gptq_config(8, False)),
    "gptq-2-asym": Format("GPTQ", "w4a16", gptq(2, False), gptq_config(2, False), bits=4),
    "gptq-3-sym": Format("GPTQ", "w4a16", gptq(3, True), gptq_config(3, True), bits=4),
    "gptq-v2": Format(
        "GPTQ", "w4a16", gptq(4, False, version=2), gptq_config(4, False, **GPTQMODEL_V2), bits=4
    ),
    "gptq-old-file": Format(
        "GPTQ", "w4a16", gptq(4, True), bits=4, extra_file=("quantize_config.json", gptq_config(4, True))
    ),
    "ct-pack-4": Format(
        "compressed-tensors", "w4a16", packed(4, True, GROUP), ct("pack-quantized", {"num_bits": 4} | GROUPS), bits=4
    ),
    "ct-pack-4-asym": Format(
        "compressed-tensors", "w4a16", packed(4, False, GROUP), bits=4,
        config=ct("pack-quantized", {"num_bits": 4, "symmetric": False} | GROUPS),
    ),
    "ct-pack-4-act-order": Format(
        "compressed-tensors", "w4a16", packed(4, True, GROUP, True), bits=4,
        config=ct("pack-quantized", {"num_bits": 4, "actorder": "group"} | GROUPS),
    ),
    "ct-pack-3": Format(
        "compressed-tensors", "w4a16", packed(3, True, GROUP), ct("pack-quantized", {"num_bits": 3} | GROUPS), bits=4
    ),
    "ct-pack-8-channel": Format(
        "compressed-tensors", "w8a16", packed(8, True, 0),
        ct("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    ),
    "ct-pack-w4afp8": Format(
        "compressed-tensors", "w4afp8", packed(4, True, GROUP), bits=4, activations=TOKEN_FP8,
        config=ct("pack-quantized", {"num_bits": 4} | GROUPS, {"type": "float", "dynamic": True, "strategy": "token"}),
    ),
    "ct-nvfp4": Format(
        "compressed-tensors", "nvfp4a16", nvfp4(False), bits=4,
        config=ct("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group",
                                           "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}),
    ),
    "ct-int-w8a8": Format(
        "compressed-tensors", "w8a8", bytes_of(8, True, 0), activations=TOKEN_INT8,
        config=ct("int-quantized", {"num_bits": 8, "strategy": "channel"}, {"dynamic": True, "strategy": "token"}),
    ),
    "ct-int-w8a8-static": Format(
        "compressed-tensors", "w8a8", bytes_of(8, True, 0, static=True),
        activations=rounded(to_int8, 127, static=float(np.float32(STATIC_SCALE * 448 / 127))),
        config=ct("int-quantized", {"num_bits": 8, "strategy": "channel"}, {"strategy": "tensor"}),
    ),
    "ct-naive-int": Format(
        "compressed-tensors", "w4a16", bytes_of(4, False, GROUP), bits=4,
        config=ct("naive-quantized", {"num_bits": 4, "symmetric": False} | GROUPS),
    ),
    "ct-int-w8a16": Format(
        "compressed-tensors", "w8a16", bytes_of(8, True, 0),
        ct("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    ),
    "ct-float-dynamic": Format(
        "compressed-tensors", "fp8", fp8("channel"), activations=TOKEN_FP8,
        config=ct("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"},
                  {"type": "float", "dynamic": True, "strategy": "token"}),
    ),
    "ct-float-static": Format(
        "compressed-tensors", "fp8", fp8("tensor", static=True),
        activations=rounded(to_e4m3, 448, static=float(np.float32(STATIC_SCALE))),
        config=ct("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"},
                  {"type": "float", "strategy": "tensor"}),
    ),
    "ct-float-block": Format(
        "compressed-tensors", "fp8", fp8("block"), activations=rounded(to_e4m3, 448, size=BLOCK),
        config=ct("float-quantized",
                  {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [BLOCK, BLOCK]},
                  {"type": "float", "dynamic": True, "strategy": "group", "group_size": BLOCK}),
    ),
    "ct-naive-float": Format(
        "compressed-tensors", "fp8a16", fp8("channel"),
        ct("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    ),
    "fp8-blocks": Format(
        "FP8", "fp8", fp8("block", "weight_scale_inv"), FP8_CONFIG | {"weight_block_size": [BLOCK, BLOCK]},
        activations=rounded(to_e4m3, 448, size=BLOCK),
    ),
    "fp8-tensor": Format("FP8", "fp8", fp8("tensor"), FP8_CONFIG, activations=TOKEN_FP8),
    "fp8-tensor-static": Format(
        "FP8", "fp8", fp8("tensor", static=True), FP8_CONFIG | {"activation_scheme": "static"},
        activations=rounded(to_e4m3, 448, static=float(np.float32(STATIC_SCALE))),
    ),
    "modelopt-fp8": Format(
        "ModelOpt", "fp8", fp8("tensor", static=True),
        activations=rounded(to_e4m3, 448, static=float(np.float32(STATIC_SCALE))),
        extra_file=("hf_quant_config.json", {
            "producer": {"name": "modelopt", "version": "0.39.0"},
            "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
        }),
    ),
    "modelopt-nvfp4": Format(
        "ModelOpt", "nvfp4a16", nvfp4(True), bits=4,
        extra_file=("hf_quant_config.json", {
            "producer": {"name": "modelopt", "version": "0.39.0"},
            "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16,
                             "exclude_modules": ["lm_head"]},
        }),
    ),
    "modelopt-fp8-channel": Format(
        "ModelOpt", "fp8", fp8("channel"), activations=TOKEN_FP8,
        config={"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "ignore": ["lm_head"],
                "producer": {"name": "modelopt", "version": "0.39.0"}},
    ),
}  # fmt: skip
