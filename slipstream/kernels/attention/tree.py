"""Attention of drafts that branch: each row sees its own past in the tree, and not its siblings' (arXiv:2305.09781).

    tokens     … the │ cat  sat  dog  ran        "the" is the root; "cat" and "dog" follow it, "sat" and "ran" those
    place        7   │  8    9    10   11        in the cache
    position     7   │  8    9    8    9         in the text: what rotations, windows and slopes count
    mask       00001   00011 00111 01001 11001   bit i stands for the node at place 7 + i

Nodes lie in the cache one after the other, parents before their children; the accepted ones move together afterwards
(runtime/worker/ending.py). Everything before the root is seen by all, and nothing whose position is beyond a row's
own: where all bits of all rows are set, the tree is a chain, or none.
"""

import torch
from torch import Tensor

from slipstream.kernels.attention.paged import attend_one, attention, first_place
from slipstream.kernels.cpu.library import native
from slipstream.kernels.fits import need, need_shape
from slipstream.kernels.registry import kernel, on_gpu, op

WORD = 64  # bits, of which each stands for a node


def _shapes(
    q_TX: Tensor, kv_PNBKD: Tensor, query_starts: Tensor, kv_lens: Tensor, block_tables_SB: Tensor,
    positions_T: Tensor, tree_starts_S: Tensor, tree_masks_TW: Tensor,
    alibi_slopes_H: Tensor | None, sinks_H: Tensor | None, kv_scales_PK: Tensor | None,
    scale: float, window: int, soft_cap: float, value_dim: int,
) -> Tensor:  # fmt: skip
    need(tree_starts_S.dtype == tree_masks_TW.dtype == torch.int64, "tree_starts and tree_masks must be int64")
    need_shape("tree_starts", tree_starts_S, len(kv_lens))
    need_shape("tree_masks", tree_masks_TW, len(q_TX), *tree_masks_TW.shape[1:2])
    need(tree_masks_TW.shape[1] > 0, "tree_masks must have a word at least")
    step = (query_starts, kv_lens, block_tables_SB, alibi_slopes_H, sinks_H, kv_scales_PK)
    return attention.shapes(q_TX, kv_PNBKD, *step, scale, window, soft_cap, value_dim)


@op(
    "tree_attention(Tensor q, Tensor kv, Tensor query_starts, Tensor kv_lens, Tensor block_tables, Tensor positions, "
    "Tensor tree_starts, Tensor tree_masks, Tensor? alibi_slopes, Tensor? sinks, Tensor? kv_scales, float scale, "
    "int window, float soft_cap, int value_dim) -> Tensor",
    shapes=_shapes,
    reads_values=True,
)
def tree_attention(
    q_TX: Tensor, kv_PNBKD: Tensor, query_starts: Tensor, kv_lens: Tensor, block_tables_SB: Tensor,
    positions_T: Tensor, tree_starts_S: Tensor, tree_masks_TW: Tensor,
    alibi_slopes_H: Tensor | None, sinks_H: Tensor | None, kv_scales_PK: Tensor | None,
    scale: float, window: int, soft_cap: float, value_dim: int,
) -> Tensor:  # fmt: skip
    """As attention; of the keys from its sequence's root on, a row sees those whose bit is set.

    positions: of each row in its text. tree_starts: the root's place in each sequence, which may be its last token.
    tree_masks: int64, W words a row; bit i of word w is the node 64 · w + i.
    """
    num_heads = q_TX.shape[1] // kv_PNBKD.shape[4]
    out_TX = torch.empty(q_TX.shape[0], num_heads * value_dim, dtype=q_TX.dtype, device=q_TX.device)
    starts, lens, roots = query_starts.tolist(), kv_lens.tolist(), tree_starts_S.tolist()
    for sequence, kv_len in enumerate(lens):
        rows = slice(starts[sequence], starts[sequence + 1])
        if rows.start != rows.stop:
            first = first_place(kv_len, rows.stop - rows.start, window, kv_PNBKD.shape[2])
            distance_QL = _distances(positions_T[rows], tree_masks_TW[rows], roots[sequence], kv_len, first)
            out_TX[rows] = attend_one(
                q_TX[rows], kv_PNBKD, block_tables_SB[sequence], kv_len, distance_QL, alibi_slopes_H, sinks_H,
                kv_scales_PK, scale, window, soft_cap, value_dim,
            )  # fmt: skip
    return out_TX


def _distances(positions_Q: Tensor, masks_QW: Tensor, root: int, kv_len: int, first: int) -> Tensor:
    """[queries, keys] how many tokens of the text before the query the key stands; -1 where it is not seen."""
    num_nodes = kv_len - root
    places_P = torch.arange(first, root, device=positions_Q.device)
    positions_L = torch.cat((places_P, positions_Q[len(positions_Q) - num_nodes :]))
    nodes_N = torch.arange(num_nodes, device=positions_Q.device)
    is_above_QN = (masks_QW[:, nodes_N // WORD] >> nodes_N % WORD & 1).bool()
    distance_QL = positions_Q[:, None] - positions_L
    distance_QL[:, len(places_P) :].masked_fill_(~is_above_QN, -1)
    return distance_QL


native(tree_attention, is_row_by_row=False)  # a node's keys lie elsewhere than those of plain decoding


@kernel(tree_attention, "triton", on_gpu)
def tree_attention_triton(
    q_TX: Tensor, kv_PNBKD: Tensor, query_starts: Tensor, kv_lens: Tensor, block_tables_SB: Tensor,
    positions_T: Tensor, tree_starts_S: Tensor, tree_masks_TW: Tensor,
    alibi_slopes_H: Tensor | None, sinks_H: Tensor | None, kv_scales_PK: Tensor | None,
    scale: float, window: int, soft_cap: float, value_dim: int,
) -> Tensor:  # fmt: skip
    from slipstream.kernels.triton.attention import attention as in_tiles

    return in_tiles(
        q_TX, kv_PNBKD, query_starts, kv_lens, block_tables_SB, alibi_slopes_H, sinks_H, kv_scales_PK,
        scale, window, soft_cap, value_dim, tree=(positions_T, tree_starts_S, tree_masks_TW),
    )  # fmt: skip
