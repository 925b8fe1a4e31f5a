"""Attention to a sequence's first tokens and to its newest, with positions inside the cache (arXiv:2309.17453).

    text    | 0 1 2 3 | ...... no longer seen ...... | t-4 t-3 t-2 t-1  t |     window 9 of which 4 are sinks
    cache   | 0 1 2 3 |                              |  4   5   6   7   8 |     the query stands at 8

A rotary score depends on the distance between query and key alone. Among the newest tokens it is the same in the text
and in the cache, so these keys are met by the query as it is, rotated to its place in the text. The sinks keep their
places too; only the query must come to stand at the window's end, so for them it comes a second time, rotated to there.
Keys are thus written once, rotated, as for any attention, and prefixes are shared as everywhere. Positions in the text
can be in the millions then: rope.far_cos_sin.
"""

import torch
from torch import Tensor

from slipstream.kernels.attention.cache import to_numbers
from slipstream.kernels.attention.paged import attention
from slipstream.kernels.cpu.library import native
from slipstream.kernels.fits import need, need_same_dtype, need_shape
from slipstream.kernels.registry import kernel, on_gpu, op


def _place_shapes(positions_T: Tensor, window: int) -> Tensor:
    need(window > 0, "window must be of a token at least")
    return positions_T.new_empty(positions_T.shape)


@op("place_in_window(Tensor positions, int window) -> Tensor", shapes=_place_shapes, is_row_by_row=True)
def place_in_window(positions_T: Tensor, window: int) -> Tensor:
    """Where a token at this position of the text stands in a cache of `window` tokens, when it is the newest."""
    return positions_T.clamp(max=window - 1)


def _shapes(
    q_TX: Tensor, sink_q_TX: Tensor, kv_PNBKD: Tensor, query_starts: Tensor, kv_lens: Tensor, block_tables_SB: Tensor,
    kv_scales_PK: Tensor | None, scale: float, window: int, soft_cap: float, value_dim: int, sink_tokens: int,
) -> Tensor:  # fmt: skip
    need_same_dtype(q_TX, sink_q=sink_q_TX)
    need_shape("sink_q", sink_q_TX, *q_TX.shape)
    need(0 <= sink_tokens < window, f"sink_tokens must be from 0 to {window - 1}")
    step = (query_starts, kv_lens, block_tables_SB)
    return attention.shapes(q_TX, kv_PNBKD, *step, None, None, kv_scales_PK, scale, window, soft_cap, value_dim)


@op(
    "streaming_attention(Tensor q, Tensor sink_q, Tensor kv, Tensor query_starts, Tensor kv_lens, Tensor block_tables, "
    "Tensor? kv_scales, float scale, int window, float soft_cap, int value_dim, int sink_tokens) -> Tensor",
    shapes=_shapes,
    reads_values=True,
)
def streaming_attention(
    q_TX: Tensor, sink_q_TX: Tensor, kv_PNBKD: Tensor, query_starts: Tensor, kv_lens: Tensor, block_tables_SB: Tensor,
    kv_scales_PK: Tensor | None, scale: float, window: int, soft_cap: float, value_dim: int, sink_tokens: int,
) -> Tensor:  # fmt: skip
    """softmax(q kᵀ · scale) v over the first `sink_tokens` tokens of a sequence and the newest, `window` in all.

    sink_q: the query as the sinks meet it, rotated to place_in_window. Pages in between are not read.
    soft_cap, value_dim: as in attention.
    """
    num_heads = q_TX.shape[1] // kv_PNBKD.shape[4]
    out_TX = torch.empty(q_TX.shape[0], num_heads * value_dim, dtype=q_TX.dtype, device=q_TX.device)
    starts, lens = query_starts.tolist(), kv_lens.tolist()
    for sequence, kv_len in enumerate(lens):
        rows = slice(starts[sequence], starts[sequence + 1])
        if rows.start != rows.stop:
            out_TX[rows] = _attend_one(
                q_TX[rows], sink_q_TX[rows], kv_PNBKD, block_tables_SB[sequence], kv_len,
                kv_scales_PK, scale, window, soft_cap, value_dim, sink_tokens,
            )  # fmt: skip
    return out_TX


def _attend_one(
    q_QX: Tensor, sink_q_QX: Tensor, kv_PNBKD: Tensor, block_ids_B: Tensor, kv_len: int,
    kv_scales_PK: Tensor | None, scale: float, window: int, soft_cap: float, value_dim: int, sink_tokens: int,
) -> Tensor:  # fmt: skip
    num_queries, block_size = q_QX.shape[0], kv_PNBKD.shape[2]
    positions_Q1 = torch.arange(kv_len - num_queries, kv_len, device=q_QX.device)[:, None]
    num_newest = window - sink_tokens
    first = max(0, kv_len - num_queries + 1 - num_newest) // block_size * block_size
    sinks_L = torch.arange(min(sink_tokens, kv_len), device=q_QX.device)
    newest_L = torch.arange(first, kv_len, device=q_QX.device)
    # A token is among the sinks or among the newest, never both.
    is_seen_QL = torch.cat(
        [
            sinks_L <= positions_Q1,
            (newest_L >= sink_tokens) & (newest_L <= positions_Q1) & (newest_L > positions_Q1 - num_newest),
        ],
        dim=1,
    )
    sinks_PKLD, newest_PKLD = (
        _pages(kv_PNBKD, block_ids_B, places, kv_scales_PK, q_QX.dtype) for places in (sinks_L, newest_L)
    )
    pairs = ((sink_q_QX, sinks_PKLD[0]), (q_QX, newest_PKLD[0]))
    scores_KGQL = torch.cat([_scores(q, k_KLD) for q, k_KLD in pairs], dim=-1).float() * scale
    if soft_cap:
        scores_KGQL = soft_cap * torch.tanh(scores_KGQL / soft_cap)
    probs_KGQL = scores_KGQL.masked_fill(~is_seen_QL, float("-inf")).softmax(-1).to(q_QX.dtype)
    v_KLD = torch.cat([sinks_PKLD[-1], newest_PKLD[-1]], dim=1)[..., :value_dim]
    out_KGQD = torch.matmul(probs_KGQL.flatten(1, 2), v_KLD).unflatten(1, probs_KGQL.shape[1:3])
    return out_KGQD.permute(2, 0, 1, 3).reshape(num_queries, -1)


def _pages(
    kv_PNBKD: Tensor, block_ids_B: Tensor, places_L: Tensor, kv_scales_PK: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What the cache holds at these places of the sequence: planes, KV heads, places, numbers."""
    block_size = kv_PNBKD.shape[2]
    slots_L = block_ids_B[places_L // block_size] * block_size + places_L % block_size
    scales_P1K = None if kv_scales_PK is None else kv_scales_PK[:, None]
    return to_numbers(kv_PNBKD.flatten(1, 2)[:, slots_L], scales_P1K, dtype).transpose(1, 2)


def _scores(q_QX: Tensor, k_KLD: Tensor) -> Tensor:
    """[KV heads, query heads of each, queries, keys]"""
    num_kv_heads, _, head_dim = k_KLD.shape
    q_KGQD = q_QX.view(q_QX.shape[0], num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    return torch.matmul(q_KGQD.flatten(1, 2), k_KLD.transpose(1, 2)).unflatten(1, q_KGQD.shape[1:3])


@kernel(streaming_attention, "triton", on_gpu)
def streaming_attention_triton(
    q_TX: Tensor, sink_q_TX: Tensor, kv_PNBKD: Tensor, query_starts: Tensor, kv_lens: Tensor, block_tables_SB: Tensor,
    kv_scales_PK: Tensor | None, scale: float, window: int, soft_cap: float, value_dim: int, sink_tokens: int,
    is_batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    from slipstream.kernels.triton.attention import attention as in_tiles

    return in_tiles(
        q_TX, kv_PNBKD, query_starts, kv_lens, block_tables_SB, None, None, kv_scales_PK,
        scale, window, soft_cap, value_dim, sink_q_TX=sink_q_TX, sink_tokens=sink_tokens,
        is_batch_invariant=is_batch_invariant,
    )  # fmt: skip


native(streaming_attention)
