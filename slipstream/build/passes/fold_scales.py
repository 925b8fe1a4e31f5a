"""A number that multiplies what a weight gives is multiplied into the weight, when the engine is written.

Only where that is exact, or nearly: by a power of two, or in float32, where each weight is rounded once more (2⁻²⁴ of
it). In 16 bits other factors would round the weights anew. And only where nobody else reads the weight, which would
then be stored twice, and where it is not packed.
"""

import math
from collections.abc import Callable

from slipstream.build.example import trace
from slipstream.build.rewrite import Match, Rewrite, Rule, Symbol, ops
from slipstream.engine.graph import Graph


def pattern(x: Symbol, weight: Symbol, factor: Symbol) -> Symbol:
    return ops.scale(ops.linear(x, weight), factor=factor)


def replacement(x: Symbol, weight: Symbol, factor: Symbol) -> Symbol:
    return ops.linear(x, ops.scale(weight, factor=factor))


def pattern_bias(x: Symbol, weight: Symbol, bias: Symbol, factor: Symbol) -> Symbol:
    return ops.scale(ops.linear(x, weight, bias), factor=factor)


def replacement_bias(x: Symbol, weight: Symbol, bias: Symbol, factor: Symbol) -> Symbol:
    return ops.linear(x, ops.scale(weight, factor=factor), ops.scale(bias, factor=factor))


def pattern_table(token_ids: Symbol, weight: Symbol, factor: Symbol) -> Symbol:
    return ops.scale(ops.embedding(weight, token_ids), factor=factor)


def replacement_table(token_ids: Symbol, weight: Symbol, factor: Symbol) -> Symbol:
    return ops.embedding(ops.scale(weight, factor=factor), token_ids)


def _can_take_it(*weights: str) -> Callable[[Match], bool]:
    def where(match: Match) -> bool:
        is_exact = match.type_of("weight").dtype == "float32" or abs(math.frexp(match["factor"])[0]) == 0.5
        is_free = match.are_weights(*weights) and all(len(match.readers(weight)) == 1 for weight in weights)
        return is_exact and is_free and match["weight"] not in match.graph.formats

    return where


PASS = Rewrite(
    "fold_scales",
    "one op less after each product that the model scales",
    (
        Rule(pattern, replacement, where=_can_take_it("weight")),
        Rule(pattern_bias, replacement_bias, where=_can_take_it("weight", "bias")),
        Rule(pattern_table, replacement_table, where=_can_take_it("weight")),
    ),
)


def example() -> Graph:
    def block(x: Symbol, weight: Symbol, bias: Symbol) -> Symbol:
        return ops.scale(ops.linear(x, weight, bias), factor=0.22)

    return trace(block, inputs={"x": ("T", 8)}, weights={"weight": (6, 8), "bias": (6,)})
