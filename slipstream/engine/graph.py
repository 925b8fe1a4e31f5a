"""Graph: the program an engine runs, a list of ops over named values. Plain Python, readable text, stored as JSON.

A value is a name: an input ("step.token_ids", "kv.3"), a weight ("layers.3.mlp.down_proj.weight") or the output of a
node ("linear_7"). Nodes are in execution order and each value is written once (SSA); an op may also write into its
mutated inputs, the KV cache. `prologue` nodes compute weights from weights; they run once, when the engine is written,
so an engine on disk has none.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from typing import Any, Self

from slipstream.errors import EngineError
from slipstream.schema.format import WeightFormat

Attribute = bool | int | float | str | list[int] | list[float] | None  # a str names a dtype

_NAME = re.compile(r"[A-Za-z_][\w.+-]{0,255}", re.ASCII)
MAX_NODES = 20_000  # ten a layer are usual
MAX_VALUES = 200_000
MAX_LIST = 4096  # numbers in one attribute
_FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
DTYPES = frozenset((*_FLOATS, "int64", "int32", "int16", "int8", "uint8", "bool"))
# T tokens, S sequences (S1: one more), B blocks a sequence, R logit rows, N blocks in the cache
DIMENSIONS = frozenset(("T", "S", "S1", "B", "R", "N"))


@dataclass(frozen=True)
class TensorType:
    """Shape and dtype of a value. A dimension is a number, or a letter for what varies: T tokens, R logit rows, ..."""

    shape: tuple[int | str, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class Node:
    op: str
    inputs: tuple[str | None, ...]  # None where an optional tensor is absent
    outputs: tuple[str, ...]
    attributes: dict[str, Attribute] = field(default_factory=dict)

    def __str__(self) -> str:
        arguments = [str(name) for name in self.inputs]
        arguments += [f"{name}={json.dumps(value)}" for name, value in self.attributes.items()]
        left = f"{', '.join(self.outputs)} = " if self.outputs else ""
        return f"{left}{self.op}({', '.join(arguments)})"


@dataclass
class Graph:
    inputs: dict[str, TensorType]
    weights: dict[str, TensorType]
    nodes: list[Node]
    outputs: tuple[str, ...]
    types: dict[str, TensorType] = field(default_factory=dict)  # of every value
    prologue: list[Node] = field(default_factory=list)
    formats: dict[str, WeightFormat] = field(default_factory=dict)  # of packed weights, while the build rewrites
    equal: dict[str, str] = field(default_factory=dict)  # a weight → one before it that is the same, while it does
    kv_dtypes: dict[str, str] = field(default_factory=dict)  # of caches in fewer bits, by name; while it does
    is_for_cpu: bool = False  # whose kernels read weights in an order of their own; while it does

    def copy(self) -> Self:
        """One that can be rewritten; nodes and types are never changed in place."""
        return replace(
            self, inputs=dict(self.inputs), weights=dict(self.weights), nodes=list(self.nodes),
            types=dict(self.types), prologue=list(self.prologue), formats=dict(self.formats), equal=dict(self.equal),
        )  # fmt: skip

    def users(self) -> dict[str, list[Node]]:
        """Each value's readers, in order."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(name for name in node.inputs if name is not None):
                found.setdefault(name, []).append(node)
        return found

    def producers(self) -> dict[str, Node]:
        return {name: node for node in self.nodes for name in node.outputs}

    def count_ops(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for node in self.nodes:
            counts[node.op] = counts.get(node.op, 0) + 1
        return dict(sorted(counts.items()))

    def text(self) -> str:
        """One node a line, with the type of what it makes; the form `slipstream inspect --graph` prints."""
        lines = [f"{name}: {kind}" for name, kind in self.inputs.items()]
        for node in self.nodes:
            kinds = ", ".join(str(self.types[name]) for name in node.outputs if name in self.types)
            lines.append(f"{node}{f'  # {kinds}' if kinds else ''}")
        return "\n".join([*lines, f"return {', '.join(self.outputs)}"])

    def digest(self) -> str:
        """sha256 of the program: equal for equal builds."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(
            {
                "inputs": {name: [kind.dtype, *kind.shape] for name, kind in self.inputs.items()},
                "weights": {name: [kind.dtype, *kind.shape] for name, kind in sorted(self.weights.items())},
                "nodes": [
                    {"op": node.op, "in": node.inputs, "out": node.outputs}
                    | ({"attributes": node.attributes} if node.attributes else {})
                    for node in self.nodes
                ],
                "outputs": self.outputs,
                "types": {name: [kind.dtype, *kind.shape] for name, kind in self.types.items()},
            },
            separators=(",", ":"),
            allow_nan=False,
        )

    def check(self) -> None:
        """Raise EngineError unless every value is written once, before it is read."""
        written = set(self.inputs) | set(self.weights)
        if len(written) < len(self.inputs) + len(self.weights):
            raise EngineError(f"graph: {min(set(self.inputs) & set(self.weights))!r} is both an input and a weight.")
        for node in self.nodes:
            for name in node.inputs:
                if name is not None and name not in written:
                    raise EngineError(f"graph: {node.op} reads {name!r}, which nothing before it writes.")
            for name in node.outputs:
                if name in written:
                    raise EngineError(f"graph: {name!r} is written twice.")
                written.add(name)
        for name in self.outputs:
            if name not in written:
                raise EngineError(f"graph: the output {name!r} is never written.")


def graph_from_json(text: str) -> Graph:
    """Read a stored graph; every name, number and type is checked, since the file may come from anyone."""
    try:
        values = json.loads(text)
        if len(_list(values["nodes"])) > MAX_NODES:
            raise EngineError(f"graph: {len(values['nodes'])} nodes; the most allowed is {MAX_NODES}.")
        if len(values["types"]) > MAX_VALUES:
            raise EngineError(f"graph: {len(values['types'])} values; the most allowed is {MAX_VALUES}.")
        graph = Graph(
            inputs=_types(values["inputs"]),
            weights=_types(values["weights"]),
            nodes=[_node(entry) for entry in values["nodes"]],
            outputs=_names(values["outputs"]),
            types=_types(values["types"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise EngineError(f"graph: not a stored graph ({reason}); build the engine again.") from None
    graph.check()
    _check_types(graph)
    return graph


def _check_types(graph: Graph) -> None:
    """Every value has a type, and inputs and weights have one only."""
    declared = graph.inputs | graph.weights
    for name in (*declared, *(name for node in graph.nodes for name in node.outputs)):
        if name not in graph.types or graph.types[name] != declared.get(name, graph.types[name]):
            raise EngineError(f"graph: {name!r} has no type, or two; build the engine again.")


def _types(entries: dict[str, list[Any]]) -> dict[str, TensorType]:
    return {
        _name(name): TensorType(tuple(_size(size) for size in shape), _dtype(dtype))
        for name, (dtype, *shape) in entries.items()
    }


def _dtype(value: Any) -> str:
    if not isinstance(value, str) or value not in DTYPES:
        raise ValueError(f"dtype {value!r}")
    return value


def _size(size: Any) -> int | str:
    if isinstance(size, str) and size in DIMENSIONS:
        return size
    if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 2**48:
        raise ValueError(f"size {size!r}")
    return size


def _node(entry: dict[str, Any]) -> Node:
    attributes = {_name(name): _attribute(value) for name, value in entry.get("attributes", {}).items()}
    inputs = tuple(None if name is None else _name(name) for name in _list(entry["in"]))
    return Node(_name(entry["op"]), inputs, _names(entry["out"]), attributes)


def _attribute(value: Any) -> Attribute:
    if isinstance(value, str):
        return _dtype(value)
    if isinstance(value, list) and len(value) > MAX_LIST:
        raise ValueError(f"an attribute of {len(value)} numbers")
    for item in value if isinstance(value, list) else [value]:
        is_number = type(item) in (int, float) and abs(item) < 2**63  # which NaN is not
        if not is_number and (isinstance(value, list) or (item is not None and type(item) is not bool)):
            raise ValueError(f"attribute {str(item)[:80]!r}")
    return value


def _names(values: Any) -> tuple[str, ...]:
    return tuple(_name(value) for value in _list(values))


def _list(values: Any) -> list[Any]:
    if not isinstance(values, list):
        raise TypeError(f"{str(values)[:80]!r} is not a list")
    return values


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(f"name {str(value)[:80]!r}")
    return value
