"""Which weights of a model are quantized."""

import fnmatch
from collections.abc import Sequence

from slipstream.engine.graph import Graph
from slipstream.errors import ModelError

HEAD = "lm_head"
DEFAULT_EXCLUDE = (HEAD, "router")


def quantized_names(graph: Graph, exclude: Sequence[str], *, includes_head: bool = False) -> frozenset[str]:
    """Weights of products and of experts, less those that a pattern fits.

    includes_head: the head is among them, an embedding that is the head, too, as well.
    """
    found: set[str] = set()
    tables = {node.inputs[0] for node in graph.nodes if node.op == "embedding"}  # one may be the head, too
    for node in graph.nodes:
        if node.op == "linear" and node.inputs[1] in graph.weights:
            found.add(str(node.inputs[1]))
        elif node.op == "experts":
            found |= {str(name) for name in node.inputs[3:6]}
    found -= set() if includes_head else {str(name) for name in tables}
    for pattern in (each for each in exclude if not (includes_head and each == HEAD)):
        left_out = {name for name in found if fnmatch.fnmatchcase(name, f"*{pattern}*")}
        if not left_out and pattern not in DEFAULT_EXCLUDE:
            raise ModelError(f"--exclude_modules {pattern!r} fits no weight of this model, such as {min(found)}.")
        found -= left_out
    return frozenset(found)
