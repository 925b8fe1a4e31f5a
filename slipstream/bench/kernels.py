"""Every op of an engine's graph by itself: each candidate's time at a step's shapes, beside the floor of its bytes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from slipstream.bench.machine import Machine, measure_machine
from slipstream.bench.step import Step, make_step
from slipstream.build.timing import arguments_of, cold_copies, made_up, shape_of, time_kernels
from slipstream.engine.choices import Choices, bucket_of, key_of
from slipstream.engine.graph import Graph, Node, TensorType
from slipstream.engine.manifest import Manifest
from slipstream.errors import UsageError
from slipstream.kernels.costs import Work, work_of
from slipstream.runtime.worker.graphs import candidates_of, chosen_kernels
from slipstream.runtime.worker.groups import with_groups
from slipstream.runtime.worker.memory import keep_freed_memory

Progress = Callable[[int, int], None]  # done, total


@dataclass(frozen=True)
class Line:
    """One op at one shape."""

    op: str
    shapes: str
    times: int  # in a step
    rows: int
    context: int | None  # of ops that read the KV cache
    kernel: str  # the one that the engine runs
    seconds: dict[str, float]  # of one call, by candidate
    work: Work


@dataclass(frozen=True)
class Total:
    """All ops of a step, one after the other."""

    rows: int
    context: int
    seconds: float
    floor: float

    @property
    def fraction(self) -> float:
        return self.floor / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Report:
    machine: Machine
    lines: list[Line]
    totals: list[Total]

    def floor(self, line: Line) -> float:
        """Seconds that a call takes at least."""
        return self.machine.floor(line.work)

    def fraction(self, line: Line) -> float:
        """Of the floor, that the engine's kernel reaches."""
        return self.floor(line) / line.seconds[line.kernel]


def bench_kernels(
    graph: Graph,
    manifest: Manifest,
    choices: Choices,
    device: torch.device,
    *,
    rows: Sequence[int],
    contexts: Sequence[int],
    patterns: Sequence[str] = ("*",),
    progress: Progress = lambda done, total: None,
) -> Report:
    """Time each op once for each number of rows, those that read the KV cache for each context too; on made-up weights.

    rows: up to max_batch_size they are the next token of as many sequences, more are prompts (bench/step.py).
    Raises UsageError where no op fits the patterns.
    """
    graph = with_groups(graph, manifest.kv_groups)
    groups = _distinct(graph, patterns)
    if device.type == "cpu":
        keep_freed_memory()  # as the worker does
    todo = [
        (nodes, num_rows, context)
        for num_rows in rows
        for nodes in groups
        for context in (contexts if _reads_context(nodes[0]) else contexts[:1])
    ]
    lines: list[Line] = []
    with torch.inference_mode():
        progress(0, len(todo))
        machine = measure_machine(manifest.dtype, device)
        steps = {}
        for done, (nodes, num_rows, context) in enumerate(todo):
            progress(done, len(todo))
            if (num_rows, context) not in steps:
                steps[num_rows, context] = make_step(manifest, num_rows, context, device)
            lines.append(_time(nodes, graph, choices, steps[num_rows, context], device))
        machine = machine.at_best(measure_machine(manifest.dtype, device))
    progress(len(todo), len(todo))
    return Report(machine, lines, list(_totals(lines, machine, rows, contexts)))


def _distinct(graph: Graph, patterns: Sequence[str]) -> list[list[Node]]:
    """Nodes that do the same: the same op on inputs of the same types."""
    found: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if any(fnmatchcase(node.op, pattern) for pattern in patterns):
            found.setdefault(f"{key_of(node, graph.types)} {node.attributes}", []).append(node)
    if not found:
        raise UsageError(
            f"--ops is {','.join(patterns)}, which no op of this engine fits; they are {', '.join(graph.count_ops())}."
        )
    return list(found.values())


def _reads_context(node: Node) -> bool:
    return "step.kv_lens" in node.inputs


def _time(nodes: Sequence[Node], graph: Graph, choices: Choices, step: Step, device: torch.device) -> Line:
    node = nodes[0]
    kinds = {name: graph.types[name] for name in node.inputs if name is not None}
    cold = {name: kind for name, kind in kinds.items() if name in graph.weights or name.startswith("kv.")}
    warm = {
        name: step.inputs[name] if name in step.inputs else _made_by_a_node(kind, node, graph, step, device)
        for name, kind in kinds.items()
        if name not in cold
    }
    copies = cold_copies(cold, step.sizes, device)
    candidates = candidates_of(node, graph.types, device)
    seconds = time_kernels(candidates, [arguments_of(node, warm | copy) for copy in copies], node.attributes, device)

    inputs = [None if name is None else (warm | copies[0])[name] for name in node.inputs]
    outputs = [_shape_only(graph.types[name], step) for name in node.outputs]
    num_rows = shape_of(graph.types[str(node.inputs[0])], step.sizes)[0]
    return Line(
        op=node.op,
        shapes=", ".join("×".join(map(str, shape_of(kind, step.sizes))) for kind in kinds.values()),
        times=len(nodes),
        rows=step.rows,
        context=step.context if _reads_context(node) else None,
        kernel=chosen_kernels(node, graph.types, choices, device)[bucket_of(num_rows)].name,
        seconds=seconds,
        work=work_of(node.op, inputs, outputs, node.attributes),
    )


def _made_by_a_node(kind: TensorType, node: Node, graph: Graph, step: Step, device: torch.device) -> Tensor:
    """What another node of the step gives; of whole numbers there are only the experts that each token has chosen."""
    if kind.dtype != "int64":
        return made_up(kind, step.sizes, device)
    num_experts = next(int(weight.shape[0]) for weight in _weights(node, graph) if len(weight.shape) == 3)
    num_tokens, top_k = shape_of(kind, step.sizes)
    return torch.rand(num_tokens, num_experts, device=device).topk(top_k, 1).indices


def _weights(node: Node, graph: Graph) -> list[TensorType]:
    return [graph.weights[name] for name in node.inputs if name in graph.weights]


def _shape_only(kind: TensorType, step: Step) -> Tensor:
    return torch.empty(shape_of(kind, step.sizes), dtype=getattr(torch, kind.dtype), device="meta")


def _totals(lines: Sequence[Line], machine: Machine, rows: Sequence[int], contexts: Sequence[int]) -> Iterator[Total]:
    if all(line.context is None for line in lines):
        contexts = contexts[:1]
    for num_rows in rows:
        for context in contexts:
            step = [each for each in lines if each.rows == num_rows and each.context in (None, context)]
            seconds = sum(each.times * each.seconds[each.kernel] for each in step)
            yield Total(num_rows, context, seconds, sum(each.times * machine.floor(each.work) for each in step))
