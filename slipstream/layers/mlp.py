"""The gated feed-forward block (SwiGLU, arXiv:2002.05202)."""

from torch import Tensor, nn

from slipstream.kernels import activation
from slipstream.layers.linear import Linear


class GatedMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.down_proj(activation.silu(self.gate_proj(x_TH)) * self.up_proj(x_TH))
