"""Runs of a graph's nodes as one native call each: the same nodes, weights and kernels, without Python in between.

A run becomes a flat list (kernels/cpu/src/program.cpp): values that lie at an address (weights), where an argument of
the call does, or in a buffer; and kernels over them. A buffer serves values that are never alive at once.
"""

import ctypes
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from ctypes import c_int64
from typing import NamedTuple

import torch
from torch import Tensor

from slipstream.engine.graph import Node, TensorType
from slipstream.kernels.cpu.library import (
    DTYPES,
    LETTERS,
    BufferStruct,
    InstructionStruct,
    NativeKernel,
    ProgramStruct,
    ValueStruct,
    library,
)

_FIXED, _ARGUMENT, _BUFFER = range(3)

Types = Mapping[str, TensorType]


class NativeNode(NamedTuple):
    node: Node
    kernel: NativeKernel | None  # None: a split, which is only another look at what it splits


class _Look(NamedTuple):
    """A value as columns of another one, which is none itself."""

    base: str
    first_column: int
    num_columns: int


def native_node(node: Node, function: object, types: Types) -> NativeNode | None:
    """What a node is in a run, None where torch computes it. function: the kernel that was chosen for it."""
    if node.op == "split":
        return NativeNode(node, None)
    if not isinstance(function, NativeKernel):
        return None
    kinds = [None if name is None else (types[name].dtype, types[name].shape) for name in node.inputs]
    return NativeNode(node, function) if function.takes(kinds, node.attributes) else None


class NativeRun:
    """Consecutive nodes, called with the tensors of `arguments`; gives those of `outputs`."""

    def __init__(
        self, nodes: Sequence[NativeNode], types: Types, weights: Mapping[str, Tensor], wanted: Set[str]
    ) -> None:
        """wanted: values that are read after the run."""
        looks = _looks(nodes, types)
        made = [name for each in nodes if each.kernel is not None for name in each.node.outputs]
        read = dict.fromkeys(name for each in nodes for name in each.node.inputs if name is not None)
        self.outputs = [name for each in nodes for name in each.node.outputs if name in wanted]
        self.arguments = [name for name in read if name not in (*made, *looks, *weights)]
        shown = {looks[name].base if name in looks else name for name in self.outputs}
        self._made = [name for name in made if name in shown]  # as tensors of torch's
        self._looks = [looks.get(name, name) for name in self.outputs]
        self._with_rows = [index for index, name in enumerate(self.arguments) if len(types[name].shape) == 2]
        self._types, self._weights = types, weights  # their memory stays
        places = _Places((*self.arguments, *self._made), weights, types, nodes, looks)
        self._program, self._keep = _program(nodes, places, looks, types)
        self._sizes = _where_sizes_are(self.arguments, types)
        self._numbers = (c_int64 * (2 * len(self.arguments) + 2 * len(self._made)))()
        self._caches: dict[int, Tensor | None] = {  # as they last came: always the same
            index: None for index, name in enumerate(self.arguments) if name.startswith("kv.")
        }
        self.kernels = [each.kernel.address for each in nodes if each.kernel is not None]
        found = library()
        assert found is not None
        self._run = found.functions.slipstream_run

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        tensors = list(given)
        for index in self._with_rows:  # torch may give columns that lie together
            if tensors[index].stride(1) != 1:
                tensors[index] = tensors[index].contiguous()
        letters = (c_int64 * len(LETTERS))()
        for index, (argument, dimension) in self._sizes:
            letters[index] = tensors[argument].shape[dimension]
        sizes = dict(zip(LETTERS, letters, strict=True))
        made = {name: _empty(self._types[name], sizes) for name in self._made}
        for index, tensor in enumerate((*tensors, *made.values())):
            if index not in self._caches or tensor is not self._caches[index]:
                self._numbers[2 * index], self._numbers[2 * index + 1] = tensor.data_ptr(), tensor.stride(0)
                if index in self._caches:
                    self._caches[index] = tensor
        if self._run(ctypes.byref(self._program), self._numbers, letters):
            raise torch.OutOfMemoryError("no memory for what a step computes")
        named = dict(zip(self.arguments, tensors, strict=True)) | made
        return tuple(
            named[look] if isinstance(look, str) else named[look.base].narrow(1, look.first_column, look.num_columns)
            for look in self._looks
        )


def _looks(nodes: Iterable[NativeNode], types: Types) -> dict[str, _Look]:
    found: dict[str, _Look] = {}
    for node, kernel in nodes:
        if kernel is None:
            base, column, _ = found.get(str(node.inputs[0]), (str(node.inputs[0]), 0, 0))
            for name in node.outputs:
                (width,) = _fixed_sizes(types[name])
                found[name] = _Look(base, column, width)
                column += width
    return found


def _fixed_sizes(kind: TensorType) -> list[int]:
    return [size for size in kind.shape if isinstance(size, int)]


def _empty(kind: TensorType, sizes: Mapping[str, int]) -> Tensor:
    shape = [sizes[size] if isinstance(size, str) else size for size in kind.shape]
    return torch.empty(shape, dtype=getattr(torch, kind.dtype))


def _where_sizes_are(arguments: Sequence[str], types: Types) -> list[tuple[int, tuple[int, int]]]:
    """(index of a letter, (argument, dimension) that tells its size)."""
    found: dict[int, tuple[int, int]] = {}
    for argument, name in enumerate(arguments):
        for dimension, size in enumerate(types[name].shape):
            if isinstance(size, str):
                found.setdefault(LETTERS.index(size), (argument, dimension))
    return list(found.items())


class _Places:
    """Where each value of a run lies, and the buffers that this takes."""

    def __init__(
        self, arguments: Sequence[str], weights: Mapping[str, Tensor], types: Types, nodes: Sequence[NativeNode],
        looks: Mapping[str, _Look],
    ) -> None:  # fmt: skip
        self._types, self._weights = types, weights
        self._arguments = {name: index for index, name in enumerate(arguments)}
        self._buffer_of: dict[str, int] = {}
        self.buffers: list[BufferStruct] = []
        self._plan(nodes, looks)

    def of(self, name: str) -> tuple[int, int]:
        """(what kind of place, which)"""
        if name in self._weights:
            assert self._weights[name].is_contiguous()
            return _FIXED, self._weights[name].data_ptr()
        if name in self._arguments:
            return _ARGUMENT, self._arguments[name]
        return _BUFFER, self._buffer_of[name]

    def _plan(self, nodes: Sequence[NativeNode], looks: Mapping[str, _Look]) -> None:
        last_use: dict[str, int] = {}
        for index, (node, kernel) in enumerate(nodes):
            for name in (*node.inputs, *node.outputs):
                if name is not None and kernel is not None:
                    last_use[looks[name].base if name in looks else name] = index
        free: list[int] = []
        ends: dict[int, list[int]] = {}
        for index, (node, kernel) in enumerate(nodes):
            for name in node.outputs if kernel is not None else ():
                if name not in self._arguments:
                    self._buffer_of[name] = self._take(free, self._types[name])
                    ends.setdefault(last_use[name], []).append(self._buffer_of[name])
            free += ends.pop(index, [])

    def _take(self, free: list[int], kind: TensorType) -> int:
        """A free buffer of as many rows, the one that fits best; or one more."""
        varying = [size for size in kind.shape if isinstance(size, str)]
        assert varying in ([], list(kind.shape[:1])), "one size varies at most, and it is the first"
        letter = -1 - LETTERS.index(varying[0]) if varying else 0
        num_bytes = math.prod(_fixed_sizes(kind)) * getattr(torch, kind.dtype).itemsize
        alike = [index for index in free if self.buffers[index].letter == letter]
        if not alike:
            self.buffers.append(BufferStruct(num_bytes, letter))
            return len(self.buffers) - 1
        large = [index for index in alike if self.buffers[index].bytes >= num_bytes]
        chosen = min(large or alike, key=lambda index: abs(self.buffers[index].bytes - num_bytes))
        self.buffers[chosen].bytes = max(self.buffers[chosen].bytes, num_bytes)
        free.remove(chosen)
        return chosen


def _program(
    nodes: Sequence[NativeNode], places: _Places, looks: Mapping[str, _Look], types: Types
) -> tuple[ProgramStruct, list[object]]:
    """The program, and what it points to."""
    indices: dict[str, int] = {}
    values: list[ValueStruct] = []

    def index_of(name: str | None) -> int:
        if name is None:
            return -1
        if name not in indices:
            indices[name] = len(values)
            values.append(_value(name, places, looks, types))
        return indices[name]

    instructions = []
    for node, kernel in nodes:
        if kernel is None:
            continue
        instruction = InstructionStruct(kernel.address, kernel.attribute_structs(node.attributes))
        for slots, names in ((instruction.inputs, node.inputs), (instruction.outputs, node.outputs)):
            found = [index_of(name) for name in names]
            slots[:] = found + [-1] * (len(slots) - len(found))
        instructions.append(instruction)
    arrays = [
        (ValueStruct * len(values))(*values), (InstructionStruct * len(instructions))(*instructions),
        (BufferStruct * len(places.buffers))(*places.buffers),
    ]  # fmt: skip
    return ProgramStruct(*arrays, len(values), len(instructions), len(places.buffers)), list(arrays)


def _value(name: str, places: _Places, looks: Mapping[str, _Look], types: Types) -> ValueStruct:
    base, column, _ = looks.get(name, (name, 0, 0))
    place, which = places.of(base)
    kind, width = types[name], math.prod(_fixed_sizes(types[base])[-1:])
    sizes = [size if isinstance(size, int) else -1 - LETTERS.index(size) for size in kind.shape]
    value = ValueStruct(which, column * getattr(torch, kind.dtype).itemsize)
    value.sizes[: len(sizes)] = sizes
    # Rows of an argument are as far apart as they come; a cache's first dimension counts planes, which are not rows.
    value.row_stride = 0 if place == _ARGUMENT or len(sizes) != 2 else width
    value.place, value.dtype, value.num_dims = place, DTYPES.index(kind.dtype), len(sizes)
    return value
