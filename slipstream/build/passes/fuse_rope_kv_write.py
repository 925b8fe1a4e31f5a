"""Rotate q and k and write k and v to the cache in one op: the rotated k is never written outside the cache."""

from slipstream.build.example import trace
from slipstream.build.rewrite import Rewrite, Rule, Symbol, ops
from slipstream.engine.graph import Graph


def pattern(
    q: Symbol, k: Symbol, v: Symbol, cos: Symbol, sin: Symbol, kv: Symbol, slots: Symbol,
    query_starts: Symbol, kv_lens: Symbol, block_tables: Symbol, alibi_slopes: Symbol | None, sinks: Symbol | None,
    scale: Symbol, window: Symbol, soft_cap: Symbol, value_dim: Symbol, head_dim: Symbol,
) -> Symbol:  # fmt: skip
    """The attention is part of it because it alone says which q belongs to which k: all layers share cos and sin."""
    ops.kv_write(ops.rope(k, cos, sin, head_dim=head_dim), v, kv, slots)
    return ops.attention(
        ops.rope(q, cos, sin, head_dim=head_dim), kv, query_starts, kv_lens, block_tables, alibi_slopes, sinks,
        scale=scale, window=window, soft_cap=soft_cap, value_dim=value_dim,
    )  # fmt: skip


def replacement(
    q: Symbol, k: Symbol, v: Symbol, cos: Symbol, sin: Symbol, kv: Symbol, slots: Symbol,
    query_starts: Symbol, kv_lens: Symbol, block_tables: Symbol, alibi_slopes: Symbol | None, sinks: Symbol | None,
    scale: Symbol, window: Symbol, soft_cap: Symbol, value_dim: Symbol,
) -> Symbol:  # fmt: skip
    rotated = ops.rope_kv_write(q, k, v, cos, sin, kv, slots)
    return ops.attention(
        rotated, kv, query_starts, kv_lens, block_tables, alibi_slopes, sinks,
        scale=scale, window=window, soft_cap=soft_cap, value_dim=value_dim,
    )  # fmt: skip


PASS = Rewrite("fuse_rope_kv_write", "one op instead of three a layer", (Rule(pattern, replacement),))


def example() -> Graph:
    def block(
        q: Symbol, k: Symbol, v: Symbol, cos: Symbol, sin: Symbol, kv: Symbol, slots: Symbol,
        query_starts: Symbol, kv_lens: Symbol, block_tables: Symbol,
    ) -> Symbol:  # fmt: skip
        step = (kv, slots, query_starts, kv_lens, block_tables)
        return pattern(q, k, v, cos, sin, *step, None, None, 0.5, 0, 0.0, 4, 4)  # type: ignore[arg-type]

    heads = {"q": ("T", 8), "k": ("T", 4), "v": ("T", 4), "cos": ("T", 2), "sin": ("T", 2), "kv": (2, "N", 2, 1, 4)}
    step = {"slots": ("T",), "query_starts": ("S1",), "kv_lens": ("S",), "block_tables": ("S", "B")}
    return trace(block, inputs=heads | step, weights={})
