"""The activation gives its result quantized, as the product after it reads it; nothing of full width is written."""

from slipstream.build.example import trace
from slipstream.build.rewrite import Rewrite, Rule, Symbol, ops
from slipstream.engine.graph import Graph
from slipstream.schema.format import PACKED_DTYPES, QUANTIZES_ACTIVATIONS


def rules(kind: str) -> tuple[Rule, ...]:
    """For one format of activations: gated SiLU, and GELU gated and alone."""
    quantize, dtype = getattr(ops, f"quantize_{kind}"), PACKED_DTYPES[kind]

    def silu(x: Symbol, scale: Symbol, group: Symbol) -> Symbol:
        return quantize(ops.silu_and_mul(x), input_scale=scale, input_group_size=group)

    def silu_quantized(x: Symbol, scale: Symbol, group: Symbol) -> Symbol:
        return ops.silu_and_mul_quantize(x, input_scale=scale, input_group_size=group, dtype=dtype)

    def gated_gelu(x: Symbol, approximate: Symbol, scale: Symbol, group: Symbol) -> Symbol:
        gated = ops.gelu_and_mul(x, approximate=approximate)
        return quantize(gated, input_scale=scale, input_group_size=group)

    def gated_gelu_quantized(x: Symbol, approximate: Symbol, scale: Symbol, group: Symbol) -> Symbol:
        how = {"input_scale": scale, "input_group_size": group, "dtype": dtype}
        return ops.gelu_and_mul_quantize(x, approximate=approximate, **how)

    def gelu(x: Symbol, approximate: Symbol, scale: Symbol, group: Symbol) -> Symbol:
        return quantize(ops.gelu(x, approximate=approximate), input_scale=scale, input_group_size=group)

    def gelu_quantized(x: Symbol, approximate: Symbol, scale: Symbol, group: Symbol) -> Symbol:
        how = {"input_scale": scale, "input_group_size": group, "dtype": dtype}
        return ops.gelu_quantize(x, approximate=approximate, **how)

    return Rule(silu, silu_quantized), Rule(gated_gelu, gated_gelu_quantized), Rule(gelu, gelu_quantized)


PASS = Rewrite(
    "fuse_act_quant",
    "one op instead of two before a quantized product",
    tuple(rule for kind in dict.fromkeys(QUANTIZES_ACTIVATIONS.values()) for rule in rules(kind)),
)


def example() -> Graph:
    def block(x: Symbol) -> tuple[Symbol, ...]:
        return ops.quantize_w8a8(ops.silu_and_mul(x), input_scale=0.0, input_group_size=4)

    return trace(block, inputs={"x": ("T", 16)}, weights={})
