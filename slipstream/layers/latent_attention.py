"""Multi-head latent attention (MLA, arXiv:2405.04434 §2.1): the cache holds one small latent a token for all heads."""

from torch import Tensor, nn

from slipstream.kernels import heads, rope
from slipstream.kernels.attention.metadata import StepTensors
from slipstream.layers.attention import attend
from slipstream.layers.linear import Linear
from slipstream.layers.norm import RMSNorm

NORM_EPS = 1e-6  # of the latents, whatever the layers' own


class Queries(nn.Module):
    """All heads' numbers without and with a position."""

    def __init__(self, num_in: int, num_nope: int, num_rope: int) -> None:
        super().__init__()
        self.nope, self.rope = Linear(num_in, num_nope), Linear(num_in, num_rope)

    def forward(self, x_TX: Tensor) -> tuple[Tensor, Tensor]:
        return self.nope(x_TX), self.rope(x_TX)


class LatentAttention(nn.Module):
    """In the absorbed form: keys and values are never made. The up-projection of keys moves over to the query, which
    then scores the latents themselves; that of values comes after the weighted sum. For the cache this is MQA.

    q_rank: of the queries' own latent; 0 where queries are made of x directly.
    nope_dim, rope_dim: numbers of a head's query and key without and with a position.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        q_rank: int,
        kv_rank: int,
        nope_dim: int,
        rope_dim: int,
        value_dim: int,
        bias: bool,
        scale: float,
        pairs_neighbours: bool,
    ) -> None:
        super().__init__()
        self.num_heads, self.q_rank, self.kv_rank, self.rope_dim = num_heads, q_rank, kv_rank, rope_dim
        self.scale, self.pairs_neighbours = scale, pairs_neighbours
        if q_rank:
            self.q_down = Linear(hidden_size, q_rank, bias=bias)
            self.q_norm = RMSNorm(q_rank, NORM_EPS)
            self.q_up = Queries(q_rank, num_heads * nope_dim, num_heads * rope_dim)
        else:
            self.q_proj = Queries(hidden_size, num_heads * nope_dim, num_heads * rope_dim)
        self.kv_down = Linear(hidden_size, kv_rank, bias=bias)
        self.kv_norm = RMSNorm(kv_rank, NORM_EPS)
        self.k_rope = Linear(hidden_size, rope_dim, bias=bias)
        self.k_up = Linear(kv_rank, num_heads * nope_dim)
        self.v_up = Linear(kv_rank, num_heads * value_dim)
        self.o_proj = Linear(num_heads * value_dim, hidden_size, bias=bias)

    def forward(self, x_TH: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, step: StepTensors) -> Tensor:
        q_nope_TX, q_rope_TY = self.q_up(self.q_norm(self.q_down(x_TH))) if self.q_rank else self.q_proj(x_TH)
        q_latent_TZ = heads.head_linear(q_nope_TX, self.k_up.weight, self.num_heads, True)
        q_TX = heads.join_heads(q_latent_TZ, self._rotate(q_rope_TY, cos, sin), self.num_heads)
        latent_TL, k_rope_TP = self.kv_norm(self.kv_down(x_TH)), self._rotate(self.k_rope(x_TH), cos, sin)
        k_TY = heads.join_heads(latent_TL, k_rope_TP, 1)
        out_TX = attend(q_TX, k_TY, None, kv, step, scale=self.scale, value_dim=self.kv_rank)
        return self.o_proj(heads.head_linear(out_TX, self.v_up.weight, self.num_heads, False))

    def _rotate(self, x_TX: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if self.pairs_neighbours:
            return rope.rope_pairs(x_TX, cos, sin)
        return rope.rope(x_TX, cos, sin, self.rope_dim)
