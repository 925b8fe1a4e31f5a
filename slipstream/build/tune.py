"""Measure the candidates of each op on this device, at each number of rows; the table of winners is model.cache."""

import platform
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import torch

from slipstream.build.kept import keep_compiled_kernels
from slipstream.build.timing import arguments_of, cold_copies, made_up, time_kernels
from slipstream.engine.choices import ROW_BUCKETS, Choices, key_of
from slipstream.engine.graph import Graph, Node
from slipstream.kernels.cpu.library import NativeKernel, describe
from slipstream.kernels.registry import Kernel, known_ops
from slipstream.schema.build import PLUGINS

_NUMBERS = ("float32", "float16", "bfloat16", "float8_e4m3fn", "int8")  # what activations are; indices are int64


def describe_device(device: torch.device) -> str:
    """Everything a measurement depends on besides the graph."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"{name}; torch {torch.__version__}; CUDA {torch.version.cuda}"
    return f"{_processor()}; {torch.get_num_threads()} threads; torch {torch.__version__}; {describe()}"


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
        elif _is_measurable(node, graph) and _has_choice(_candidates(node, graph, device)):
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


def _has_choice(candidates: dict[str, Kernel]) -> bool:
    """A native kernel is taken wherever it runs: what it saves is the way from one op to the next."""
    return len(candidates) > 1 and not isinstance(list(candidates.values())[-1].function, NativeKernel)


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
    candidates = _candidates(node, graph, device)
    kinds = {name: graph.types[name] for name in node.inputs if name is not None}
    activations = kinds.keys() - graph.weights.keys()
    copies = cold_copies({name: kinds[name] for name in kinds if name in graph.weights}, {}, device)
    neighbour = _neighbour(device) if device.type == "cuda" else None
    winners: list[str] = []
    for num_rows in ROW_BUCKETS:
        if winners and num_rows >= 2 * limit:
            winners.append(winners[-1])
            continue
        sizes = {"T": num_rows, "R": num_rows}
        values = {name: made_up(kinds[name], sizes, device) for name in activations}
        calls = [arguments_of(node, values | copy) for copy in copies]
        seconds = time_kernels(candidates, calls, node.attributes, device, neighbour)
        winners.append(min(seconds, key=seconds.__getitem__))
    return winners


def _neighbour(device: torch.device) -> Callable[[], object]:
    """A small kernel as there is one between the products of a step. Some kernels begin before it has ended and let the
    next one begin, too, and some do not: alone they may take as long, among others they do not."""
    from slipstream.kernels.triton.rows import activate

    x = torch.zeros(16, 1024, dtype=torch.bfloat16, device=device)
    return lambda: activate(x, "silu", is_gated=False)
