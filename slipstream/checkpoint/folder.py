"""Checkpoint: a model ready to build. And the folder it can be saved in."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipstream.checkpoint.kv_cache import KVCache
from slipstream.checkpoint.layouts import Recipe, Shapes
from slipstream.checkpoint.shared import KEY as SHARES
from slipstream.checkpoint.shared import Shares
from slipstream.checkpoint.tensors import ShardedTensors, TensorSource
from slipstream.engine.bounded_json import read_json
from slipstream.engine.tensor_file import TensorEntry, TensorFile, write_tensor_file
from slipstream.errors import ModelError
from slipstream.models import ModelFile
from slipstream.schema.format import PART_NAMES, PartType, WeightFormat
from slipstream.schema.model import DecoderConfig

FORMAT = "slipstream-checkpoint"
VERSION = 1
WEIGHTS_FILE = "rank0.safetensors"
TOKENIZER_FOLDER = "tokenizer"

_NUM_COMPARED_FIRST = 64  # bytes of a tensor, in one page


@dataclass(frozen=True)
class Checkpoint:
    """A decoder's shape, and its weights under our names, each read when asked for."""

    name: str
    options: dict[str, Any]  # the Hugging Face style config.json
    config: DecoderConfig
    model: ModelFile
    dtype: str  # what read() gives, but for the parts of packed weights
    generation: dict[str, Any]  # generation_config.json; {} where there is none
    weights: TensorSource
    shapes: Shapes  # of our weights, by name
    recipes: dict[str, Recipe]  # how each of them is made from the source's
    write_tokenizer: Callable[[Path], None]
    formats: dict[str, WeightFormat] = field(default_factory=dict)  # our names of the weights that are packed
    kv_cache: KVCache = KVCache()  # noqa: RUF009 - frozen
    shares: Shares | None = None  # with another model; save() leaves it there

    def read(self, name: str) -> Tensor:
        """One weight in the checkpoint's dtype, a packed one dequantized; or a part of a packed one as it is stored."""
        weight, part = self._split(name)
        if part:
            recipe = self.recipes[weight]
            parts = [self.weights.read(f"{source}.{part}") for source in recipe.sources]
            return parts[0] if part == "order" else recipe.make(parts)  # the order is of columns, which rows share
        recipe = self.recipes[name]
        return recipe.make([self.weights.read(source) for source in recipe.sources]).to(getattr(torch, self.dtype))

    def shape(self, name: str) -> tuple[int, ...]:
        weight, part = self._split(name)
        return self._part_type(weight, part)[0] if part else self.shapes[name]

    def dtype_of(self, name: str) -> torch.dtype:
        """What read() gives."""
        weight, part = self._split(name)
        return getattr(torch, self._part_type(weight, part)[1] if part else self.dtype)

    def equal_weights(self) -> dict[str, str]:
        """Matrices that are stored with the bytes of one before them, and its name.

        Only in mapped files, where this reads a few bytes of each, and all of two that start alike.
        """
        alike: dict[tuple[Any, ...], list[tuple[str, Tensor]]] = {}
        found: dict[str, str] = {}
        is_mapped = isinstance(self.weights, TensorFile | ShardedTensors)
        for name, shape in self.shapes.items():
            recipe = self.recipes[name]
            if not is_mapped or not recipe.is_the_same or len(shape) < 2:
                continue
            stored = self.weights.read(recipe.sources[0])
            content = stored.view(torch.uint8).flatten()
            start = content[:_NUM_COMPARED_FIRST].tolist()
            others = alike.setdefault((shape, stored.dtype, *start), [])
            same = next((other for other, its_content in others if torch.equal(content, its_content)), None)
            if same is None:
                others.append((name, content))
            else:
                found[name] = same
        return found

    def stored_names(self) -> list[str]:
        """What save() writes: each weight that is not shared, a packed one by its parts."""
        lent, found = self._lent(), list[str]()
        for name in self.recipes:
            if name in lent:
                continue
            parts = self.formats[name].parts(1, 1) if name in self.formats else {}
            found += [f"{name}.{part}" for part in parts] or [name]
        return found

    def _lent(self) -> tuple[str, ...]:
        """What is another model's, and was not rounded here."""
        shared = () if self.shares is None else self.shares.weights
        return tuple(name for name in shared if name not in self.formats)

    def _part_type(self, weight: str, part: str) -> PartType:
        return self.formats[weight].parts(*self.shapes[weight])[part]

    def _split(self, name: str) -> tuple[str, str]:
        weight, _, part = name.rpartition(".")
        return (weight, part) if part in PART_NAMES and weight in self.formats else (name, "")

    @property
    def num_bytes(self) -> int:
        """Of all weights as save() writes them."""
        scales = sum(tensor.nbytes for tensor in self.kv_cache.scales.values())
        return scales + sum(math.prod(self.shape(name)) * self.dtype_of(name).itemsize for name in self.stored_names())

    def close(self) -> None:
        self.weights.close()

    def save(self, folder: Path, progress: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Write the checkpoint folder; config.json comes last, so a folder that has it is whole."""
        with new_folder(folder, FORMAT) as description:
            entries: list[TensorEntry] = [
                (name, self.shape(name), self.dtype_of(name), partial(self.read, name)) for name in self.stored_names()
            ]
            entries += self.kv_cache.entries()
            write_tensor_file(folder / WEIGHTS_FILE, entries, {"format": "pt"}, progress)
            if self.shares is None:
                self.write_tokenizer(folder / TOKENIZER_FOLDER)
            else:
                description[SHARES] = Shares(self.shares.model, self._lent()).to_dict()
            description |= {"name": self.name, "dtype": self.dtype}
            description |= {"model": self.options, "generation": self.generation}
            description["kv_dtype"] = self.kv_cache.dtype
            description["kv_skip_layers"] = list(self.kv_cache.skip_layers)
            description["formats"] = {name: format.to_dict() for name, format in self.formats.items()}


@contextmanager
def new_folder(folder: Path, file_format: str) -> Iterator[dict[str, Any]]:
    """Make or overwrite one of our folders: config.json goes first and comes back last, with what the block put in."""
    check_new_folder(folder, file_format)
    config_path = folder / "config.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config_path.unlink(missing_ok=True)
        description: dict[str, Any] = {"format": file_format, "version": VERSION}
        yield description
        partial = folder / "config.json.partial"
        partial.write_text(json.dumps(description, indent=1) + "\n")
        partial.replace(config_path)
    except OSError as error:  # a read-only place, a full disk
        raise _not_writable(folder, error) from None


def check_new_folder(folder: Path, file_format: str) -> None:
    """Refuse a folder that holds something else, so that --output_dir cannot land in a user's own files."""
    try:
        is_in_use = folder.exists() and any(folder.iterdir())
    except OSError as error:  # a file, a folder that cannot be read
        raise _not_writable(folder, error) from None
    if is_in_use and _format_of(folder / "config.json") != file_format:
        raise ModelError(
            f"{folder} is not empty and holds no {file_format}; give an --output_dir that is new or empty."
        )


def _not_writable(folder: Path, error: OSError) -> ModelError:
    return ModelError(f"{folder} cannot be written ({error.strerror}); give another --output_dir.")


def _format_of(config_path: Path) -> object:
    try:
        return read_json(config_path).get("format")
    except ModelError:
        return None
