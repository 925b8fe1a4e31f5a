"""A tiny random model of any known architecture, as a Hugging Face folder: for tests, examples and benches."""

import json
from pathlib import Path
from typing import Any

import torch

from slipstream.checkpoint.layouts import theirs_shape, to_hugging_face
from slipstream.checkpoint.own_model import OwnModel
from slipstream.engine.tensor_file import write_tensor_file
from slipstream.models import read_config


def write_random_model(
    folder: Path, options: dict[str, Any], *, seed: int = 0, dtype: str = "float32", own_model: OwnModel | None = None
) -> Path:
    """Write config.json and model.safetensors under Hugging Face's names; equal seeds give equal bytes.

    Weights are normal with a deviation of fan_in ** -0.5 (norms near 1), so that logits are neither flat nor huge.
    """
    model, config = read_config(options, str(folder), own_model.load() if own_model else None)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in model.Model(config).named_parameters()}
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)

    def make(name: str) -> torch.Tensor:
        shape = shapes[name]
        values = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and name.endswith("norm.weight")
        return (1 + 0.1 * values if is_norm else values * shape[-1] ** -0.5).to(kind)

    # Drawn at once and in the order of the parameters, since one generator makes them all.
    drawn = {name: make(name) for name in shapes}
    entries = [
        (
            name,
            theirs_shape(recipe, shapes),
            kind,
            lambda recipe=recipe: recipe.make([drawn[n] for n in recipe.sources]),
        )
        for name, recipe in to_hugging_face(model.WEIGHTS, config, shapes).items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_tensor_file(folder / "model.safetensors", entries, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(options | {"dtype": dtype}, indent=1) + "\n")
    return folder
