"""The next token of each row in two launches, however its slot samples; and the tokens a step was planned without.

    _scan    rows × parts of the vocabulary   the best (token, score) of each part: the logit of a greedy row, logit and
                                              noise of a random one. A row with filters gets the largest logit and the
                                              mass of each chunk of 64 tokens instead
    _finish  rows                             the best of the parts. A row with filters: which chunks can hold what the
                                              filters keep, then, in those alone, the borders of each filter by halving
                                              the range of logits, then the draw

So nothing is sorted, and what a greedy row pays for the filters of others is a branch. The meanings are those of
kernels/sampling.py. Logits are compared by the integers that order as they do (_order): 16 bits of bfloat16, so that
halving takes 16 passes at most. The same seed draws the same token wherever rounding (Gumbel noise in float32 here, in
float64 there) does not decide.

Shape suffixes: R rows, V vocabulary, S slots, P parts, C chunks, L chunks on a row's list, E tokens of a chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.schema.step import PENDING

CHUNK = 64  # tokens, a multiple of 4: Philox makes noise for four
FEWEST_CHUNKS = 16  # that a program of _scan reads
TILE = 8192  # tokens that _finish holds at once
LOW_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}  # of a float32 that came from it: always 0

_NO_TOKEN = tl.constexpr(-1)  # NOTHING_TO_SAMPLE
_PENDING = tl.constexpr(PENDING)
_LAST_ID = tl.constexpr(2**31 - 1)
_INFINITY = tl.constexpr(0x7F800000)  # its bits
_ORDER_OF_MINUS_INFINITY = tl.constexpr(-0x7F800001)


@triton.jit
def _order(x, LOW_BITS: tl.constexpr):
    """Integers that order as the floats do, without bits that are always 0."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0 is 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> LOW_BITS


@triton.jit
def _middle(low, high):
    """Rounded down, where low + high may overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _scaled(x, temperature):
    return tl.div_rn(x, tl.zeros_like(x) + temperature)


@triton.jit
def _wishes(numbers, fractions, slots, row, num_slots):
    """What kernels/sampling.py: SlotTable holds of the row's slot; the last slot's for a row without one."""
    slot = tl.load(slots + row)
    slot = tl.where(slot < 0, num_slots - 1, slot)
    numbers += slot * 8
    fractions += slot * 8
    temperature, typical_p = tl.load(fractions).to(tl.float32), tl.load(fractions + 1).to(tl.float32)
    cut_mass, min_p = (1 - tl.load(fractions + 2)).to(tl.float32), tl.load(fractions + 3).to(tl.float32)
    top_k, seed, is_greedy = tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6) != 0
    return slot, is_greedy, temperature, top_k, typical_p, cut_mass, min_p, seed


@triton.jit
def _noise(chunk_C, seed, position, CHUNK: tl.constexpr):
    """Standard Gumbel noise of the tokens of chunks, [C, CHUNK]: -log(-log(u)), u as kernels/sampling.py: uniform."""
    quad_CQ = chunk_C[:, None] * (CHUNK // 4) + tl.arange(0, CHUNK // 4)[None, :]
    zeros_CQ = tl.zeros_like(quad_CQ)
    low_CQ, high_CQ = zeros_CQ + position.to(tl.int32), zeros_CQ + (position >> 32).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, quad_CQ, zeros_CQ, low_CQ, high_CQ)
    word_CE = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    # v is the smaller of u and 1 - u: both exact to float32's last bit.
    is_large = word_CE >= 0x80000000
    v = (tl.where(is_large, 0xFFFFFFFF - word_CE, word_CE).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = 1 - v
    # log(1 - v) loses what 1 - v rounds away; v / (1 - rest) puts it back (Kahan).
    of_large = tl.where(rest == 1, v, -tl.log(rest) * (v / tl.where(rest == 1, 1.0, 1 - rest)))
    return -tl.log(tl.where(is_large, of_large, -tl.log(v)))


@triton.jit
def _scan(
    logits, slots, positions, numbers, fractions, scores, ids, chunk_largest, chunk_mass,
    row_stride, vocab_size, num_slots, num_chunks,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    chunk_C = part * CHUNKS + tl.arange(0, CHUNKS)
    id_CE = chunk_C[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    x_CE = tl.load(logits + row * row_stride + id_CE, mask=id_CE < vocab_size, other=float("-inf")).to(tl.float32)
    x_CE = tl.where(x_CE == x_CE, x_CE, float("inf"))  # a row with NaN is no distribution, as one with infinity
    _, is_greedy, temperature, top_k, typical_p, cut_mass, min_p, seed = _wishes(
        numbers, fractions, slots, row, num_slots
    )
    score_CE = x_CE
    if not is_greedy:
        score_CE = _scaled(x_CE, temperature)
        if _has_filters(top_k, typical_p, cut_mass, min_p, vocab_size):
            largest_C = tl.max(score_CE, 1)
            weight_CE = tl.exp(score_CE - tl.where(largest_C == float("-inf"), 0.0, largest_C)[:, None])
            place_C = row * num_chunks + chunk_C
            tl.store(chunk_largest + place_C, tl.max(x_CE, 1), mask=chunk_C < num_chunks)
            tl.store(chunk_mass + place_C, tl.sum(weight_CE, 1), mask=chunk_C < num_chunks)
        else:
            score_CE += _noise(chunk_C, seed, tl.load(positions + row), CHUNK)
    best = tl.max(tl.max(score_CE, 1), 0)
    place = row * tl.num_programs(1) + part
    tl.store(scores + place, best)
    tl.store(ids + place, tl.min(tl.min(tl.where(score_CE == best, id_CE, _LAST_ID), 1), 0))


@triton.jit
def _has_filters(top_k, typical_p, cut_mass, min_p, vocab_size):
    return ((top_k > 0) & (top_k < vocab_size)) | (typical_p < 1) | (cut_mass > 0) | (min_p > 0)


@triton.jit
def _tile(
    logits, listed, start, num_listed, vocab_size, temperature, largest,
    LISTED: tl.constexpr, CHUNK: tl.constexpr, LOW_BITS: tl.constexpr,
):  # fmt: skip
    """Tokens of LISTED chunks of a row's list: their chunks, ids, orders, logits over temperature, and weights, which
    are probabilities but for a factor: the largest logit weighs 1."""
    place_L = start + tl.arange(0, LISTED)
    chunk_L = tl.load(listed + place_L, mask=place_L < num_listed, other=0)
    id_LE = chunk_L[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    is_inside = (place_L < num_listed)[:, None] & (id_LE < vocab_size)
    x_LE = tl.load(logits + id_LE, mask=is_inside, other=float("-inf")).to(tl.float32)
    scaled_LE = _scaled(x_LE, temperature)
    return chunk_L, id_LE, _order(x_LE, LOW_BITS), scaled_LE, tl.exp(scaled_LE - largest)


@triton.jit(do_not_specialize=["num_parts"])
def _finish(
    logits, slots, positions, numbers, fractions, scores, ids, chunk_largest, chunk_mass, listed, token_ids,
    last_token, row_stride, vocab_size, num_slots, num_chunks, num_parts,
    PARTS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, LISTED: tl.constexpr, LOW_BITS: tl.constexpr,
):  # fmt: skip
    """PARTS and CHUNKS: powers of two that num_parts and num_chunks fit. The same for any number of rows."""
    row = tl.program_id(0).to(tl.int64)
    part_P = tl.arange(0, PARTS)
    place_P = row * num_parts + part_P
    score_P = tl.load(scores + place_P, mask=part_P < num_parts, other=float("-inf"))
    id_P = tl.load(ids + place_P, mask=part_P < num_parts, other=_LAST_ID)
    slot, is_greedy, temperature, top_k, typical_p, cut_mass, min_p, seed = _wishes(
        numbers, fractions, slots, row, num_slots
    )
    best = tl.max(score_P, 0)
    token_id = tl.min(tl.where(score_P == best, id_P, _LAST_ID), 0)
    is_distribution = (best > float("-inf")) & (best < float("inf"))
    has_filters = _has_filters(top_k, typical_p, cut_mass, min_p, vocab_size)
    if is_distribution & has_filters & (not is_greedy):
        token_id = _draw_filtered(
            logits + row * row_stride, chunk_largest + row * num_chunks, chunk_mass + row * num_chunks,
            listed + row * num_chunks, best, vocab_size, num_chunks,
            temperature, top_k, typical_p, cut_mass, min_p, seed, tl.load(positions + row),
            CHUNKS, CHUNK, LISTED, LOW_BITS,
        )  # fmt: skip
    token_id = tl.where(is_distribution, token_id, _NO_TOKEN)
    tl.store(token_ids + row, token_id)
    tl.store(last_token + slot, token_id)


@triton.jit
def _draw_filtered(
    logits, chunk_largest, chunk_mass, listed, largest, vocab_size, num_chunks,
    temperature, top_k, typical_p, cut_mass, min_p, seed, position,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, LISTED: tl.constexpr, LOW_BITS: tl.constexpr,
):  # fmt: skip
    """A token of one row: what each filter keeps is a range of logits, found in the order of the filters.

    largest: of the logits over temperature.
    """
    LOWEST: tl.constexpr = _ORDER_OF_MINUS_INFINITY >> LOW_BITS
    has_top_k, has_typical_p, has_top_p = (top_k > 0) & (top_k < vocab_size), typical_p < 1, cut_mass > 0

    # The list: chunks that can hold what the filters keep, or (typical_p) that must be measured.
    chunk_C = tl.arange(0, CHUNKS)
    is_chunk_C = chunk_C < num_chunks
    largest_C = tl.load(chunk_largest + chunk_C, mask=is_chunk_C, other=float("-inf"))
    weight_C = tl.exp(_scaled(largest_C, temperature) - largest)
    mass_C = tl.load(chunk_mass + chunk_C, mask=is_chunk_C, other=0.0) * weight_C
    order_C = _order(largest_C, LOW_BITS)
    highest = tl.max(order_C, 0)
    least = LOWEST + tl.zeros_like(highest)  # order that top-k keeps: no more than the k-th largest of the chunks'
    if has_top_k:
        high = highest + 1
        while least + 1 < high:
            middle = _middle(least, high)
            is_kept = tl.sum((is_chunk_C & (order_C >= middle)).to(tl.int32), 0) >= top_k
            least = tl.where(is_kept, middle, least)
            high = tl.where(is_kept, high, middle)
    total = tl.sum(mass_C, 0)
    # What is lighter than this adds up to less than half of what top-p cuts; half of min_p leaves room for rounding.
    least_weight = tl.where(has_top_p, 0.5 * cut_mass * total / vocab_size, 0.5 * min_p)
    least_weight = tl.where(has_top_k | has_typical_p, 0.0, least_weight)
    is_listed_C = is_chunk_C & (order_C >= least) & (weight_C >= least_weight)
    place_C = tl.cumsum(is_listed_C.to(tl.int32), 0) - 1
    tl.store(listed + place_C, chunk_C, mask=is_listed_C)
    tl.debug_barrier()  # what one thread writes, others read
    num_listed = tl.sum(is_listed_C.to(tl.int32), 0)
    unlisted = tl.where(has_top_k, 0.0, tl.sum(tl.where(is_listed_C, 0.0, mass_C), 0))

    if has_top_k:
        high = highest + 1
        while least + 1 < high:
            middle = _middle(least, high)
            count = 0
            for start in range(0, num_listed, LISTED):
                _, _, order, _, _ = _tile(
                    logits, listed, start, num_listed, vocab_size, temperature, largest, LISTED, CHUNK, LOW_BITS
                )
                count += tl.sum(tl.sum((order >= middle).to(tl.int32), 1), 0)
            least = tl.where(count >= top_k, middle, least)
            high = tl.where(count >= top_k, high, middle)

    # Typical: a token's surprise is within reach of the entropy. On the logits over temperature, less the largest,
    # that is a distance from their mean.
    mean, reach = 0.0, float("inf")
    heaviest = 1.0  # weight of a token that is kept
    if has_top_k | has_typical_p:
        total, mean, _ = _measure(
            logits, listed, num_listed, vocab_size, temperature, largest, least, mean, reach, LISTED, CHUNK, LOW_BITS
        )
    if has_typical_p:
        far_order, near_order = _INFINITY + tl.zeros_like(highest), tl.zeros_like(highest) - 1
        while near_order + 1 < far_order:
            middle = _middle(near_order, far_order)
            mass = 0.0
            for start in range(0, num_listed, LISTED):
                _, _, order, scaled, weight = _tile(
                    logits, listed, start, num_listed, vocab_size, temperature, largest, LISTED, CHUNK, LOW_BITS
                )
                distance = tl.abs(scaled - largest - mean).to(tl.int32, bitcast=True)
                mass += tl.sum(tl.sum(tl.where((order >= least) & (distance <= middle), weight, 0.0), 1), 0)
            is_enough = mass >= typical_p * total
            far_order = tl.where(is_enough, middle, far_order)
            near_order = tl.where(is_enough, near_order, middle)
        reach = far_order.to(tl.float32, bitcast=True)
        total, _, heaviest = _measure(
            logits, listed, num_listed, vocab_size, temperature, largest, least, mean, reach, LISTED, CHUNK, LOW_BITS
        )

    # Top-p: the lowest order with more than the cut mass at or below it. Of its tokens, the first ids may be kept.
    border, num_kept, num_cut = least, 0, 0
    if has_top_p:
        cut = cut_mass * total
        # All that is lighter than a fourth of cut / vocab_size is cut.
        low = _order((largest + tl.log(cut / vocab_size * 0.25)) * temperature, LOW_BITS)
        low = tl.minimum(tl.maximum(low, least - 1), highest - 1)
        border = highest
        while low + 1 < border:
            middle = _middle(low, border)
            mass = unlisted
            for start in range(0, num_listed, LISTED):
                _, _, order, scaled, weight = _tile(
                    logits, listed, start, num_listed, vocab_size, temperature, largest, LISTED, CHUNK, LOW_BITS
                )
                is_kept = (order >= least) & (tl.abs(scaled - largest - mean) <= reach)
                mass += tl.sum(tl.sum(tl.where(is_kept & (order <= middle), weight, 0.0), 1), 0)
            border = tl.where(mass > cut, middle, border)
            low = tl.where(mass > cut, low, middle)
        count, each, mass = 0, 0.0, unlisted
        for start in range(0, num_listed, LISTED):
            _, _, order, scaled, weight = _tile(
                logits, listed, start, num_listed, vocab_size, temperature, largest, LISTED, CHUNK, LOW_BITS
            )
            is_kept = (order >= least) & (tl.abs(scaled - largest - mean) <= reach)
            count += tl.sum(tl.sum((is_kept & (order == border)).to(tl.int32), 1), 0)
            each = tl.maximum(each, tl.max(tl.max(tl.where(is_kept & (order == border), weight, 0.0), 1), 0))
            mass += tl.sum(tl.sum(tl.where(is_kept & (order < border), weight, 0.0), 1), 0)
        num_cut = tl.minimum(tl.maximum(cut - mass, 0.0) / tl.maximum(each, 1e-37), count - 1.0).to(tl.int32)
        num_kept = count - num_cut

    best, best_id, num_seen = float("-inf"), _LAST_ID + tl.zeros_like(highest), 0
    for start in range(0, num_listed, LISTED):
        chunk, id, order, scaled, weight = _tile(
            logits, listed, start, num_listed, vocab_size, temperature, largest, LISTED, CHUNK, LOW_BITS
        )
        is_kept = (order >= border) & (tl.abs(scaled - largest - mean) <= reach)
        if num_cut > 0:
            is_at_border = (is_kept & (order == border)).to(tl.int32)
            rank = tl.cumsum(tl.reshape(is_at_border, (LISTED * CHUNK,)), 0)
            is_kept = is_kept & ((order > border) | (tl.reshape(rank, (LISTED, CHUNK)) + num_seen <= num_kept))
            num_seen += tl.sum(tl.sum(is_at_border, 1), 0)
        is_kept = is_kept & (weight >= min_p * heaviest)
        if tl.max(tl.max(is_kept.to(tl.int32), 1), 0) > 0:
            score = tl.where(is_kept, scaled + _noise(chunk, seed, position, CHUNK), float("-inf"))
            tile_best = tl.max(tl.max(score, 1), 0)
            tile_id = tl.min(tl.min(tl.where(score == tile_best, id, _LAST_ID), 1), 0)
            best_id = tl.where(tile_best > best, tile_id, best_id)
            best = tl.maximum(best, tile_best)
    return best_id


@triton.jit
def _measure(
    logits, listed, num_listed, vocab_size, temperature, largest, least, mean, reach,
    LISTED: tl.constexpr, CHUNK: tl.constexpr, LOW_BITS: tl.constexpr,
):  # fmt: skip
    """Of the tokens from `least` up, within reach of the mean: their mass, mean logit, and the greatest weight."""
    mass, moment, heaviest = 0.0, 0.0, 0.0
    for start in range(0, num_listed, LISTED):
        _, _, order, scaled, weight = _tile(
            logits, listed, start, num_listed, vocab_size, temperature, largest, LISTED, CHUNK, LOW_BITS
        )
        weight = tl.where((order >= least) & (tl.abs(scaled - largest - mean) <= reach), weight, 0.0)
        mass += tl.sum(tl.sum(weight, 1), 0)
        moment += tl.sum(tl.sum(tl.where(weight > 0, weight * (scaled - largest), 0.0), 1), 0)
        heaviest = tl.maximum(heaviest, tl.max(tl.max(weight, 1), 0))
    return mass, moment / mass, heaviest


@triton.jit
def _fill_pending(token_ids, slots, last_token, num_tokens, num_slots, TOKENS: tl.constexpr):
    token_T = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token_T = token_T < num_tokens
    is_pending_T = is_token_T & (tl.load(token_ids + token_T, mask=is_token_T, other=0) == _PENDING)
    slot_T = tl.load(slots + token_T, mask=is_pending_T, other=0)
    last_T = tl.load(last_token + tl.where(slot_T < 0, num_slots - 1, slot_T), mask=is_pending_T, other=0)
    tl.store(token_ids + token_T, tl.maximum(last_T, 0), mask=is_pending_T)


def fill_pending(token_ids_T: Tensor, slots_T: Tensor, last_token_S: Tensor) -> None:
    num_tokens = len(token_ids_T)
    _fill_pending[(triton.cdiv(num_tokens, 256),)](
        token_ids_T, slots_T, last_token_S, num_tokens, len(last_token_S), TOKENS=256
    )


def choose(
    logits_RV: Tensor, slots_R: Tensor, positions_R: Tensor, numbers_SX: Tensor, last_token_S: Tensor,
    is_batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """numbers_SX: of kernels/sampling.py: SlotTable. is_batch_invariant: sums of masses in one order for any R."""
    num_rows, vocab_size = logits_RV.shape
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    chunks_a_part = FEWEST_CHUNKS if is_batch_invariant else _chunks_a_part(num_rows, num_chunks)
    num_parts = triton.cdiv(num_chunks, chunks_a_part)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits_RV.device)

    token_ids_R = empty(num_rows, dtype=torch.int64)
    if not num_rows:
        return token_ids_R
    scores_RP, ids_RP = (empty(num_rows, num_parts, dtype=each) for each in (torch.float32, torch.int32))
    largest_RC, mass_RC = (empty(num_rows, num_chunks, dtype=torch.float32) for _ in range(2))
    listed_RC = empty(num_rows, num_chunks, dtype=torch.int32)
    of_rows = (logits_RV, slots_R, positions_R, numbers_SX, numbers_SX.view(torch.float64))
    sizes = (logits_RV.stride(0), vocab_size, len(numbers_SX), num_chunks)
    _scan[(num_rows, num_parts)](
        *of_rows,
        scores_RP,
        ids_RP,
        largest_RC,
        mass_RC,
        *sizes,
        CHUNKS=chunks_a_part,
        CHUNK=CHUNK,
        num_warps=max(4, chunks_a_part // 8),
    )
    tile = min(TILE // CHUNK, triton.next_power_of_2(num_chunks))
    _finish[(num_rows,)](
        *of_rows, scores_RP, ids_RP, largest_RC, mass_RC, listed_RC, token_ids_R, last_token_S, *sizes, num_parts,
        PARTS=triton.next_power_of_2(triton.cdiv(num_chunks, FEWEST_CHUNKS)),
        CHUNKS=triton.next_power_of_2(num_chunks), CHUNK=CHUNK, LISTED=tile, LOW_BITS=LOW_BITS[logits_RV.dtype],
        num_warps=16,
    )  # fmt: skip
    return token_ids_R


def _chunks_a_part(num_rows: int, num_chunks: int) -> int:
    """A few rows need many programs to fill the GPU; many rows are better off with fewer."""
    return FEWEST_CHUNKS if num_rows * num_chunks <= 16 * 2048 else 64
