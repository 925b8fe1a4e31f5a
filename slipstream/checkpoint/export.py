"""A checkpoint back as a Hugging Face folder: its names and shapes, in shards, the tokenizer beside them."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipstream.checkpoint.folder import Checkpoint
from slipstream.checkpoint.layouts import Recipe, Shapes, renamed, theirs_shape, to_hugging_face
from slipstream.checkpoint.packed import PackedLinear, PackedTensors
from slipstream.checkpoint.quantized import LAYOUTS, layout_for
from slipstream.checkpoint.quantized.outgoing import Layout, QuantizedLinear, QuantizedModel
from slipstream.checkpoint.tensors import INDEX_FILE, SINGLE_FILE
from slipstream.engine.tensor_file import TensorEntry, write_tensor_file
from slipstream.errors import ModelError, UnsupportedModel
from slipstream.schema.format import WeightFormat

_KEYS = re.compile(r"layers\.(?P<layer>\d+)\.attention\.(?:k_proj|kv_down)\.weight")  # of ours
SHARD_BYTES = 5 * 10**9  # what transformers' save_pretrained makes of large models


def save_hugging_face(
    checkpoint: Checkpoint,
    folder: Path,
    progress: Callable[[int], None] = lambda num_bytes: None,
    *,
    layout: str = "",
    expected: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json, model*.safetensors, generation_config.json and the tokenizer into a new or empty folder.

    layout: of packed weights, one of LAYOUTS; "" is what layout_for chooses, where `expected` fits or not. Raises
    UnsupportedModel, before anything is written, for what the layout has no place for.
    """
    options, (entries, quantization, files) = _options(checkpoint), _entries(checkpoint, layout, expected)
    if quantization is not None:
        options["quantization_config"] = quantization
    try:
        if folder.exists() and any(folder.iterdir()):
            raise ModelError(f"{folder} is not empty; give an --output_dir that is new or empty.")
        folder.mkdir(parents=True, exist_ok=True)
        _write_weights(entries, folder, progress, shard_bytes)
        checkpoint.write_tokenizer(folder)
        generation = {name: value for name, value in checkpoint.generation.items() if value is not None}
        if generation:
            _write_json(folder / "generation_config.json", generation)
        for name, values in files.items():
            _write_json(folder / name, values)
        _write_json(folder / "config.json", options)  # last: a folder that has it is whole
    except OSError as error:
        raise ModelError(f"{folder} cannot be written ({error.strerror}); give another --output_dir.") from None


def check_hugging_face(checkpoint: Checkpoint, formats: dict[str, WeightFormat], expected: str = "") -> None:
    """Raise UnsupportedModel where save_hugging_face would, once the model's weights are in these formats."""
    linears = {name: _planned(format, checkpoint.shapes[name]) for name, format in formats.items()}
    recipes = {name: renamed(name, checkpoint.shapes[name]) for name in checkpoint.recipes}
    weights = PackedTensors(checkpoint.weights, linears, set())
    planned = replace(checkpoint, formats=formats, recipes=recipes, weights=weights)
    _options(planned)
    _entries(planned, "", expected)


def _planned(format: WeightFormat, shape: tuple[int, ...]) -> PackedLinear:
    """Its numbers are not known yet; where they matter, let them be good: no zero point of 0, and all scales alike."""
    parts = format.parts(*shape).items()
    return PackedLinear(format, shape, {n: partial(torch.ones, s, dtype=getattr(torch, t)) for n, (s, t) in parts})


def _options(checkpoint: Checkpoint) -> dict[str, Any]:
    if "rope_freq_factors" in checkpoint.options:
        raise UnsupportedModel(
            f"{checkpoint.name} has rope_freq_factors, for which Hugging Face's config.json has no place; "
            "convert it without --output_format."
        )
    options = {name: value for name, value in checkpoint.options.items() if value is not None}
    options.pop("torch_dtype", None)
    return options | {"dtype": checkpoint.dtype}


def _entries(
    checkpoint: Checkpoint, layout_name: str, expected: str
) -> tuple[list[TensorEntry], dict[str, Any] | None, dict[str, dict[str, Any]]]:
    """Every tensor of theirs; where some are packed the quantization_config, and what other files say."""
    recipes = to_hugging_face(checkpoint.model.WEIGHTS, checkpoint.config, _shapes(checkpoint))
    shapes = {name: theirs_shape(recipe, checkpoint.shapes) for name, recipe in recipes.items()}
    linears = {}
    for name, recipe in recipes.items():
        format = _format_of(checkpoint, name, recipe)
        if format is not None:
            num_out, num_in = shapes[name]
            read = partial(_read_part, checkpoint, recipe)
            linears[name] = QuantizedLinear(_owner(name), format, num_out, num_in, read)
    model = _quantized_model(checkpoint, recipes, shapes, linears)
    layout = _chosen_layout(checkpoint, model, layout_name, expected)
    entries: list[TensorEntry] = []
    for name, recipe in recipes.items():
        if name in linears:
            entries += layout.tensors(linears[name])
        else:
            make = partial(_read, checkpoint, recipe)
            entries.append((name, shapes[name], getattr(torch, checkpoint.dtype), make))
    if not model.is_quantized:
        return entries, None, {}
    return entries + layout.cache_tensors(model), layout.config(model), layout.files(model)


def _chosen_layout(checkpoint: Checkpoint, model: QuantizedModel, name: str, expected: str) -> Layout:
    if name and not model.is_quantized:
        raise UnsupportedModel(f"{checkpoint.name} has no packed weights to store as {name}; give --output_format hf.")
    name = name or layout_for(model, expected)
    why_not = LAYOUTS[name].refusal(model)
    if why_not:
        raise UnsupportedModel(f"{checkpoint.name} cannot be stored as {name}: {why_not}.")
    return LAYOUTS[name]


def _shapes(checkpoint: Checkpoint) -> Shapes:
    return {name: checkpoint.shapes[name] for name in checkpoint.recipes}


def _format_of(checkpoint: Checkpoint, name: str, recipe: Recipe) -> WeightFormat | None:
    """Of one of theirs; None where nothing of it is packed."""
    found = {checkpoint.formats.get(source) for source in recipe.sources}
    if found == {None}:
        return None
    if len(found) > 1 or not recipe.takes_rows:
        raise UnsupportedModel(
            f"{checkpoint.name} cannot be stored packed: {name} would join parts of several formats, or is stored "
            "transposed there; convert it without --output_format."
        )
    return found.pop()


def _quantized_model(
    checkpoint: Checkpoint, recipes: dict[str, Recipe], shapes: Shapes, linears: dict[str, QuantizedLinear]
) -> QuantizedModel:
    table = checkpoint.model.WEIGHTS
    head = next((theirs for theirs, ours in table.items() if ours == "lm_head.weight"), "lm_head.weight")
    dense = dict.fromkeys(name for name, shape in shapes.items() if len(shape) == 2 and name not in linears)
    if head not in linears:
        dense[head] = None  # a head that is tied is a linear all the same
    attentions: dict[int, str] = {}
    for name, recipe in recipes.items():
        keys = next(filter(None, map(_KEYS.fullmatch, recipe.sources)), None)
        if keys is not None:
            attentions[int(keys["layer"])] = _owner(name).rpartition(".")[0]
    owners = [_owner(name) for name in dense]
    return QuantizedModel(list(linears.values()), owners, _owner(head), attentions, checkpoint.kv_cache)


def _owner(name: str) -> str:
    return name.removesuffix(".weight")


def _read(checkpoint: Checkpoint, recipe: Recipe) -> Tensor:
    return recipe.make([checkpoint.read(name) for name in recipe.sources])


def _read_part(checkpoint: Checkpoint, recipe: Recipe, part: str) -> Tensor:
    parts = [checkpoint.read(f"{name}.{part}") for name in recipe.sources]
    return parts[0] if part == "order" else recipe.make(parts)


def _write_weights(entries: list[TensorEntry], folder: Path, progress: Callable[[int], None], shard_bytes: int) -> None:
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in entries:
        num_bytes = _num_bytes(entry)
        if size + num_bytes > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += num_bytes
    if len(shards) == 1:
        write_tensor_file(folder / SINGLE_FILE, entries, {"format": "pt"}, progress)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensor_file(folder / name, shard, {"format": "pt"}, progress)
        weight_map |= {entry[0]: name for entry in shard}
    total = sum(_num_bytes(entry) for entry in entries)
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _num_bytes(entry: TensorEntry) -> int:
    return math.prod(entry[1]) * entry[2].itemsize


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
