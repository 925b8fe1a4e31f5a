"""Matrix products and table look-ups with a weight."""

import torch
from torch import Tensor, nn

from slipstream.kernels import dense, embedding, norm


class Linear(nn.Module):
    """y = x Wᵀ + b; weight [num_out, num_in]."""

    def __init__(self, num_in: int, num_out: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in))
        self.bias = nn.Parameter(torch.empty(num_out)) if bias else None

    def forward(self, x_TH: Tensor) -> Tensor:
        return dense.linear(x_TH, self.weight, self.bias)


class NormalizedLinear(Linear):
    """A Linear whose weight has rows of length 1, whatever is stored (Baichuan 2's NormHead)."""

    def forward(self, x_TH: Tensor) -> Tensor:
        return dense.linear(x_TH, norm.normalize_rows(self.weight), self.bias)


class Embedding(nn.Module):
    """Token ids [T] to vectors [T, hidden_size]."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, token_ids_T: Tensor) -> Tensor:
        return embedding.embedding(self.weight, token_ids_T)
