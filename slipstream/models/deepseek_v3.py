"""DeepSeek-V3 and R1 (arXiv:2412.19437), Kimi K2: latent attention, experts by sigmoid score, first layers without."""

from dataclasses import dataclass
from typing import Self

from torch import nn

from slipstream.errors import CorruptFile
from slipstream.layers import (
    Decoder,
    Experts,
    GatedMLP,
    LatentAttention,
    MixtureOfExperts,
    PreNormLayer,
    RMSNorm,
    SigmoidRouter,
)
from slipstream.schema.model import MAX_HEAD_DIM, MAX_LAYERS, DecoderConfig, Options, read_rope
from slipstream.schema.rope import yarn_magnitude
from slipstream.schema.weights import Rows, Stacked


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """For the cache this is one head of one plane: its key is the latent and the rotated part, its value the latent."""

    q_rank: int  # 0 where queries have no latent
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    pairs_neighbours: bool
    attention_bias: bool
    intermediate_size: int  # of a layer without experts
    moe_intermediate_size: int  # of an expert
    num_dense_layers: int  # the first ones
    num_experts: int
    num_shared_experts: int
    top_k: int
    num_groups: int
    top_groups: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float

    @classmethod
    def from_options(cls, options: Options) -> Self:
        options.choice("hidden_act", ("silu",), "silu")
        options.choice("scoring_func", ("sigmoid",), "sigmoid")
        options.choice("topk_method", ("noaux_tc",), "noaux_tc")
        options.integer("moe_layer_freq", 1, high=1)
        num_heads = options.integer("num_attention_heads")
        options.choice("num_key_value_heads", (num_heads,), num_heads)
        # What the other sizes say already; training's; the publisher's own software's; multi-token prediction.
        options.skip("head_dim", "qk_head_dim", "output_router_logits", "aux_loss_alpha", "seq_aux", "ep_size")
        options.skip("num_nextn_predict_layers")
        rope_dim = options.integer("qk_rope_head_dim", 64, high=MAX_HEAD_DIM)
        kv_rank = options.integer("kv_lora_rank", 512, high=MAX_HEAD_DIM)
        max_position_embeddings = options.integer("max_position_embeddings", 4096)
        num_experts = options.integer("n_routed_experts", 256)
        num_groups = options.integer("n_group", 8, high=num_experts)
        top_groups = options.integer("topk_group", 4, high=num_groups)
        if num_experts % num_groups or num_experts == num_groups:
            raise CorruptFile(
                f"n_group is {num_groups}; it must divide {num_experts} experts into groups of two or more."
            )
        return cls(
            vocab_size=options.integer("vocab_size"),
            hidden_size=options.integer("hidden_size"),
            num_layers=options.integer("num_hidden_layers", high=MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=1,
            head_dim=kv_rank + rope_dim,
            kv_planes=1,
            max_position_embeddings=max_position_embeddings,
            rope=read_rope(options, rope_dim, max_position_embeddings),
            tie_word_embeddings=options.boolean("tie_word_embeddings"),
            q_rank=options.optional_integer("q_lora_rank", 1536) or 0,
            kv_rank=kv_rank,
            nope_dim=options.integer("qk_nope_head_dim", 128),
            rope_dim=rope_dim,
            value_dim=options.integer("v_head_dim", 128),
            pairs_neighbours=options.boolean("rope_interleave", True),
            attention_bias=options.boolean("attention_bias"),
            intermediate_size=options.integer("intermediate_size", 18432),
            moe_intermediate_size=options.integer("moe_intermediate_size", 2048),
            num_dense_layers=options.integer("first_k_dense_replace", 3, low=0),
            num_experts=num_experts,
            num_shared_experts=options.integer("n_shared_experts", 1),
            top_k=options.integer("num_experts_per_tok", 8, high=top_groups * (num_experts // num_groups)),
            num_groups=num_groups,
            top_groups=top_groups,
            norm_topk_prob=options.boolean("norm_topk_prob", True),
            routed_scaling_factor=options.real("routed_scaling_factor", 2.5),
            rms_norm_eps=options.real("rms_norm_eps", 1e-6),
        )


def attention(config: Config) -> LatentAttention:
    magnitude = yarn_magnitude(config.rope.factor, config.rope.mscale_all_dim) if config.rope else 1.0
    return LatentAttention(
        config.hidden_size, config.num_heads, q_rank=config.q_rank, kv_rank=config.kv_rank,
        nope_dim=config.nope_dim, rope_dim=config.rope_dim, value_dim=config.value_dim,
        bias=config.attention_bias, pairs_neighbours=config.pairs_neighbours,
        scale=(config.nope_dim + config.rope_dim) ** -0.5 * magnitude**2,
    )  # fmt: skip


def feed_forward(config: Config, is_dense: bool) -> nn.Module:
    if is_dense:
        return GatedMLP(config.hidden_size, config.intermediate_size, bias=False)
    return MixtureOfExperts(
        SigmoidRouter(
            config.hidden_size, config.num_experts, config.top_k, num_groups=config.num_groups,
            top_groups=config.top_groups, is_normalized=config.norm_topk_prob, factor=config.routed_scaling_factor,
        ),
        Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size),
        GatedMLP(config.hidden_size, config.moe_intermediate_size * config.num_shared_experts, bias=False),
    )  # fmt: skip


def layer(config: Config, is_dense: bool) -> PreNormLayer:
    return PreNormLayer(
        RMSNorm(config.hidden_size, config.rms_norm_eps),
        attention(config),
        RMSNorm(config.hidden_size, config.rms_norm_eps),
        feed_forward(config, is_dense),
    )


class Model(Decoder):
    def __init__(self, config: Config) -> None:
        layers = [layer(config, number < config.num_dense_layers) for number in range(config.num_layers)]
        super().__init__(config, layers, RMSNorm(config.hidden_size, config.rms_norm_eps))


_ATTENTION = "layers.{i}.attention"

WEIGHTS = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{i}.input_layernorm.weight": "layers.{i}.input_norm.weight",
    "model.layers.{i}.self_attn.q_proj.weight": Rows(
        (f"{_ATTENTION}.q_proj.nope.weight", f"{_ATTENTION}.q_proj.rope.weight"), groups="num_heads"
    ),
    "model.layers.{i}.self_attn.q_b_proj.weight": Rows(
        (f"{_ATTENTION}.q_up.nope.weight", f"{_ATTENTION}.q_up.rope.weight"), groups="num_heads"
    ),
    "model.layers.{i}.self_attn.q_a_proj.weight": f"{_ATTENTION}.q_down.weight",
    "model.layers.{i}.self_attn.q_a_proj.bias": f"{_ATTENTION}.q_down.bias",
    "model.layers.{i}.self_attn.q_a_layernorm.weight": f"{_ATTENTION}.q_norm.weight",
    "model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight": Rows(
        (f"{_ATTENTION}.kv_down.weight", f"{_ATTENTION}.k_rope.weight")
    ),
    "model.layers.{i}.self_attn.kv_a_proj_with_mqa.bias": Rows(
        (f"{_ATTENTION}.kv_down.bias", f"{_ATTENTION}.k_rope.bias")
    ),
    "model.layers.{i}.self_attn.kv_a_layernorm.weight": f"{_ATTENTION}.kv_norm.weight",
    "model.layers.{i}.self_attn.kv_b_proj.weight": Rows(
        (f"{_ATTENTION}.k_up.weight", f"{_ATTENTION}.v_up.weight"), groups="num_heads"
    ),
    "model.layers.{i}.self_attn.o_proj.weight": f"{_ATTENTION}.o_proj.weight",
    "model.layers.{i}.self_attn.o_proj.bias": f"{_ATTENTION}.o_proj.bias",
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.post_norm.weight",
    "model.layers.{i}.mlp.gate.weight": "layers.{i}.mlp.router.weight",
    "model.layers.{i}.mlp.gate.e_score_correction_bias": "layers.{i}.mlp.router.correction",
    "model.layers.{i}.mlp.experts.{e}.{p}_proj.weight": Stacked("layers.{i}.mlp.experts.{p}_proj.weight"),
    "model.layers.{i}.mlp.shared_experts.{p}_proj.weight": "layers.{i}.mlp.shared.{p}_proj.weight",
    "model.layers.{i}.mlp.{p}_proj.weight": "layers.{i}.mlp.{p}_proj.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}

IGNORED_WEIGHTS = ("model.layers.61.{rest}",)  # the published models' layer for multi-token prediction, after the last

PROMISED_PASSES = ("fuse_gate_up", "fuse_add_norm", "last_token")

TINY = {
    "model_type": "deepseek_v3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
}
