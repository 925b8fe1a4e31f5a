"""The only registry of the project: op() declares an op by schema and reference, kernel() adds a candidate to it."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

__all__ = ["kernel", "op"]  # public: a user's module may declare ops (docs/adding/pass.md)

_LIBRARY = torch.library.Library("slipstream", "DEF")
_OPS: dict[str, "Op"] = {}

_SCHEMA = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)\) -> (?P<returns>.+)")
_ARGUMENT = re.compile(r"(?P<kind>Tensor\??|Tensor\(a!\)|Tensor\[\]|float|int|int\[\]|bool|str) (?P<name>\w+)(= *\w+)?")


@dataclass(frozen=True)
class Argument:
    name: str
    kind: str  # Tensor, Tensor?, Tensor[], float, int, int[], bool, str (a dtype)
    is_mutated: bool = False

    @property
    def is_tensor(self) -> bool:
        return self.kind.startswith("Tensor")


@dataclass(frozen=True)
class Kernel:
    """One way to compute an op on some devices."""

    name: str
    function: Callable[..., Any]
    runs_on: Callable[[torch.device, torch.dtype], bool]
    can_be_recorded: bool = True  # into a CUDA graph: nothing on the host waits for what the device computes
    # The same, where each row of the result is to the last bit what it would be among any other rows, or alone.
    batch_invariant: Callable[..., Any] | None = None


@dataclass(frozen=True, eq=False)
class Op:
    """A named computation. Calling it goes through torch's dispatcher, so that torch.export records it."""

    name: str
    arguments: tuple[Argument, ...]
    num_outputs: int | None  # None: as many as the reference returns
    reference: Callable[..., Any]
    shapes: Callable[..., Any]  # same signature, on meta tensors: only shapes and dtypes matter
    reads_values: bool = False  # the reference waits for values, so it cannot be recorded
    is_row_by_row: bool = False  # the reference computes no row in another way because of the others
    kernels: dict[str, Kernel] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(torch.ops.slipstream, self.name)(*args, **kwargs)

    @property
    def is_mutating(self) -> bool:
        return any(argument.is_mutated for argument in self.arguments)

    @property
    def is_collective(self) -> bool:
        """All ranks of an engine compute it together; its kernels take them as `ranks` (kernels/collectives.py)."""
        return "ranks" in inspect.signature(self.reference).parameters

    @property
    def tensor_arguments(self) -> tuple[Argument, ...]:
        return tuple(argument for argument in self.arguments if argument.is_tensor)

    @property
    def attributes(self) -> tuple[Argument, ...]:
        return tuple(argument for argument in self.arguments if not argument.is_tensor)

    def candidates(self, device: torch.device, dtype: torch.dtype) -> dict[str, Kernel]:
        """Every way to compute this op there; "reference" is always one."""
        usable = {name: kernel for name, kernel in self.kernels.items() if kernel.runs_on(device, dtype)}
        invariant = _batch_invariant(self.reference, self.is_row_by_row)
        reference = Kernel("reference", self.reference, lambda _device, _dtype: True, not self.reads_values, invariant)
        return {"reference": reference, **usable}


def op(
    schema: str,
    shapes: Callable[..., Any] | None = None,
    *,
    reads_values: bool = False,
    is_row_by_row: bool = False,
) -> Callable[[Callable[..., Any]], Op]:
    """Declare an op by a torch schema; the decorated function is its reference.

    Tensor arguments come first, then attributes (numbers known at build time). `shapes` replaces the reference on
    meta tensors where the reference reads values, or takes what kernels would not (fits.py); reads_values: it reads
    them on the host (a loop over sequences, say). is_row_by_row: no sum in the reference is taken in an order that
    depends on the number of rows, as a library's products are; only such ops run where tokens must not depend on the
    batch (`LLM(deterministic=True)`).
    """

    def register(reference: Callable[..., Any]) -> Op:
        parsed = _parse(schema, reference, shapes or reference, reads_values, is_row_by_row)
        _LIBRARY.define(schema)
        _LIBRARY.impl(parsed.name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"slipstream::{parsed.name}", parsed.shapes, lib=_LIBRARY)
        _OPS[parsed.name] = parsed
        return parsed

    return register


def kernel(
    of: Op, name: str, runs_on: Callable[[torch.device, torch.dtype], bool], *, is_row_by_row: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a candidate to an op: same arguments, same result within the op's tolerance.

    A function with a parameter is_batch_invariant besides can compute rows independently of each other, and is told.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        invariant = _batch_invariant(function, is_row_by_row)
        of.kernels[name] = Kernel(name, function, runs_on, batch_invariant=invariant)
        return function

    return register


def on_gpu(device: torch.device, dtype: torch.dtype) -> bool:
    """An NVIDIA GPU, and numbers that its kernels take."""
    return device.type == "cuda" and dtype != torch.float64


def on_gpu_with_fp8(device: torch.device, dtype: torch.dtype) -> bool:
    """One that can convert to E4M3: Ada, Hopper and later."""
    return on_gpu(device, dtype) and torch.cuda.get_device_capability(device) >= (8, 9)


def known_ops() -> dict[str, Op]:
    return dict(_OPS)


def _batch_invariant(function: Callable[..., Any], is_row_by_row: bool) -> Callable[..., Any] | None:
    if "is_batch_invariant" in inspect.signature(function).parameters:
        return partial(function, is_batch_invariant=True)
    return function if is_row_by_row else None


def _parse(
    schema: str, reference: Callable[..., Any], shapes: Callable[..., Any], reads_values: bool, is_row_by_row: bool
) -> Op:
    match = _SCHEMA.fullmatch(schema)
    if match is None:
        raise ValueError(f"not an op schema: {schema}")
    arguments = tuple(
        Argument(found["name"], found["kind"].replace("(a!)", ""), "!" in found["kind"])
        for found in _ARGUMENT.finditer(match["arguments"])
    )
    order = [argument.is_tensor for argument in arguments]
    assert order == sorted(order, reverse=True), f"{schema}: tensors come before attributes"
    returns = match["returns"]
    num_outputs = None if returns == "Tensor[]" else returns.count("Tensor")
    return Op(match["name"], arguments, num_outputs, reference, shapes, reads_values, is_row_by_row)
