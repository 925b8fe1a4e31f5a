"""Attention over the paged cache in tiles: softmax as it goes along (arXiv:2205.14135), long pasts in splits.

A row is one query token at one head. The query heads that share a KV head are neighbours in a tile (GQA, MQA), so their
keys are read once. The tiles of all sequences are numbered in one line, and a program finds its sequence in
query_starts: the grid depends on shapes alone and can be recorded. Where tiles are few, several programs walk through
one tile's keys, each through its share of as many as there are, and the last to be done merges what they found.

A head's numbers are a power of two, MAIN, and the rest, REST (80 = 64 + 16, 576 = 512 + 64): tiles are powers of two,
and 576 numbers in 1,024 would be half zeros.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.triton.launch import arrivals, num_processors, shared_memory, starts_early, wait_for_previous

LOG2_E = tl.constexpr(1.4426950408889634)  # exponentials are of base 2
MOST_SPLITS = tl.constexpr(64)
MOST_READ_AGAIN = 4096  # keys, by each few of the rows that verify drafts
WHOLE = 512  # keys that are not split: to merge parts takes as long as to walk through some 500 more


@dataclass(frozen=True)
class Tile:
    rows: int
    keys: int  # read at a time
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Launch:
    """One pass over the step's sequences."""

    tile: Tile
    num_splits: int
    # Sequences with few rows take one tile each, if max_rows is given; then another launch has those of min_rows.
    max_rows: int = 0
    min_rows: int = 0
    whole_keys: int = 0  # of so many at most nothing is split


@triton.jit
def _most_rows(query_starts, num_sequences):
    """Tokens of the sequence that has most."""
    most = 0
    for first in range(0, num_sequences, 256):
        sequences = first + tl.arange(0, 256)
        is_one = sequences < num_sequences
        starts = tl.load(query_starts + sequences, mask=is_one, other=0)
        ends = tl.load(query_starts + sequences + 1, mask=is_one, other=0)
        most = tl.maximum(most, tl.max(ends - starts, 0).to(tl.int32))
    return most


@triton.jit
def _find_tile(index, query_starts, num_sequences, GROUP: tl.constexpr, ROWS: tl.constexpr, MIN_ROWS: tl.constexpr):
    """(sequence, its tile) of a tile counted from the last; sequence -1 where there are not as many."""
    before = 0
    num_tiles_before = 0
    num_tiles = 0
    for first in range(0, num_sequences, 256):  # all at once: a binary search would wait for memory at each step
        sequences = num_sequences - 1 - first - tl.arange(0, 256)
        is_one = sequences >= 0
        starts = tl.load(query_starts + sequences, mask=is_one, other=0)
        num_rows = ((tl.load(query_starts + sequences + 1, mask=is_one, other=0) - starts) * GROUP).to(tl.int32)
        tiles = tl.where(num_rows >= MIN_ROWS, tl.cdiv(num_rows, ROWS), 0)
        is_before = num_tiles + tl.cumsum(tiles, 0) <= index
        before += tl.sum((is_one & is_before).to(tl.int32))
        num_tiles_before += tl.sum(tl.where(is_before, tiles, 0))
        num_tiles += tl.sum(tiles)
    sequence = num_sequences - 1 - before
    return sequence, index - num_tiles_before


@triton.jit
def _seen_by_tile(
    first_row, num_rows, kv_len, root, window,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Positions of the tile's first and last token, and where the keys that its rows see begin: a multiple of KEYS, so
    that a row's keys are met in the same groups whichever rows share its tile. In a tree the first is the root."""
    past = kv_len - num_rows // GROUP
    first_position = tl.minimum(past + first_row // GROUP, root)
    last_position = past + (tl.minimum(first_row + ROWS, num_rows) - 1) // GROUP
    first_key = 0
    if HAS_WINDOW:
        first_key = tl.maximum(first_position - window + 1, 0) // KEYS * KEYS
    return first_position, last_position, first_key


@triton.jit
def _split_keys(num_keys, num_splits, KEYS: tl.constexpr, WHOLE: tl.constexpr):
    """Keys of a split: a share of all, but at least two tiles, since a part less is a part less to merge."""
    share = tl.maximum(tl.cdiv(tl.cdiv(num_keys, KEYS), num_splits), 2) * KEYS
    return tl.where(num_keys <= WHOLE, tl.maximum(share, WHOLE), share)


@triton.jit
def _load(base, offsets, is_row, START: tl.constexpr, WIDTH: tl.constexpr, USED: tl.constexpr, IS_MASKED: tl.constexpr):
    """Numbers START to START + WIDTH of each row, of USED that there are; zeros for others, which are not read."""
    columns = START + tl.arange(0, WIDTH)
    pointers = base + offsets[:, None] + columns[None, :]
    if START + WIDTH > USED:
        if IS_MASKED:
            return tl.load(pointers, mask=is_row[:, None] & (columns < USED)[None, :], other=0.0)
        return tl.load(pointers, mask=(columns < USED)[None, :], other=0.0)
    if IS_MASKED:
        return tl.load(pointers, mask=is_row[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def _store(base, offsets, is_row, values, START: tl.constexpr, WIDTH: tl.constexpr, USED: tl.constexpr):
    columns = START + tl.arange(0, WIDTH)
    mask = is_row[:, None] & (columns < USED)[None, :]
    tl.store(base + offsets[:, None] + columns[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _exact_for_8_bits(q):
    """In a dtype that 8 bits convert to exactly, and in the fewest instructions: bfloat16 would take more."""
    if q.dtype == tl.bfloat16:
        q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    return q


@triton.jit
def _load_query(
    base, offsets, is_row, kv_scales, START: tl.constexpr, WIDTH: tl.constexpr, USED: tl.constexpr
):  # fmt: skip
    q = _load(base, offsets, is_row, START, WIDTH, USED, True)
    if kv_scales is not None:
        q = _exact_for_8_bits(q)
    return q


@triton.jit
def _finite(maximum):
    """For rows that have seen nothing yet: exp2(-inf - 0) is 0, exp2(-inf - -inf) is NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _merge_stats(partial_stats, first_parts, is_row, num_parts):
    """Maximum and total of each row over its parts."""
    each = first_parts[:, None] + tl.arange(0, MOST_SPLITS)[None, :]
    mask = is_row[:, None] & (tl.arange(0, MOST_SPLITS) < num_parts)[None, :]
    maxima = tl.load(partial_stats + each * 2, mask=mask, other=float("-inf"), cache_modifier=".cg")
    totals = tl.load(partial_stats + each * 2 + 1, mask=mask, other=0.0, cache_modifier=".cg")
    maximum = tl.max(maxima, 1)
    return maximum, tl.sum(totals * tl.exp2(maxima - _finite(maximum)[:, None]), 1)


@triton.jit
def _merge_sums(
    partial_sums, partial_stats, first_parts, is_row, maximum, num_parts,
    START: tl.constexpr, WIDTH: tl.constexpr, USED: tl.constexpr,
):  # fmt: skip
    """Sums of each row over its parts, some at a time, weighed by their maxima; columns START to START + WIDTH."""
    ROWS: tl.constexpr = first_parts.shape[0]
    PARTS: tl.constexpr = max(1, 8192 // (ROWS * WIDTH))
    columns = START + tl.arange(0, WIDTH)
    merged = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, num_parts, PARTS):
        index = first + tl.arange(0, PARTS)
        each = first_parts[None, :] + index[:, None]
        mask = is_row[None, :] & (index < num_parts)[:, None]
        maxima = tl.load(partial_stats + each * 2, mask=mask, other=float("-inf"), cache_modifier=".cg")
        weights = tl.exp2(maxima - _finite(maximum)[None, :])
        sums = tl.load(
            partial_sums + each[:, :, None] * USED + columns[None, None, :],
            mask=mask[:, :, None] & (columns < USED)[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        merged += tl.sum(sums * weights[:, :, None], 0)
    return merged


@triton.jit
def _is_above(masks, is_row, first_node, is_key, num_words):
    """[rows, keys] whether a key, of those from first_node on, is before the tree or has its bit set in the row's mask.

    A row's words are read one by one: as many numbers as scores would be kept in shared memory.
    """
    KEYS: tl.constexpr = is_key.shape[0]
    nodes = first_node + tl.arange(0, KEYS)
    is_above = (nodes < 0)[None, :] & is_row[:, None]
    words_there = tl.where(is_row, num_words, 0)
    for place in tl.static_range(KEYS // 64 + 2):
        word = tl.maximum(first_node, 0) // 64 + place
        bits = tl.load(masks + word, mask=word < words_there, other=0)
        shifts = tl.where(nodes // 64 == word, nodes % 64, 0).to(tl.int64)
        is_here = (is_key & (nodes >= 0) & (nodes // 64 == word))[None, :]
        is_above |= is_here & ((bits[:, None] >> shifts[None, :]) & 1 != 0)
    return is_above


@triton.jit(do_not_specialize=["num_sequences", "num_splits", "table_stride", "window"])
def _attend(
    q, sink_q, kv, out, partial_sums, partial_stats, arrived, query_starts, kv_lens, block_tables, alibi_slopes, sinks,
    kv_scales, tree_positions, tree_starts, tree_masks, num_sequences, num_splits, window, scale, soft_cap,
    q_stride, out_stride, plane_stride, page_stride, token_stride, head_stride, table_stride, scale_stride,
    mask_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, VALUE_MAIN: tl.constexpr, VALUE_REST: tl.constexpr,
    KEYS_ARE_VALUES: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    FIRST_PHASE: tl.constexpr, IS_SPLIT: tl.constexpr, MAX_ROWS: tl.constexpr, MIN_ROWS: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFT_CAP: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_SINKS: tl.constexpr,
    SINK_TOKENS: tl.constexpr, WHOLE: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """One tile, one KV head, one split. Scores are in units of log2."""
    index = tl.program_id(0) // NUM_KV_HEADS
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    split = tl.program_id(1)
    if MAX_ROWS:
        sequence, tiles_after = index, 0
    else:  # counted from the last: the end of a prompt sees most keys, so it starts first
        sequence, tiles_after = 0, index
        if MIN_ROWS:  # most steps have no prompt: to find that out is quicker than to look for its tiles
            if _most_rows(query_starts, num_sequences) * GROUP < MIN_ROWS:
                wait_for_previous(IS_EARLY)
                return
        if num_sequences > 1:
            sequence, tiles_after = _find_tile(index, query_starts, num_sequences, GROUP, ROWS, MIN_ROWS)
    is_one = sequence >= 0
    first_token = tl.load(query_starts + sequence, mask=is_one, other=0)
    num_rows = ((tl.load(query_starts + sequence + 1, mask=is_one, other=0) - first_token) * GROUP).to(tl.int32)
    first_row = (tl.cdiv(num_rows, ROWS) - 1 - tiles_after) * ROWS
    is_one &= first_row >= 0
    if MAX_ROWS:
        is_one &= num_rows <= MAX_ROWS
    if MIN_ROWS:
        is_one &= num_rows >= MIN_ROWS

    kv_len = tl.load(kv_lens + sequence, mask=is_one, other=0).to(tl.int32)
    root = kv_len
    if tree_starts is not None:
        root = tl.load(tree_starts + sequence, mask=is_one, other=0).to(tl.int32)
    first_position, last_position, first_key = _seen_by_tile(
        first_row, num_rows, kv_len, root, window, GROUP, ROWS, KEYS, HAS_WINDOW
    )
    begin, end_key = first_key, last_position + 1
    num_parts = 1
    if IS_SPLIT:
        split_keys = _split_keys(end_key - first_key, num_splits, KEYS, WHOLE)
        num_parts = tl.cdiv(end_key - first_key, split_keys)
        begin = first_key + split * split_keys
        is_one &= begin < end_key
        end_key = tl.minimum(begin + split_keys, end_key)

    keys_of_head = kv + kv_head * head_stride
    values_of_head = keys_of_head + plane_stride
    table = block_tables + sequence * table_stride
    wait_for_previous(IS_EARLY)
    if not is_one:
        return

    rows = first_row + tl.arange(0, ROWS)
    is_row = rows < num_rows
    tokens, heads = first_token + rows // GROUP, kv_head * GROUP + rows % GROUP
    past = kv_len - num_rows // GROUP
    positions = past + rows // GROUP
    if tree_starts is not None:
        positions = tl.load(tree_positions + tokens, mask=is_row, other=0).to(tl.int32)
    q_offsets = tokens * q_stride + heads * HEAD_DIM
    q_main = _load_query(q, q_offsets, is_row, kv_scales, 0, MAIN, HEAD_DIM)
    if REST:
        q_rest = _load_query(q, q_offsets, is_row, kv_scales, MAIN, REST, HEAD_DIM)
    if HAS_SLOPES:
        slopes = tl.load(alibi_slopes + heads, mask=is_row, other=0.0) * LOG2_E
    log2_scale = scale * LOG2_E
    if kv_scales is not None:  # of 8 bits: they take part as they are stored, and the scales once, in the end
        log2_scale *= tl.load(kv_scales + kv_head)
        value_scale = tl.load(kv_scales + scale_stride + kv_head)

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sum_main = tl.zeros([ROWS, VALUE_MAIN], tl.float32)
    sum_rest = tl.zeros([ROWS, VALUE_REST if VALUE_REST else 16], tl.float32)

    IS_ONE_PAGE: tl.constexpr = BLOCK_SIZE % KEYS == 0
    # Phase 1 has the keys that all rows see and needs no masks; 0 those before it, at a window's start; 2 those after.
    # Phase 3 has the first tokens of the text, if they are sinks, which the others then leave out.
    for PHASE in tl.static_range(FIRST_PHASE, 4 if SINK_TOKENS else 3):
        end = end_key
        if PHASE == 3:
            begin, end = 0, tl.minimum(last_position + 1, SINK_TOKENS)
            if IS_SPLIT:
                end = tl.where(split == 0, end, 0)
            q_main = _load_query(sink_q, q_offsets, is_row, kv_scales, 0, MAIN, HEAD_DIM)
            if REST:
                q_rest = _load_query(sink_q, q_offsets, is_row, kv_scales, MAIN, REST, HEAD_DIM)
        if PHASE == 0:
            hidden = tl.maximum(tl.maximum(last_position - window + 1, SINK_TOKENS) - begin, 0)
            end = tl.minimum(begin + tl.cdiv(hidden, KEYS) * KEYS, end_key)
        if PHASE == 1:
            seen = tl.minimum(tl.minimum(first_position + 1, root), end_key) - begin
            end = begin + tl.maximum(seen, 0) // KEYS * KEYS
        # A turn's page ids are read in the turn before it, so that its keys can be fetched several turns ahead.
        if IS_ONE_PAGE:
            pages = tl.load(table + begin // BLOCK_SIZE, mask=begin < end, other=0)
        else:
            keys = begin + tl.arange(0, KEYS)
            pages = tl.load(table + keys // BLOCK_SIZE, mask=keys < end, other=0)
        for start in range(begin, end, KEYS):
            keys = start + tl.arange(0, KEYS)
            is_key = keys < end
            if HAS_WINDOW and PHASE != 3:  # pages before may be another sequence's by now
                is_key &= keys > first_position - window
            key_offsets = pages * page_stride + keys % BLOCK_SIZE * token_stride
            if IS_ONE_PAGE:
                pages = tl.load(table + (start + KEYS) // BLOCK_SIZE, mask=start + KEYS < end, other=0)
            else:
                pages = tl.load(table + (keys + KEYS) // BLOCK_SIZE, mask=keys + KEYS < end, other=0)
            k_main = _load(keys_of_head, key_offsets, is_key, 0, MAIN, HEAD_DIM, PHASE != 1).to(q_main.dtype)
            scores = tl.dot(q_main, k_main.T, input_precision="ieee")
            if REST:
                k_rest = _load(keys_of_head, key_offsets, is_key, MAIN, REST, HEAD_DIM, PHASE != 1).to(q_main.dtype)
                scores = tl.dot(q_rest, k_rest.T, scores, input_precision="ieee")
            factor = log2_scale  # left to the exponent, where it costs nothing, if nothing comes between
            if HAS_SOFT_CAP:  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
                scores = soft_cap * (1 - 2 / (tl.exp2(scores * (2 * log2_scale / soft_cap)) + 1))
                factor = LOG2_E
            key_positions = keys
            if tree_starts is not None and PHASE != 1:
                is_node = is_key & (keys >= root)
                of_nodes = tl.load(tree_positions + first_token + keys - past, mask=is_node, other=0)
                key_positions = tl.where(is_node, of_nodes.to(tl.int32), keys)
            if HAS_SLOPES:
                scores = scores * factor + slopes[:, None] * (key_positions[None, :] - positions[:, None])
                factor = 1.0
            if PHASE != 1:
                is_seen = key_positions[None, :] <= positions[:, None]
                if HAS_WINDOW and PHASE != 3:
                    is_seen &= key_positions[None, :] > positions[:, None] - window
                if tree_starts is not None:
                    is_seen &= _is_above(tree_masks + tokens * mask_stride, is_row, start - root, is_key, mask_stride)
                if SINK_TOKENS:
                    is_seen &= (keys < SINK_TOKENS)[None, :] == (PHASE == 3)
                scores = tl.where(is_seen, scores, float("-inf"))
            new_maximum = tl.maximum(maximum, tl.max(scores, 1) * factor)
            shift = new_maximum if PHASE == 1 else _finite(new_maximum)
            probs = tl.exp2(scores * factor - shift[:, None])
            decay = tl.exp2(maximum - shift)
            maximum = new_maximum
            total = total * decay + tl.sum(probs, 1)
            probs = probs.to(q_main.dtype)
            if KEYS_ARE_VALUES:
                v_main = k_main
            else:
                v_main = _load(values_of_head, key_offsets, is_key, 0, VALUE_MAIN, VALUE_DIM, PHASE != 1).to(
                    q_main.dtype
                )
            sum_main = tl.dot(probs, v_main, sum_main * decay[:, None], input_precision="ieee")
            if VALUE_REST:
                v_rest = _load(values_of_head, key_offsets, is_key, VALUE_MAIN, VALUE_REST, VALUE_DIM, PHASE != 1)
                sum_rest = tl.dot(probs, v_rest.to(q_main.dtype), sum_rest * decay[:, None], input_precision="ieee")
        begin = end

    if kv_scales is not None:
        sum_main *= value_scale
        sum_rest *= value_scale
    is_last = True
    if IS_SPLIT and num_parts > 1:
        partial_rows = tokens * (NUM_KV_HEADS * GROUP) + heads
        if MAX_ROWS:
            partial_rows = (sequence * NUM_KV_HEADS + kv_head).to(tl.int64) * ROWS + rows
        first_parts = partial_rows * num_splits
        part = first_parts + split
        tl.store(partial_stats + part * 2, maximum, mask=is_row)
        tl.store(partial_stats + part * 2 + 1, total, mask=is_row)
        _store(partial_sums, part * VALUE_DIM, is_row, sum_main, 0, VALUE_MAIN, VALUE_DIM)
        if VALUE_REST:
            _store(partial_sums, part * VALUE_DIM, is_row, sum_rest, VALUE_MAIN, VALUE_REST, VALUE_DIM)
        tl.debug_barrier()
        counter = arrived + tl.program_id(0)
        is_last = tl.atomic_add(counter, 1, sem="acq_rel") == num_parts - 1
        if is_last:
            tl.store(counter, 0)
            maximum, total = _merge_stats(partial_stats, first_parts, is_row, num_parts)
            sum_main = _merge_sums(
                partial_sums, partial_stats, first_parts, is_row, maximum, num_parts, 0, VALUE_MAIN, VALUE_DIM
            )
            if VALUE_REST:
                sum_rest = _merge_sums(
                    partial_sums, partial_stats, first_parts, is_row, maximum, num_parts,
                    VALUE_MAIN, VALUE_REST, VALUE_DIM,
                )  # fmt: skip
    if is_last:
        share = 1 / total
        if HAS_SINKS:
            sink = tl.load(sinks + heads, mask=is_row, other=0.0).to(tl.float32) * LOG2_E
            new_maximum = tl.maximum(maximum, sink)
            decay = tl.exp2(maximum - new_maximum)
            share = decay / (total * decay + tl.exp2(sink - new_maximum))
        out_offsets = tokens * out_stride + heads * VALUE_DIM
        _store(out, out_offsets, is_row, sum_main * share[:, None], 0, VALUE_MAIN, VALUE_DIM)
        if VALUE_REST:
            _store(out, out_offsets, is_row, sum_rest * share[:, None], VALUE_MAIN, VALUE_REST, VALUE_DIM)


def attention(
    q_TX: Tensor, kv_PNBKD: Tensor, query_starts: Tensor, kv_lens: Tensor, block_tables_SB: Tensor,
    alibi_slopes_H: Tensor | None, sinks_H: Tensor | None, kv_scales_PK: Tensor | None,
    scale: float, window: int, soft_cap: float, value_dim: int,
    launches: tuple[Launch, ...] | None = None, sink_q_TX: Tensor | None = None, sink_tokens: int = 0,
    tree: tuple[Tensor, Tensor, Tensor] | None = None, is_batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """As the op (kernels/attention/paged.py). launches: instead of those that the shapes suggest, to measure others.

    sink_q, sink_tokens: as in kernels/attention/streaming.py, where they count among the window's tokens.
    tree: positions, tree_starts and tree_masks, as in kernels/attention/tree.py.
    is_batch_invariant: prompts in the tiles of generation, nothing in splits, whose number depends on the batch.
    """
    _, _, block_size, num_kv_heads, head_dim = kv_PNBKD.shape
    num_heads = q_TX.shape[1] // head_dim
    out_TX = q_TX.new_empty(q_TX.shape[0], num_heads * value_dim)
    if is_batch_invariant:
        launches = (Launch(_few_rows(min(32, num_heads // num_kv_heads), head_dim, q_TX.element_size()), 1),)
    elif launches is None:
        launches = plan(
            q_TX.shape[0], len(kv_lens), num_kv_heads, num_heads // num_kv_heads, block_tables_SB.shape[1] * block_size,
            head_dim, q_TX.element_size(), num_processors(q_TX.device), shared_memory(q_TX.device), tree is not None,
        )  # fmt: skip
    if q_TX.stride(1) != 1 or sink_q_TX is not None:
        q_TX, sink_q_TX = q_TX.contiguous(), None if sink_q_TX is None else sink_q_TX.contiguous()
    for launch in launches if q_TX.numel() else ():
        _run(
            launch, out_TX, q_TX, sink_q_TX, kv_PNBKD, query_starts, kv_lens, block_tables_SB, alibi_slopes_H, sinks_H,
            kv_scales_PK, scale, window - sink_tokens, soft_cap, value_dim, sink_tokens, tree,
        )  # fmt: skip
    return out_TX


def _run(
    launch: Launch, out_TX: Tensor, q_TX: Tensor, sink_q_TX: Tensor | None, kv_PNBKD: Tensor, query_starts: Tensor,
    kv_lens: Tensor, block_tables_SB: Tensor, alibi_slopes_H: Tensor | None, sinks_H: Tensor | None,
    kv_scales_PK: Tensor | None, scale: float, window: int, soft_cap: float, value_dim: int, sink_tokens: int,
    tree: tuple[Tensor, Tensor, Tensor] | None,
) -> None:  # fmt: skip
    num_planes, _, block_size, num_kv_heads, head_dim = kv_PNBKD.shape
    num_tokens, num_sequences = q_TX.shape[0], len(kv_lens)
    group = q_TX.shape[1] // head_dim // num_kv_heads
    tile, num_splits, is_early = launch.tile, launch.num_splits, starts_early(q_TX.device)
    main, rest = _powers_of_two(head_dim)
    value_main, value_rest = _powers_of_two(value_dim)
    num_tiles = num_sequences if launch.max_rows else _most_tiles(launch, num_tokens, num_sequences, group)
    num_rows = num_sequences * num_kv_heads * tile.rows if launch.max_rows else num_tokens * group * num_kv_heads
    sums = stats = arrived = None
    if num_splits > 1:
        arrived = arrivals(q_TX.device)
        sums = torch.empty(num_rows * num_splits * value_dim, dtype=torch.float32, device=q_TX.device)
        stats = torch.empty(num_rows * num_splits * 2, dtype=torch.float32, device=q_TX.device)
    # Short tiles meet their whole past and a few masked keys in one loop: to start another costs more than masks. Those
    # of a tree cost more than that.
    first_phase = 2 if tile.rows < 64 and tree is None else 1 - (window > 0)
    _attend[num_tiles * num_kv_heads, num_splits](
        q_TX, sink_q_TX, kv_PNBKD, out_TX, sums, stats, arrived, query_starts, kv_lens, block_tables_SB, alibi_slopes_H,
        sinks_H, kv_scales_PK, *(tree or (None, None, None)), num_sequences, num_splits, window, scale, soft_cap,
        q_TX.stride(0), out_TX.stride(0), kv_PNBKD.stride(0) * (num_planes - 1), *kv_PNBKD.stride()[1:4],
        block_tables_SB.stride(0), (num_planes - 1) * num_kv_heads, 0 if tree is None else tree[2].stride(0),
        num_kv_heads, group, head_dim, value_dim, main, rest, value_main, value_rest,
        num_planes == 1 and value_dim == main, block_size, tile.rows, tile.keys,
        first_phase, num_splits > 1, launch.max_rows, launch.min_rows,
        window > 0, soft_cap != 0, alibi_slopes_H is not None, sinks_H is not None, sink_tokens, launch.whole_keys,
        is_early, num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=is_early,
    )  # fmt: skip


def _most_tiles(launch: Launch, num_tokens: int, num_sequences: int, group: int) -> int:
    """However the tokens are distributed among the sequences."""
    num_rows, rows = num_tokens * group, launch.tile.rows
    not_full = min(num_sequences, num_tokens, num_rows // max(1, launch.min_rows))
    return min(num_tokens * -(-group // rows), num_rows // rows + not_full)


def _powers_of_two(width: int) -> tuple[int, int]:
    """The main part of so many numbers and the rest, each padded to a size that a tile can have."""
    main = max(16, 1 << width.bit_length() - 1)
    return main, max(16, triton.next_power_of_2(width - main)) if width > main else 0


def plan(
    num_tokens: int, num_sequences: int, num_kv_heads: int, group: int, max_keys: int, head_dim: int, item_size: int,
    num_processors: int, shared_bytes: int, has_trees: bool = False,
) -> tuple[Launch, ...]:  # fmt: skip
    """The launches for a step of these shapes: a recorded one must do for any lengths that come in them."""
    tokens_a_sequence = -(-num_tokens // num_sequences)
    whole = WHOLE if item_size < 4 and head_dim <= 128 else 0
    # Up to eight may be drafted tokens that each sequence verifies; more than that are a prompt's, beside generation.
    few = _few_rows(group * tokens_a_sequence if tokens_a_sequence <= 8 else group, head_dim, item_size)
    many = _many_rows(num_tokens * group, head_dim, item_size)

    def launch(tile: Tile, num_tiles: int, programs_a_processor: int, **limits: int) -> Launch:
        room = programs_a_processor * num_processors // (max(1, num_tiles) * num_kv_heads)
        most = min(room, -(-max_keys // (2 * tile.keys)), MOST_SPLITS.value)
        return Launch(tile, max(1, most if max_keys > whole else 1), whole_keys=whole, **limits)

    # Drafts that are verified: a processor for each few rows, though each reads the keys again, where they are few.
    is_short = 1 < num_tokens <= (64 if num_sequences == 1 else 256 if has_trees and 8 < tokens_a_sequence <= 64 else 0)
    if is_short and item_size < 4 and head_dim <= 128 and max_keys <= MOST_READ_AGAIN:
        tile = Tile(16, 64, 4, 3) if has_trees else _one_a_processor(head_dim, item_size, shared_bytes)
        return (launch(tile, -(-num_tokens * group // tile.rows) + num_sequences - 1, 1),)
    # A recorded step has as many sequences as tokens, unless it ends with drafts; its tokens may still be one prompt's.
    if num_tokens <= min(num_sequences, 64) or num_tokens * group <= few.rows:
        num_tiles = min(num_tokens, num_sequences) * -(-group // few.rows)
        if num_tiles * num_kv_heads <= num_processors and few.rows == 16 and item_size < 4 and head_dim <= 128:
            return (launch(_one_a_processor(head_dim, item_size, shared_bytes), num_tiles, 1),)
        return (launch(few, num_tiles, 4),)
    num_tiles = -(-num_tokens * group // many.rows)
    if num_sequences == 1 or group > few.rows:
        return (launch(many, num_tiles, 128 // many.rows),)
    return (
        launch(few, num_sequences, 4, max_rows=few.rows),
        launch(many, num_tiles, 128 // many.rows, min_rows=few.rows + 1),
    )


def _few_rows(num_rows: int, head_dim: int, item_size: int) -> Tile:
    """For generation: all that counts is to have many keys on their way."""
    rows = min(64 if item_size < 4 else 32, max(16, triton.next_power_of_2(num_rows)))
    if item_size == 4:
        return Tile(rows, 32, rows // 4, 2)
    if head_dim > 256:
        return Tile(rows, 32, 8 if rows == 64 else 4, 2)
    if head_dim > 128:
        return Tile(rows, 32, 4, 3)
    return Tile(rows, 32, 4, 2) if rows == 16 else Tile(rows, 64, 4, 3)


def _one_a_processor(head_dim: int, item_size: int, shared_bytes: int) -> Tile:
    """For generation by programs that have a processor each: all of its memory is for keys and values on their way."""
    key_bytes = 2 * item_size * sum(_powers_of_two(head_dim))
    stages = 3 if 3 * 128 * key_bytes <= shared_bytes - (16 << 10) else 2
    return Tile(16, 128, 4, stages)


def _many_rows(num_rows: int, head_dim: int, item_size: int) -> Tile:
    """For prompts: large products, as far as registers and shared memory go."""
    if item_size == 4:  # exact products run outside the tensor cores, from registers
        return Tile(32, 32, 8, 2)
    if head_dim > 256:
        return Tile(64, 32, 8, 2)
    if head_dim > 128:
        return Tile(128, 32, 8, 2)
    if num_rows < 1024:
        return Tile(64, 64, 4, 3)
    return Tile(128, 64, 8, 3)
