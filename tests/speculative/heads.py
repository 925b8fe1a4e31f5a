"""Random heads for a model, in the layouts that are published."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

LLAMA = {"intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}


def write_eagle(model: Path, folder: Path, **config: Any) -> Path:
    """Of EAGLE 1. config: what its config.json says besides."""
    target = json.loads((model / "config.json").read_text())
    values = {**{name: target[name] for name in ("hidden_size", "vocab_size")}, **LLAMA, "head_dim": 16} | config
    size, inner = values["hidden_size"], values["intermediate_size"]
    shapes = {"fc.weight": (size, 2 * size), "fc.bias": (size,), "embed_tokens.weight": (values["vocab_size"], size)}
    shapes |= {f"layers.0.{name}": shape for name, shape in _of_layer(values, size, inner).items()}
    return _write(folder, values, shapes)


def write_eagle3(model: Path, folder: Path, num_drafted: int = 0, **config: Any) -> Path:
    """Of EAGLE-3, which drafts every other token first."""
    target = json.loads((model / "config.json").read_text())
    values = {**{name: target[name] for name in ("hidden_size", "vocab_size")}, **LLAMA, "head_dim": 16} | config
    num_drafted = num_drafted or values["vocab_size"] * 3 // 4
    values |= {"draft_vocab_size": num_drafted}
    size = values["hidden_size"]
    shapes = {
        "fc.weight": (size, 3 * target["hidden_size"]),
        "lm_head.weight": (num_drafted, size),
        "norm.weight": (size,),
    }
    layer = _of_layer(values, 2 * size, values["intermediate_size"])
    layer |= dict.fromkeys(("input_layernorm.weight", "hidden_norm.weight"), (size,))
    drafted = torch.arange(values["vocab_size"]).view(-1, 2).t().flatten()[:num_drafted].sort().values
    is_drafted = torch.zeros(values["vocab_size"], dtype=torch.bool).index_fill(0, drafted, True)
    more = {"d2t": drafted - torch.arange(num_drafted), "t2d": is_drafted}
    return _write(folder, values, shapes | {f"midlayer.{name}": shape for name, shape in layer.items()}, more)


def _of_layer(values: dict[str, Any], num_in: int, inner: int) -> dict[str, tuple[int, ...]]:
    size, head_dim = values["hidden_size"], values["head_dim"]
    num_queries, num_keys = values["num_attention_heads"] * head_dim, values["num_key_value_heads"] * head_dim
    return {
        "self_attn.q_proj.weight": (num_queries, num_in),
        "self_attn.k_proj.weight": (num_keys, num_in),
        "self_attn.v_proj.weight": (num_keys, num_in),
        "self_attn.o_proj.weight": (size, num_queries),
        "post_attention_layernorm.weight": (size,),
        "mlp.gate_proj.weight": (inner, size),
        "mlp.up_proj.weight": (inner, size),
        "mlp.down_proj.weight": (size, inner),
    }


def _write(
    folder: Path, values: dict[str, Any], shapes: dict[str, tuple[int, ...]], more: Mapping[str, Tensor] = {}
) -> Path:
    generator = torch.Generator().manual_seed(2)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    tensors = {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    tensors |= {name: 1 + tensor for name, tensor in tensors.items() if "norm" in name}
    save_file(tensors | dict(more), folder / "model.safetensors")
    return folder


def write_redrafter(model: Path, folder: Path, exit_dim: int = 0, num_layers: int = 2, rnn: bool = True) -> Path:
    """exit_dim: twice the hidden size, unless it is said."""
    target = json.loads((model / "config.json").read_text())
    size, vocab_size = target["hidden_size"], target["vocab_size"]
    exit_dim = exit_dim or 2 * size
    values = {"model_type": "recurrent_drafting_drafter", "hidden_size": size, "vocab_size": vocab_size, "rnn": rnn}
    values |= {"exit_dim": exit_dim, "num_draft_layers": num_layers, "num_lookback_tokens": 5}
    shapes: dict[str, tuple[int, ...]] = {f"lm_head.{num_layers}.weight": (vocab_size, exit_dim)}
    if exit_dim != 2 * size:
        shapes |= {"input_proj.weight": (exit_dim, 2 * size), "input_proj.bias": (exit_dim,)}
    for layer in range(num_layers):
        shapes |= {f"lm_head.{layer}.linear.weight": (exit_dim, exit_dim), f"lm_head.{layer}.linear.bias": (exit_dim,)}
    if rnn:
        shapes |= {"rnn_w.weight": (size, size), "rnn_u.weight": (size, size), "rnn_u.bias": (size,)}
    return _write(folder, values, shapes)


def write_medusa(model: Path, folder: Path, num_heads: int = 3, num_layers: int = 1) -> Path:
    config = json.loads((model / "config.json").read_text())
    hidden_size, vocab_size = config["hidden_size"], config["vocab_size"]
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    tensors = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            tensors[f"{head}.{layer}.linear.weight"] = random(hidden_size, hidden_size)
            tensors[f"{head}.{layer}.linear.bias"] = random(hidden_size)
        tensors[f"{head}.{num_layers}.weight"] = random(vocab_size, hidden_size)
    folder.mkdir()
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    (folder / "config.json").write_text(json.dumps({"medusa_num_heads": 2, "medusa_num_layers": num_layers}))
    return folder
