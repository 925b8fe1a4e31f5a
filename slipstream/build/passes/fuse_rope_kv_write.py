"""Rotate q and k and write k and v to the cache in one op: the rotated k is never written outside the cache."""

from slipstream.build.example import trace
from slipstream.build.rewrite import Match, Rewrite, Rule, Symbol, ops
from slipstream.engine.graph import Graph


def pattern(
    q: Symbol, k: Symbol, v: Symbol, cos: Symbol, sin: Symbol, kv: Symbol, slots: Symbol
) -> Symbol:
    rotated = ops.rope(q, cos, sin)
    ops.kv_write(ops.rope(k, cos, sin), v, kv, slots)
    return rotated


def replacement(
    q: Symbol, k: Symbol, v: Symbol, cos: Symbol, sin: Symbol, kv: Symbol, slots: Symbol
) -> Symbol:
    return ops.rope_kv_write(q, k, v, cos, sin, kv, slots)


def _is_attended(match: Match) -> bool:
    """q is the query of the attention over this very cache (every layer rotates by the same cos and sin)."""
    kv_readers = [node for node in match.graph.users()[match["kv"]] if node.op == "attention"]
    rotated = [node.outputs[0] for node in match.nodes.values() if node.op == "rope" and node.inputs[0] == match["q"]]
    return any(node.inputs[0] in rotated for node in kv_readers)


PASS = Rewrite(
    "fuse_rope_kv_write", "one op instead of three a layer", (Rule(pattern, replacement, where=_is_attended),)
)


def example() -> Graph:
    def block(q: Symbol, k: Symbol, v: Symbol, cos: Symbol, sin: Symbol, *rest: Symbol) -> Symbol:
        kv, slots, query_starts, kv_lens, block_tables = rest
        rotated = pattern(q, k, v, cos, sin, kv, slots)
        return ops.attention(rotated, kv, query_starts, kv_lens, block_tables, scale=0.5)

    heads = {"q": ("T", 8), "k": ("T", 4), "v": ("T", 4), "cos": ("T", 2), "sin": ("T", 2), "kv": (2, "N", 2, 1, 4)}
    step = {"slots": ("T",), "query_starts": ("S1",), "kv_lens": ("S",), "block_tables": ("S", "B")}
    return trace(block, inputs=heads | step, weights={})
