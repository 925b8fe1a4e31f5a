"""Llama in float64, a token at a time, with the KV cache written as its papers describe it: the oracle of windows.

A cache keeps unrotated keys. Each token enters it; where that is one more than the window, the oldest that is no sink
is evicted. The query then meets what is in the cache, all rotated to their places there, counted from 0. With sinks
that is StreamingLLM (arXiv:2309.17453, section 3.2), without them the sliding window of transformers (relative
distances are the same). No kernel, no block and no trick of ours is in it.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional


class NaiveLlama:
    def __init__(
        self,
        folder: Path,
        windows: list[int],
        sink_tokens: int = 0,
        stored: Callable[[str, Tensor], Tensor] = lambda name, x_LKD: x_LKD,
    ) -> None:
        """windows: one a layer; 0 sees everything.

        stored: what a cache gives back of rotated keys and of values, "model.layers.0.self_attn.k" and ".v"; only where
        all windows are 0, so that a key keeps its place.
        """
        self.stored = stored
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.windows, self.sink_tokens = windows, sink_tokens

    def logits(self, token_ids: list[int]) -> Tensor:
        """[len(token_ids), vocab_size]"""
        x_TH = self.weights["model.embed_tokens.weight"][torch.tensor(token_ids)]
        for layer, window in enumerate(self.windows):
            name = f"model.layers.{layer}"
            x_TH = x_TH + self._attention(f"{name}.self_attn", self._norm(f"{name}.input_layernorm", x_TH), window)
            y_TH = self._norm(f"{name}.post_attention_layernorm", x_TH)
            gate, up = (self._linear(f"{name}.mlp.{which}_proj", y_TH) for which in ("gate", "up"))
            x_TH = x_TH + self._linear(f"{name}.mlp.down_proj", functional.silu(gate) * up)
        return self._linear("lm_head", self._norm("model.norm", x_TH))

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        token_ids = list(prompt)
        for _ in range(num_tokens):
            token_ids.append(int(self.logits(token_ids)[-1].argmax()))
        return token_ids[len(prompt) :]

    def _attention(self, name: str, x_TH: Tensor, window: int) -> Tensor:
        num_heads, num_kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        q_TND, k_TND, v_TND = (
            self._linear(f"{name}.{which}_proj", x_TH).unflatten(1, (count, -1))
            for which, count in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads))
        )
        group = num_heads // num_kv_heads
        v_TND = self.stored(f"{name}.v", v_TND).repeat_interleave(group, dim=1)
        rows = []
        cache: list[int] = []  # which tokens are in it
        for token in range(len(x_TH)):
            cache.append(token)
            if window and len(cache) > window:
                del cache[self.sink_tokens]  # the oldest that is no sink
            places = torch.arange(len(cache))
            q_ND = self._rotate(q_TND[token][None], places[-1:])[0]
            k_LND = self.stored(f"{name}.k", self._rotate(k_TND[cache], places)).repeat_interleave(group, dim=1)
            probs_NL = (torch.einsum("nd,lnd->nl", q_ND, k_LND) * q_ND.shape[1] ** -0.5).softmax(-1)
            rows.append(torch.einsum("nl,lnd->nd", probs_NL, v_TND[cache]).flatten())
        return self._linear(f"{name}.o_proj", torch.stack(rows))

    def _rotate(self, x_LND: Tensor, places_L: Tensor) -> Tensor:
        half = x_LND.shape[2] // 2
        frequencies = self.config["rope_theta"] ** -(torch.arange(half, dtype=torch.float64) / half)
        angles_L1F = (places_L.double()[:, None] * frequencies)[:, None]
        turned = torch.complex(x_LND[..., :half], x_LND[..., half:]) * torch.polar(torch.ones(()).double(), angles_L1F)
        return torch.cat([turned.real, turned.imag], dim=-1)

    def _norm(self, name: str, x_TH: Tensor) -> Tensor:
        mean = x_TH.square().mean(-1, keepdim=True)
        return x_TH * (mean + self.config["rms_norm_eps"]).rsqrt() * self.weights[f"{name}.weight"]

    def _linear(self, name: str, x_TH: Tensor) -> Tensor:
        return x_TH @ self.weights[f"{name}.weight"].T
