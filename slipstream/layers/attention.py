"""Self-attention over the paged KV cache: MHA, GQA or MQA by the number of KV heads."""

import torch
from torch import Tensor, nn

from slipstream.kernels import paged, rope
from slipstream.kernels.attention.metadata import StepTensors
from slipstream.layers.linear import Linear


class Attention(nn.Module):
    """out_bias: of the output projection, where it differs from that of query, key and value.
    scale: what scores are multiplied by; 1 / sqrt(head_dim) if None. window, soft_cap: as attend() takes them.
    q_norm, k_norm: norms of queries and keys before their rotation.
    alibi_slopes: float32 [num_heads], where positions are told by ALiBi (layers/alibi.py).
    has_sinks: each head has a learned score beside those of the keys, which takes weight and gives nothing.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool,
        out_bias: bool | None = None,
        scale: float | None = None,
        window: int = 0,
        soft_cap: float = 0.0,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        alibi_slopes: Tensor | None = None,
        has_sinks: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim, self.window, self.soft_cap = head_dim, window, soft_cap
        self.scale = head_dim**-0.5 if scale is None else scale
        self.q_proj = Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=bias if out_bias is None else out_bias)
        self.q_norm, self.k_norm = q_norm, k_norm
        self.alibi_slopes: Tensor | None
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.sinks = nn.Parameter(torch.empty(num_heads)) if has_sinks else None

    def forward(self, x_TH: Tensor, cos: Tensor | None, sin: Tensor | None, kv: Tensor, step: StepTensors) -> Tensor:
        """cos and sin are None where positions are not rotary."""
        q_TX, k_TY, v_TY = self.q_proj(x_TH), self.k_proj(x_TH), self.v_proj(x_TH)
        if self.q_norm is not None and self.k_norm is not None:
            q_TX, k_TY = self.q_norm(q_TX), self.k_norm(k_TY)
        if cos is not None and sin is not None:
            q_TX, k_TY = rope.rope(q_TX, cos, sin, self.head_dim), rope.rope(k_TY, cos, sin, self.head_dim)
        out_TX = attend(
            q_TX, k_TY, v_TY, kv, step, scale=self.scale, value_dim=self.head_dim, window=self.window,
            soft_cap=self.soft_cap, alibi_slopes=self.alibi_slopes, sinks=self.sinks,
        )  # fmt: skip
        return self.o_proj(out_TX)


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
        q_TX, kv, step.query_starts, step.kv_lens, step.block_tables, alibi_slopes, sinks, None,
        scale, window, soft_cap, value_dim,
    )  # fmt: skip
