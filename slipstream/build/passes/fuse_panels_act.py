"""On a CPU gate and up are multiplied, activated and rounded together: neither of them is ever written."""

from slipstream.build.example import trace
from slipstream.build.passes import pack_panels
from slipstream.build.rewrite import Match, Rewrite, Rule, Symbol, ops
from slipstream.engine.graph import Graph
from slipstream.kernels.quantized import has_whole_panels


def pattern(
    x: Symbol, x_scale: Symbol, panels: Symbol, scale: Symbol, shift: Symbol | None, bias: Symbol | None, bits: Symbol,
    group: Symbol, x_group: Symbol, num_out: Symbol, y_group: Symbol,
) -> Symbol:  # fmt: skip
    how = {"bits": bits, "group_size": group, "input_group_size": x_group, "num_out": num_out}
    product = ops.linear_panels(x, x_scale, panels, scale, shift, bias, **how)
    return ops.silu_and_mul_quantize(product, input_scale=0.0, input_group_size=y_group, dtype="int8")


def replacement(
    x: Symbol, x_scale: Symbol, panels: Symbol, scale: Symbol, shift: Symbol | None, bias: Symbol | None, bits: Symbol,
    group: Symbol, x_group: Symbol, num_out: Symbol, y_group: Symbol,
) -> Symbol:  # fmt: skip
    how = {"bits": bits, "group_size": group, "input_group_size": x_group, "num_out": num_out}
    return ops.linear_panels_silu_and_mul_quantize(
        x, x_scale, panels, scale, shift, bias, **how, output_group_size=y_group
    )


def _fits(match: Match) -> bool:
    return has_whole_panels(match["num_out"], match["y_group"])


PASS = Rewrite(
    "fuse_panels_act",
    "what gate and up multiply to is activated and rounded where it is made",
    (Rule(pattern, replacement, where=_fits),),
)


def example() -> Graph:
    def block(x: Symbol, weight: Symbol) -> tuple[Symbol, ...]:
        numbers = ops.quantize_w8a8(x, input_scale=0.0, input_group_size=8)
        packed = ops.quantize_w8a8(weight, input_scale=0.0, input_group_size=0)
        how = {"group_size": 0, "input_group_size": 8, "dtype": "float32"}
        product = ops.linear_w8a8(*numbers, *packed, None, None, **how)
        return ops.silu_and_mul_quantize(product, input_scale=0.0, input_group_size=16, dtype="int8")

    graph = trace(block, inputs={"x": ("T", 12)}, weights={"weight": (64, 12)})
    graph.is_for_cpu = True
    pack_panels.PASS.run(graph)
    return graph
