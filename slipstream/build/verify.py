"""What may appear in a graph after each stage of the build. A graph that breaks it never reaches an engine."""

from slipstream.build.shapes import infer_types
from slipstream.engine.graph import Graph
from slipstream.errors import BuildError
from slipstream.kernels.registry import known_ops

CAPTURED = "captured"  # as the model file wrote it
REWRITTEN = "rewritten"  # after the fusions
FINAL = "final"  # what an engine holds

# Ops that only rewrites make; a model file that called them would hide its own meaning from the passes.
_MADE_BY_PASSES = {
    "add_layer_norm",
    "add_rms_norm",
    "concat",
    "gelu_and_mul",
    "rope_kv_write",
    "select_rows",
    "silu_and_mul",
    "split",
}
# Ops on weights, which the build computes; a step never does.
_ONLY_AT_BUILD = {"concat"}

FORBIDDEN: dict[str, set[str]] = {CAPTURED: _MADE_BY_PASSES, REWRITTEN: set(), FINAL: _ONLY_AT_BUILD}


def verify(graph: Graph, stage: str) -> None:
    """Raise BuildError if the graph is not legal at this stage."""
    graph.check()
    ops = known_ops()
    for node in graph.nodes:
        if node.op not in ops:
            raise BuildError(f"{stage} graph: no op is called {node.op!r}.")
        if node.op in FORBIDDEN[stage]:
            raise BuildError(f"{stage} graph: {node.op} may not appear at this stage ({node}).")
        expected = {argument.name for argument in ops[node.op].attributes}
        if set(node.attributes) != expected:
            raise BuildError(
                f"{stage} graph: {node.op} has attributes {sorted(node.attributes)}, not {sorted(expected)}."
            )
    types = infer_types(graph)
    for name in graph.outputs:
        if types[name].dtype != graph.types[name].dtype or types[name].shape[1:] != graph.types[name].shape[1:]:
            raise BuildError(f"{stage} graph: the output {name} became {types[name]}, it was {graph.types[name]}.")
    graph.types = types
