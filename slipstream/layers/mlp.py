"""Feed-forward blocks: gated (SwiGLU, GEGLU, arXiv:2002.05202) and plain."""

from collections.abc import Callable

from torch import Tensor, nn

from slipstream.kernels.activation import gelu, silu
from slipstream.layers.linear import Linear

Activation = Callable[[Tensor], Tensor]

# Hugging Face's names, in a config's hidden_act. (Its "gelu_fast" and "gelu_pytorch_tanh" are one formula.)
ACTIVATIONS: dict[str, Activation] = {
    "silu": silu,
    "gelu": lambda x: gelu(x, False),
    "gelu_new": lambda x: gelu(x, True),
    "gelu_fast": lambda x: gelu(x, True),
    "gelu_pytorch_tanh": lambda x: gelu(x, True),
}


class GatedMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool, activation: Activation = silu) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x_TH)) * self.up_proj(x_TH))


class MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x_TH: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x_TH)))
