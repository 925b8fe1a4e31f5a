"""Models that mostly say what another says."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def write_likeness(model: Path, folder: Path, noise: float = 0.1) -> Path:
    """The same with noise in its weights, as a part of their size."""
    shutil.copytree(model, folder)
    generator = torch.Generator().manual_seed(0)
    weights = load_file(model / "model.safetensors")
    for name, weight in weights.items():
        weights[name] = weight + noise * weight.std() * torch.randn(weight.shape, generator=generator)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder
