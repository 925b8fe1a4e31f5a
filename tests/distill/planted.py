"""A target that is easily foreseen: after token t comes t + 1, and after the last of a cycle its first."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from slipstream.checkpoint.random import write_random_model
from slipstream.models import llama

CYCLE = 40


def write_planted_model(folder: Path) -> Path:
    """A llama whose layers add nothing, so that the head sees the last token alone."""
    write_random_model(folder, llama.TINY)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
    embedding_VH = weights["model.embed_tokens.weight"]
    head_VH = torch.zeros_like(embedding_VH)
    head_VH[(torch.arange(CYCLE) + 1) % CYCLE] = embedding_VH[:CYCLE]
    weights["lm_head.weight"] = head_VH
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
