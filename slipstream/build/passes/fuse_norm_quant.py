"""The norm gives its result quantized, as all products after it read it; nothing of full width is written."""

from slipstream.build.example import trace
from slipstream.build.rewrite import Rewrite, Rule, Symbol, ops
from slipstream.engine.graph import Graph
from slipstream.schema.format import PACKED_DTYPES, QUANTIZES_ACTIVATIONS


def rules(kind: str) -> tuple[Rule, ...]:
    """For one format of activations: both norms, without and with the residual sum."""
    quantize, dtype = getattr(ops, f"quantize_{kind}"), PACKED_DTYPES[kind]

    def rms(x: Symbol, weight: Symbol, eps: Symbol, offset: Symbol, scale: Symbol, group: Symbol) -> Symbol:
        normed = ops.rms_norm(x, weight, eps=eps, weight_offset=offset)
        return quantize(normed, input_scale=scale, input_group_size=group)

    def rms_quantized(x: Symbol, weight: Symbol, eps: Symbol, offset: Symbol, scale: Symbol, group: Symbol) -> Symbol:
        how = {"input_scale": scale, "input_group_size": group, "dtype": dtype}
        return ops.rms_norm_quantize(x, weight, eps=eps, weight_offset=offset, **how)

    def add_rms(
        x: Symbol, residual: Symbol, weight: Symbol, eps: Symbol, offset: Symbol, scale: Symbol, group: Symbol
    ) -> tuple[Symbol, ...]:
        normed, total = ops.add_rms_norm(x, residual, weight, eps=eps, weight_offset=offset)
        return *quantize(normed, input_scale=scale, input_group_size=group), total

    def add_rms_quantized(
        x: Symbol, residual: Symbol, weight: Symbol, eps: Symbol, offset: Symbol, scale: Symbol, group: Symbol
    ) -> tuple[Symbol, ...]:
        how = {"input_scale": scale, "input_group_size": group, "dtype": dtype}
        return ops.add_rms_norm_quantize(x, residual, weight, eps=eps, weight_offset=offset, **how)

    def layer(x: Symbol, weight: Symbol, bias: Symbol | None, eps: Symbol, scale: Symbol, group: Symbol) -> Symbol:
        return quantize(ops.layer_norm(x, weight, bias, eps=eps), input_scale=scale, input_group_size=group)

    def layer_quantized(
        x: Symbol, weight: Symbol, bias: Symbol | None, eps: Symbol, scale: Symbol, group: Symbol
    ) -> Symbol:
        how = {"input_scale": scale, "input_group_size": group, "dtype": dtype}
        return ops.layer_norm_quantize(x, weight, bias, eps=eps, **how)

    def add_layer(
        x: Symbol, residual: Symbol, weight: Symbol, bias: Symbol | None, eps: Symbol, scale: Symbol, group: Symbol
    ) -> tuple[Symbol, ...]:
        normed, total = ops.add_layer_norm(x, residual, weight, bias, eps=eps)
        return *quantize(normed, input_scale=scale, input_group_size=group), total

    def add_layer_quantized(
        x: Symbol, residual: Symbol, weight: Symbol, bias: Symbol | None, eps: Symbol, scale: Symbol, group: Symbol
    ) -> tuple[Symbol, ...]:
        how = {"input_scale": scale, "input_group_size": group, "dtype": dtype}
        return ops.add_layer_norm_quantize(x, residual, weight, bias, eps=eps, **how)

    return (
        Rule(rms, rms_quantized),
        Rule(add_rms, add_rms_quantized),
        Rule(layer, layer_quantized),
        Rule(add_layer, add_layer_quantized),
    )


PASS = Rewrite(
    "fuse_norm_quant",
    "one op instead of two before quantized products",
    tuple(rule for kind in dict.fromkeys(QUANTIZES_ACTIVATIONS.values()) for rule in rules(kind)),
)


def example() -> Graph:
    def block(x: Symbol, residual: Symbol, weight: Symbol) -> tuple[Symbol, ...]:
        normed, total = ops.add_rms_norm(x, residual, weight, eps=1e-5, weight_offset=0.0)
        return *ops.quantize_w8a8(normed, input_scale=0.0, input_group_size=0), total

    return trace(block, inputs={"x": ("T", 8), "residual": ("T", 8)}, weights={"weight": (8,)})
