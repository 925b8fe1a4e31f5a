"""compressed-tensors (github.com/vllm-project/compressed-tensors), the format of llm-compressor: groups of linears,
each with numbers of its own.

pack-quantized    weight_packed int32 [N, ⌈K·bits/32⌉], value + 2^(bits-1), lowest bits first; weight_scale [N, G];
                  weight_shape [2]; weight_zero_point packed along N; weight_g_idx int32 [K]
int-quantized     weight int8 [N, K], weight_scale; input_scale where the activations' scale is static
float-quantized   weight E4M3 [N, K], likewise
naive-quantized   one or the other
nvfp4-pack-quantized  weight_packed uint8 [N, K/2] of E2M1, the earlier column lower; weight_scale E4M3 [N, K/16];
                  weight_global_scale [1], by which scales are divided; input_global_scale where activations are E2M1

Activations in E2M1 are left as they are: that is more exact, and what multiplies them here has 16 bits anyway.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slipstream.checkpoint.packed import PackedLinear
from slipstream.checkpoint.quantized.fp8 import read_block
from slipstream.checkpoint.quantized.linears import (
    FLOATS,
    Parts,
    column_order,
    eight_bit_linear,
    integer_linear,
    matches_target,
    nvfp4_linear,
    values_of_words,
)
from slipstream.errors import CorruptFile, UnsupportedModel
from slipstream.schema.model import Options

PACKED, INT, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
NVFP4_PACKED = "nvfp4-pack-quantized"
FORMATS = (PACKED, INT, FLOAT, NAIVE, NVFP4_PACKED)
MIXED, DENSE = "mixed-precision", "dense"  # of many groups; of none, where the KV cache alone is quantized


@dataclass(frozen=True)
class _Scheme:
    """What a config group says of its linears."""

    targets: tuple[str, ...]
    stored_as: str
    num_bits: int
    is_float: bool
    is_symmetric: bool
    group_size: int  # 0: a row or the tensor has one scale
    block: tuple[int, int] | None
    activations: str | None  # None, "static", "dynamic"
    has_float_inputs: bool  # activations are E4M3
    input_group_size: int


def read(options: Options, parts: Parts) -> dict[str, PackedLinear]:
    stored_as = options.choice("format", (*FORMATS, MIXED, DENSE))
    options.choice("quantization_status", ("compressed", "frozen"), "compressed")
    options.skip("global_compression_ratio", "ignore", "kv_cache_scheme", "version")
    for name in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        if options.value(name):
            raise UnsupportedModel(f"quantization_config has a {name}; only models without one can be read.")
    groups = options.section("config_groups")
    options.finish("compressed-tensors")
    if groups is None:
        raise CorruptFile("quantization_config has no config_groups; compressed-tensors lists its linears there.")
    schemes = [_scheme(group, stored_as) for group in groups.sections()]
    owners = dict.fromkeys([*parts.owners(".weight_packed"), *parts.owners(".weight_scale")])
    return {f"{owner}.weight": _linear(parts, owner, _scheme_of(owner, schemes)) for owner in owners}


def _scheme(group: Options, stored_as: str) -> _Scheme:
    stored_as = group.choice("format", FORMATS, None if stored_as == MIXED else stored_as)
    targets = group.value("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CorruptFile(f"targets of a config group is {str(targets)[:80]}; it must be a list such as ['Linear'].")
    weights, inputs = group.section("weights"), group.section("input_activations")
    if weights is None:
        raise UnsupportedModel("A config group has no weights; only groups that quantize weights can be read.")
    group.finish("a config group")
    if stored_as == NVFP4_PACKED:
        return _nvfp4_scheme(tuple(targets), weights, inputs)
    num_bits, is_float = (
        weights.integer("num_bits", 8, high=8),
        weights.choice("type", ("int", "float"), "int") == "float",
    )
    strategy = weights.choice("strategy", ("tensor", "channel", "group", "block"), "channel")
    group_size = weights.integer("group_size", -1, low=-1) if strategy == "group" else 0
    block = read_block(weights, "block_structure") if strategy == "block" else None
    is_symmetric = weights.boolean("symmetric", True)
    weights.choice("dynamic", (False,), False)
    weights.skip("group_size", "block_structure", "actorder", "observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    weights.finish("weights of compressed-tensors")
    if is_float and num_bits != 8:
        raise UnsupportedModel(f"num_bits is {num_bits} of type float; the known one is 8.")
    if strategy == "block" and block is None:
        raise CorruptFile("block_structure is missing; the strategy 'block' needs one, such as [128, 128].")
    activations, has_float_inputs, input_group_size = (
        _activations(inputs, num_bits, is_float) if inputs is not None else (None, False, 0)
    )
    if not is_symmetric and (activations is not None or is_float):
        raise UnsupportedModel("weights are not symmetric while activations are quantized too; only one may be so.")
    return _Scheme(
        tuple(targets), stored_as, num_bits, is_float, is_symmetric, max(group_size, 0), block, activations,
        has_float_inputs, input_group_size,
    )  # fmt: skip


def _nvfp4_scheme(targets: tuple[str, ...], weights: Options, inputs: Options | None) -> _Scheme:
    for numbers in (weights, inputs) if inputs is not None else (weights,):
        numbers.choice("num_bits", (4,), 8)
        numbers.choice("type", ("float",), "int")
        numbers.choice("strategy", ("tensor_group",), "channel")
        numbers.choice("group_size", (16,))
        numbers.choice("symmetric", (True,), True)
        numbers.choice("dynamic", (False, True, "local"), False)
        numbers.skip("actorder", "block_structure", "observer", "observer_kwargs", "scale_dtype", "zp_dtype")
        numbers.finish("NVFP4 of compressed-tensors")
    return _Scheme(targets, NVFP4_PACKED, 4, True, True, 16, None, None, False, 0)


def _activations(inputs: Options, weight_bits: int, is_float: bool) -> tuple[str, bool, int]:
    """ "static" or "dynamic", whether they are E4M3, and the columns that share a scale."""
    kinds = ("float",) if is_float else ("int", "float") if weight_bits == 4 else ("int",)
    inputs.choice("num_bits", (8,), 8)
    has_floats = inputs.choice("type", kinds, "int") == "float"
    inputs.choice("symmetric", (True,), True)
    is_dynamic = inputs.boolean("dynamic")
    strategy = inputs.choice("strategy", ("token", "tensor", "group"), "token" if is_dynamic else "tensor")
    if not is_dynamic and strategy != "tensor":
        raise UnsupportedModel(f"strategy of static activations is {strategy!r}; the known value is tensor.")
    group_size = inputs.integer("group_size", high=2**20) if strategy == "group" else 0
    inputs.skip("group_size", "observer", "observer_kwargs", "block_structure", "actorder", "scale_dtype", "zp_dtype")
    inputs.finish("input_activations of compressed-tensors")
    return "dynamic" if is_dynamic else "static", has_floats, group_size


def _scheme_of(owner: str, schemes: list[_Scheme]) -> _Scheme:
    for scheme in schemes:
        if any(matches_target(owner, target) for target in scheme.targets):
            return scheme
    raise CorruptFile(f"{owner} is quantized, but no config group has it among its targets.")


def _linear(parts: Parts, owner: str, scheme: _Scheme) -> PackedLinear:
    if scheme.stored_as == NVFP4_PACKED:
        return nvfp4_linear(parts, owner, "weight_packed", "weight_global_scale", is_inverse=True)
    if scheme.has_float_inputs and not scheme.is_float:
        return _with_e4m3_inputs(parts, owner, scheme)
    if scheme.stored_as == PACKED:
        return _packed(parts, owner, scheme)
    kind = {(True, True): "fp8", (True, False): "fp8a16", (False, True): "w8a8"}.get(
        (scheme.is_float, scheme.activations is not None)
    )
    if kind is None:
        return _plain_integers(parts, owner, scheme)
    return eight_bit_linear(
        parts, owner, kind, f"{owner}.weight_scale", block=scheme.block, group_size=scheme.group_size,
        input_group_size=scheme.input_group_size,
        input_scale=parts.scalar(f"{owner}.input_scale") if scheme.activations == "static" else 0.0,
    )  # fmt: skip


def _plain_integers(parts: Parts, owner: str, scheme: _Scheme) -> PackedLinear:
    """Weights of up to 8 bits, a byte each."""
    num_out, num_in = parts.shape(f"{owner}.weight", 2)
    weight = parts.use(f"{owner}.weight", (num_out, num_in), (torch.int8,))
    middle = 1 << (scheme.num_bits - 1)

    def offset(values: Tensor) -> Tensor:
        return (values.to(torch.int16) + middle).to(torch.uint8)

    group_size, scale = _scale(parts, owner, (num_out, num_in), scheme)
    zero = None
    if not scheme.is_symmetric:
        shape = parts.tensors.shape(f"{owner}.weight_scale")
        zero_point = parts.use(f"{owner}.weight_zero_point", shape, (torch.int8,))
        zero = lambda: offset(zero_point()).reshape(-1, shape[-1] if len(shape) == 2 else 1).expand(num_out, -1)  # noqa: E731
    return integer_linear(
        scheme.num_bits, (num_out, num_in), group_size, parts.scale_dtype(f"{owner}.weight_scale"),
        values=lambda: offset(weight()), scale=scale, zero=zero,
    )  # fmt: skip


def _packed(parts: Parts, owner: str, scheme: _Scheme) -> PackedLinear:
    bits = scheme.num_bits
    if scheme.is_float or (scheme.activations is not None and not scheme.has_float_inputs):
        raise UnsupportedModel(
            f"{owner} is {PACKED} with float weights or INT8 activations; known are integers, those of 4 bits with "
            "E4M3 activations, too."
        )
    shape = parts.use(f"{owner}.weight_shape", (2,), (torch.int64, torch.int32))().tolist()
    num_out, num_in = parts.shape(f"{owner}.weight_packed", 2)[0], int(shape[1])
    if shape[0] != num_out or not 0 < num_in < 2**31:
        raise CorruptFile(f"The tensor {owner}.weight_shape is {shape}; weight_packed has {num_out} rows.")
    packed = parts.use(f"{owner}.weight_packed", (num_out, -(-num_in * bits // 32)), (torch.int32,))
    group_size, scale = _scale(parts, owner, (num_out, num_in), scheme)
    num_groups = -(-num_in // group_size) if group_size else 1
    zero = None
    if not scheme.is_symmetric:
        zero_point = parts.use(f"{owner}.weight_zero_point", (-(-num_out * bits // 32), num_groups), (torch.int32,))
        zero = lambda: values_of_words(zero_point().t(), bits, num_out).t()  # noqa: E731
    order_K = None
    if f"{owner}.weight_g_idx" in parts.names:
        g_idx = parts.use(f"{owner}.weight_g_idx", (num_in,), (torch.int32, torch.int64))
        order_K = column_order(g_idx(), group_size, f"{owner}.weight_g_idx")
    return integer_linear(
        bits, (num_out, num_in), group_size, parts.scale_dtype(f"{owner}.weight_scale"),
        values=lambda: values_of_words(packed(), bits, num_in), scale=scale, zero=zero, order_K=order_K,
    )  # fmt: skip


def _with_e4m3_inputs(parts: Parts, owner: str, scheme: _Scheme) -> PackedLinear:
    """Integers of 4 bits, in words or a byte each."""
    linear = (_packed if scheme.stored_as == PACKED else _plain_integers)(parts, owner, scheme)
    if linear.format.order:
        raise UnsupportedModel(f"{owner} has its columns in act-order and quantized activations; only one may be so.")
    format = replace(
        linear.format, kind="w4afp8", input_group_size=scheme.input_group_size,
        input_scale=parts.scalar(f"{owner}.input_scale") if scheme.activations == "static" else 0.0,
    )  # fmt: skip
    return replace(linear, format=format)


def _scale(parts: Parts, owner: str, shape: tuple[int, int], scheme: _Scheme) -> tuple[int, Callable[[], Tensor]]:
    """The group size (0: a row has one scale), and what reads the scales [N, G]."""
    num_out, num_in = shape
    name = f"{owner}.weight_scale"
    group_size = 0 if scheme.group_size >= num_in else scheme.group_size
    num_groups = -(-num_in // group_size) if group_size else 1
    if scheme.block:
        raise UnsupportedModel(f"{owner} has integers in blocks; the known strategies are tensor, channel and group.")
    found = parts.tensors.shape(name) if name in parts.names else ()
    is_one = math.prod(found) == 1 and not group_size
    read = parts.use(name, found if is_one or found == (num_out,) else (num_out, num_groups), FLOATS)
    return group_size, lambda: read().reshape(-1, num_groups).expand(num_out, num_groups)
