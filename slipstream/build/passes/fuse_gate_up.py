"""One matrix product for gate and up: x is read once, and one large product is faster than two."""

from collections.abc import Callable

from slipstream.build.example import trace
from slipstream.build.rewrite import Match, Rewrite, Rule, Symbol, ops
from slipstream.engine.graph import Graph

Activation = Callable[[Symbol], Symbol]


def rules(activation: Activation, activation_and_mul: Activation) -> tuple[Rule, Rule]:
    """For one activation: without and with biases."""

    def pattern(x: Symbol, gate: Symbol, up: Symbol) -> Symbol:
        return ops.mul(activation(ops.linear(x, gate)), ops.linear(x, up))

    def replacement(x: Symbol, gate: Symbol, up: Symbol) -> Symbol:
        return activation_and_mul(ops.linear(x, ops.concat(gate, up)))

    def pattern_bias(x: Symbol, gate: Symbol, gate_bias: Symbol, up: Symbol, up_bias: Symbol) -> Symbol:
        return ops.mul(activation(ops.linear(x, gate, gate_bias)), ops.linear(x, up, up_bias))

    def replacement_bias(x: Symbol, gate: Symbol, gate_bias: Symbol, up: Symbol, up_bias: Symbol) -> Symbol:
        return activation_and_mul(ops.linear(x, ops.concat(gate, up), ops.concat(gate_bias, up_bias)))

    return Rule(pattern, replacement, where=_are_halves), Rule(pattern_bias, replacement_bias, where=_are_halves)


def _are_halves(match: Match) -> bool:
    """Two weights of one shape: with another, the product would broadcast."""
    return match.can_be_joined("gate", "up") and match.have_same_type("gate", "up")


PASS = Rewrite(
    "fuse_gate_up",
    "one product and one activation op instead of four ops a layer",
    (
        *rules(lambda x: ops.silu(x), lambda x: ops.silu_and_mul(x)),
        *rules(lambda x: ops.gelu(x, approximate=True), lambda x: ops.gelu_and_mul(x, approximate=True)),
        *rules(lambda x: ops.gelu(x, approximate=False), lambda x: ops.gelu_and_mul(x, approximate=False)),
    ),
)


def example() -> Graph:
    def block(x: Symbol, gate: Symbol, up: Symbol) -> Symbol:
        return ops.mul(ops.silu(ops.linear(x, gate)), ops.linear(x, up))

    return trace(block, inputs={"x": ("T", 8)}, weights={"gate": (6, 8), "up": (6, 8)})
