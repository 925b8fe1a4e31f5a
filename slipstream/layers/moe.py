"""Mixture of experts: of many feed-forward blocks each token runs a few, chosen by a router (arXiv:1701.06538)."""

import torch
from torch import Tensor, nn

from slipstream.kernels import moe


class ExpertLinear(nn.Module):
    """The weights of one linear in every expert: weight [num_experts, num_out, num_in], bias [num_experts, num_out]."""

    def __init__(self, num_experts: int, num_in: int, num_out: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, num_out, num_in))
        self.bias = nn.Parameter(torch.empty(num_experts, num_out)) if bias else None


class Experts(nn.Module):
    """Gated feed-forward blocks, SwiGLU by default; alpha, limit, up_offset as kernels/moe.py: experts takes them."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        alpha: float = 1.0,
        limit: float = 0.0,
        up_offset: float = 0.0,
    ) -> None:
        super().__init__()
        self.alpha, self.limit, self.up_offset = alpha, limit, up_offset
        self.gate_proj = ExpertLinear(num_experts, hidden_size, intermediate_size, bias=bias)
        self.up_proj = ExpertLinear(num_experts, hidden_size, intermediate_size, bias=bias)
        self.down_proj = ExpertLinear(num_experts, intermediate_size, hidden_size, bias=bias)

    def forward(self, x_TH: Tensor, shares_TK: Tensor, ids_TK: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        return moe.experts(
            x_TH, shares_TK, ids_TK, gate.weight, up.weight, down.weight, gate.bias, up.bias, down.bias,
            self.alpha, self.limit, self.up_offset,
        )  # fmt: skip


class SoftmaxRouter(nn.Module):
    """The top_k most probable experts; is_normalized: their probabilities are scaled to a sum of 1."""

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, is_normalized: bool, bias: bool = False
    ) -> None:
        super().__init__()
        self.top_k, self.is_normalized = top_k, is_normalized
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        return moe.route_softmax(x_TH, self.weight, self.bias, self.top_k, self.is_normalized)


class SigmoidRouter(nn.Module):
    """DeepSeek-V3's (kernels/moe.py: route_sigmoid)."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        num_groups: int,
        top_groups: int,
        is_normalized: bool,
        factor: float,
    ) -> None:
        super().__init__()
        self.top_k, self.num_groups, self.top_groups = top_k, num_groups, top_groups
        self.is_normalized, self.factor = is_normalized, factor
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.correction = nn.Parameter(torch.empty(num_experts))

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        return moe.route_sigmoid(
            x_TH, self.weight, self.correction, self.top_k, self.num_groups, self.top_groups, self.is_normalized,
            self.factor,
        )  # fmt: skip


class MixtureOfExperts(nn.Module):
    """shared: a feed-forward block that every token runs beside its experts (arXiv:2401.06066)."""

    def __init__(self, router: nn.Module, experts: Experts, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared

    def forward(self, x_TH: Tensor) -> Tensor:
        out_TH = self.experts(x_TH, *self.router(x_TH))
        return out_TH if self.shared is None else out_TH + self.shared(x_TH)
