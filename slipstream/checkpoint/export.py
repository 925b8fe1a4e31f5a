"""A checkpoint back as a Hugging Face folder: its names and shapes, in shards, the tokenizer beside them."""

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipstream.checkpoint.folder import Checkpoint
from slipstream.checkpoint.layouts import Recipe, theirs_shape, to_hugging_face
from slipstream.checkpoint.quantized.compressed_export import exported, exported_scales, quantization_config
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
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json, model*.safetensors, generation_config.json and the tokenizer into a new or empty folder."""
    options, (entries, quantization) = _options(checkpoint), _entries(checkpoint)
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
        _write_json(folder / "config.json", options)  # last: a folder that has it is whole
    except OSError as error:
        raise ModelError(f"{folder} cannot be written ({error.strerror}); give another --output_dir.") from None


def _options(checkpoint: Checkpoint) -> dict[str, Any]:
    if "rope_freq_factors" in checkpoint.options:
        raise UnsupportedModel(
            f"{checkpoint.name} has rope_freq_factors, for which Hugging Face's config.json has no place; "
            "convert it without --output_format."
        )
    options = {name: value for name, value in checkpoint.options.items() if value is not None}
    options.pop("torch_dtype", None)
    return options | {"dtype": checkpoint.dtype}


def _entries(checkpoint: Checkpoint) -> tuple[list[TensorEntry], dict[str, Any] | None]:
    """Every tensor of theirs, and the quantization_config where some are packed."""
    shapes = {name: checkpoint.shapes[name] for name in checkpoint.recipes}
    dtype = getattr(torch, checkpoint.dtype)
    entries: list[TensorEntry] = []
    attentions: dict[int, str] = {}  # what theirs is called in each layer
    formats: dict[str, WeightFormat] = {}
    dense: list[str] = []
    for name, recipe in to_hugging_face(checkpoint.model.WEIGHTS, checkpoint.config, shapes).items():
        shape = theirs_shape(recipe, shapes)
        owner = name.removesuffix(".weight")
        keys = next(filter(None, map(_KEYS.fullmatch, recipe.sources)), None)
        if keys is not None:
            attentions[int(keys["layer"])] = owner.rpartition(".")[0]
        found = {checkpoint.formats.get(source) for source in recipe.sources}
        format = found.pop() if len(found) == 1 and recipe.takes_rows else None
        if format is not None:
            formats[owner] = format
            for each in exported(format, shape[0], shape[1]):
                make = partial(each.make, partial(_read_part, checkpoint, recipe))
                entries.append((f"{owner}.{each.suffix}", each.shape, each.dtype, make))
            continue
        if len(shape) == 2:
            dense.append(owner)
        entries.append((name, shape, dtype, partial(_read, checkpoint, recipe)))
    scales = [
        (f"{attentions[layer]}.{each.suffix}", each.shape, each.dtype, partial(each.make, checkpoint.read))
        for layer, each in exported_scales(checkpoint.kv_cache)
    ]
    is_quantized = formats or checkpoint.kv_cache.dtype
    return entries + scales, quantization_config(formats, dense, checkpoint.kv_cache) if is_quantized else None


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
