"""Self-attention with rotary positions over the paged KV cache: MHA, GQA or MQA by the number of KV heads."""

from torch import Tensor, nn

from slipstream.kernels import paged, rope
from slipstream.kernels.attention.metadata import StepTensors
from slipstream.layers.linear import Linear


class Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, *, bias: bool) -> None:
        super().__init__()
        self.head_dim, self.scale = head_dim, head_dim**-0.5
        self.q_proj = Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=bias)

    def forward(self, x_TH: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, step: StepTensors) -> Tensor:
        q_TX, k_TY, v_TY = self.q_proj(x_TH), self.k_proj(x_TH), self.v_proj(x_TH)
        q_TX, k_TY = rope.rope(q_TX, cos, sin, self.head_dim), rope.rope(k_TY, cos, sin, self.head_dim)
        return self.o_proj(attend(q_TX, k_TY, v_TY, kv, step, scale=self.scale, value_dim=self.head_dim))


def attend(
    q_TX: Tensor,
    k_TY: Tensor,
    v_TY: Tensor | None,
    kv: Tensor,
    step: StepTensors,
    *,
    scale: float,
    value_dim: int,
    window: int = 0,
    soft_cap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Store this step's keys and values, then attend to all that the cache holds (kernels/attention/paged.py)."""
    paged.kv_write(k_TY, v_TY, kv, step.slots)
    return paged.attention(
        q_TX, kv, step.query_starts, step.kv_lens, step.block_tables, alibi_slopes, sinks,
        scale, window, soft_cap, value_dim,
    )  # fmt: skip
