"""The experts of kernels/moe.py with packed weights: experts_w4a16, experts_fp8 and so on, an op for each format.

Gate, up and down are of one format, whose columns are in their own order; each part is stacked over the experts.
"""

from functools import partial

import torch
from torch import Tensor

from slipstream.kernels.fits import need
from slipstream.kernels.linear.groups import dequantize, packed_rows, product
from slipstream.kernels.linear.parts import dense_weight, one_of, rounding_op
from slipstream.kernels.moe import need_routes, run_experts
from slipstream.kernels.registry import Op, kernel, on_gpu, on_gpu_with_fp8, op
from slipstream.schema.format import PACKED_DTYPES, QUANTIZES_ACTIVATIONS, WeightFormat


def _declare(kind: str) -> Op:
    packed_dtype = getattr(torch, PACKED_DTYPES[kind])

    def shapes(
        x_TH: Tensor, shares_TK: Tensor, ids_TK: Tensor, gate_packed: Tensor, gate_scale: Tensor,
        gate_zero: Tensor | None, up_packed: Tensor, up_scale: Tensor, up_zero: Tensor | None, down_packed: Tensor,
        down_scale: Tensor, down_zero: Tensor | None, gate_bias_EI: Tensor | None, up_bias_EI: Tensor | None,
        down_bias_EH: Tensor | None, alpha: float, limit: float, up_offset: float, group_size: int,
        input_scale: float, input_group_size: int,
    ) -> Tensor:  # fmt: skip
        need_routes(x_TH, shares_TK, ids_TK)
        need(input_group_size >= 0, "a group cannot have less than no columns")
        how, hidden_size = (group_size, packed_dtype), x_TH.shape[1]
        num_experts, width = packed_rows(hidden_size, gate_packed, gate_scale, gate_zero, gate_bias_EI, *how)
        up_rows = packed_rows(hidden_size, up_packed, up_scale, up_zero, up_bias_EI, *how)
        down_rows = packed_rows(width, down_packed, down_scale, down_zero, down_bias_EH, *how)
        need(up_rows == (num_experts, width), "up must be as large as gate")
        need(down_rows == (num_experts, hidden_size), "down must lead back to x")
        return x_TH.new_empty(x_TH.shape)

    def experts(
        x_TH: Tensor, shares_TK: Tensor, ids_TK: Tensor, gate_packed: Tensor, gate_scale: Tensor,
        gate_zero: Tensor | None, up_packed: Tensor, up_scale: Tensor, up_zero: Tensor | None, down_packed: Tensor,
        down_scale: Tensor, down_zero: Tensor | None, gate_bias_EI: Tensor | None, up_bias_EI: Tensor | None,
        down_bias_EH: Tensor | None, alpha: float, limit: float, up_offset: float, group_size: int,
        input_scale: float, input_group_size: int,
    ) -> Tensor:  # fmt: skip
        format = WeightFormat(
            kind=kind, group_size=group_size, input_scale=input_scale, input_group_size=input_group_size
        )
        return run_experts(
            x_TH, shares_TK, ids_TK, len(gate_packed),
            partial(_linear, format, _parts(gate_packed, gate_scale, gate_zero), gate_bias_EI),
            partial(_linear, format, _parts(up_packed, up_scale, up_zero), up_bias_EI),
            partial(_linear, format, _parts(down_packed, down_scale, down_zero), down_bias_EH),
            alpha, limit, up_offset,
        )  # fmt: skip

    parts = ", ".join(f"Tensor {name}_packed, Tensor {name}_scale, Tensor? {name}_zero" for name in WEIGHTS)
    biases = ", ".join(f"Tensor? {name}_bias" for name in WEIGHTS)
    schema = (
        f"experts_{kind}(Tensor x, Tensor shares, Tensor expert_ids, {parts}, {biases}, float alpha, float limit, "
        "float up_offset, int group_size, float input_scale, int input_group_size) -> Tensor"
    )
    return op(schema, shapes=shapes, reads_values=True)(experts)


def _parts(packed: Tensor, scale: Tensor, zero: Tensor | None) -> dict[str, Tensor]:
    found = {"packed": packed, "scale": scale}
    return found if zero is None else found | {"zero": zero}


def _linear(
    format: WeightFormat, parts: dict[str, Tensor], bias_EN: Tensor | None, expert: int, x_RK: Tensor
) -> Tensor:
    dtype, size = x_RK.dtype, format.input_group_size
    if format.kind in QUANTIZES_ACTIVATIONS:
        rounded_RK, scale_RG = rounding_op(format.kind).reference(x_RK, format.input_scale, size)
        x_RK = dequantize(rounded_RK, scale_RG, None, size)
    weight_NK = dense_weight(format, one_of(parts, expert), x_RK.shape[1])
    return product(x_RK, weight_NK, None if bias_EN is None else bias_EN[expert], dtype)


def _declare_triton(of: Op, kind: str) -> None:
    @kernel(of, "triton", on_gpu_with_fp8 if "fp8" in kind else on_gpu)
    def experts_triton(
        x_TH: Tensor, shares_TK: Tensor, ids_TK: Tensor, gate_packed: Tensor, gate_scale: Tensor,
        gate_zero: Tensor | None, up_packed: Tensor, up_scale: Tensor, up_zero: Tensor | None, down_packed: Tensor,
        down_scale: Tensor, down_zero: Tensor | None, gate_bias_EI: Tensor | None, up_bias_EI: Tensor | None,
        down_bias_EH: Tensor | None, alpha: float, limit: float, up_offset: float, group_size: int,
        input_scale: float, input_group_size: int, is_batch_invariant: bool = False,
    ) -> Tensor:  # fmt: skip
        """Weights whose groups no tile can follow are widened before, which is slow but can be recorded."""
        from slipstream.kernels.triton import experts as grouped

        def quantize(x_MK: Tensor, is_widened: bool = False) -> tuple[Tensor, Tensor | None]:
            if kind not in QUANTIZES_ACTIVATIONS:
                return x_MK, None
            rounding = rounding_op(kind).kernels["triton"].batch_invariant  # which rounds one row, too
            assert rounding is not None
            values_MK, scale_MG = rounding(x_MK, input_scale, input_group_size)
            if is_widened:
                return dequantize(values_MK, scale_MG, None, input_group_size).to(x_MK.dtype), None
            return values_MK, scale_MG

        stacks = (
            (gate_packed, gate_scale, gate_zero),
            (up_packed, up_scale, up_zero),
            (down_packed, down_scale, down_zero),
        )
        weights = tuple(grouped.Weight(*parts, group_size, None, input_group_size) for parts in stacks)
        is_widened = not grouped.can_multiply(x_TH, weights)
        if is_widened:
            format, sizes = WeightFormat(kind=kind, group_size=group_size), (*[x_TH.shape[1]] * 2, gate_packed.shape[1])
            wide = (dense_weight(format, _parts(*parts), size) for parts, size in zip(stacks, sizes, strict=True))
            weights = tuple(grouped.Weight(each.to(x_TH.dtype)) for each in wide)
        return grouped.experts(
            x_TH, shares_TK, ids_TK, weights, (gate_bias_EI, up_bias_EI, down_bias_EH),
            grouped.Activation(alpha, limit, up_offset), partial(quantize, is_widened=is_widened),
            is_batch_invariant=is_batch_invariant,
        )  # fmt: skip


WEIGHTS = ("gate", "up", "down")
# Not those whose scales have two levels, nor those of a GGUF file: stacks of these are dequantized.
OPS = {kind: _declare(kind) for kind in PACKED_DTYPES if kind not in ("nvfp4a16", "w4a8")}
for _kind, _op in OPS.items():
    _declare_triton(_op, _kind)
