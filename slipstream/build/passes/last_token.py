"""Logits only for the rows that are asked for: the head, often the largest weight, skips the rest of a prompt."""

from slipstream.build.example import trace
from slipstream.build.rewrite import Match, Rewrite, Rule, Symbol, ops
from slipstream.engine.graph import Graph, Node

LOGIT_ROWS = "step.logit_rows"
ROW_WISE = {"scale", "soft_cap", "all_gather"}  # what is done to logits after the head: each row on its own


def pattern(x: Symbol, head: Symbol, bias: Symbol | None) -> Symbol:
    return ops.linear(x, head, bias)


def replacement(x: Symbol, head: Symbol, bias: Symbol | None) -> Symbol:
    return ops.linear(ops.select_rows(x, ops.graph_input(LOGIT_ROWS)), head, bias)


def _makes_the_logits(match: Match) -> bool:
    (node,) = match.nodes.values()
    return match.type_of("x").shape[0] == "T" and _becomes_the_output(match, node)


def _becomes_the_output(match: Match, node: Node) -> bool:
    """Row by row, and nobody else reads it on the way."""
    (value,) = node.outputs
    readers = match.index.readers(value)
    if value in match.graph.outputs:
        return not readers
    return len(readers) == 1 and readers[0].op in ROW_WISE and _becomes_the_output(match, readers[0])


PASS = Rewrite(
    "last_token",
    "logits of one row a sequence instead of one a token",
    (Rule(pattern, replacement, where=_makes_the_logits),),
)


def example() -> Graph:
    def block(x: Symbol, rows: Symbol, head: Symbol) -> Symbol:
        return pattern(x, head, None)

    return trace(block, inputs={"x": ("T", 8), LOGIT_ROWS: ("R",)}, weights={"head": (16, 8)})
