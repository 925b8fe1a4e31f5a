"""Logits only for the rows that are asked for: the head, often the largest weight, skips the rest of a prompt."""

from slipstream.build.example import trace
from slipstream.build.rewrite import Match, Rewrite, Rule, Symbol, ops
from slipstream.engine.graph import Graph

LOGIT_ROWS = "step.logit_rows"


def pattern(x: Symbol, head: Symbol) -> Symbol:
    return ops.linear(x, head)


def replacement(x: Symbol, head: Symbol) -> Symbol:
    return ops.linear(ops.select_rows(x, ops.graph_input(LOGIT_ROWS)), head)


def _is_output_of_all_rows(match: Match) -> bool:
    (node,) = match.nodes.values()
    return node.outputs[0] in match.graph.outputs and match.type_of("x").shape[0] == "T"


PASS = Rewrite(
    "last_token",
    "logits of one row a sequence instead of one a token",
    (Rule(pattern, replacement, where=_is_output_of_all_rows),),
)


def example() -> Graph:
    def block(x: Symbol, rows: Symbol, head: Symbol) -> Symbol:
        return pattern(x, head)

    return trace(block, inputs={"x": ("T", 8), LOGIT_ROWS: ("R",)}, weights={"head": (16, 8)})
