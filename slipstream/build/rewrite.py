"""Rewriting by example: a pattern and a replacement, both written as plain functions over `ops`.

    def pattern(x, gate, up):
        return ops.mul(ops.silu(ops.linear(x, gate)), ops.linear(x, up))

    def replacement(x, gate, up):
        return ops.silu_and_mul(ops.linear(x, ops.concat(gate, up)))

The functions are run once on symbols, which records the ops they call. A parameter stands for any value, or for any
number where it is passed as an attribute; equal parameters must stand for equal things. Values made inside a match may
be read only there, unless the pattern returns them.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from slipstream.build.shapes import infer_node
from slipstream.engine.graph import Graph, Node, TensorType
from slipstream.errors import BuildError
from slipstream.kernels.registry import known_ops


@dataclass(frozen=True, eq=False)
class Symbol:
    """A parameter of a pattern, or the output of an op recorded in it."""

    name: str
    producer: "SymbolicNode | None" = None
    index: int = 0


@dataclass(frozen=True, eq=False)
class SymbolicNode:
    op: str
    inputs: tuple[Symbol | None, ...]
    attributes: dict[str, Any]
    outputs: list[Symbol] = field(default_factory=list)


class _Recorder:
    """`ops.linear(x, w)` records a call; `ops.graph_input(name)` names an input of the graph at hand."""

    def __init__(self) -> None:
        self._nodes: list[SymbolicNode] | None = None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in known_ops():
            raise AttributeError(f"no op is called {name!r}")
        return lambda *arguments, **attributes: self._record(name, arguments, attributes)

    def graph_input(self, name: str) -> Symbol:
        return Symbol(name)

    def record(self, function: Callable[..., Any], arguments: list[Symbol]) -> tuple[list[SymbolicNode], list[Symbol]]:
        self._nodes = []
        result = function(*arguments)
        nodes, self._nodes = self._nodes, None
        outputs = [] if result is None else [result] if isinstance(result, Symbol) else list(result)
        return nodes, outputs

    def _record(self, name: str, arguments: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
        assert self._nodes is not None, "ops are called only inside a pattern or a replacement"
        op = known_ops()[name]
        inputs: tuple[Symbol | None, ...] = arguments
        if not any(argument.kind == "Tensor[]" for argument in op.arguments):
            inputs += (None,) * (len(op.tensor_arguments) - len(arguments))
        node = SymbolicNode(name, inputs, attributes)
        count = len(attributes["sizes"]) if op.num_outputs is None else op.num_outputs
        node.outputs.extend(Symbol(f"{name}{len(self._nodes)}.{index}", node, index) for index in range(count))
        self._nodes.append(node)
        return tuple(node.outputs) if count > 1 else node.outputs[0] if count else None


ops = _Recorder()


@dataclass
class Match:
    """Where a pattern was found: what each parameter stands for, and the node behind each recorded op."""

    graph: Graph
    values: dict[str, Any] = field(default_factory=dict)
    nodes: dict[SymbolicNode, Node] = field(default_factory=dict)

    def __getitem__(self, parameter: str) -> Any:
        return self.values[parameter]

    def type_of(self, parameter: str) -> TensorType:
        return self.graph.types[self.values[parameter]]

    def are_weights(self, *parameters: str) -> bool:
        return all(self.values[parameter] in self.graph.weights for parameter in parameters)

    def copy(self) -> "Match":
        return Match(self.graph, dict(self.values), dict(self.nodes))


class Rule:
    """One pattern and what replaces it. `where` may refuse a match; `attributes` computes numbers for the replacement."""

    def __init__(
        self,
        pattern: Callable[..., Any],
        replacement: Callable[..., Any],
        *,
        where: Callable[[Match], bool] = lambda match: True,
        attributes: Callable[[Match], dict[str, Any]] = lambda match: {},
    ) -> None:
        self.where, self.attributes, self._replacement = where, attributes, replacement
        self.parameters = list(inspect.signature(pattern).parameters)
        self.symbols = {name: Symbol(name) for name in self.parameters}
        self.nodes, self.outputs = ops.record(pattern, list(self.symbols.values()))

    def record_replacement(self, match: Match) -> tuple[list[SymbolicNode], list[Symbol]]:
        computed = self.attributes(match)
        names = inspect.signature(self._replacement).parameters
        return ops.record(self._replacement, [computed.get(name, self.symbols.get(name)) for name in names])


@dataclass(frozen=True)
class Rewrite:
    """A pass made of rules, applied wherever they match until they match no more."""

    name: str
    benefit: str
    rules: tuple[Rule, ...]

    def run(self, graph: Graph) -> int:
        """Rewrite the graph in place; returns how many places changed."""
        return sum(self._run_rule(graph, rule) for rule in self.rules)

    def _run_rule(self, graph: Graph, rule: Rule) -> int:
        changed = 0
        while match := next(_matches(graph, rule), None):
            _replace(graph, rule, match)
            changed += 1
        return changed


def _matches(graph: Graph, rule: Rule) -> Iterator[Match]:
    finder = _Finder(graph, rule)
    for node in graph.nodes:
        if node.op == rule.nodes[-1].op:
            for match in finder.complete(Match(graph), rule.nodes[-1], node):
                if finder.is_closed(match) and rule.where(match) and _place(graph, rule, match) is not None:
                    yield match


class _Finder:
    def __init__(self, graph: Graph, rule: Rule) -> None:
        self._rule = rule
        self._producers, self._users = graph.producers(), graph.users()
        self._outputs = set(graph.outputs)

    def complete(self, match: Match, symbolic: SymbolicNode, node: Node) -> Iterator[Match]:
        """All ways to match every recorded op, given that this one is this node."""
        match = match.copy()
        if not self._unify(match, symbolic, node):
            return
        missing = next((other for other in self._rule.nodes if other not in match.nodes), None)
        if missing is None:
            yield match
            return
        for candidate in self._siblings(match, missing):
            yield from self.complete(match, missing, candidate)

    def _siblings(self, match: Match, missing: SymbolicNode) -> list[Node]:
        """Nodes that read something already matched which the missing op reads too."""
        for symbol in missing.inputs:
            name = self._name(match, symbol)
            if name is not None:
                taken = list(match.nodes.values())
                return [node for node in self._users.get(name, []) if node.op == missing.op and node not in taken]
        return []

    def _name(self, match: Match, symbol: Symbol | None) -> str | None:
        if symbol is None:
            return None
        if symbol.producer is None:
            return match.values.get(symbol.name)
        node = match.nodes.get(symbol.producer)
        return None if node is None else node.outputs[symbol.index]

    def _unify(self, match: Match, symbolic: SymbolicNode, node: Node) -> bool:
        if symbolic in match.nodes:
            return match.nodes[symbolic] is node
        same_form = node.op == symbolic.op and len(node.inputs) == len(symbolic.inputs)
        if not same_form or len(node.outputs) != len(symbolic.outputs):
            return False
        match.nodes[symbolic] = node
        pairs = zip(symbolic.inputs, node.inputs, strict=True)
        if not all(self._unify_value(match, symbol, name) for symbol, name in pairs):
            return False
        return all(_bind(match, value, node.attributes[name]) for name, value in symbolic.attributes.items())

    def _unify_value(self, match: Match, symbol: Symbol | None, name: str | None) -> bool:
        if symbol is None or name is None:
            return symbol is None and name is None
        if symbol.producer is None:
            return _bind(match, symbol, name)
        node = self._producers.get(name)
        return (
            node is not None
            and node.outputs.index(name) == symbol.index
            and self._unify(match, symbol.producer, node)
        )

    def is_closed(self, match: Match) -> bool:
        """Nobody outside reads a value that the replacement will not make."""
        inside = list(match.nodes.values())
        for symbolic, node in match.nodes.items():
            for symbol, name in zip(symbolic.outputs, node.outputs, strict=True):
                if symbol in self._rule.outputs:
                    continue
                if name in self._outputs or any(user not in inside for user in self._users.get(name, [])):
                    return False
        return True


def _bind(match: Match, symbol: Any, value: Any) -> bool:
    if not isinstance(symbol, Symbol):
        return bool(symbol == value)
    return bool(match.values.setdefault(symbol.name, value) == value)


def _place(graph: Graph, rule: Rule, match: Match) -> int | None:
    """Index at which the replacement may stand: after all it reads, before all that reads it, or None.

    A mutated value (the KV cache) keeps its order: no reader or writer of it changes sides.
    """
    inside = list(match.nodes.values())
    reads = {value for value in match.values.values() if isinstance(value, str)}
    makes = {match.nodes[symbol.producer].outputs[symbol.index] for symbol in rule.outputs if symbol.producer}
    mutated = {
        name
        for node in inside
        for argument, name in zip(known_ops()[node.op].tensor_arguments, node.inputs, strict=False)
        if argument.is_mutated
    }
    earliest, latest, has_mutated = 0, len(graph.nodes), False
    for index, node in enumerate(graph.nodes):
        if node in inside:
            has_mutated |= known_ops()[node.op].is_mutating
            continue
        touches = bool(mutated & set(node.inputs))
        if reads & set(node.outputs) or (touches and not has_mutated):
            earliest = index + 1
        if makes & set(node.inputs) or (touches and has_mutated):
            latest = min(latest, index)
    return latest if earliest <= latest else None


def _replace(graph: Graph, rule: Rule, match: Match) -> None:
    place = _place(graph, rule, match)
    assert place is not None
    recorded, results = rule.record_replacement(match)
    if len(results) != len(rule.outputs):
        raise BuildError(f"a replacement returns {len(results)} values where its pattern returns {len(rule.outputs)}.")
    old = [match.nodes[s.producer].outputs[s.index] for s in rule.outputs if s.producer is not None]
    names: dict[Symbol, str] = dict(zip(results, old, strict=True))
    nodes = [_instantiate(symbolic, match, names, graph) for symbolic in recorded]
    inside = list(match.nodes.values())
    before = [node for node in graph.nodes[:place] if node not in inside]
    after = [node for node in graph.nodes[place:] if node not in inside]
    graph.nodes[:] = [*before, *nodes, *after]
    for node in nodes:
        graph.types |= infer_node(node, graph.types)


def _instantiate(symbolic: SymbolicNode, match: Match, names: dict[Symbol, str], graph: Graph) -> Node:
    """A recorded op as a node: parameters replaced by what they stand for, new values named after their op."""
    inputs = tuple(
        None if s is None else names[s] if s.producer else match.values.get(s.name, s.name) for s in symbolic.inputs
    )
    attributes = {
        name: match.values[value.name] if isinstance(value, Symbol) else value
        for name, value in symbolic.attributes.items()
    }
    base = unused_name(graph, symbolic.op)
    for symbol in symbolic.outputs:
        suffix = f".{symbol.index}" if len(symbolic.outputs) > 1 else ""
        names.setdefault(symbol, base + suffix)
    outputs = tuple(names[symbol] for symbol in symbolic.outputs)
    graph.types |= {name: graph.types.get(name, TensorType((), "float32")) for name in outputs}  # reserve the names
    return Node(symbolic.op, inputs, outputs, attributes)


def unused_name(graph: Graph, base: str) -> str:
    """base, base_1, base_2, ... : the first that no value of the graph (or part of one) is called."""
    taken = {name.split(".")[0] if name.startswith(base) else name for name in graph.types}
    number, name = 0, base
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    return name
