"""Measure the candidates of each op on this device, at each number of rows; the table of winners is model.cache."""

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipstream.build.kept import keep_compiled_kernels
from slipstream.engine.choices import ROW_BUCKETS, Choices, key_of
from slipstream.engine.graph import Graph, Node, TensorType
from slipstream.kernels.registry import Kernel, Op, known_ops
from slipstream.schema.build import PLUGINS

_COLD_BYTES = 96 << 20  # weights cycled through while timing, so that no cache level holds them as none will in a step
# The fastest of many single calls counts: on a shared machine a neighbour spoils most, rarely all.
_ROUNDS = 7
_ROUND_SECONDS = 0.004
_RECORDED_CALLS = 16
_NUMBERS = ("float32", "float16", "bfloat16", "float8_e4m3fn", "int8")  # what activations are; indices are int64


def describe_device(device: torch.device) -> str:
    """Everything a measurement depends on besides the graph."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"{name}; torch {torch.__version__}; CUDA {torch.version.cuda}"
    return f"{_processor()}; {torch.get_num_threads()} threads; torch {torch.__version__}"


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def tune(
    graph: Graph,
    device: torch.device,
    *,
    max_num_tokens: int,
    max_batch_size: int,
    disabled_plugins: Iterable[str] = (),
    known: Mapping[str, list[str]] = {},
    measure: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Choices:
    """Time every op that has a choice here. Ops that need a live step (attention) take their newest candidate.

    disabled_plugins: of schema/build.py: PLUGINS; their ops take the reference, unmeasured.
    known: choices measured on this device before, which are not measured again.
    measure: False leaves each other op with its newest candidate.
    """
    if device.type == "cuda":
        keep_compiled_kernels()
    plain = [pattern for name in disabled_plugins for pattern in PLUGINS[name]]
    kernels: dict[str, list[str]] = {}
    todo: dict[str, Node] = {}
    for node in graph.nodes:
        key = key_of(node, graph.types)
        if any(fnmatchcase(node.op, pattern) for pattern in plain):
            kernels[key] = ["reference"] * len(ROW_BUCKETS)
        elif _is_measurable(node, graph) and len(_candidates(node, graph, device)) > 1:
            if key in known:
                kernels[key] = list(known[key])
            elif measure:
                todo.setdefault(key, node)
    with torch.inference_mode():
        for done, (key, node) in enumerate(todo.items()):
            progress(done, len(todo))
            limit = max_batch_size if _rows(node, graph) == "R" else max_num_tokens
            kernels[key] = _fastest_by_rows(node, graph, device, limit)
    progress(len(todo), len(todo))
    return Choices(describe_device(device), kernels)


def _candidates(node: Node, graph: Graph, device: torch.device) -> dict[str, Kernel]:
    dtype = getattr(torch, graph.types[node.outputs[0]].dtype) if node.outputs else torch.float32
    return known_ops()[node.op].candidates(device, dtype)


def _rows(node: Node, graph: Graph) -> int | str:
    return graph.types[node.inputs[0]].shape[0]  # type: ignore[index]


def _is_measurable(node: Node, graph: Graph) -> bool:
    """Every input is a weight or numbers with one row a token (no indices): made-up ones are as good as real ones."""
    rows_first = (("T",), ("R",))
    return bool(node.outputs) and all(
        name is None
        or name in graph.weights
        or (graph.types[name].dtype in _NUMBERS and graph.types[name].shape[:1] in rows_first)
        for name in node.inputs
    )


def _fastest_by_rows(node: Node, graph: Graph, device: torch.device, limit: int) -> list[str]:
    op, candidates = known_ops()[node.op], _candidates(node, graph, device)
    weights = _cold_copies([graph.types[name] for name in node.inputs if name in graph.weights], device)
    winners: list[str] = []
    for num_rows in ROW_BUCKETS:
        if winners and num_rows >= 2 * limit:
            winners.append(winners[-1])
            continue
        calls = cycle([_arguments(node, graph, op, num_rows, copy, device) for copy in weights])
        time_round = _recorded if device.type == "cuda" else _called
        rounds = {name: time_round(kernel.function, calls, node.attributes) for name, kernel in candidates.items()}
        best = dict.fromkeys(candidates, float("inf"))
        for _ in range(_ROUNDS):  # interleaved, so that a disturbance hits all alike
            for name, seconds in rounds.items():
                best[name] = min(best[name], seconds())
        winners.append(min(best, key=best.__getitem__))
    return winners


def _cold_copies(kinds: Sequence[TensorType], device: torch.device) -> list[list[Tensor]]:
    def make(kind: TensorType) -> Tensor:
        shape = [int(size) for size in kind.shape]
        return torch.full(shape, 0.01, dtype=getattr(torch, kind.dtype), device=device)

    first = [make(kind) for kind in kinds]
    size = sum(weight.nbytes for weight in first)
    count = max(1, min(16, _COLD_BYTES // max(size, 1)))
    return [first, *([make(kind) for kind in kinds] for _ in range(count - 1))]


def _arguments(
    node: Node, graph: Graph, op: Op, num_rows: int, weights: list[Tensor], device: torch.device
) -> list[Any]:
    rest = iter(weights)
    values: list[Any] = []
    for name in node.inputs:
        if name is None:
            values.append(None)
        elif name in graph.weights:
            values.append(next(rest))
        else:
            kind = graph.types[name]
            shape = [num_rows, *(int(size) for size in kind.shape[1:])]
            values.append(torch.full(shape, 0.5, dtype=getattr(torch, kind.dtype), device=device))
    return [values] if any(argument.kind == "Tensor[]" for argument in op.arguments) else values


def _called(
    function: Callable[..., Any], calls: Iterator[list[Any]], attributes: dict[str, Any]
) -> Callable[[], float]:
    """Gives the seconds of the fastest call in one round; each call takes the next of the cold weights."""

    def seconds() -> float:
        function(*next(calls), **attributes)
        fastest, end = float("inf"), time.perf_counter() + _ROUND_SECONDS
        while (start := time.perf_counter()) < end:
            function(*next(calls), **attributes)
            fastest = min(fastest, time.perf_counter() - start)
        return fastest

    return seconds


def _recorded(
    function: Callable[..., Any], calls: Iterator[list[Any]], attributes: dict[str, Any]
) -> Callable[[], float]:
    """Gives the seconds of a call among calls recorded one after another, as a step is recorded."""
    function(*next(calls), **attributes)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_RECORDED_CALLS):
            function(*next(calls), **attributes)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def seconds() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / _RECORDED_CALLS

    return seconds
