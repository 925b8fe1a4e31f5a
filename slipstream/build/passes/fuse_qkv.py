"""One matrix product for query, key and value: x is read once, and one large product is faster than three."""

from slipstream.build.example import trace
from slipstream.build.rewrite import Match, Rewrite, Rule, Symbol, ops
from slipstream.engine.graph import Graph


def pattern(x: Symbol, q: Symbol, k: Symbol, v: Symbol) -> tuple[Symbol, ...]:
    return ops.linear(x, q), ops.linear(x, k), ops.linear(x, v)


def replacement(x: Symbol, q: Symbol, k: Symbol, v: Symbol, sizes: list[int]) -> tuple[Symbol, ...]:
    return ops.split(ops.linear(x, ops.concat(q, k, v)), sizes=sizes)


def pattern_bias(
    x: Symbol, q: Symbol, q_bias: Symbol, k: Symbol, k_bias: Symbol, v: Symbol, v_bias: Symbol
) -> tuple[Symbol, ...]:
    return ops.linear(x, q, q_bias), ops.linear(x, k, k_bias), ops.linear(x, v, v_bias)


def replacement_bias(
    x: Symbol, q: Symbol, q_bias: Symbol, k: Symbol, k_bias: Symbol, v: Symbol, v_bias: Symbol, sizes: list[int]
) -> tuple[Symbol, ...]:
    return ops.split(ops.linear(x, ops.concat(q, k, v), ops.concat(q_bias, k_bias, v_bias)), sizes=sizes)


def _are_the_first_three_readers(match: Match) -> bool:
    """Of the products that x feeds; an MLP beside attention has the others."""
    readers = [node.inputs[1] for node in match.readers("x") if node.op == "linear"]
    return readers[:3] == [match["q"], match["k"], match["v"]] and match.can_be_joined("q", "k", "v")


def _sizes(match: Match) -> dict[str, list[int]]:
    return {"sizes": [int(match.type_of(name).shape[0]) for name in ("q", "k", "v")]}


PASS = Rewrite(
    "fuse_qkv",
    "one product instead of three a layer",
    (
        Rule(pattern, replacement, where=_are_the_first_three_readers, attributes=_sizes),
        Rule(pattern_bias, replacement_bias, where=_are_the_first_three_readers, attributes=_sizes),
    ),
)


def example() -> Graph:
    return trace(pattern, inputs={"x": ("T", 8)}, weights={"q": (8, 8), "k": (4, 8), "v": (4, 8)})
