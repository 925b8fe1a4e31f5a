"""EAGLE's equations in float64, a row at a time, from its papers and published code; no cache, no batch, no tree."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


class NaiveEagle:
    def __init__(self, folder: Path, embed_VH: Tensor, head_VH: Tensor) -> None:
        """embed, head: the model's own."""
        self.config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        short = {name.removeprefix("layers.0.").removeprefix("midlayer."): each for name, each in tensors.items()}
        self.weights = {name: each.double() if each.is_floating_point() else each for name, each in short.items()}
        self.embed = self.weights.get("embed_tokens.weight", embed_VH.double())
        self.head = head_VH.double()
        shared = self.weights.get("draft_token_ids")
        self.shared = None if shared is None else shared.long()  # whose rows of the model's head it has
        self.is_third = "hidden_norm.weight" in self.weights

    def log_probs(self, features_TF: Tensor, token_ids: list[int], guesses: list[int]) -> Tensor:
        """Of the tokens after a text and some guesses beyond it: [draft vocabulary].

        features: of all tokens of the text but its last.
        """
        known = list(features_TF.double())
        if self.is_third:
            known = [self._linear("fc", f_F) for f_F in known]
        rows = [self._row(self.embed[token], f_H) for token, f_H in zip(token_ids[1:], known, strict=True)]
        out_H = self._last(rows)
        for guess in guesses:
            rows.append(self._row(self.embed[guess], out_H))
            out_H = self._last(rows)
        if self.is_third:
            head_DH = self.head[self.shared] if self.shared is not None else self.weights["lm_head.weight"]
            return (head_DH @ self._norm("norm", out_H)).log_softmax(0)
        return (self.head @ out_H).log_softmax(0)

    def token_id(self, drafted: int) -> int:
        if self.shared is not None:
            return int(self.shared[drafted])
        return drafted + int(self.weights["d2t"][drafted]) if "d2t" in self.weights else drafted

    def _row(self, e_E: Tensor, f_H: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads, and what it is added to."""
        if not self.is_third:
            x_H = self._linear("fc", torch.cat((e_E, f_H)))
            return x_H, x_H
        normed_H = self._norm("hidden_norm", f_H)
        x_Z = torch.cat((self._norm("input_layernorm", e_E), normed_H))
        return x_Z, normed_H if self.config.get("norm_before_residual") else f_H

    def _last(self, rows: list[tuple[Tensor, Tensor]]) -> Tensor:
        """What the layer gives for the last row."""
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        x_Z, residual_H = rows[-1]
        q_HD = self._turned(self._linear("self_attn.q_proj", x_Z).view(heads, -1), len(rows) - 1)
        keys = [
            self._turned(self._linear("self_attn.k_proj", x).view(kv_heads, -1), at) for at, (x, _) in enumerate(rows)
        ]
        values = [self._linear("self_attn.v_proj", x).view(kv_heads, -1) for x, _ in rows]
        attended = []
        for head in range(heads):
            mine = head * kv_heads // heads
            scores = torch.stack([q_HD[head] @ key[mine] for key in keys]) / q_HD.shape[1] ** 0.5
            attended.append(scores.softmax(0) @ torch.stack([value[mine] for value in values]))
        h_H = residual_H + self._linear("self_attn.o_proj", torch.cat(attended))
        y_H = self._norm("post_attention_layernorm", h_H)
        gate, up = self._linear("mlp.gate_proj", y_H), self._linear("mlp.up_proj", y_H)
        return h_H + self._linear("mlp.down_proj", gate / (1 + torch.exp(-gate)) * up)

    def _turned(self, x_HD: Tensor, position: int) -> Tensor:
        half = x_HD.shape[1] // 2
        theta = self.config.get("rope_theta", 10000.0)
        angles = position * theta ** -(torch.arange(half, dtype=torch.float64) / half)
        first, second = x_HD[:, :half], x_HD[:, half:]
        return torch.cat(
            (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), 1
        )

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return self.weights[f"{name}.weight"] @ x + self.weights.get(f"{name}.bias", torch.zeros(1))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean() + self.config.get("rms_norm_eps", 1e-6)).sqrt() * self.weights[f"{name}.weight"]
