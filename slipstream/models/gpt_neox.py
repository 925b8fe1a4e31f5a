"""GPT-NeoX (arXiv:2204.06745), Pythia and their kin: attention and MLP side by side, a quarter of each head rotated."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from slipstream.layers import ACTIVATIONS, MLP, Attention, Decoder, LayerNorm, StepTensors
from slipstream.schema.model import MAX_LAYERS, DecoderConfig, Options, read_rope
from slipstream.schema.weights import Rows


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    intermediate_size: int
    activation: str
    layer_norm_eps: float
    parallel_residual: bool
    attention_bias: bool

    @classmethod
    def from_options(cls, options: Options) -> Self:
        hidden_size = options.integer("hidden_size")
        num_heads = options.integer("num_attention_heads")
        head_dim = hidden_size // num_heads
        longest = options.integer("max_position_embeddings", 2048)
        theta, part = options.real("rotary_emb_base", 10000.0), options.real("rotary_pct", 0.25)
        options.skip("attention_probs_dropout_prob", "classifier_dropout", "hidden_dropout", "hidden_dropout_prob")
        return cls(
            vocab_size=options.integer("vocab_size"),
            hidden_size=hidden_size,
            num_layers=options.integer("num_hidden_layers", high=MAX_LAYERS),
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            max_position_embeddings=longest,
            intermediate_size=options.integer("intermediate_size"),
            activation=options.choice("hidden_act", tuple(ACTIVATIONS), "gelu"),
            layer_norm_eps=options.real("layer_norm_eps", 1e-5),
            rope=read_rope(options, head_dim, longest, theta=theta, part=part),
            parallel_residual=options.boolean("use_parallel_residual", True),
            attention_bias=options.boolean("attention_bias", True),
            tie_word_embeddings=options.boolean("tie_word_embeddings"),
        )


class Layer(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.input_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(
            config.hidden_size, config.num_heads, config.num_heads, config.head_dim, bias=config.attention_bias
        )
        self.post_norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(
            config.hidden_size, config.intermediate_size, bias=True, activation=ACTIVATIONS[config.activation]
        )

    def forward(self, x_TH: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, step: StepTensors) -> Tensor:
        attended_TH = self.attention(self.input_norm(x_TH), cos, sin, kv, step)
        if self.parallel_residual:
            return x_TH + (attended_TH + self.mlp(self.post_norm(x_TH)))
        x_TH = x_TH + attended_TH
        return x_TH + self.mlp(self.post_norm(x_TH))


class Model(Decoder):
    def __init__(self, config: Config) -> None:
        layers = [Layer(config) for _ in range(config.num_layers)]
        super().__init__(config, layers, LayerNorm(config.hidden_size, config.layer_norm_eps))


_QKV = tuple(f"layers.{{i}}.attention.{p}_proj" for p in "qkv")

WEIGHTS = {
    "gpt_neox.embed_in.weight": "embed.weight",
    "gpt_neox.layers.{i}.input_layernorm.{p}": "layers.{i}.input_norm.{p}",
    "gpt_neox.layers.{i}.attention.query_key_value.weight": Rows(
        tuple(f"{name}.weight" for name in _QKV), groups="num_heads"
    ),
    "gpt_neox.layers.{i}.attention.query_key_value.bias": Rows(
        tuple(f"{name}.bias" for name in _QKV), groups="num_heads"
    ),
    "gpt_neox.layers.{i}.attention.dense.{p}": "layers.{i}.attention.o_proj.{p}",
    "gpt_neox.layers.{i}.post_attention_layernorm.{p}": "layers.{i}.post_norm.{p}",
    "gpt_neox.layers.{i}.mlp.dense_h_to_4h.{p}": "layers.{i}.mlp.up_proj.{p}",
    "gpt_neox.layers.{i}.mlp.dense_4h_to_h.{p}": "layers.{i}.mlp.down_proj.{p}",
    "gpt_neox.final_layer_norm.{p}": "norm.{p}",
    "embed_out.weight": "lm_head.weight",
}

# The causal mask and the rotary table, which old exports carry.
IGNORED_WEIGHTS = tuple(
    f"gpt_neox.layers.{{i}}.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")
)

PROMISED_PASSES = ("fuse_qkv", "fuse_rope_kv_write", "fuse_add_norm", "last_token")

TINY = {
    "model_type": "gpt_neox",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
