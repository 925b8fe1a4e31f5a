"""Baichuan written out from its published code's equations, in plain torch, for AutoModelForCausalLM to find.

transformers has no such model. The code is modeling_baichuan.py of baichuan-inc/Baichuan-7B, Baichuan-13B-Base,
Baichuan2-7B-Chat and Baichuan2-13B-Chat on Hugging Face; a sequence is run as a whole, without a cache.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class BaichuanConfig(PreTrainedConfig):
    model_type = "baichuan"


class RMSNorm(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(config.hidden_size)), config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Attention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_heads, self.is_7b = config.num_attention_heads, is_7b(config)
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x_TH: Tensor) -> Tensor:
        num_tokens = len(x_TH)
        q, k, v = (each.view(num_tokens, self.num_heads, -1).transpose(0, 1) for each in self.W_pack(x_TH).chunk(3, 1))
        bias = torch.full((num_tokens, num_tokens), -math.inf).triu(1).expand(self.num_heads, -1, -1)
        if self.is_7b:
            q, k = rotate(q), rotate(k)
        else:
            places = torch.arange(num_tokens)
            bias = bias + torch.tensor(slopes(self.num_heads))[:, None, None] * (places - places[:, None])
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) + bias
        return self.o_proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))


class MLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        return self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn = RMSNorm(config), Attention(config)
        self.post_attention_layernorm, self.mlp = RMSNorm(config), MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class BaichuanForCausalLM(PreTrainedModel):
    config_class = BaichuanConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.is_second = getattr(config, "z_loss_weight", None) is not None
        self.post_init()

    def forward(self, input_ids: Tensor) -> CausalLMOutput:
        (token_ids,) = input_ids
        x = self.model.embed_tokens(token_ids)
        for layer in self.model.layers:
            x = layer(x)
        head = functional.normalize(self.lm_head.weight) if self.is_second else self.lm_head.weight
        return CausalLMOutput(logits=(self.model.norm(x) @ head.T)[None])


def is_7b(config: Any) -> bool:
    return getattr(config, "max_position_embeddings", None) is not None


def rotate(x_HTD: Tensor) -> Tensor:
    num_tokens, size = x_HTD.shape[1:]
    inv_freq = 1.0 / (10000 ** (torch.arange(0, size, 2).float() / size))
    angles = torch.outer(torch.arange(num_tokens).float(), inv_freq)
    angles = torch.cat([angles, angles], dim=-1)
    first, second = x_HTD.chunk(2, dim=-1)
    return x_HTD * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def slopes(num_heads: int) -> list[float]:
    if not math.log2(num_heads).is_integer():
        power = 2 ** math.floor(math.log2(num_heads))
        return slopes(power) + slopes(2 * power)[0::2][: num_heads - power]
    ratio = 2 ** (-(2 ** -(math.log2(num_heads) - 3)))
    return [ratio * ratio**head for head in range(num_heads)]


AutoConfig.register("baichuan", BaichuanConfig)
AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM)
