"""Mixture of experts as grouped products: the pairs of token and expert that share an expert meet its weights.

Pair p is of token p // K, of K experts each. A tile is up to BLOCK_M pairs of one expert. Where pairs are few, programs
find their tile's in the ids; many are sorted by expert before. Pairs of expert -1 are another rank's. The grid has as
many tiles as the shapes can need, and programs of those that there are not return at once: nothing on the host waits
for where tokens go.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.triton.launch import starts_early, wait_for_previous
from slipstream.kernels.triton.linear import (
    INVARIANT_ROWS,
    Tiles,
    Weight,
    choose_tiles,
    products,
    supports,
    whole_group,
)

_FEW_PAIRS = 128


class Activation(NamedTuple):
    """hidden = g · sigmoid(alpha · g) · (u + up_offset), g and u clamped where limit is above 0."""

    alpha: float
    limit: float
    up_offset: float


class Plan(NamedTuple):
    """How the two products are cut up."""

    pairs: int  # of a tile
    gate_and_up: Tiles
    down: Tiles


class _Routes(NamedTuple):
    """Which pairs are of which tile; without an order, tile t begins with pair t where that begins a tile."""

    ids_P: Tensor
    order_P: Tensor | None
    tiles_N3: Tensor | None  # expert, and from where to where in the order
    num_tiles: Tensor | None
    most_tiles: int


@triton.jit(do_not_specialize=["num_pairs"])
def _sort(
    ids_P, order_P, tiles_N3, num_tiles, num_pairs,
    EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """Program e puts its expert's pairs, in their order, behind those of the experts before, and cuts its tiles."""
    wait_for_previous(IS_EARLY)
    expert = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    counts = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, num_pairs, BLOCK):
        pairs = first + tl.arange(0, BLOCK)
        ids = tl.load(ids_P + pairs, mask=pairs < num_pairs, other=0).to(tl.int32)
        counts += tl.histogram(ids, EXPERTS, mask=(pairs < num_pairs) & (ids >= 0))
    tiles = tl.cdiv(counts, BLOCK_M)
    place = tl.sum(tl.where(experts < expert, counts, 0))
    end = place + tl.sum(tl.where(experts == expert, counts, 0))
    tile = tiles_N3 + 3 * tl.sum(tl.where(experts < expert, tiles, 0))
    tl.store(num_tiles, tl.sum(tiles), mask=expert == 0)
    for first in range(place, end, BLOCK_M):
        tl.store(tile, expert)
        tl.store(tile + 1, first)
        tl.store(tile + 2, tl.minimum(first + BLOCK_M, end))
        tile += 3
    for first in range(0, num_pairs, BLOCK):
        pairs = first + tl.arange(0, BLOCK)
        is_own = tl.load(ids_P + pairs, mask=pairs < num_pairs, other=-1) == expert
        tl.store(order_P + place + tl.cumsum(is_own.to(tl.int32), 0) - 1, pairs, mask=is_own)
        place += tl.sum(is_own.to(tl.int32))


@triton.jit
def _tile(tile, ids_P, order_P, tiles_N3, num_tiles, num_pairs, FEW: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, pairs, which of them there are) of a tile; expert -1 where there is no such tile."""
    slots = tl.arange(0, BLOCK_M)
    if order_P is None:
        all_pairs = tl.arange(0, FEW)
        expert = tl.load(ids_P + tile).to(tl.int32)
        is_same = tl.load(ids_P + all_pairs, mask=all_pairs < num_pairs, other=-1) == expert
        first = tl.sum((is_same & (all_pairs < tile)).to(tl.int32))  # of the expert's pairs, the tile's own
        ranks = tl.cumsum(is_same.to(tl.int32), 0) - 1
        is_slot = is_same[None, :] & (ranks[None, :] == first + slots[:, None])
        pairs = tl.sum(tl.where(is_slot, all_pairs[None, :], 0), 1)
        is_pair = tl.sum(is_slot.to(tl.int32), 1) > 0
        expert = tl.where(first % BLOCK_M == 0, expert, -1)
    else:
        is_tile = tile < tl.load(num_tiles)
        expert = tl.load(tiles_N3 + 3 * tile, mask=is_tile, other=-1)
        places = tl.load(tiles_N3 + 3 * tile + 1, mask=is_tile, other=0) + slots
        is_pair = places < tl.load(tiles_N3 + 3 * tile + 2, mask=is_tile, other=0)
        pairs = tl.load(order_P + places, mask=is_pair, other=0)
    return expert, pairs, is_pair


@triton.jit
def _add_bias(y, bias_EN, places):
    if bias_EN is not None:
        y += tl.load(bias_EN + places).to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=["num_pairs"])
def _gate_and_up(
    x_TH, x_scale_TG, gate, gate_scale, gate_zero, gate_bias, up_distance, up_scale, up_zero, up_bias, hidden_PI,
    ids_P, order_P, tiles_N3, num_tiles, num_pairs, alpha, limit, up_offset, width, num_groups, x_groups,
    TOP_K: tl.constexpr, FEW: tl.constexpr, HAS_LIMIT: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    X_GROUP: tl.constexpr, PER_WORD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, IS_EVEN: tl.constexpr, IS_SWAPPED: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """A tile by BLOCK_N rows of weights, every second of them the gate's: one product makes both.

    up_distance: words from gate to up. Chosen pointers would lose their alignment, and with it wide loads.
    """
    wait_for_previous(IS_EARLY)
    expert, pairs, is_pair = _tile(
        tl.program_id(0), ids_P, order_P, tiles_N3, num_tiles, num_pairs, FEW, BLOCK_M
    )  # fmt: skip
    if expert < 0:
        return
    rows = tl.arange(0, BLOCK_N)
    is_gate = rows % 2 == 0
    n = tl.minimum(tl.program_id(1) * (BLOCK_N // 2) + rows // 2, width - 1)
    places = expert.to(tl.int64) * width + n
    tokens = (pairs // TOP_K).to(tl.int64)
    y = products(
        x_TH + tokens * K,
        is_pair,
        None if x_scale_TG is None else x_scale_TG + tokens * x_groups,
        gate + rows % 2 * up_distance + places * (K // PER_WORD),
        None if gate_scale is None else tl.where(is_gate, gate_scale, up_scale) + places * num_groups,
        None if gate_zero is None else tl.where(is_gate, gate_zero, up_zero) + places * num_groups,
        0, (K + BLOCK_K - 1) // BLOCK_K, K, GROUP, X_GROUP, PER_WORD, BLOCK_K, STAGES, IS_EVEN, IS_SWAPPED,
    )  # fmt: skip
    g, u = tl.split(tl.reshape(y, (BLOCK_M, BLOCK_N // 2, 2)))
    n = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    places = expert * width + tl.minimum(n, width - 1)
    g, u = _add_bias(g, gate_bias, places), _add_bias(u, up_bias, places)
    if HAS_LIMIT:
        g = tl.minimum(g, limit, propagate_nan=tl.PropagateNan.ALL)
        u = tl.clamp(u, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    hidden = g * tl.sigmoid(alpha * g) * (u + up_offset)
    pointers = hidden_PI + pairs.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(pointers, hidden.to(hidden_PI.dtype.element_ty), mask=is_pair[:, None] & (n < width)[None, :])


@triton.jit(do_not_specialize=["num_pairs"])
def _down(
    hidden_PI, hidden_scale_PG, down, down_scale, down_zero, down_bias, parts_SPH,
    ids_P, order_P, tiles_N3, num_tiles, num_pairs, hidden_size, num_groups, x_groups,
    FEW: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, X_GROUP: tl.constexpr, PER_WORD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    IS_EVEN: tl.constexpr, IS_SWAPPED: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """A tile by BLOCK_N rows of down, over a split's part of the columns."""
    wait_for_previous(IS_EARLY)
    expert, pairs, is_pair = _tile(
        tl.program_id(0), ids_P, order_P, tiles_N3, num_tiles, num_pairs, FEW, BLOCK_M
    )  # fmt: skip
    if expert < 0:
        return
    split = tl.program_id(2)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    places = expert.to(tl.int64) * hidden_size + tl.minimum(n, hidden_size - 1)
    pairs = pairs.to(tl.int64)
    steps: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS)
    y = products(
        hidden_PI + pairs * K,
        is_pair,
        None if hidden_scale_PG is None else hidden_scale_PG + pairs * x_groups,
        down + places * (K // PER_WORD),
        None if down_scale is None else down_scale + places * num_groups,
        None if down_zero is None else down_zero + places * num_groups,
        split * steps, steps, K, GROUP, X_GROUP, PER_WORD, BLOCK_K, STAGES, IS_EVEN, IS_SWAPPED,
    )  # fmt: skip
    if split == 0:
        y = _add_bias(y, down_bias, places)
    pointers = parts_SPH + (split.to(tl.int64) * num_pairs + pairs)[:, None] * hidden_size + n[None, :]
    tl.store(pointers, y.to(parts_SPH.dtype.element_ty), mask=is_pair[:, None] & (n < hidden_size)[None, :])


@triton.jit(do_not_specialize=["num_pairs"])
def _sum(
    parts_SPH, shares_P, ids_P, out_TH, num_pairs, hidden_size,
    TOP_K: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """A token's experts by their shares, always in the same order."""
    wait_for_previous(IS_EARLY)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < hidden_size
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        num_columns = tl.where(tl.load(ids_P + pair) >= 0, hidden_size, 0)  # none of what another rank has
        y = tl.zeros((BLOCK,), tl.float32)
        for split in tl.static_range(SPLITS):
            part = parts_SPH + (split * num_pairs + pair) * hidden_size
            y += tl.load(part + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
        total += y * tl.load(shares_P + pair)
    tl.store(out_TH + token * hidden_size + columns, total.to(out_TH.dtype.element_ty), mask=is_inside)


Quantize = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # of activations, to what is multiplied and its scales


def _as_they_are(x_MK: Tensor) -> tuple[Tensor, None]:
    return x_MK, None


def experts(
    x_TH: Tensor, shares_TK: Tensor, ids_TK: Tensor, weights: tuple[Weight, ...],
    biases: tuple[Tensor | None, ...], activation: Activation,
    quantize: Quantize = _as_they_are, plan: Plan | None = None, is_batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """As kernels/moe.py: experts. weights: gate, up, down stacked over the experts, dense or as can_multiply asks.

    is_batch_invariant: products are cut up in one way, whatever the number of tokens.
    """
    (num_tokens, hidden_size), top_k = x_TH.shape, ids_TK.shape[1]
    out_TH = x_TH.new_empty(num_tokens, hidden_size)
    if not num_tokens:
        return out_TH
    gate, up, down = weights
    num_experts, width, num_pairs = *gate.packed.shape[:2], ids_TK.numel()
    x_TH, x_scale_TG = quantize(x_TH.contiguous())
    planned_pairs = INVARIANT_ROWS * num_experts if is_batch_invariant else num_pairs
    plan = plan or choose_plan(planned_pairs, num_experts, hidden_size, width, gate, x_TH.dtype)
    routes = _route(ids_TK, num_experts, plan.pairs)
    few = 0 if routes.order_P is not None else max(16, triton.next_power_of_2(num_pairs))

    tiles, hidden_PI = plan.gate_and_up, out_TH.new_empty(num_pairs, width)
    (gate_words, up_words), how = _words((gate, up), tiles, hidden_size)
    up_distance = (up_words.data_ptr() - gate_words.data_ptr()) // gate_words.itemsize
    _gate_and_up[routes.most_tiles, triton.cdiv(width, tiles.rows // 2)](
        x_TH, x_scale_TG, gate_words, *gate[1:3], biases[0], up_distance, *up[1:3], biases[1], hidden_PI,
        *routes[:4], num_pairs, *activation, width, *_num_groups(gate, x_scale_TG),
        TOP_K=top_k, FEW=few, HAS_LIMIT=activation.limit > 0, BLOCK_M=plan.pairs, **how,
    )  # fmt: skip

    tiles, dtype = plan.down, torch.float32 if plan.down.splits > 1 else out_TH.dtype
    parts_SPH = out_TH.new_empty(tiles.splits, num_pairs, hidden_size, dtype=dtype)
    hidden_PI, hidden_scale_PG = quantize(hidden_PI)
    (words,), how = _words((down,), tiles, width)
    _down[routes.most_tiles, triton.cdiv(hidden_size, tiles.rows), tiles.splits](
        hidden_PI, hidden_scale_PG, words, *down[1:3], biases[2], parts_SPH,
        *routes[:4], num_pairs, hidden_size, *_num_groups(down, hidden_scale_PG),
        FEW=few, BLOCK_M=plan.pairs, SPLITS=tiles.splits, **how,
    )  # fmt: skip
    block, is_early = min(512, triton.next_power_of_2(hidden_size)), starts_early(out_TH.device)
    _sum[num_tokens, triton.cdiv(hidden_size, block)](
        parts_SPH, shares_TK.contiguous(), routes.ids_P, out_TH, num_pairs, hidden_size,
        top_k, tiles.splits, block, is_early, num_warps=4, launch_pdl=is_early,
    )  # fmt: skip
    return out_TH


def can_multiply(x_TH: Tensor, weights: tuple[Weight, ...]) -> bool:
    """Of packed weights; dense ones always can be."""
    gate, _, down = weights
    hidden_PI = x_TH.new_empty(x_TH.shape[0], gate.packed.shape[1])
    return supports(x_TH, gate) and supports(hidden_PI, down)


def choose_plan(
    num_pairs: int, num_experts: int, hidden_size: int, width: int, weight: Weight, x_type: torch.dtype
) -> Plan:
    """By shapes alone: tiles as large as an expert's pairs on average, weights as for a linear of as many rows."""
    rows, num_active = max(2, num_pairs // num_experts), min(num_pairs, num_experts)

    def tiles(num_out: int, num_in: int) -> Tiles:
        group = whole_group(weight.group_size, num_in)
        return choose_tiles(rows, num_active * num_out, num_in, group, x_type, weight.packed.dtype)

    block = 16 if x_type == torch.float32 else min(128, max(16, triton.next_power_of_2(rows)))
    return Plan(block, tiles(2 * width, hidden_size)._replace(splits=1), tiles(hidden_size, width))


def _route(ids_TK: Tensor, num_experts: int, block: int) -> _Routes:
    num_pairs, ids_P = ids_TK.numel(), ids_TK.contiguous().view(-1)
    if num_pairs <= _FEW_PAIRS:
        return _Routes(ids_P, None, None, None, num_pairs)
    most_tiles = min(num_pairs, num_pairs // block + num_experts)
    order_P = ids_P.new_empty(num_pairs, dtype=torch.int32)
    tiles_N3 = ids_P.new_empty(most_tiles, 3, dtype=torch.int32)
    num_tiles = ids_P.new_empty(1, dtype=torch.int32)
    is_early = starts_early(ids_TK.device)
    _sort[(num_experts,)](
        ids_P, order_P, tiles_N3, num_tiles, num_pairs,
        max(2, triton.next_power_of_2(num_experts)), block, min(1024, triton.next_power_of_2(num_pairs)), is_early,
        launch_pdl=is_early,
    )  # fmt: skip
    return _Routes(ids_P, order_P, tiles_N3, num_tiles, most_tiles)


def _words(weights: tuple[Weight, ...], tiles: Tiles, num_columns: int) -> tuple[list[Tensor], dict[str, Any]]:
    """Packed weights as their tiles are read, and how."""
    group, x_group = (whole_group(size, num_columns) for size in (weights[0].group_size, weights[0].x_group_size))
    block_k = min(tiles.columns, group or tiles.columns, x_group or tiles.columns)
    words, is_early = [weight.packed for weight in weights], starts_early(weights[0].packed.device)
    if words[0].dtype == torch.uint8 and block_k >= 64:  # a product on tensor cores sums 16 columns or more
        words = [each.view(torch.int16) for each in words]
    return words, {
        "K": num_columns, "GROUP": group, "X_GROUP": x_group, "PER_WORD": num_columns // words[0].shape[2],
        "BLOCK_N": tiles.rows, "BLOCK_K": block_k, "STAGES": tiles.stages,
        "IS_EVEN": num_columns % (block_k * max(1, tiles.splits)) == 0, "IS_SWAPPED": tiles.is_swapped,
        "IS_EARLY": is_early, "num_warps": tiles.warps, "num_stages": tiles.stages, "launch_pdl": is_early,
    }  # fmt: skip


def _num_groups(weight: Weight, x_scale_MG: Tensor | None) -> tuple[int, int]:
    """Scales of a row, of the weight and of what it multiplies."""
    num_groups, x_groups = (1 if each is None else each.shape[-1] for each in (weight.scale_NG, x_scale_MG))
    return num_groups, x_groups
