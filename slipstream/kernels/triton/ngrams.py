"""N-gram drafts on a GPU: texts where the device has them, and what followed the longest end that one had before.

    write    tokens    of a step's rows, at their places in the texts
    find     texts     each part of a text for itself, then a launch for what they have found

    text     … the cat sat on the mat … the cat          the longest end that was there before: "the cat"
    draft                                        sat on the mat …

As speculative/ngram/drafter.py has it, but for ends of more than MOST tokens, which are as good as those. The last
token is given, and need not be in the text yet.

Shape suffixes: X slots, the last of which is of no text; L tokens of the longest text; S sequences, T rows, N drafts,
P parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.triton.trees import _slot

MOST = 32  # tokens of an end that are compared
PART = 2048  # tokens of a text that a program looks at
PLACES = 128  # of them at once

_PLACE_BITS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _write(texts_XL, slots, places, token_ids, num_tokens, num_slots, longest, TOKENS: tl.constexpr):
    token_T = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token_T = token_T < num_tokens
    slot_T = tl.load(slots + token_T, mask=is_token_T, other=0)
    slot_T = tl.where(slot_T < 0, num_slots - 1, slot_T)
    place_T = tl.load(places + token_T, mask=is_token_T, other=0)
    token_id_T = tl.load(token_ids + token_T, mask=is_token_T, other=0)
    tl.store(texts_XL + slot_T * longest + place_T, token_id_T.to(tl.int32), mask=is_token_T & (place_T < longest))


def write(texts_XL: Tensor, slots_T: Tensor, places_T: Tensor, token_ids_T: Tensor) -> None:
    """In place. Those beyond the longest text are left out."""
    num_slots, longest = texts_XL.shape
    num_tokens = len(token_ids_T)
    _write[(triton.cdiv(num_tokens, 128),)](
        texts_XL, slots_T, places_T, token_ids_T, num_tokens, num_slots, longest, TOKENS=128
    )


@triton.jit
def _find(
    texts_XL, slots, last_token_ids, last_places, found_SP, num_slots, longest, num_parts,
    PART: tl.constexpr, PLACES: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Of a part's places the one whose end is longest, and of equals the first: length above place, in one number."""
    sequence, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    text = texts_XL + _slot(slots, sequence, num_slots) * longest
    last_token_id = tl.load(last_token_ids + sequence).to(tl.int32)
    last_place = tl.minimum(tl.load(last_places + sequence), longest - 1).to(tl.int32)
    back_1K = tl.arange(0, MOST)[None, :]
    end_1K = tl.load(text + last_place - back_1K, mask=(back_1K > 0) & (back_1K <= last_place), other=-1)
    end_1K = tl.where(back_1K == 0, last_token_id, end_1K)
    best = tl.zeros([PLACES], tl.int64)
    for start in range(part * PART, tl.minimum((part + 1) * PART, last_place), PLACES):
        place_E = start + tl.arange(0, PLACES)
        before_EK = place_E[:, None] - back_1K
        token_EK = tl.load(text + before_EK, mask=(before_EK >= 0) & (place_E < last_place)[:, None], other=-2)
        length_E = tl.min(tl.where(token_EK == end_1K, MOST, back_1K), 1)
        best = tl.maximum(best, (length_E.to(tl.int64) << 32) + (place_E ^ _PLACE_BITS))
    tl.store(found_SP + sequence * num_parts + part, tl.max(best, 0))


@triton.jit
def _continue(
    texts_XL, slots, last_token_ids, last_places, found_SP, token_ids, counts, num_slots, longest, num_parts,
    num_drafts, min_ngram, PARTS: tl.constexpr, DRAFTS: tl.constexpr,
):  # fmt: skip
    """Where the place is so near that what followed runs into the end, it goes on with what it has found."""
    sequence = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + sequence)
    text = texts_XL + _slot(slots, sequence, num_slots) * longest
    last_place = tl.minimum(tl.load(last_places + sequence), longest - 1)
    part_P = tl.arange(0, PARTS)
    best = tl.max(tl.load(found_SP + sequence * num_parts + part_P, mask=part_P < num_parts, other=0), 0)
    count = tl.where(((best >> 32) >= min_ngram) & (slot >= 0), num_drafts, 0)
    start = ((best & _PLACE_BITS) ^ _PLACE_BITS) + 1
    draft_N = tl.arange(0, DRAFTS)
    place_N = start + draft_N % tl.maximum(last_place + 1 - start, 1)
    token_id_N = tl.load(text + place_N, mask=(draft_N < count) & (place_N < last_place), other=0).to(tl.int64)
    token_id_N = tl.where(place_N == last_place, tl.load(last_token_ids + sequence), token_id_N)
    tl.store(token_ids + sequence * num_drafts + draft_N, token_id_N, mask=draft_N < num_drafts)
    tl.store(counts + sequence, count.to(tl.int64))


def find(
    texts_XL: Tensor, slots_S: Tensor, last_token_ids_S: Tensor, last_places_S: Tensor, min_ngram: int, num_drafts: int
) -> tuple[Tensor, Tensor]:
    """-> token ids [S, N], and how many of them are meant, [S]: none where no end of min_ngram tokens is found."""
    (num_slots, longest), num_sequences = texts_XL.shape, len(slots_S)
    num_parts = triton.cdiv(longest, PART)
    found_SP = slots_S.new_empty(num_sequences, num_parts)
    token_ids_SN, counts_S = slots_S.new_empty(num_sequences, num_drafts), slots_S.new_empty(num_sequences)
    ends = slots_S, last_token_ids_S, last_places_S
    _find[num_sequences, num_parts](
        texts_XL, *ends, found_SP, num_slots, longest, num_parts, PART=PART, PLACES=PLACES, MOST=MOST
    )
    _continue[(num_sequences,)](
        texts_XL, *ends, found_SP, token_ids_SN, counts_S, num_slots, longest, num_parts, num_drafts, min_ngram,
        PARTS=triton.next_power_of_2(num_parts), DRAFTS=max(16, triton.next_power_of_2(num_drafts)),
    )  # fmt: skip
    return token_ids_SN, counts_S


def new_texts(num_slots: int, longest: int, device: torch.device) -> Tensor:
    """[X, L] of so many slots, and of no text."""
    return torch.zeros(num_slots + 1, longest, dtype=torch.int32, device=device)
