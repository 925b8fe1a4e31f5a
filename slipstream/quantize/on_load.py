"""A checkpoint whose weights are rounded to a format as they are read: quantizing without texts, and without a file."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from slipstream.checkpoint.convert import OWN_BITS, in_own_bits
from slipstream.checkpoint.folder import Checkpoint
from slipstream.checkpoint.layouts import renamed
from slipstream.engine.graph import Graph
from slipstream.errors import ModelError
from slipstream.kernels.linear.parts import dense_weight
from slipstream.quantize.names import DEFAULT_EXCLUDE, quantized_names
from slipstream.quantize.numbers import check_weight, nearest_parts
from slipstream.quantize.qformats import QFORMATS, QFormat
from slipstream.schema.format import WeightFormat

# On a CPU activations have a scale for so many columns instead of one a row. Of SmolLM2's perplexity that takes 0.4 %
# instead of 4 %, and of a product a sixth of the time at most; tensor cores want rows.
CPU_INPUT_GROUP_SIZE = 32


def quantized_on_load(checkpoint: Checkpoint, graph: Graph, qformat: str) -> Checkpoint:
    """graph: of the checkpoint, as captured; it knows whether it is for a CPU. OWN_BITS rounds nothing.

    Raises ModelError for a format that needs texts, or a packed model.
    """
    if qformat == OWN_BITS:
        if not graph.is_for_cpu:
            raise ModelError(f"quantization is {OWN_BITS}, which runs on a CPU; leave it out on a GPU.")
        return in_own_bits(checkpoint)
    known = {name: each for name, each in QFORMATS.items() if each.format is not None and not each.needs_text}
    if qformat not in known:
        better = "; slipstream quantize makes the others" if qformat in QFORMATS else ""
        raise ModelError(
            f"quantization is {qformat!r}; when loading it may be {', '.join([*known, OWN_BITS])}{better}."
        )
    if checkpoint.formats:
        raise ModelError(f"{checkpoint.name} is quantized already; leave out quantization ({qformat}).")
    names = quantized_names(graph, DEFAULT_EXCLUDE, includes_head=known[qformat].includes_head)
    chosen = known[qformat]
    if graph.is_for_cpu and chosen.format == WeightFormat(kind="w8a8"):
        chosen = replace(chosen, format=replace(chosen.format, input_group_size=CPU_INPUT_GROUP_SIZE))
    source = Rounded(checkpoint, chosen, names)
    recipes = {name: renamed(name, checkpoint.shapes[name]) for name in checkpoint.recipes}
    return replace(checkpoint, weights=source, recipes=recipes, formats=dict.fromkeys(sorted(names), source.format))


class Rounded:
    """A TensorSource under our names: the parts of these weights, and the others as they are."""

    def __init__(self, checkpoint: Checkpoint, qformat: QFormat, names: frozenset[str]) -> None:
        assert qformat.format is not None
        self.format: WeightFormat = qformat.format
        self._checkpoint, self._num_rows, self._names = checkpoint, qformat.rows_per_scale, names

    def names(self) -> list[str]:
        return list(self._checkpoint.recipes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._checkpoint.dtype_of(name)

    def read(self, name: str) -> Tensor:
        if name in self._names:
            return dense_weight(self.format, dict(self._parts(name)), self._checkpoint.shapes[name][-1])
        weight, _, part = name.rpartition(".")
        return self._parts(weight)[part] if weight in self._names else self._checkpoint.read(name)

    def _parts(self, name: str) -> Mapping[str, Tensor]:
        weight = self._checkpoint.read(name).float()
        check_weight(name, weight)
        matrices = weight if weight.ndim == 3 else weight[None]
        each = [nearest_parts(matrix_NK, self.format, self._num_rows) for matrix_NK in matrices]
        return each[0] if weight.ndim == 2 else {part: torch.stack([parts[part] for parts in each]) for part in each[0]}

    def close(self) -> None:
        self._checkpoint.close()
