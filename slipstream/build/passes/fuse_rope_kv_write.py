"""Rotate q and k and write k and v to the cache in one op: the rotated k is never written outside the cache."""

from slipstream.build.example import trace
from slipstream.build.rewrite import Rewrite, Rule, Symbol, ops
from slipstream.engine.graph import Graph


def pattern(
    q: Symbol, k: Symbol, v: Symbol, cos: Symbol, sin: Symbol, kv: Symbol, slots: Symbol,
    query_starts: Symbol, kv_lens: Symbol, block_tables: Symbol, scale: Symbol,
) -> Symbol:  # fmt: skip
    """The attention is part of it because it alone says which q belongs to which k: all layers share cos and sin."""
    ops.kv_write(ops.rope(k, cos, sin), v, kv, slots)
    return ops.attention(ops.rope(q, cos, sin), kv, query_starts, kv_lens, block_tables, scale=scale)


def replacement(
    q: Symbol, k: Symbol, v: Symbol, cos: Symbol, sin: Symbol, kv: Symbol, slots: Symbol,
    query_starts: Symbol, kv_lens: Symbol, block_tables: Symbol, scale: Symbol,
) -> Symbol:  # fmt: skip
    rotated = ops.rope_kv_write(q, k, v, cos, sin, kv, slots)
    return ops.attention(rotated, kv, query_starts, kv_lens, block_tables, scale=scale)


PASS = Rewrite("fuse_rope_kv_write", "one op instead of three a layer", (Rule(pattern, replacement),))


def example() -> Graph:
    def block(
        q: Symbol, k: Symbol, v: Symbol, cos: Symbol, sin: Symbol, kv: Symbol, slots: Symbol,
        query_starts: Symbol, kv_lens: Symbol, block_tables: Symbol,
    ) -> Symbol:  # fmt: skip
        return pattern(q, k, v, cos, sin, kv, slots, query_starts, kv_lens, block_tables, 0.5)  # type: ignore[arg-type]

    heads = {"q": ("T", 8), "k": ("T", 4), "v": ("T", 4), "cos": ("T", 2), "sin": ("T", 2), "kv": (2, "N", 2, 1, 4)}
    step = {"slots": ("T",), "query_starts": ("S1",), "kv_lens": ("S",), "block_tables": ("S", "B")}
    return trace(block, inputs=heads | step, weights={})
