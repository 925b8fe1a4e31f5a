"""Trees of drafts on a GPU, a launch for each thing that is done to them; what torch would do in some 250.

    keep     slots    a drafter's tokens and parents into the slots' tables: depths and ancestors, too
    fill     tokens   a step's names of drafts become tokens, places and masks
    accept   trees    what was chosen by each row, walked down from the root (speculative/accept.py, the reference)
    move     trees × layers   keys and values of accepted nodes to the places after their root
    move_on  sequences        the places of steps that were planned before it was known how far the ones before get

Shape suffixes: X slots, the last of which is of those without one; S sequences, N drafts, M nodes, W words of 64 bits,
T tokens, R rows of logits, B blocks.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.attention.tree import WORD
from slipstream.schema.step import PENDING

_WORD = tl.constexpr(WORD)
_PENDING = tl.constexpr(PENDING)
_NO_TOKEN = tl.constexpr(-1)  # NOTHING_TO_SAMPLE
INTEGERS = {1: tl.int8, 2: tl.int16, 4: tl.int32}  # by their bytes: what keys and values are copied as


class TreeTables(NamedTuple):
    """Of each slot."""

    token_ids: Tensor  # [X, N]
    parents: Tensor  # [X, N]
    depths: Tensor  # [X, M] of trees that branch; of others nobody looks
    masks: Tensor  # [X, M, W] likewise
    can_branch: bool


@triton.jit
def _slot(slots, index, num_slots):
    slot = tl.load(slots + index)
    return tl.where(slot < 0, num_slots - 1, slot)


@triton.jit
def _bit(node_M, is_there_M, word):
    """In this word of a mask."""
    return tl.where(is_there_M & (node_M // _WORD == word), tl.full(node_M.shape, 1, tl.int64) << node_M % _WORD, 0)


# --- keep ---


@triton.jit
def _keep(
    slots, token_ids, parents, token_stride, token_column, parent_stride, parent_column, num_given,
    token_ids_XN, parents_XN, depths_XM, masks_XMW, num_slots, num_drafts, vocab_size,
    NODES: tl.constexpr, WORDS: tl.constexpr, WORDS_BLOCK: tl.constexpr, CAN_BRANCH: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    slot = _slot(slots, sequence, num_slots)
    node_M = tl.arange(0, NODES).to(tl.int64)
    draft_M = tl.maximum(node_M - 1, 0)
    is_draft_M = (node_M > 0) & (node_M <= num_drafts)
    is_given_M = is_draft_M & (draft_M < num_given)
    token_M = tl.load(token_ids + sequence * token_stride + draft_M * token_column, mask=is_given_M, other=0)
    token_M = tl.minimum(tl.maximum(token_M, 0), vocab_size - 1)
    tl.store(token_ids_XN + slot * num_drafts + draft_M, token_M, mask=is_draft_M)
    if CAN_BRANCH:
        parents += sequence * parent_stride
        parent_M = tl.load(parents + draft_M * parent_column, mask=is_given_M, other=0)
        parent_M = tl.minimum(tl.maximum(parent_M, 0), draft_M)
        tl.store(parents_XN + slot * num_drafts + draft_M, parent_M, mask=is_draft_M)
        word_1W = tl.arange(0, WORDS_BLOCK)[None, :]
        above_M, depth_M = node_M, tl.zeros_like(node_M)
        mask_MW = _bits(above_M, word_1W)
        while tl.max(above_M, 0) > 0:  # a node further up each time
            place_M = tl.maximum(above_M - 1, 0)
            found_M = tl.load(parents + place_M * parent_column, mask=(above_M > 0) & (place_M < num_given), other=0)
            depth_M += (above_M > 0).to(tl.int64)
            above_M = tl.minimum(tl.maximum(found_M, 0), place_M)
            mask_MW |= _bits(above_M, word_1W)
        is_node_M = node_M <= num_drafts
        place_M = slot * (num_drafts + 1) + node_M
        tl.store(depths_XM + place_M, depth_M, mask=is_node_M)
        places_MW = masks_XMW + place_M[:, None] * WORDS + word_1W
        tl.store(places_MW, mask_MW, mask=is_node_M[:, None] & (word_1W < WORDS))
    else:
        tl.store(parents_XN + slot * num_drafts + draft_M, draft_M, mask=is_draft_M)


@triton.jit
def _bits(node_M, word_1W):
    bit_M1 = (tl.full(node_M.shape, 1, tl.int64) << node_M % _WORD)[:, None]
    return tl.where((node_M // _WORD)[:, None] == word_1W, bit_M1, 0)


def keep(slots_S: Tensor, token_ids_SN: Tensor, parents_SN: Tensor, tables: TreeTables, vocab_size: int) -> None:
    """At most as many as the tables have; what they cannot be is brought within its bounds."""
    num_drafts = tables.token_ids.shape[1]
    if not len(slots_S) or not num_drafts:
        return
    _keep[(len(slots_S),)](
        slots_S, token_ids_SN, parents_SN, *token_ids_SN.stride(), *parents_SN.stride(), token_ids_SN.shape[1],
        *tables[:4], len(tables.token_ids), num_drafts, vocab_size,
        NODES=_nodes(tables), **_words(tables), CAN_BRANCH=tables.can_branch,
    )  # fmt: skip


def _nodes(tables: TreeTables) -> int:
    return max(16, triton.next_power_of_2(1 + tables.token_ids.shape[1]))


def _words(tables: TreeTables) -> dict[str, int]:
    count = tables.masks.shape[2]
    return {"WORDS": count, "WORDS_BLOCK": triton.next_power_of_2(count)}


# --- fill ---


@triton.jit
def _fill(
    token_ids, slots, positions, masks_TW, token_ids_XN, depths_XM, masks_XMW, num_tokens, num_slots, num_drafts,
    first_draft, TOKENS: tl.constexpr, WORDS: tl.constexpr, WORDS_BLOCK: tl.constexpr, CAN_BRANCH: tl.constexpr,
):  # fmt: skip
    token_T = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token_T = token_T < num_tokens
    name_T = tl.load(token_ids + token_T, mask=is_token_T, other=0)
    is_draft_T = is_token_T & (name_T < _PENDING)
    node_T = tl.minimum(tl.where(is_draft_T, 1 + first_draft - name_T, 1), num_drafts)
    slot_T = tl.load(slots + token_T, mask=is_draft_T, other=0)
    slot_T = tl.where(slot_T < 0, num_slots - 1, slot_T)
    draft_T = tl.load(token_ids_XN + slot_T * num_drafts + node_T - 1, mask=is_draft_T, other=0)
    tl.debug_barrier()  # names are read in another layout, too, by other threads than these
    tl.store(token_ids + token_T, draft_T, mask=is_draft_T)
    if CAN_BRANCH:
        place_T = slot_T * (num_drafts + 1) + node_T
        depth_T = tl.load(depths_XM + place_T, mask=is_draft_T, other=0)
        position_T = tl.load(positions + token_T, mask=is_draft_T, other=0)
        tl.store(positions + token_T, position_T + depth_T - node_T, mask=is_draft_T)
        word_1W = tl.arange(0, WORDS_BLOCK)[None, :]
        is_word_1W = word_1W < WORDS
        places_TW = masks_XMW + place_T[:, None] * WORDS + word_1W
        mask_TW = tl.load(places_TW, mask=is_draft_T[:, None] & is_word_1W, other=-1)
        tl.store(masks_TW + token_T[:, None] * WORDS + word_1W, mask_TW, mask=is_token_T[:, None] & is_word_1W)


def fill(
    token_ids_T: Tensor, slots_T: Tensor, positions_T: Tensor, tables: TreeTables, first_draft: int
) -> Tensor | None:
    """In place: tokens, and places as if drafts were chains. -> the masks that attention needs of trees, [T, W].

    first_draft: the name of the first one; others are below it.
    """
    num_tokens, num_words = len(token_ids_T), tables.masks.shape[2]
    masks_TW = token_ids_T.new_empty(num_tokens, num_words) if tables.can_branch else None
    _fill[(triton.cdiv(num_tokens, 64),)](
        token_ids_T, slots_T, positions_T, masks_TW, tables.token_ids, tables.depths, tables.masks, num_tokens,
        len(tables.token_ids), tables.token_ids.shape[1], first_draft,
        TOKENS=64, **_words(tables), CAN_BRANCH=tables.can_branch,
    )  # fmt: skip
    return masks_TW


# --- accept ---


@triton.jit
def _accept(
    token_ids, roots, sizes, slots, token_ids_XN, parents_XN, depths_XM, masks_XMW, accepted, last_token_X, accepted_X,
    num_rows, num_slots, num_drafts, num_nodes,
    NODES: tl.constexpr, WORDS: tl.constexpr, CAN_BRANCH: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    slot = _slot(slots, sequence, num_slots)
    root, size = tl.load(roots + sequence), tl.load(sizes + sequence)
    node_M = tl.arange(0, NODES).to(tl.int64)
    is_node_M = node_M < num_nodes
    is_draft_M = is_node_M & (node_M > 0)
    draft_M = slot * num_drafts + tl.maximum(node_M - 1, 0)
    drafted_M = tl.load(token_ids_XN + draft_M, mask=is_draft_M, other=0)
    parent_M = tl.maximum(node_M - 1, 0)
    depth_M = node_M
    if CAN_BRANCH:
        parent_M = tl.load(parents_XN + draft_M, mask=is_draft_M, other=0)
        depth_M = tl.load(depths_XM + slot * (num_drafts + 1) + node_M, mask=is_node_M, other=0)
    is_row_M, before_M = is_node_M & (root + node_M < num_rows), is_node_M & (root + parent_M < num_rows)
    chosen_M = tl.load(token_ids + root + node_M, mask=is_row_M, other=_NO_TOKEN)
    asked_M = tl.load(token_ids + root + parent_M, mask=before_M, other=_NO_TOKEN)
    # Where nothing can be chosen, the node is left for the next step, whose root it becomes: that tells the request.
    is_right_M = (drafted_M == asked_M) & (chosen_M != _NO_TOKEN) & (node_M < size)
    is_right_M = is_node_M & (is_right_M | (node_M == 0))
    if CAN_BRANCH:
        masks = masks_XMW + slot * (num_drafts + 1) * WORDS
        is_said_M = is_right_M
        for word in tl.static_range(WORDS):
            wrong = tl.sum(tl.where(is_right_M, 0, _bit(node_M, is_node_M, word)), 0)
            mask_M = tl.load(masks + node_M * WORDS + word, mask=is_node_M, other=0)
            is_said_M = is_said_M & ((mask_M & wrong) == 0)
    else:
        is_said_M = node_M < tl.min(tl.where(is_right_M, NODES, node_M), 0)
    said_depth_M = tl.where(is_said_M, depth_M, -1)
    count = 1 + tl.max(said_depth_M, 0)
    is_on_path_M = is_said_M
    last = tl.argmax(said_depth_M, 0).to(tl.int64)
    tl.store(last_token_X + slot, tl.sum(tl.where(node_M == last, chosen_M, 0), 0))
    tl.store(accepted_X + slot, count - 1)
    if CAN_BRANCH:
        is_on_path_M = node_M == 0  # also where nothing was ever kept
        for word in tl.static_range(WORDS):
            mask = tl.load(masks + last * WORDS + word)
            is_on_path_M = is_on_path_M | ((_bit(node_M, is_node_M, word) & mask) != 0)
    accepted += sequence * (1 + 3 * num_nodes)
    tl.store(accepted, count)
    token_M, path_M = accepted + 1, accepted + 1 + num_nodes
    tl.store(token_M + depth_M, chosen_M, mask=is_on_path_M)
    tl.store(path_M + depth_M, node_M, mask=is_on_path_M)
    is_rest_M = is_node_M & (node_M >= count)
    root_chosen = tl.sum(tl.where(node_M == 0, chosen_M, 0), 0)
    tl.store(token_M + node_M, tl.zeros_like(node_M) + root_chosen, mask=is_rest_M)
    tl.store(path_M + node_M, tl.zeros_like(node_M), mask=is_rest_M)
    chosen_M = tl.where(node_M < size, chosen_M, _NO_TOKEN)
    tl.store(accepted + 1 + 2 * num_nodes + node_M, chosen_M, mask=is_node_M)


def accept(
    token_ids_R: Tensor, roots_S: Tensor, sizes_S: Tensor, slots_S: Tensor, num_nodes: int, tables: TreeTables,
    last_token_X: Tensor, accepted_X: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """roots, sizes: of each tree its first row of logits, and its nodes. -> the fields of accept.py: Accepted.

    last_token, accepted: written of each slot, its last token and the number of drafts before it.
    """
    accepted_SX = token_ids_R.new_empty(len(slots_S), 1 + 3 * num_nodes)
    _accept[(len(slots_S),)](
        token_ids_R, roots_S, sizes_S, slots_S, *tables[:4], accepted_SX, last_token_X, accepted_X, len(token_ids_R),
        len(tables.token_ids), tables.token_ids.shape[1], num_nodes,
        NODES=_nodes(tables), WORDS=tables.masks.shape[2], CAN_BRANCH=tables.can_branch,
    )  # fmt: skip
    counts_S1, *others = accepted_SX.split([1, num_nodes, num_nodes, num_nodes], 1)
    return counts_S1[:, 0], *others


# --- move ---


@triton.jit
def _move(
    addresses, counts, path, counts_stride, path_stride, starts, sizes, tables, table_stride, plane_stride, row_size,
    block_size, TYPE: tl.constexpr, PLANES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    column_C = tl.arange(0, COLUMNS)
    is_column_C = column_C < row_size
    kv = tl.load(addresses + tl.program_id(1)).to(tl.pointer_type(TYPE))
    count, start = tl.load(counts + sequence * counts_stride), tl.load(starts + sequence)
    last = tl.maximum(tl.load(sizes + sequence) - 1, 0)
    path += sequence * path_stride
    tables += sequence * table_stride
    for place in range(1, count):  # nodes come after their parents, so a row is read before one is written over it
        node = tl.load(path + place)
        if node != place:
            source, target = start + tl.minimum(node, last), start + tl.minimum(place, last)
            from_row = tl.load(tables + source // block_size) * block_size + source % block_size
            to_row = tl.load(tables + target // block_size) * block_size + target % block_size
            for plane in tl.static_range(PLANES):
                plane_kv = kv + plane * plane_stride
                moved_C = tl.load(plane_kv + from_row * row_size + column_C, mask=is_column_C)
                tl.store(plane_kv + to_row * row_size + column_C, moved_C, mask=is_column_C)


@cache
def _addresses(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Where they are, for a kernel. Kept for ever: a recorded step may not make it, and reads it whenever it runs."""
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def move(
    kv: Sequence[Tensor], counts_S: Tensor, path_SM: Tensor, starts_S: Tensor, sizes_S: Tensor, tables_SB: Tensor
) -> None:
    """kv: [planes, blocks, tokens_per_block, heads, head_dim] of layers with the same blocks and sizes.

    starts, sizes: of each tree the place of its root in its text, and its nodes.
    """
    for itemsize in {each.itemsize for each in kv}:
        alike = [each for each in kv if each.itemsize == itemsize]
        planes, _, block_size, num_heads, head_dim = alike[0].shape
        row_size = num_heads * head_dim
        _move[(len(counts_S), len(alike))](
            _addresses(tuple(each.data_ptr() for each in alike), counts_S.device),
            counts_S, path_SM, counts_S.stride(0), path_SM.stride(0), starts_S, sizes_S, tables_SB,
            tables_SB.stride(0), alike[0].stride(0), row_size, block_size,
            TYPE=INTEGERS[itemsize], PLANES=planes, COLUMNS=triton.next_power_of_2(row_size),
        )  # fmt: skip


# --- move on ---


@triton.jit
def _move_on(
    positions, kv_lens, tree_starts, query_starts, late_slots, accepted_X, slots_T, tables, table_stride, block_size,
    TOKENS: tl.constexpr, IS_FIRST: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    late = tl.load(late_slots + sequence)
    if late >= 0:
        moved = tl.load(accepted_X + late)
        begin, end = tl.load(query_starts + sequence), tl.load(query_starts + sequence + 1)
        tables += sequence * table_stride
        if IS_FIRST:
            tl.store(kv_lens + sequence, tl.load(kv_lens + sequence) + moved)
            tl.store(tree_starts + sequence, tl.load(tree_starts + sequence) + moved)
        for first in range(begin, end, TOKENS):
            token_T = first + tl.arange(0, TOKENS)
            is_token_T = token_T < end
            place_T = tl.load(positions + token_T, mask=is_token_T, other=0)
            if IS_FIRST:
                place_T += moved
                tl.store(positions + token_T, place_T, mask=is_token_T)
            block_T = tl.load(tables + place_T // block_size, mask=is_token_T, other=0)
            tl.store(slots_T + token_T, block_T * block_size + place_T % block_size, mask=is_token_T)


def move_on(
    inputs: Mapping[str, Tensor], accepted_X: Tensor, slots_T: Tensor, tables_SB: Tensor, block_size: int,
    *, is_first: bool,
) -> None:  # fmt: skip
    """runtime/worker/late.py, of one group's KV; with the first everything else, too."""
    late_S = inputs["late_slots"]
    names = ("positions", "kv_lens", "tree_starts", "query_starts")
    _move_on[(len(late_S),)](
        *(inputs[f"step.{name}"] for name in names), late_S, accepted_X, slots_T, tables_SB, tables_SB.stride(0),
        block_size, TOKENS=64, IS_FIRST=is_first, num_warps=2,  # a token a thread: nobody else reads what it moves
    )  # fmt: skip
