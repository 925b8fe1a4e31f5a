"""Weights that stay packed: a TensorSource in which a quantized linear is one weight, with parts for who uses them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from slipstream.checkpoint.kv_cache import PublishedCache, read_scales, scale_names
from slipstream.checkpoint.tensors import TensorSource
from slipstream.errors import CorruptFile
from slipstream.kernels.linear.parts import dense_weight
from slipstream.schema.format import PART_NAMES, WeightFormat


@dataclass(frozen=True)
class PackedLinear:
    """The weight [N, K] of one linear, or [E, N, K] of one in each expert: its format, and how each part is read."""

    format: WeightFormat
    shape: tuple[int, ...]
    parts: dict[str, Callable[[], torch.Tensor]]

    def read(self, part: str) -> torch.Tensor:
        shape, dtype = self.format.parts(*self.shape)[part]
        tensor = self.parts[part]()
        assert (tuple(tensor.shape), tensor.dtype) == (shape, getattr(torch, dtype)), f"{part}: {tensor.shape}"
        return tensor


class PackedTensors:
    """Another source, in which what belongs to quantized linears is replaced by their weights.

    read("a.weight") dequantizes; read("a.weight.packed") and the other parts of `format_of("a.weight")` do not.
    """

    def __init__(
        self,
        tensors: TensorSource,
        linears: dict[str, PackedLinear],
        hidden: set[str],
        kv_cache: PublishedCache = PublishedCache(),  # noqa: B008 - frozen
    ) -> None:
        """linears: by the names of their weights; hidden: the tensors that they, and kv_cache, are made of."""
        self._tensors, self._linears, self.kv_cache = tensors, linears, kv_cache
        self._plain = dict.fromkeys(name for name in tensors.names() if name not in hidden)

    def names(self) -> list[str]:
        return [*self._plain, *self._linears]

    def format_of(self, name: str) -> WeightFormat | None:
        return self._linears[name].format if name in self._linears else None

    def shape(self, name: str) -> tuple[int, ...]:
        linear, part = self._find(name)
        if linear is None:
            return self._tensors.shape(name)
        return linear.format.parts(*linear.shape)[part][0] if part else linear.shape

    def dtype(self, name: str) -> torch.dtype:
        linear, part = self._find(name)
        if linear is None:
            return self._tensors.dtype(name)
        return getattr(torch, linear.format.parts(*linear.shape)[part][1]) if part else torch.float32

    def read(self, name: str) -> torch.Tensor:
        linear, part = self._find(name)
        if linear is None:
            return self._tensors.read(name)
        if part:
            return linear.read(part)
        return dense_weight(linear.format, {part: linear.read(part) for part in linear.parts}, linear.shape[-1])

    def close(self) -> None:
        self._tensors.close()

    def _find(self, name: str) -> tuple[PackedLinear | None, str]:
        if name in self._linears:
            return self._linears[name], ""
        weight, _, part = name.rpartition(".")
        return (self._linears[weight], part) if part in PART_NAMES and weight in self._linears else (None, "")


def open_packed(
    tensors: TensorSource,
    formats: dict[str, WeightFormat],
    shapes: dict[str, tuple[int, ...]],
    kv_dtype: str,
    kv_skip_layers: Sequence[int],
    where: str,
) -> PackedTensors:
    """Our own checkpoint: the parts are there by their names, and must have the shapes that the model asks for."""
    stored = set(tensors.names())
    linears = {}
    for name, format in formats.items():
        shape = shapes.get(name, ())
        if len(shape) not in (2, 3):
            raise CorruptFile(f"{where} has a format for {name}, which is no matrix of this model; convert it again.")
        parts: dict[str, Callable[[], torch.Tensor]] = {}
        for part, (part_shape, dtype) in format.parts(*shape).items():
            full = f"{name}.{part}"
            found = (tensors.shape(full), tensors.dtype(full)) if full in stored else None
            if found != (part_shape, getattr(torch, dtype)):
                raise CorruptFile(f"{where} lacks {full} as {dtype} {list(part_shape)}; convert the model again.")
            parts[part] = partial(tensors.read, full)
        linears[name] = PackedLinear(format, shape, parts)
    hidden = {f"{name}.{part}" for name in linears for part in PART_NAMES} | scale_names(stored)
    return PackedTensors(tensors, linears, hidden, read_scales(tensors, kv_dtype, kv_skip_layers))
