"""How long kernels take, as a step would run them: over cold weights, and recorded where the device is a GPU."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from slipstream.engine.graph import Node, TensorType
from slipstream.kernels.registry import Kernel, known_ops

_COLD_BYTES = 96 << 20  # weights cycled through while timing, so that no cache level holds them as none will in a step
# The fastest of many single calls counts: on a shared machine a neighbour spoils most, rarely all.
_ROUNDS = 7
_ROUND_SECONDS = 0.004
_RECORDED_CALLS = 16

Sizes = Mapping[str, int]  # what the letters of a shape stand for
Round = Callable[[], float]  # gives the seconds of a call


def time_kernels(
    kernels: Mapping[str, Kernel],
    calls: Sequence[list[Any]],
    attributes: Mapping[str, Any],
    device: torch.device,
    neighbour: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Seconds of one call of each kernel, by name. The calls' arguments take turns, so that they are cold each time.

    neighbour: where calls are recorded, what comes after each of them, and counts.
    """
    turns = cycle(calls)
    rounds: dict[str, Round] = {}
    for name, kernel in kernels.items():
        if device.type == "cuda" and kernel.can_be_recorded:
            rounds[name] = _recorded(kernel.function, turns, attributes, device, neighbour)
        else:
            rounds[name] = _called(kernel.function, turns, attributes, device)
    best = dict.fromkeys(kernels, float("inf"))
    for _ in range(_ROUNDS):  # interleaved, so that a disturbance hits all alike
        for name, seconds in rounds.items():
            best[name] = min(best[name], seconds())
    return best


def arguments_of(node: Node, values: Mapping[str, Tensor]) -> list[Any]:
    """What the node's kernel is called with, before its attributes."""
    inputs = [None if name is None else values[name] for name in node.inputs]
    takes_list = any(argument.kind == "Tensor[]" for argument in known_ops()[node.op].arguments)
    return [inputs] if takes_list else inputs


def made_up(kind: TensorType, sizes: Sizes, device: torch.device) -> Tensor:
    """A tensor of this type. A CPU takes as long for any numbers; a GPU's clock depends on how many bits they flip."""
    shape = shape_of(kind, sizes)
    dtype = getattr(torch, kind.dtype)
    if device.type == "cpu":
        return torch.full(shape, 1, dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, device=device).to(dtype)
    if kind.dtype == "int32":  # the order of a packed weight's columns
        return torch.randperm(shape[0], dtype=dtype, device=device)
    return torch.randint(0, 128, shape, dtype=dtype, device=device)


def shape_of(kind: TensorType, sizes: Sizes) -> list[int]:
    return [sizes[size] if isinstance(size, str) else size for size in kind.shape]


def cold_copies(kinds: Mapping[str, TensorType], sizes: Sizes, device: torch.device) -> list[dict[str, Tensor]]:
    """These tensors as often as it takes that no cache holds the first when its turn comes again."""

    def make() -> dict[str, Tensor]:
        return {name: made_up(kind, sizes, device) for name, kind in kinds.items()}

    first = make()
    size = sum(tensor.nbytes for tensor in first.values())
    count = max(1, min(16, _COLD_BYTES // max(size, 1)))
    return [first, *(make() for _ in range(count - 1))]


def _called(
    function: Callable[..., Any], turns: Iterator[list[Any]], attributes: Mapping[str, Any], device: torch.device
) -> Round:
    """The fastest call in a round; on a GPU with its launch, which is what a step pays that cannot be recorded."""

    def call() -> float:
        arguments, start = next(turns), time.perf_counter()
        function(*arguments, **attributes)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    def seconds() -> float:
        call()
        end = time.perf_counter() + _ROUND_SECONDS
        fastest = call()
        while time.perf_counter() < end:
            fastest = min(fastest, call())
        return fastest

    return seconds


def _recorded(
    function: Callable[..., Any],
    turns: Iterator[list[Any]],
    attributes: Mapping[str, Any],
    device: torch.device,
    neighbour: Callable[[], object] | None,
) -> Round:
    """A call among calls recorded one after another, as a step is recorded."""

    def call() -> None:
        function(*next(turns), **attributes)
        if neighbour is not None:
            neighbour()

    call()  # compiles
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings(), torch.cuda.graph(graph):
        warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # of an op that makes views
        for _ in range(_RECORDED_CALLS):
            call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def seconds() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / _RECORDED_CALLS

    return seconds
