"""Baichuan 1 and 2 (arXiv:2309.10305): a Llama with q, k and v in one tensor; 7B with RoPE, 13B with ALiBi."""

from dataclasses import dataclass
from typing import Self

from slipstream.layers import Attention, Decoder, GatedMLP, NormalizedLinear, PreNormLayer, RMSNorm, alibi_slopes
from slipstream.schema.model import DecoderConfig, Options, read_decoder
from slipstream.schema.weights import Rows

BAICHUAN2_VOCAB_SIZE = 125696  # Baichuan 1 has 64000


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    intermediate_size: int
    rms_norm_eps: float
    normalize_head: bool

    @classmethod
    def from_options(cls, options: Options) -> Self:
        """One model_type for four models, told apart by what only some of their configs have: 7B has
        max_position_embeddings, 13B model_max_length alone; Baichuan 2 has z_loss_weight, or its larger vocabulary."""
        has_rope = options.has("max_position_embeddings")
        decoder = read_decoder(options, max_position_embeddings=options.integer("model_max_length", 4096))
        is_second = options.has("z_loss_weight") or decoder["vocab_size"] == BAICHUAN2_VOCAB_SIZE
        options.choice("hidden_act", ("silu",), "silu")
        options.skip("gradient_checkpointing", "tokenizer_class", "z_loss_weight", "_from_model_config")
        return cls(
            **decoder | ({} if has_rope else {"rope": None}),
            intermediate_size=options.integer("intermediate_size"),
            rms_norm_eps=options.real("rms_norm_eps", 1e-6),
            normalize_head=is_second,
        )


def layer(config: Config) -> PreNormLayer:
    slopes = None if config.rope else alibi_slopes(config.num_heads)
    return PreNormLayer(
        RMSNorm(config.hidden_size, config.rms_norm_eps),
        Attention(
            config.hidden_size, config.num_heads, config.num_heads, config.head_dim, bias=False, alibi_slopes=slopes
        ),
        RMSNorm(config.hidden_size, config.rms_norm_eps),
        GatedMLP(config.hidden_size, config.intermediate_size, bias=False),
    )


class Model(Decoder):
    def __init__(self, config: Config) -> None:
        layers = [layer(config) for _ in range(config.num_layers)]
        super().__init__(config, layers, RMSNorm(config.hidden_size, config.rms_norm_eps))
        if config.normalize_head:
            weight = self.lm_head.weight
            self.lm_head = NormalizedLinear(config.hidden_size, config.vocab_size)
            self.lm_head.weight = weight


WEIGHTS = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{i}.input_layernorm.weight": "layers.{i}.input_norm.weight",
    "model.layers.{i}.self_attn.W_pack.weight": Rows(tuple(f"layers.{{i}}.attention.{p}_proj.weight" for p in "qkv")),
    "model.layers.{i}.self_attn.o_proj.weight": "layers.{i}.attention.o_proj.weight",
    "model.layers.{i}.post_attention_layernorm.weight": "layers.{i}.post_norm.weight",
    "model.layers.{i}.mlp.{p}_proj.weight": "layers.{i}.mlp.{p}_proj.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}

IGNORED_WEIGHTS = ("model.layers.{i}.self_attn.rotary_emb.inv_freq",)

PROMISED_PASSES = ("fuse_qkv", "fuse_gate_up", "fuse_add_norm", "last_token")

# Baichuan2-7B-Chat's keys.
TINY = {
    "model_type": "baichuan",
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
    "tokenizer_class": "BaichuanTokenizer",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "model_max_length": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "z_loss_weight": 0,
    "_from_model_config": True,
}
