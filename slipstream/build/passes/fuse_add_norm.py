"""The residual sum joins the norm that reads it: the sum is written once and not read again for the norm."""

from slipstream.build.example import trace
from slipstream.build.rewrite import Match, Rewrite, Rule, Symbol, ops
from slipstream.engine.graph import Graph


def pattern(x: Symbol, residual: Symbol, weight: Symbol, eps: Symbol, offset: Symbol) -> tuple[Symbol, ...]:
    total = ops.add(x, residual)
    return ops.rms_norm(total, weight, eps=eps, weight_offset=offset), total


def replacement(x: Symbol, residual: Symbol, weight: Symbol, eps: Symbol, offset: Symbol) -> tuple[Symbol, ...]:
    return ops.add_rms_norm(x, residual, weight, eps=eps, weight_offset=offset)


def pattern_layer(x: Symbol, residual: Symbol, weight: Symbol, bias: Symbol | None, eps: Symbol) -> tuple[Symbol, ...]:
    total = ops.add(x, residual)
    return ops.layer_norm(total, weight, bias, eps=eps), total


def replacement_layer(
    x: Symbol, residual: Symbol, weight: Symbol, bias: Symbol | None, eps: Symbol
) -> tuple[Symbol, ...]:
    return ops.add_layer_norm(x, residual, weight, bias, eps=eps)


def _are_rows(match: Match) -> bool:
    """Both are [tokens, hidden]: the fused op does not broadcast."""
    return match.have_same_type("x", "residual")


PASS = Rewrite(
    "fuse_add_norm",
    "one op instead of two, twice a layer",
    (Rule(pattern, replacement, where=_are_rows), Rule(pattern_layer, replacement_layer, where=_are_rows)),
)


def example() -> Graph:
    def block(x: Symbol, residual: Symbol, weight: Symbol) -> tuple[Symbol, ...]:
        return pattern(x, residual, weight, 1e-5, 0.0)  # type: ignore[arg-type]

    return trace(block, inputs={"x": ("T", 8), "residual": ("T", 8)}, weights={"weight": (8,)})
