"""Writing K and V into pages, and attending to them.

A layer's cache is one tensor kv_PNBKD (cache.py), with kv_scales where it is kept in 8 bits.
Ragged batches are the only kind: context and generation rows of many sequences in one call, each seeing its own past.

MHA, GQA and MQA differ only in K (arXiv:1911.02150, 2305.13245). Latent attention (MLA, arXiv:2405.04434) is MQA over
one plane: the first value_dim numbers of a key are also its value. Pages as in PagedAttention (arXiv:2309.06180).
"""

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.kernels.attention.cache import narrowed, need_cache, need_query, to_numbers, to_stored
from slipstream.kernels.cpu.library import native
from slipstream.kernels.fits import need, need_floats, need_heads, need_shape
from slipstream.kernels.registry import kernel, on_gpu, op


def _write_shapes(
    k_TY: Tensor, v_TY: Tensor | None, kv_PNBKD: Tensor, slots_T: Tensor, kv_scales_PK: Tensor | None = None
) -> None:
    need_cache(kv_PNBKD, kv_scales_PK)
    need_floats(k=k_TY, v=v_TY)
    (num_tokens,) = slots_T.shape
    num_columns = kv_PNBKD.shape[3] * kv_PNBKD.shape[4]
    need_shape("k", k_TY, num_tokens, num_columns)
    need_shape("v", v_TY, num_tokens, num_columns)
    need(v_TY is not None or kv_PNBKD.shape[0] == 1, "a cache of two planes takes keys and values")


@op("kv_write(Tensor k, Tensor? v, Tensor(a!) kv, Tensor slots, Tensor? kv_scales=None) -> ()", shapes=_write_shapes)
def kv_write(
    k_TY: Tensor, v_TY: Tensor | None, kv_PNBKD: Tensor, slots_T: Tensor, kv_scales_PK: Tensor | None = None
) -> None:
    """Store each token's key, and its value where the cache has two planes, at its slot (block id * size + offset)."""
    num_planes, num_blocks, block_size, *heads = kv_PNBKD.shape
    pages_PSKD = kv_PNBKD.view(
        num_planes, num_blocks * block_size, *heads
    )  # a view or an error: a copy loses the write
    for plane, (page_SKD, x_TY) in enumerate(zip(pages_PSKD, (k_TY, v_TY), strict=False)):
        assert x_TY is not None
        x_TKD = x_TY.unflatten(1, heads)
        if kv_scales_PK is None:
            page_SKD.index_copy_(0, slots_T, narrowed(x_TKD, kv_PNBKD.dtype))
        else:  # as bytes: torch copies no E4M3 by index
            stored_TKD = to_stored(x_TKD, kv_scales_PK[plane], kv_PNBKD.dtype)
            page_SKD.view(torch.int8).index_copy_(0, slots_T, stored_TKD.view(torch.int8))


@kernel(kv_write, "triton", on_gpu, is_row_by_row=True)
def kv_write_triton(
    k_TY: Tensor, v_TY: Tensor | None, kv_PNBKD: Tensor, slots_T: Tensor, kv_scales_PK: Tensor | None = None
) -> None:
    from slipstream.kernels.triton import rope as rotation

    rotation.kv_write(k_TY, v_TY, kv_PNBKD, slots_T, kv_scales_PK)


def _attention_shapes(
    q_TX: Tensor, kv_PNBKD: Tensor, query_starts: Tensor, kv_lens: Tensor, block_tables_SB: Tensor,
    alibi_slopes_H: Tensor | None, sinks_H: Tensor | None, kv_scales_PK: Tensor | None,
    scale: float, window: int, soft_cap: float, value_dim: int,
) -> Tensor:  # fmt: skip
    need_query(q_TX, kv_PNBKD, kv_scales_PK)
    need_floats(q=q_TX, alibi_slopes=alibi_slopes_H, sinks=sinks_H)
    num_tokens, num_columns = q_TX.shape
    num_kv_heads, head_dim = kv_PNBKD.shape[3:]
    need_heads("q", num_columns, num_kv_heads * head_dim)
    num_heads = num_columns // head_dim
    need_shape("alibi_slopes", alibi_slopes_H, num_heads)
    need_shape("sinks", sinks_H, num_heads)
    need(window >= 0, "window must not be negative")
    need(1 <= value_dim <= head_dim, f"value_dim must be from 1 to {head_dim}")
    return q_TX.new_empty(num_tokens, num_heads * value_dim)


@op(
    "attention(Tensor q, Tensor kv, Tensor query_starts, Tensor kv_lens, Tensor block_tables, Tensor? alibi_slopes, "
    "Tensor? sinks, Tensor? kv_scales, float scale, int window, float soft_cap, int value_dim) -> Tensor",
    shapes=_attention_shapes,
    reads_values=True,
)
def attention(
    q_TX: Tensor, kv_PNBKD: Tensor, query_starts: Tensor, kv_lens: Tensor, block_tables_SB: Tensor,
    alibi_slopes_H: Tensor | None, sinks_H: Tensor | None, kv_scales_PK: Tensor | None,
    scale: float, window: int, soft_cap: float, value_dim: int,
) -> Tensor:  # fmt: skip
    """softmax(q kᵀ · scale) v for each query row, over its sequence's pages up to its own position.

    window: how many tokens a row sees, itself included; 0 for all. Pages out of every row's window are not read.
    soft_cap: scores become soft_cap · tanh(score / soft_cap); 0 for none (arXiv:2408.00118).
    alibi_slopes: float32 [heads]; scores gain slope · (key position - query position) (arXiv:2108.12409).
    sinks: [heads]; one more score in each softmax, of a key without a value (gpt-oss).
    value_dim: numbers a head of a value; a cache of one plane has them at the start of its keys.
    """
    num_heads = q_TX.shape[1] // kv_PNBKD.shape[4]
    out_TX = torch.empty(q_TX.shape[0], num_heads * value_dim, dtype=q_TX.dtype, device=q_TX.device)
    starts, lens = query_starts.tolist(), kv_lens.tolist()
    for sequence, kv_len in enumerate(lens):
        rows = slice(starts[sequence], starts[sequence + 1])
        if rows.start != rows.stop:
            q_QX = q_TX[rows]
            first = first_place(kv_len, len(q_QX), window, kv_PNBKD.shape[2])
            out_TX[rows] = attend_one(
                q_QX, kv_PNBKD, block_tables_SB[sequence], kv_len, _distances(kv_len, len(q_QX), first, q_TX.device),
                alibi_slopes_H, sinks_H, kv_scales_PK, scale, window, soft_cap, value_dim,
            )  # fmt: skip
    return out_TX


def attend_one(
    q_QX: Tensor, kv_PNBKD: Tensor, block_ids_B: Tensor, kv_len: int, distance_QL: Tensor,
    alibi_slopes_H: Tensor | None, sinks_H: Tensor | None, kv_scales_PK: Tensor | None,
    scale: float, window: int, soft_cap: float, value_dim: int,
) -> Tensor:  # fmt: skip
    """One sequence: to its last L keys, which are so far before each query; a negative distance hides the key."""
    _, _, block_size, num_kv_heads, head_dim = kv_PNBKD.shape
    num_queries = q_QX.shape[0]
    first = kv_len - distance_QL.shape[1]
    block_ids = block_ids_B[first // block_size : -(-kv_len // block_size)]
    planes = _read(kv_PNBKD, block_ids, kv_scales_PK, q_QX.dtype)
    pages_KLD = [page.flatten(0, 1)[: kv_len - first].transpose(0, 1) for page in planes]
    k_KLD, v_KLD = pages_KLD[0], pages_KLD[-1][:, :, :value_dim]
    q_KGQD = q_QX.view(num_queries, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    scores_KGQL = torch.matmul(q_KGQD.flatten(1, 2), k_KLD.transpose(1, 2)).unflatten(1, q_KGQD.shape[1:3])
    scores_KGQL = scores_KGQL.float() * scale
    if soft_cap:
        scores_KGQL = soft_cap * torch.tanh(scores_KGQL / soft_cap)
    if alibi_slopes_H is not None:
        scores_KGQL -= alibi_slopes_H.float().view(num_kv_heads, -1, 1, 1) * distance_QL
    is_hidden_QL = distance_QL < 0
    if window:
        is_hidden_QL |= distance_QL >= window
    scores_KGQL.masked_fill_(is_hidden_QL, float("-inf"))
    if sinks_H is not None:
        sink_KGQ1 = sinks_H.float().view(num_kv_heads, -1, 1, 1).expand(*scores_KGQL.shape[:3], 1)
        scores_KGQL = torch.cat([scores_KGQL, sink_KGQ1], -1)
    probs_KGQL = scores_KGQL.softmax(-1)[..., : kv_len - first].to(q_QX.dtype)
    out_KGQD = torch.matmul(probs_KGQL.flatten(1, 2), v_KLD).unflatten(1, q_KGQD.shape[1:3])
    return out_KGQD.permute(2, 0, 1, 3).reshape(num_queries, -1)


def _read(kv_PNBKD: Tensor, block_ids_B: Tensor, kv_scales_PK: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """These blocks [B, tokens, heads, numbers] of each plane, in the dtype to compute with."""
    scales = [None] * len(kv_PNBKD) if kv_scales_PK is None else kv_scales_PK
    return [
        to_numbers(plane.index_select(0, block_ids_B), scale, dtype)
        for plane, scale in zip(kv_PNBKD, scales, strict=True)
    ]


def first_place(kv_len: int, num_queries: int, window: int, block_size: int) -> int:
    """Position, at a block's start, before which no query row sees anything: those pages may be someone else's."""
    first_visible = max(0, kv_len - num_queries + 1 - window) if window else 0
    return first_visible - first_visible % block_size


def _distances(kv_len: int, num_queries: int, first: int, device: torch.device) -> Tensor:
    """[queries, keys] how many tokens before the query the key stands; negative where it comes after."""
    positions = torch.arange(first, kv_len, device=device)
    return positions[kv_len - num_queries - first :, None] - positions


@kernel(attention, "batched_decode", lambda device, _dtype: device.type == "cpu")
def attention_batched_decode(
    q_TX: Tensor, kv_2NBKD: Tensor, query_starts: Tensor, kv_lens: Tensor, block_tables_SB: Tensor,
    alibi_slopes_H: Tensor | None, sinks_H: Tensor | None, kv_scales_PK: Tensor | None,
    scale: float, window: int, soft_cap: float, value_dim: int,
) -> Tensor:  # fmt: skip
    """Sequences with one query row in one batched product over padded pages; the others by flash attention.

    Plain softmax over keys and values of one size only; what else the op can be is left to the reference.
    """
    is_plain = alibi_slopes_H is None and sinks_H is None and not window and not soft_cap
    if not is_plain or len(kv_2NBKD) == 1 or value_dim != kv_2NBKD.shape[4]:
        return attention.reference(
            q_TX, kv_2NBKD, query_starts, kv_lens, block_tables_SB, alibi_slopes_H, sinks_H, kv_scales_PK,
            scale, window, soft_cap, value_dim,
        )  # fmt: skip
    out_TX = torch.empty(q_TX.shape, dtype=q_TX.dtype, device=q_TX.device)
    starts, lens = query_starts.tolist(), kv_lens.tolist()
    decoding = [s for s in range(len(lens)) if starts[s + 1] - starts[s] == 1]
    if len(decoding) == len(lens) > 0:
        return _attend_single_rows(q_TX, kv_2NBKD, lens, kv_lens, block_tables_SB, kv_scales_PK, scale)
    for sequence, kv_len in enumerate(lens):
        if starts[sequence + 1] - starts[sequence] > 1:
            rows = slice(starts[sequence], starts[sequence + 1])
            out_TX[rows] = _attend_flash(q_TX[rows], kv_2NBKD, block_tables_SB[sequence], kv_len, kv_scales_PK, scale)
    if decoding:
        which = torch.tensor(decoding)
        rows_D = query_starts[which]
        some_lens = [lens[s] for s in decoding]
        out_TX[rows_D] = _attend_single_rows(
            q_TX[rows_D], kv_2NBKD, some_lens, kv_lens[which], block_tables_SB[which], kv_scales_PK, scale
        )
    return out_TX


def _attend_single_rows(
    q_SX: Tensor, kv_2NBKD: Tensor, lens: list[int], kv_lens: Tensor, block_tables_SB: Tensor,
    kv_scales_2K: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    _, _, block_size, num_kv_heads, head_dim = kv_2NBKD.shape
    longest, shortest, num_sequences = max(lens), min(lens), len(lens)
    num_places = -(-longest // block_size) * block_size
    table = block_tables_SB[:, : num_places // block_size].flatten()
    places = (num_sequences, num_places, num_kv_heads, head_dim)
    k_SLKD, v_SLKD = (x.view(places) for x in _read(kv_2NBKD, table, kv_scales_2K, q_SX.dtype))
    mask_S11L = None
    if shortest != longest:
        is_padding_SL = torch.arange(num_places) >= kv_lens[:, None]
        padding = is_padding_SL.flatten().nonzero()[:, 0]
        # Pages are recycled unwiped, and no mask silences another request's infinity or NaN: 0 · inf is NaN.
        k_SLKD.flatten(0, 1).index_fill_(0, padding, 0)
        v_SLKD.flatten(0, 1).index_fill_(0, padding, 0)
        mask_S11L = ~is_padding_SL[:, None, None, :longest]
    k_SLKD, v_SLKD = k_SLKD[:, :longest], v_SLKD[:, :longest]
    # The query heads of one KV head take the place of query positions: they share its keys, and none masks another.
    q_SKGD = q_SX.view(num_sequences, num_kv_heads, -1, head_dim)
    k_SKLD, v_SKLD = k_SLKD.transpose(1, 2), v_SLKD.transpose(1, 2)
    out_SKGD = functional.scaled_dot_product_attention(q_SKGD, k_SKLD, v_SKLD, mask_S11L, scale=scale)
    return out_SKGD.reshape(num_sequences, -1)


def _attend_flash(
    q_QX: Tensor, kv_2NBKD: Tensor, block_ids_B: Tensor, kv_len: int, kv_scales_2K: Tensor | None, scale: float
) -> Tensor:
    _, _, block_size, _, head_dim = kv_2NBKD.shape
    num_queries = q_QX.shape[0]
    num_blocks = -(-kv_len // block_size)
    k_1KLD, v_1KLD = (
        pages.flatten(0, 1)[:kv_len].transpose(0, 1)[None]
        for pages in _read(kv_2NBKD, block_ids_B[:num_blocks], kv_scales_2K, q_QX.dtype)
    )
    q_1HQD = q_QX.view(num_queries, -1, head_dim).transpose(0, 1)[None]
    mask_QL = None
    if num_queries != kv_len:
        mask_QL = torch.ones(num_queries, kv_len, dtype=torch.bool).tril(kv_len - num_queries)
    out = functional.scaled_dot_product_attention(
        q_1HQD, k_1KLD, v_1KLD, mask_QL, is_causal=mask_QL is None, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1).reshape(num_queries, -1)


native(kv_write)
native(attention)


@kernel(attention, "triton", on_gpu)
def attention_triton(
    q_TX: Tensor, kv_PNBKD: Tensor, query_starts: Tensor, kv_lens: Tensor, block_tables_SB: Tensor,
    alibi_slopes_H: Tensor | None, sinks_H: Tensor | None, kv_scales_PK: Tensor | None,
    scale: float, window: int, soft_cap: float, value_dim: int, is_batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    from slipstream.kernels.triton.attention import attention as in_tiles

    return in_tiles(
        q_TX, kv_PNBKD, query_starts, kv_lens, block_tables_SB, alibi_slopes_H, sinks_H, kv_scales_PK,
        scale, window, soft_cap, value_dim, is_batch_invariant=is_batch_invariant,
    )  # fmt: skip
