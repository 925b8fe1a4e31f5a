"""The frame of a decoder, and the layer that most architectures since Llama have."""

from collections.abc import Iterable

from torch import Tensor, nn

from slipstream.kernels.attention.metadata import StepTensors
from slipstream.layers.linear import Embedding, Linear
from slipstream.layers.rope import RotaryTable
from slipstream.schema.model import DecoderConfig


class PreNormLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream (arXiv:2002.04745)."""

    def __init__(self, input_norm: nn.Module, attention: nn.Module, post_norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_norm, self.attention = input_norm, attention
        self.post_norm, self.mlp = post_norm, mlp

    def forward(self, x_TH: Tensor, cos: Tensor | None, sin: Tensor | None, kv: Tensor, step: StepTensors) -> Tensor:
        x_TH = x_TH + self.attention(self.input_norm(x_TH), cos, sin, kv, step)
        return x_TH + self.mlp(self.post_norm(x_TH))


class Decoder(nn.Module):
    """Embedding, layers that share a rotary table (or none), a last norm, the head, tied to the embedding or not."""

    def __init__(self, config: DecoderConfig, layers: Iterable[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.rotary = RotaryTable(config.rope, config.max_seq_len) if config.rope else None
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed.weight

    def forward(self, step: StepTensors, kv: list[Tensor]) -> Tensor:
        """Logits [T, vocab_size] of every token in the step."""
        return self.lm_head(self.run_layers(self.embed(step.token_ids), step, kv))

    def run_layers(self, x_TH: Tensor, step: StepTensors, kv: list[Tensor]) -> Tensor:
        """From embedded tokens to what lm_head reads."""
        cos, sin = self.rotary(step.positions) if self.rotary else (None, None)
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x_TH = layer(x_TH, cos, sin, layer_kv, step)
        return self.norm(x_TH)
