"""What a graph must be to run here: known ops, called as they are declared, on values of the types they make.

The build asks after each stage; opening an engine asks again, since its file may come from anyone. Ops trust what they
are given (a kernel that gets a wrong index reads wherever it points), so what indexes anything comes straight from the
step, under its own name, or from the op that chose among as many, and nothing but a KV cache is written to. Shapes are
the ops' own business: their shape functions refuse what does not fit (kernels/fits.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slipstream.engine.graph import Graph, Node, TensorType
from slipstream.engine.manifest import Manifest
from slipstream.engine.memory import plan_memory
from slipstream.engine.shapes import infer_types
from slipstream.errors import BuildError, EngineError
from slipstream.kernels.attention.metadata import STEP_SHAPES
from slipstream.kernels.linear.panels import ROWS as PANEL_ROWS
from slipstream.kernels.registry import Argument, Op, known_ops

ONLY_AT_BUILD = {
    "concat",
    "normalize_rows",
    "to_panel_scales",
    "to_panels",
}  # on weights, which the build computes; a step never does
# Where sinks are asked for, or drafts may branch: runtime/worker/groups.py. On a CPU greedy: sample.py.
ONLY_AT_START = {"greedy", "place_in_window", "streaming_attention", "tree_attention"}

_STEP_INPUTS = {f"step.{name}": TensorType(shape, "int64") for name, shape in STEP_SHAPES.items()}
# Arguments of ops that index something → the one input that may stand there.
_INDICES = {name: f"step.{name}" for name in ("positions", "slots", "query_starts", "kv_lens", "block_tables")}
_INDICES["rows"] = "step.logit_rows"
_ROW_PER_TOKEN = {"select_rows": "x", "attention": "q"}  # what those indices count the rows of
_RESERVED = ("step.", ".for_sinks")  # how names begin, or end, that the runtime adds when an engine starts

_KINDS: dict[str, tuple[type, ...]] = {"float": (float, int), "int": (int,), "bool": (bool,), "str": (str,)}


def problem_of_call(node: Node) -> str | None:
    """Why this op cannot be called like this, or None."""
    op = known_ops().get(node.op)
    if op is None:
        return f"calls {node.op!r}, which is no op of this version"
    ok = (
        _takes(op, node.inputs)
        and op.num_outputs in (None, len(node.outputs))
        and set(node.attributes) == {argument.name for argument in op.attributes}
        and all(_fits(argument, node.attributes[argument.name]) for argument in op.attributes)
    )
    return None if ok else f"calls {node.op} in a way it cannot be called: {str(node)[:200]}"


def check_program(graph: Graph, manifest: Manifest, rank: int = 0) -> None:
    """Raise EngineError unless this rank's graph can run as its manifest says. Nothing is run or allocated."""
    producers = graph.producers()
    for node in graph.nodes:
        problem = problem_of_call(node) or _problem_of_values(node, graph, manifest)
        problem = problem or _problem_of_ids(node, graph, producers) or _problem_of_ranks(node, graph, manifest, rank)
        if problem is not None:
            raise EngineError(f"the engine's graph {problem}; {_remedy(node, manifest)}.")
    caches = {f"kv.{layer}" for layer in range(*manifest.layers)}
    for name, kind in graph.inputs.items():
        if name not in caches and _STEP_INPUTS.get(name) != kind:
            raise EngineError(f"the engine's graph reads {name}: {kind}, which no step has; build it again.")
    for name in (*graph.weights, *producers):
        if name.startswith(_RESERVED[0]) or name.endswith(_RESERVED[1]):
            raise EngineError(f"the engine's graph calls a value {name}, as only a step may; build it again.")
    try:
        inferred = infer_types(graph)
    except BuildError as error:
        raise EngineError(f"the engine's graph cannot run: {str(error).rstrip('.')}.") from None
    wrong = next((name for name, kind in inferred.items() if graph.types[name] != kind), None)
    if wrong is not None:
        raise EngineError(
            f"the engine's graph says {wrong} is {graph.types[wrong]}, but it is {inferred[wrong]}; build it again."
        )
    memory = plan_memory(graph, max_num_tokens=manifest.max_num_tokens, max_batch_size=manifest.max_batch_size)
    if any(manifest.memory.get(name) != size for name, size in memory.items()):
        raise EngineError("the engine's graph takes more or less memory than config.json says; build it again.")


def check_orders(graph: Graph, read: Callable[[str], Tensor]) -> None:
    """Raise EngineError unless each order of columns (act-order), the one index that a file holds, is a permutation."""
    orders = dict.fromkeys(
        str(name)
        for node in graph.nodes
        for argument, name in zip(known_ops()[node.op].tensor_arguments, node.inputs, strict=False)
        if argument.name == "order" and name is not None
    )
    for name in orders:
        order = read(name).sort().values if name in graph.weights else None
        if order is None or not torch.equal(order, torch.arange(len(order), dtype=order.dtype)):
            raise EngineError(f"the engine's {name} is no order of columns, each of them once; build it again.")


def _remedy(node: Node, manifest: Manifest) -> str:
    if node.op in known_ops() or not manifest.op_modules:
        return "build it again"
    modules = manifest.op_modules
    return (
        f"it was built with ops of {', '.join(modules)}: if you trust that code, import it with "
        f"--plugin {modules[0]} or LLM(..., plugins={modules})"
    )


def _problem_of_values(node: Node, graph: Graph, manifest: Manifest) -> str | None:
    if node.op in ONLY_AT_BUILD | ONLY_AT_START:
        return f"calls {node.op}, which only a {'build' if node.op in ONLY_AT_BUILD else 'start with sink tokens'} may"
    for argument, name in zip(known_ops()[node.op].tensor_arguments, node.inputs, strict=False):
        expected = _INDICES.get(argument.name)
        if expected is not None and name != expected:
            return f"gives {node.op} {name} as {argument.name}, which must be {expected}"
        takes_cache = argument.is_mutated or argument.name == "kv"
        if takes_cache != (name in graph.inputs and name not in _STEP_INPUTS):
            what = "must be a KV cache" if takes_cache else "a KV cache cannot be"
            return f"gives {node.op} {name} as {argument.name}, which {what}"
        if _ROW_PER_TOKEN.get(node.op) == argument.name and graph.types[str(name)].shape[:1] != ("T",):
            return f"gives {node.op} {name}: {graph.types[str(name)]} as {argument.name}, which must have a row a token"
    if node.op in ("embedding", "embedding_panels"):
        table, ids = node.inputs[0], node.inputs[-1]
        longest = {"step.token_ids": manifest.vocab_size, "step.positions": manifest.max_seq_len}
        rows = graph.types[str(table)].shape[0]
        if node.op == "embedding_panels" and isinstance(rows, int):
            rows *= PANEL_ROWS
        if ids not in longest or not isinstance(rows, int) or rows < longest[ids]:
            return f"looks up {ids} in {table}, which has {rows} rows"
    return None


def _problem_of_ids(node: Node, graph: Graph, producers: dict[str, Node]) -> str | None:
    """Ids of experts come from a router that knows as many; or are of those that this rank has."""
    if node.op.partition("_")[0] != "experts":
        return None
    ids, gate = str(node.inputs[2]), str(node.inputs[3])
    router = producers.get(ids)
    known = graph.types[gate].shape[:1]
    if router is not None and router.op == "local_experts":
        count = (router.attributes["count"],)
        return None if known == count else f"has a part of {list(count)} experts for {list(known)}"
    if router is None or router.op not in ("route_softmax", "route_sigmoid") or router.outputs[1] != ids:
        return f"gives {node.op} {ids} as expert_ids, which must be what a router chose"
    chosen = graph.types[str(router.inputs[1])].shape[:1]
    return None if known == chosen else f"has a router of {list(chosen)} experts for {list(known)}"


def _problem_of_ranks(node: Node, graph: Graph, manifest: Manifest, rank: int) -> str | None:
    """What ranks put together is as they have it."""
    if node.op != "all_gather":
        return None
    sizes, columns = node.attributes["sizes"], graph.types[str(node.inputs[0])].shape[1]
    place = manifest.mapping.place(rank)
    if isinstance(sizes, list) and len(sizes) == manifest.tp_size and sizes[place] == columns:
        return None
    return f"puts {sizes} columns together, of which rank {place} of {manifest.tp_size} has {columns}"


def _takes(op: Op, inputs: tuple[str | None, ...]) -> bool:
    """As many tensors as the op has arguments, and each where one must be."""
    if any(argument.kind == "Tensor[]" for argument in op.arguments):
        return len(inputs) > 0 and None not in inputs
    arguments = op.tensor_arguments
    return len(inputs) == len(arguments) and all(
        name is not None or argument.kind == "Tensor?" for name, argument in zip(inputs, arguments, strict=True)
    )


def _fits(argument: Argument, value: Any) -> bool:
    if argument.kind == "int[]":
        return isinstance(value, list) and all(type(item) is int for item in value)
    return type(value) in _KINDS[argument.kind]
