"""What may appear in a graph after each stage of the build. A graph that breaks it never reaches an engine."""

from slipstream.engine.check import ONLY_AT_BUILD, problem_of_call
from slipstream.engine.graph import Graph
from slipstream.engine.shapes import infer_types
from slipstream.errors import BuildError
from slipstream.schema.format import PACKED_DTYPES, QUANTIZES_ACTIVATIONS

CAPTURED = "captured"  # as the model file wrote it
REWRITTEN = "rewritten"  # after the fusions
FINAL = "final"  # what an engine holds

# Ops that only rewrites make; a model file that called them would hide its own meaning from the passes.
_MADE_BY_PASSES = {
    "add_layer_norm",
    "add_rms_norm",
    "all_gather",
    "all_reduce",
    "concat",
    "embedding_part",
    "gelu_and_mul",
    "local_experts",
    "receive",
    "rope_kv_write",
    "select_rows",
    "send",
    "silu_and_mul",
    "split",
}
# Ops of a format, which lowering makes: the fusions, and a user's passes, see dense linears alone.
_MADE_BY_LOWERING = {
    *(f"linear_{kind}" for kind in PACKED_DTYPES),
    *(f"quantize_{kind}" for kind in QUANTIZES_ACTIVATIONS.values()),
    "add_layer_norm_quantize",
    "add_rms_norm_quantize",
    "embedding_panels",
    "gelu_and_mul_quantize",
    "gelu_quantize",
    "layer_norm_quantize",
    "linear_panels",
    "linear_panels_silu_and_mul_quantize",
    "reduce_add_rms_norm",
    "reduce_add_rms_norm_quantize",
    "rms_norm_quantize",
    "silu_and_mul_quantize",
}
FORBIDDEN: dict[str, set[str]] = {
    CAPTURED: _MADE_BY_PASSES | _MADE_BY_LOWERING,
    REWRITTEN: _MADE_BY_LOWERING,
    FINAL: ONLY_AT_BUILD,
}


def verify(graph: Graph, stage: str) -> None:
    """Raise BuildError if the graph is not legal at this stage."""
    graph.check()
    for node in graph.nodes:
        problem = problem_of_call(node)
        if problem is not None:
            raise BuildError(f"the {stage} graph {problem}.")
        if node.op in FORBIDDEN[stage]:
            raise BuildError(f"{stage} graph: {node.op} may not appear at this stage ({node}).")
    types = infer_types(graph)
    for name in graph.outputs:
        if types[name].dtype != graph.types[name].dtype or types[name].shape[1:] != graph.types[name].shape[1:]:
            raise BuildError(f"{stage} graph: the output {name} became {types[name]}, it was {graph.types[name]}.")
    graph.types = types
