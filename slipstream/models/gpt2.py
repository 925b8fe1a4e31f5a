"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): learned positions, LayerNorm."""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from slipstream.layers import ACTIVATIONS, MLP, Attention, Decoder, Embedding, LayerNorm, PreNormLayer, StepTensors
from slipstream.schema.model import MAX_LAYERS, DecoderConfig, Options
from slipstream.schema.weights import Rows


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    intermediate_size: int
    activation: str
    layer_norm_eps: float
    scales: tuple[float, ...]  # of each layer's scores

    @classmethod
    def from_options(cls, options: Options) -> Self:
        hidden_size = options.integer("n_embd", 768)
        num_layers = options.integer("n_layer", 12, high=MAX_LAYERS)
        num_heads = options.integer("n_head", 12, high=hidden_size)
        head_dim = hidden_size // num_heads
        scale = head_dim**-0.5 if options.boolean("scale_attn_weights", True) else 1.0
        by_layer = options.boolean("scale_attn_by_inverse_layer_idx")
        options.skip("n_ctx", "reorder_and_upcast_attn", "task_specific_params")
        options.skip("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_activation", "summary_first_dropout")
        options.skip("summary_proj_to_labels", "summary_type", "summary_use_proj")
        return cls(
            vocab_size=options.integer("vocab_size", 50257),
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            max_position_embeddings=options.integer("n_positions", 1024),
            intermediate_size=options.integer("n_inner", 4 * hidden_size),
            activation=options.choice("activation_function", tuple(ACTIVATIONS), "gelu_new"),
            layer_norm_eps=options.real("layer_norm_epsilon", 1e-5),
            scales=tuple(scale / (layer + 1 if by_layer else 1) for layer in range(num_layers)),
            tie_word_embeddings=options.boolean("tie_word_embeddings", True),
        )


def layer(config: Config, scale: float) -> PreNormLayer:
    return PreNormLayer(
        LayerNorm(config.hidden_size, config.layer_norm_eps),
        Attention(config.hidden_size, config.num_heads, config.num_heads, config.head_dim, bias=True, scale=scale),
        LayerNorm(config.hidden_size, config.layer_norm_eps),
        MLP(config.hidden_size, config.intermediate_size, bias=True, activation=ACTIVATIONS[config.activation]),
    )


class Model(Decoder):
    def __init__(self, config: Config) -> None:
        layers = [layer(config, scale) for scale in config.scales]
        super().__init__(config, layers, LayerNorm(config.hidden_size, config.layer_norm_eps))
        self.embed_position = Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, step: StepTensors, kv: list[Tensor]) -> Tensor:
        x_TH = self.embed(step.token_ids) + self.embed_position(step.positions)
        return self.lm_head(self.run_layers(x_TH, step, kv))


def _conv1d(theirs: str, *ours: str) -> dict[str, Rows]:
    """Their Conv1D, stored [in, out], holds the rows of ours."""
    return {
        f"{theirs}.weight": Rows(tuple(f"{name}.weight" for name in ours), is_transposed=True),
        f"{theirs}.bias": Rows(tuple(f"{name}.bias" for name in ours)),
    }


_BODY = {
    "wte.weight": "embed.weight",
    "wpe.weight": "embed_position.weight",
    "h.{i}.ln_1.{p}": "layers.{i}.input_norm.{p}",
    **_conv1d("h.{i}.attn.c_attn", *(f"layers.{{i}}.attention.{p}_proj" for p in "qkv")),
    **_conv1d("h.{i}.attn.c_proj", "layers.{i}.attention.o_proj"),
    "h.{i}.ln_2.{p}": "layers.{i}.post_norm.{p}",
    **_conv1d("h.{i}.mlp.c_fc", "layers.{i}.mlp.up_proj"),
    **_conv1d("h.{i}.mlp.c_proj", "layers.{i}.mlp.down_proj"),
    "ln_f.{p}": "norm.{p}",
}
WEIGHTS = {f"transformer.{theirs}": ours for theirs, ours in _BODY.items()} | {"lm_head.weight": "lm_head.weight"}

IGNORED_WEIGHTS = ("transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias")  # the causal mask

PROMISED_PASSES = ("fuse_qkv", "fuse_add_norm", "last_token")

TINY = {
    "model_type": "gpt2",
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "vocab_size": 128,
}
