"""The compiled library: its structs as src/tensor.h and src/program.cpp have them, and one op called by itself."""

import ctypes
import warnings
from collections.abc import Callable, Sequence
from ctypes import c_double, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slipstream.kernels.cpu.compiler import CompileError, chosen_level, compiled_library
from slipstream.kernels.registry import Op, kernel

MAX_DIMS, MAX_INPUTS, MAX_OUTPUTS, MAX_ATTRIBUTES = 5, 24, 4, 8
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int64", "int32", "int8", "uint8")
LETTERS = ("T", "S", "S1", "B", "R", "N")  # sizes that vary from step to step, in the order that a program counts them

_FUNCTION = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_void_p)
_FLOAT32 = ("float32",)
_INDICES = (
    "token_ids", "positions", "slots", "rows", "query_starts", "kv_lens", "block_tables", "tree_starts", "tree_masks",
)  # fmt: skip
_DTYPES = {  # of arguments by name, in any op
    **dict.fromkeys(_INDICES, ("int64",)),
    "kv": ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn"),
    "scale": ("float32", "bfloat16", "float16"),
    "order": (),  # act-order is left to torch
}


class TensorStruct(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p), ("sizes", c_int64 * MAX_DIMS), ("row_stride", c_int64), ("dtype", c_int32),
        ("num_dims", c_int32),
    )  # fmt: skip


class AttributeUnion(ctypes.Union):
    _fields_ = (("integer", c_int64), ("number", c_double))


class ValueStruct(ctypes.Structure):
    _fields_ = (
        ("place_data", c_int64), ("offset", c_int64), ("sizes", c_int64 * MAX_DIMS), ("row_stride", c_int64),
        ("place", c_int32), ("dtype", c_int32), ("num_dims", c_int32), ("reserved", c_int32),
    )  # fmt: skip


class InstructionStruct(ctypes.Structure):
    _fields_ = (
        ("kernel", c_void_p), ("attributes", AttributeUnion * MAX_ATTRIBUTES), ("inputs", c_int32 * MAX_INPUTS),
        ("outputs", c_int32 * MAX_OUTPUTS),
    )  # fmt: skip


class BufferStruct(ctypes.Structure):
    _fields_ = (("bytes", c_int64), ("letter", c_int32), ("reserved", c_int32))


class ProgramStruct(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.POINTER(ValueStruct)), ("instructions", ctypes.POINTER(InstructionStruct)),
        ("buffers", ctypes.POINTER(BufferStruct)),
        ("num_values", c_int32), ("num_instructions", c_int32), ("num_buffers", c_int32),
    )  # fmt: skip


class Library(NamedTuple):
    level: str
    functions: ctypes.CDLL

    def address(self, name: str) -> int | None:
        return ctypes.cast(getattr(self.functions, f"slipstream_{name}"), c_void_p).value


def library() -> Library | None:
    """The kernels at the level chosen, compiled if need be; None where torch's have to do, which is said once."""
    return _loaded(chosen_level())


@cache
def _loaded(level: str | None) -> Library | None:
    if level is None:
        return None
    try:
        functions = ctypes.CDLL(str(compiled_library(level)))
    except (CompileError, OSError) as error:
        warnings.warn(
            f"The kernels for this CPU were not compiled: {error}. Torch's run instead, which takes some times as "
            "long; install a C++ compiler, such as g++, or name one by CXX.",
            stacklevel=2,
        )
        return None
    functions.slipstream_run.argtypes = [ctypes.POINTER(ProgramStruct), c_void_p, c_void_p]
    functions.slipstream_run.restype = c_int32
    functions.slipstream_set_threads.argtypes = [c_int32]
    functions.slipstream_set_threads.restype = None
    functions.slipstream_set_threads(torch.get_num_threads())
    return Library(level, functions)


def describe() -> str:
    """Which kernels run here, for the name of a device."""
    found = library()
    return "torch's kernels" if found is None else f"kernels for {found.level}"


def use_threads(count: int) -> None:
    """How many threads compute, the caller's among them."""
    found = library()
    if found is not None:
        found.functions.slipstream_set_threads(count)


Kind = tuple[str, tuple[Any, ...]]  # dtype and shape of a tensor; a size is a number, or a letter of a graph
Takes = Callable[[dict[str, Kind | None], dict[str, Any]], bool]


class NativeKernel:
    """The candidate of an op; called by itself it computes in torch what the library does not take."""

    def __init__(self, op: Op, takes: Takes, dtypes: dict[str, tuple[str, ...]]) -> None:
        self._op, self._takes, self._dtypes = op, takes, _DTYPES | dtypes
        self._num_tensors = len(op.tensor_arguments)

    @property
    def address(self) -> int | None:
        found = library()
        assert found is not None
        return found.address(self._op.name)

    def takes(self, kinds: Sequence[Kind | None], attributes: dict[str, Any]) -> bool:
        """Whether the library computes the op for tensors like these, whose shapes the op has found to fit."""
        named = dict(zip((argument.name for argument in self._op.tensor_arguments), kinds, strict=True))
        is_known = all(kind is None or kind[0] in self._dtypes.get(name, _FLOAT32) for name, kind in named.items())
        return is_known and self._takes(named, attributes)

    def attribute_structs(self, attributes: dict[str, Any]) -> ctypes.Array[AttributeUnion]:
        """As src/tensor.h has them; a dtype is for `takes` alone."""
        structs = (AttributeUnion * MAX_ATTRIBUTES)()
        for struct, argument in zip(structs, self._op.attributes, strict=False):
            value = attributes[argument.name]
            if argument.kind == "float":
                struct.number = value
            elif argument.kind != "str":
                struct.integer = value
        return structs

    def __call__(self, *args: Any, **attributes: Any) -> Any:
        tensors, rest = args[: self._num_tensors], args[self._num_tensors :]
        named = [argument.name for argument in self._op.attributes]
        attributes |= zip(named, rest, strict=False)
        kinds = [None if x is None else (str(x.dtype).removeprefix("torch."), tuple(x.shape)) for x in tensors]
        if not self.takes(kinds, attributes) or not all(map(_lies_in_rows, tensors)):
            return self._op.reference(*tensors, **attributes)
        made = self._op.shapes(*tensors, **attributes)
        outputs = [] if made is None else [made] if isinstance(made, Tensor) else list(made)
        call(self.address, tensors, outputs, self.attribute_structs(attributes))
        return made


def native(
    op: Op,
    takes: Takes = lambda kinds, attributes: True,
    *,
    is_row_by_row: bool = True,
    **dtypes: tuple[str, ...],
) -> None:
    """Register the library's kernel of an op, `slipstream_<name>`.

    takes: what it asks of shapes and attributes. dtypes: of arguments by name; float32 where nothing else is said.
    """
    kernel(op, "native", on_cpu, is_row_by_row=is_row_by_row)(NativeKernel(op, takes, dtypes))


def on_cpu(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype in (torch.float32, torch.int8, torch.int64) and library() is not None


def call(
    address: int | None, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor],
    attributes: ctypes.Array[AttributeUnion],
) -> None:  # fmt: skip
    """One kernel on these tensors."""
    structs = [None if x is None else _struct(x) for x in (*inputs, *outputs)]
    addresses = [None if struct is None else ctypes.addressof(struct) for struct in structs]
    in_array = (c_void_p * len(inputs))(*addresses[: len(inputs)])
    out_array = (c_void_p * max(1, len(outputs)))(*addresses[len(inputs) :])
    _FUNCTION(address or 0)(in_array, out_array, ctypes.addressof(attributes))


def _struct(x: Tensor) -> TensorStruct:
    row_stride = x.stride(0) if x.dim() else 1
    sizes = (c_int64 * MAX_DIMS)(*x.shape)
    return TensorStruct(x.data_ptr(), sizes, row_stride, DTYPES.index(str(x.dtype).removeprefix("torch.")), x.dim())


def _lies_in_rows(x: Tensor | None) -> bool:
    """Whether rows may be apart, but nothing inside them."""
    return x is None or x.is_contiguous() or (x.dim() == 2 and x.stride(1) == 1)
