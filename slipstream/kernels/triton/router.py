"""Routers in two launches: the scores of all experts, and the choice of the best, a program for each token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from slipstream.kernels.linear import groups
from slipstream.kernels.triton.launch import starts_early, wait_for_previous
from slipstream.kernels.triton.linear import Weight, product, supports


@triton.jit
def _choose(
    logits_TE, correction_E, shares_TK, ids_TK, factor,
    NUM_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP_K: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr, IS_SIGMOID: tl.constexpr,
    IS_NORMALIZED: tl.constexpr, IS_EARLY: tl.constexpr,
):  # fmt: skip
    """A token's experts, the first of equal ones. GROUPS, SIZE, SLOTS: powers of two for groups, their experts, TOP_K.

    A row of NaN chooses experts that there are, by shares of NaN.
    """
    wait_for_previous(IS_EARLY)
    token = tl.program_id(0).to(tl.int64)
    groups, members = tl.arange(0, GROUPS), tl.arange(0, SIZE)
    experts = groups[:, None] * GROUP_SIZE + members[None, :]
    is_expert = (groups < NUM_GROUPS)[:, None] & (members < GROUP_SIZE)[None, :]
    logits = tl.load(logits_TE + token * (NUM_GROUPS * GROUP_SIZE) + experts, mask=is_expert, other=float("-inf"))
    if IS_SIGMOID:
        scores = tl.sigmoid(logits)
        choice = scores + tl.load(correction_E + experts, mask=is_expert, other=0.0).to(tl.float32)
    else:
        scores = tl.exp(logits - tl.max(logits))
        scores /= tl.sum(scores)
        choice = logits
    choice = tl.where(is_expert & (choice == choice), choice, float("-inf"))

    if TOP_GROUPS < NUM_GROUPS:
        best = tl.argmax(choice, 1)
        others = tl.where(members[None, :] == best[:, None], float("-inf"), choice)
        worth = tl.max(choice, 1) + tl.max(others, 1)
        is_open = groups < 0
        for _ in tl.static_range(TOP_GROUPS):
            is_best = groups == tl.argmax(worth, 0)
            is_open |= is_best
            worth = tl.where(is_best, float("-inf"), worth)
        choice = tl.where(is_open[:, None], choice, float("-inf"))

    places, slots = tl.arange(0, GROUPS * SIZE), tl.arange(0, SLOTS)
    choice, scores = tl.reshape(choice, (GROUPS * SIZE,)), tl.reshape(scores, (GROUPS * SIZE,))
    ids, shares = tl.zeros((SLOTS,), tl.int32), tl.zeros((SLOTS,), tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(choice, 0)
        ids = tl.where(slots == k, best // SIZE * GROUP_SIZE + best % SIZE, ids)
        shares = tl.where(slots == k, tl.sum(tl.where(places == best, scores, 0.0)), shares)
        choice = tl.where(places == best, float("-inf"), choice)
    if IS_NORMALIZED:
        shares /= tl.sum(shares) + (1e-20 if IS_SIGMOID else 0.0)
    tl.store(shares_TK + token * TOP_K + slots, shares * factor, mask=slots < TOP_K)
    tl.store(ids_TK + token * TOP_K + slots, ids.to(tl.int64), mask=slots < TOP_K)


def softmax(
    x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None, top_k: int, is_normalized: bool,
    is_batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As kernels/moe.py: route_softmax."""
    return _route(_logits(x_TH, weight_EH, bias_E, is_batch_invariant), None, top_k, 1, 1, is_normalized, 1.0)


def sigmoid(
    x_TH: Tensor, weight_EH: Tensor, correction_E: Tensor, top_k: int, num_groups: int, top_groups: int,
    is_normalized: bool, factor: float, is_batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As kernels/moe.py: route_sigmoid."""
    logits_TE = _logits(x_TH, weight_EH, None, is_batch_invariant)
    return _route(logits_TE, correction_E, top_k, num_groups, top_groups, is_normalized, factor)


def _logits(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None, is_batch_invariant: bool) -> Tensor:
    """In float32: tensor cores sum products of 16 bits so."""
    weight = Weight(weight_EH)
    if x_TH.dtype == weight_EH.dtype and supports(x_TH, weight):
        return product(x_TH, weight, bias_E, torch.float32, is_batch_invariant=is_batch_invariant)
    return groups.product(x_TH, weight_EH.float(), bias_E, torch.float32, is_batch_invariant)


def _route(
    logits_TE: Tensor, correction_E: Tensor | None, top_k: int, num_groups: int, top_groups: int, is_normalized: bool,
    factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_tokens, num_experts = logits_TE.shape
    shares_TK = logits_TE.new_empty(num_tokens, top_k)
    ids_TK = logits_TE.new_empty(num_tokens, top_k, dtype=torch.int64)
    if num_tokens:
        group_size, is_early = num_experts // num_groups, starts_early(logits_TE.device)
        _choose[(num_tokens,)](
            logits_TE, correction_E, shares_TK, ids_TK, factor, num_groups, group_size, top_groups, top_k,
            *map(triton.next_power_of_2, (num_groups, group_size, top_k)), correction_E is not None, is_normalized,
            is_early, num_warps=1 if num_experts <= 128 else 4, launch_pdl=is_early,
        )  # fmt: skip
    return shares_TK, ids_TK
