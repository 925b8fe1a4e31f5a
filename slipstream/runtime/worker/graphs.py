"""The engine's graph as a Python function: one line a node, each calling the kernel chosen for it.

The source is generated from the checked graph with names of our own making (v0, v1, ...): nothing out of the engine
file is executed, and only registered ops can be called. On a GPU the function's calls are what a CUDA graph records.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slipstream.engine.choices import ROW_BUCKETS, Choices, bucket_of, key_of
from slipstream.engine.graph import Graph, Node, TensorType
from slipstream.errors import EngineError
from slipstream.kernels.registry import Kernel, known_ops

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
) -> CompiledGraph:
    """A graph that engine/check.py has found to be sound, as a function.

    is_batch_invariant: no row depends on what else is in a step. Raises EngineError where no kernel promises that.
    """
    writer = _Writer(graph, weights, choices, device, is_batch_invariant)
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
    ) -> None:
        self.scope: dict[str, Any] = {}
        self.can_be_recorded = True  # until a kernel is chosen that cannot
        self._graph, self._choices, self._device = graph, choices, device
        self._is_batch_invariant = is_batch_invariant
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
        made = {name for node in self._graph.nodes for name in node.outputs} - set(self._graph.outputs)
        for index, node in enumerate(self._graph.nodes):
            lines.append(f"    {self._call(index, node)}")
            done = [name for name in dict.fromkeys((*node.inputs, *node.outputs)) if name in made]
            dead = [self._names[name] for name in done if last_use.get(name, index) == index]
            if dead:
                lines.append(f"    del {', '.join(dead)}")
        lines.append(f"    return ({''.join(f'{self._names[name]}, ' for name in self._graph.outputs)})")
        return "\n".join(lines)

    def _call(self, index: int, node: Node) -> str:
        op = self._ops[node.op]
        self.scope[f"k{index}"] = self._kernel(node)
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
