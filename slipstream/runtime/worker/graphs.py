"""The engine's graph as a Python function: one line a node, each calling the kernel chosen for it.

On a CPU consecutive nodes whose kernels are native are one line and one call (native.py), which is mostly all of them.
The source is generated from the checked graph with names of our own making (v0, v1, ...): nothing out of the engine
file is executed, and only registered ops can be called. On a GPU the function's calls are what a CUDA graph records.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slipstream.engine.choices import ROW_BUCKETS, Choices, bucket_of, key_of
from slipstream.engine.graph import Graph, Node, TensorType
from slipstream.errors import EngineError
from slipstream.kernels.collectives import ALONE, Ranks
from slipstream.kernels.registry import Kernel, known_ops
from slipstream.runtime.worker.native import NativeNode, NativeRun, native_node

StepFunction = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]


class CompiledGraph(NamedTuple):
    run: StepFunction  # from the inputs, by name, to the outputs
    can_be_recorded: bool  # into a CUDA graph


def compile_graph(
    graph: Graph,
    weights: dict[str, Tensor],
    choices: Choices,
    device: torch.device,
    *,
    is_batch_invariant: bool = False,
    ranks: Ranks = ALONE,
) -> CompiledGraph:
    """A graph that engine/check.py has found to be sound, as a function. ranks: those that compute it together.

    is_batch_invariant: no row depends on what else is in a step. Raises EngineError where no kernel promises that.
    """
    writer = _Writer(graph, weights, choices, device, is_batch_invariant, ranks)
    source = writer.source()
    exec(compile(source, "<engine graph>", "exec"), writer.scope)
    # Without this entry the function and its globals are no cycle: dropping it frees the weights at once.
    return CompiledGraph(writer.scope.pop("step"), writer.can_be_recorded)


class _Writer:
    def __init__(
        self,
        graph: Graph,
        weights: dict[str, Tensor],
        choices: Choices,
        device: torch.device,
        is_batch_invariant: bool,
        ranks: Ranks,
    ) -> None:
        self.scope: dict[str, Any] = {}
        self.can_be_recorded = True  # until a kernel is chosen that cannot
        self._graph, self._weights, self._choices, self._device = graph, weights, choices, device
        self._is_batch_invariant, self._ranks = is_batch_invariant, ranks
        self._ops = known_ops()
        self._names: dict[str, str] = {}
        for name in graph.inputs:
            self._names[name] = f"i{len(self._names)}"
        for index, (name, tensor) in enumerate(weights.items()):
            self._names[name] = f"w{index}"
            self.scope[f"w{index}"] = tensor

    def source(self) -> str:
        lines = ["def step(inputs):"]
        lines += [f"    {self._names[name]} = inputs[{name!r}]" for name in self._graph.inputs]
        last_use = {name: i for i, node in enumerate(self._graph.nodes) for name in node.inputs if name is not None}
        last_use |= dict.fromkeys(self._graph.outputs, len(self._graph.nodes))
        made = {name for node in self._graph.nodes for name in node.outputs}
        functions = [self._kernel(node) for node in self._graph.nodes]
        index = 0
        while index < len(functions):
            run = self._run_from(index, functions)
            end = index + max(1, len(run))
            nodes = self._graph.nodes[index:end]
            if run:
                lines.append(f"    {self._call_of_run(run, {name for name in made if last_use.get(name, -1) >= end})}")
            else:
                lines.append(f"    {self._call(index, nodes[0], functions[index])}")
            done = dict.fromkeys(name for node in nodes for name in (*node.inputs, *node.outputs) if name in made)
            dead = [self._names[name] for name in done if name in self._names and last_use.get(name, -1) < end]
            if dead:
                lines.append(f"    del {', '.join(dead)}")
            index = end
        lines.append(f"    return ({''.join(f'{self._names[name]}, ' for name in self._graph.outputs)})")
        return "\n".join(lines)

    def _run_from(self, index: int, functions: list[Callable[..., Any]]) -> list[NativeNode]:
        """The nodes from here on that are one native call; none where the first is not native."""
        if self._device.type != "cpu":
            return []
        found = takewhile(
            lambda each: each is not None,
            (
                native_node(node, function, self._graph.types)
                for node, function in zip(self._graph.nodes[index:], functions[index:], strict=True)
            ),
        )
        run = [each for each in found if each is not None]
        return run if any(each.kernel is not None for each in run) else []

    def _call_of_run(self, nodes: list[NativeNode], wanted: set[str]) -> str:
        """wanted: what is read after it."""
        run, function = NativeRun(nodes, self._graph.types, self._weights, wanted), f"n{len(self.scope)}"
        self.scope[function] = run
        arguments = ", ".join(self._names[name] for name in run.arguments)
        for name in run.outputs:
            self._names[name] = f"v{len(self._names)}"
        left = "".join(f"{self._names[name]}, " for name in run.outputs)
        return f"{left}= {function}({arguments})" if left else f"{function}({arguments})"

    def _call(self, index: int, node: Node, function: Callable[..., Any]) -> str:
        op = self._ops[node.op]
        self.scope[f"k{index}"] = function
        arguments = ["None" if name is None else self._names[name] for name in node.inputs]
        if any(argument.kind == "Tensor[]" for argument in op.arguments):
            arguments = [f"[{', '.join(arguments)}]"]
        for position, argument in enumerate(op.attributes):
            self.scope[f"a{index}_{position}"] = node.attributes[argument.name]
            arguments.append(f"a{index}_{position}")
        for name in node.outputs:
            self._names[name] = f"v{len(self._names)}"
        left = "".join(f"{self._names[name]}, " for name in node.outputs)
        call = f"k{index}({', '.join(arguments)})"
        if not left:
            return call
        return f"{left.removesuffix(', ')} = {call}" if op.num_outputs == 1 else f"{left}= {call}"

    def _kernel(self, node: Node) -> Callable[..., Any]:
        function = self._chosen(node)
        return partial(function, ranks=self._ranks) if self._ops[node.op].is_collective else function

    def _chosen(self, node: Node) -> Callable[..., Any]:
        if self._is_batch_invariant:
            return self._batch_invariant(node)
        chosen = chosen_kernels(node, self._graph.types, self._choices, self._device)
        self.can_be_recorded &= all(kernel.can_be_recorded for kernel in chosen)
        functions = [kernel.function for kernel in chosen]
        if len(set(functions)) == 1:
            return functions[0]
        return lambda x, *rest: functions[bucket_of(x.shape[0])](x, *rest)

    def _batch_invariant(self, node: Node) -> Callable[..., Any]:
        """The newest, for any number of rows: what was measured may change from one to the next."""
        for kernel in reversed(candidates_of(node, self._graph.types, self._device).values()):
            if kernel.batch_invariant is not None:
                self.can_be_recorded &= kernel.can_be_recorded
                return kernel.batch_invariant
        raise EngineError(
            f"deterministic needs kernels whose rows do not depend on each other, and {node.op} has none on "
            f"{self._device}; leave it out."
        )


def candidates_of(node: Node, types: Mapping[str, TensorType], device: torch.device) -> dict[str, Kernel]:
    """Every way to compute a node on this device, by name."""
    dtype = getattr(torch, types[node.outputs[0]].dtype) if node.outputs else torch.float32
    return known_ops()[node.op].candidates(device, dtype)


def chosen_kernels(node: Node, types: Mapping[str, TensorType], choices: Choices, device: torch.device) -> list[Kernel]:
    """For each of ROW_BUCKETS the measured choice, or else the newest candidate that runs here."""
    candidates = candidates_of(node, types, device)
    names = choices.kernels.get(key_of(node, types), [])
    if len(names) != len(ROW_BUCKETS) or not set(names) <= set(candidates):
        names = [list(candidates)[-1]] * len(ROW_BUCKETS)
    return [candidates[name] for name in names]
