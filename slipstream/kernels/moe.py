"""Mixture of experts: a router that picks each token's experts, and their feed-forward products as one op.

T tokens, E experts, K of them a token, H hidden size, I an expert's intermediate size.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from slipstream.kernels.fits import need, need_floats, need_same_dtype, need_shape
from slipstream.kernels.registry import kernel, on_gpu, op


def _routes(x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None, top_k: int, num_open: int) -> tuple[Tensor, Tensor]:
    """num_open: how many experts there are to choose from."""
    need_floats(x=x_TH, weight=weight_EH, bias=bias_E)
    num_tokens, hidden_size = x_TH.shape
    num_experts = weight_EH.shape[0]
    need_shape("weight", weight_EH, num_experts, hidden_size)
    need_shape("bias", bias_E, num_experts)
    need(1 <= top_k <= num_open, f"top_k must be from 1 to {num_open}")
    shape = (num_tokens, top_k)
    return x_TH.new_empty(shape, dtype=torch.float32), x_TH.new_empty(shape, dtype=torch.int64)


def _logits(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """In float32 whatever the engine's dtype: a rounded score picks another expert."""
    return x_TH.float() @ weight_EH.float().t()


def _softmax_shapes(
    x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None, top_k: int, is_normalized: bool
) -> tuple[Tensor, Tensor]:
    return _routes(x_TH, weight_EH, bias_E, top_k, weight_EH.shape[0])


@op(
    "route_softmax(Tensor x, Tensor weight, Tensor? bias, int top_k, bool is_normalized) -> (Tensor, Tensor)",
    shapes=_softmax_shapes,
)
def route_softmax(
    x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None, top_k: int, is_normalized: bool
) -> tuple[Tensor, Tensor]:
    """The top_k most probable experts, as (float32 probabilities [T, K], ids [T, K]) (arXiv:1701.06538, 2401.04088).

    is_normalized: the chosen probabilities are scaled to a sum of 1, which is the softmax of the chosen scores alone.
    """
    logits_TE = _logits(x_TH, weight_EH)
    if bias_E is not None:
        logits_TE += bias_E
    probabilities_TK, ids_TK = logits_TE.softmax(1).topk(top_k, 1)
    if is_normalized:
        probabilities_TK /= probabilities_TK.sum(1, keepdim=True)
    return probabilities_TK, ids_TK


@kernel(route_softmax, "triton", on_gpu)
def route_softmax_triton(
    x_TH: Tensor, weight_EH: Tensor, bias_E: Tensor | None, top_k: int, is_normalized: bool,
    is_batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from slipstream.kernels.triton import router

    return router.softmax(x_TH, weight_EH, bias_E, top_k, is_normalized, is_batch_invariant)


def _sigmoid_shapes(
    x_TH: Tensor, weight_EH: Tensor, correction_E: Tensor, top_k: int, num_groups: int, top_groups: int,
    is_normalized: bool, factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_experts = weight_EH.shape[0]
    need(num_groups > 0 and num_experts % num_groups == 0, f"num_groups must divide {num_experts}")
    group_size = num_experts // num_groups
    need(group_size >= 2, "a group must have two experts at least")
    need(1 <= top_groups <= num_groups, f"top_groups must be from 1 to {num_groups}")
    return _routes(x_TH, weight_EH, correction_E, top_k, top_groups * group_size)


@op(
    "route_sigmoid(Tensor x, Tensor weight, Tensor correction, int top_k, int num_groups, int top_groups, "
    "bool is_normalized, float factor) -> (Tensor, Tensor)",
    shapes=_sigmoid_shapes,
)
def route_sigmoid(
    x_TH: Tensor, weight_EH: Tensor, correction_E: Tensor, top_k: int, num_groups: int, top_groups: int,
    is_normalized: bool, factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Experts by sigmoid score, as (float32 scores · factor [T, K], ids [T, K]) (DeepSeek-V3, arXiv:2412.19437).

    The correction, which balances the load, counts for the choice alone. Experts are chosen from the top_groups of the
    num_groups equal runs of experts, a group being as good as the sum of its two best.
    """
    scores_TE = _logits(x_TH, weight_EH).sigmoid_()
    choice_TGE = (scores_TE + correction_E).unflatten(1, (num_groups, -1))
    groups_TG = choice_TGE.topk(2, 2).values.sum(2)
    is_out_TG = torch.ones_like(groups_TG, dtype=torch.bool).scatter_(1, groups_TG.topk(top_groups, 1).indices, False)
    ids_TK = choice_TGE.masked_fill(is_out_TG[:, :, None], float("-inf")).flatten(1).topk(top_k, 1).indices
    scores_TK = scores_TE.gather(1, ids_TK)
    if is_normalized:
        scores_TK /= scores_TK.sum(1, keepdim=True) + 1e-20
    return scores_TK.mul_(factor), ids_TK


@kernel(route_sigmoid, "triton", on_gpu)
def route_sigmoid_triton(
    x_TH: Tensor, weight_EH: Tensor, correction_E: Tensor, top_k: int, num_groups: int, top_groups: int,
    is_normalized: bool, factor: float, is_batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from slipstream.kernels.triton import router

    return router.sigmoid(
        x_TH, weight_EH, correction_E, top_k, num_groups, top_groups, is_normalized, factor, is_batch_invariant
    )


def need_routes(x_TH: Tensor, shares_TK: Tensor, ids_TK: Tensor) -> None:
    """Rows, and for each of them what a router gives."""
    need_floats(x=x_TH)
    need(shares_TK.dtype == torch.float32, "shares must be float32")
    (num_tokens, _), top_k = x_TH.shape, ids_TK.shape[1]
    need(ids_TK.dtype == torch.int64, "expert_ids must be int64")
    need_shape("expert_ids", ids_TK, num_tokens, top_k)
    need_shape("shares", shares_TK, num_tokens, top_k)


def _local_shapes(ids_TK: Tensor, first: int, count: int) -> Tensor:
    need(ids_TK.dtype == torch.int64, "expert_ids must be int64")
    need(first >= 0 and count > 0, "there must be experts")
    _, _ = ids_TK.shape
    return ids_TK.new_empty(ids_TK.shape)


@op("local_experts(Tensor expert_ids, int first, int count) -> Tensor", shapes=_local_shapes, is_row_by_row=True)
def local_experts(ids_TK: Tensor, first: int, count: int) -> Tensor:
    """The places of experts among those from `first` on that a rank has; -1 for all others."""
    places_TK = ids_TK - first
    return places_TK.masked_fill_((places_TK < 0) | (places_TK >= count), -1)


def _experts_shapes(
    x_TH: Tensor, shares_TK: Tensor, ids_TK: Tensor, gate_EIH: Tensor, up_EIH: Tensor, down_EHI: Tensor,
    gate_bias_EI: Tensor | None, up_bias_EI: Tensor | None, down_bias_EH: Tensor | None,
    alpha: float, limit: float, up_offset: float,
) -> Tensor:  # fmt: skip
    need_routes(x_TH, shares_TK, ids_TK)
    need_same_dtype(
        x_TH, gate=gate_EIH, up=up_EIH, down=down_EHI, gate_bias=gate_bias_EI, up_bias=up_bias_EI,
        down_bias=down_bias_EH,
    )  # fmt: skip
    hidden_size, (num_experts, width) = x_TH.shape[1], gate_EIH.shape[:2]
    for name, weight, bias in (("gate", gate_EIH, gate_bias_EI), ("up", up_EIH, up_bias_EI)):
        need_shape(name, weight, num_experts, width, hidden_size)
        need_shape(f"{name}_bias", bias, num_experts, width)
    need_shape("down", down_EHI, num_experts, hidden_size, width)
    need_shape("down_bias", down_bias_EH, num_experts, hidden_size)
    return x_TH.new_empty(x_TH.shape)


@op(
    "experts(Tensor x, Tensor shares, Tensor expert_ids, Tensor gate, Tensor up, Tensor down, Tensor? gate_bias, "
    "Tensor? up_bias, Tensor? down_bias, float alpha, float limit, float up_offset) -> Tensor",
    shapes=_experts_shapes,
    reads_values=True,
)
def experts(
    x_TH: Tensor, shares_TK: Tensor, ids_TK: Tensor, gate_EIH: Tensor, up_EIH: Tensor, down_EHI: Tensor,
    gate_bias_EI: Tensor | None, up_bias_EI: Tensor | None, down_bias_EH: Tensor | None,
    alpha: float, limit: float, up_offset: float,
) -> Tensor:  # fmt: skip
    """The sum of each token's experts by their shares, an expert being down(g · sigmoid(alpha · g) · (u + up_offset)).

    g and u are the gate's and up's products; a limit above 0 clamps g from above and u on both sides (gpt-oss). With
    alpha 1, no limit and no offset this is SwiGLU (arXiv:2002.05202). Sums of experts are taken in float32. An id of
    -1 is of an expert that another rank has.
    """
    return run_experts(
        x_TH, shares_TK, ids_TK, len(gate_EIH), partial(_linear, gate_EIH, gate_bias_EI),
        partial(_linear, up_EIH, up_bias_EI), partial(_linear, down_EHI, down_bias_EH), alpha, limit, up_offset,
    )  # fmt: skip


@kernel(experts, "triton", on_gpu)
def experts_triton(
    x_TH: Tensor, shares_TK: Tensor, ids_TK: Tensor, gate_EIH: Tensor, up_EIH: Tensor, down_EHI: Tensor,
    gate_bias_EI: Tensor | None, up_bias_EI: Tensor | None, down_bias_EH: Tensor | None,
    alpha: float, limit: float, up_offset: float, is_batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    from slipstream.kernels.triton import experts as grouped

    weights = tuple(grouped.Weight(each) for each in (gate_EIH, up_EIH, down_EHI))
    biases, activation = (gate_bias_EI, up_bias_EI, down_bias_EH), grouped.Activation(alpha, limit, up_offset)
    return grouped.experts(
        x_TH, shares_TK, ids_TK, weights, biases, activation, is_batch_invariant=is_batch_invariant
    )  # fmt: skip


Product = Callable[[int, Tensor], Tensor]  # of the rows that an expert has and the weight that it keeps


def run_experts(
    x_TH: Tensor, shares_TK: Tensor, ids_TK: Tensor, num_experts: int, gate: Product, up: Product, down: Product,
    alpha: float, limit: float, up_offset: float,
) -> Tensor:  # fmt: skip
    """What `experts` says, over weights in any form."""
    out_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    top_k = ids_TK.shape[1]
    places = ids_TK.flatten()
    order, counts = places.argsort(), (places + 1).bincount(minlength=num_experts + 1)
    _, *pairs = order.split(counts.tolist())  # the first are of experts elsewhere
    for expert, chosen in enumerate(pairs):
        if not len(chosen):
            continue
        rows = chosen // top_k
        x_RH = x_TH[rows]
        hidden_RI = gated(gate(expert, x_RH), up(expert, x_RH), alpha, limit, up_offset)
        out_TH.index_add_(0, rows, down(expert, hidden_RI).float() * shares_TK.flatten()[chosen, None])
    return out_TH.to(x_TH.dtype)


def gated(gate_RI: Tensor, up_RI: Tensor, alpha: float, limit: float, up_offset: float) -> Tensor:
    """What an expert's down product reads."""
    if limit:
        gate_RI, up_RI = gate_RI.clamp(max=limit), up_RI.clamp(-limit, limit)
    return gate_RI * torch.sigmoid(alpha * gate_RI) * (up_RI + up_offset)


def _linear(weight_ENK: Tensor, bias_EN: Tensor | None, expert: int, x_RK: Tensor) -> Tensor:
    return torch.nn.functional.linear(x_RK, weight_ENK[expert], None if bias_EN is None else bias_EN[expert])
