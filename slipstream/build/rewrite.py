"""Rewriting by example: a pattern and a replacement, both written as plain functions over `ops`.

    def pattern(x, gate, up):
        return ops.mul(ops.silu(ops.linear(x, gate)), ops.linear(x, up))

    def replacement(x, gate, up):
        return ops.silu_and_mul(ops.linear(x, ops.concat(gate, up)))

The functions are run once on symbols, which records the ops they call. A parameter stands for any value, or for any
number where it is passed as an attribute; equal parameters must stand for equal things. A parameter annotated
`Symbol | None` also stands for an optional tensor that is absent. Sums and products are found with their operands in
either order. Values made inside a match may be read only there, unless the pattern returns them.

A pass runs in sweeps: one walk over the graph collects the matches that have no part in one another, and all of them
are replaced at once. A graph of n nodes takes a few sweeps of n steps each, however many places match.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, get_args

from slipstream.engine.graph import Graph, Node, TensorType
from slipstream.engine.shapes import infer_node
from slipstream.errors import BuildError
from slipstream.kernels.registry import known_ops

__all__ = ["Match", "Rewrite", "Rule", "Symbol", "ops"]  # public; docs/adding/pass.md says how they are used

_COMMUTATIVE = {"add", "mul"}  # a pattern finds their operands in either order


@dataclass(frozen=True, eq=False)
class Symbol:
    """A parameter of a pattern, or the output of an op recorded in it."""

    name: str
    producer: "SymbolicNode | None" = None
    index: int = 0
    is_optional: bool = False


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

    def record(self, function: Callable[..., Any], arguments: list[Any]) -> tuple[list[SymbolicNode], list[Symbol]]:
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


class _Index:
    """Who makes, reads and mutates each value of a graph, and where; good until the graph changes."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producers, self._readers = graph.producers(), graph.users()
        self._positions = {id(node): position for position, node in enumerate(graph.nodes)}
        self._mutators: dict[str, set[int]] = {}
        for node in graph.nodes:
            for name in mutated_values(node):
                self._mutators.setdefault(name, set()).add(id(node))

    def readers(self, value: str) -> list[Node]:
        return self._readers.get(value, [])

    def position(self, node: Node) -> int:
        return self._positions[id(node)]

    def mutates(self, node: Node, value: str) -> bool:
        return id(node) in self._mutators.get(value, ())

    def is_mutated(self, value: str) -> bool:
        return value in self._mutators


def mutated_values(node: Node) -> list[str]:
    arguments = known_ops()[node.op].tensor_arguments
    return [
        name for argument, name in zip(arguments, node.inputs, strict=False) if argument.is_mutated and name is not None
    ]


@dataclass
class Match:
    """Where a pattern was found: what each parameter stands for, and the node behind each recorded op."""

    index: _Index
    values: dict[str, Any] = field(default_factory=dict)
    nodes: dict[SymbolicNode, Node] = field(default_factory=dict)

    def __getitem__(self, parameter: str) -> Any:
        return self.values[parameter]

    @property
    def graph(self) -> Graph:
        return self.index.graph

    def type_of(self, parameter: str) -> TensorType:
        return self.graph.types[self.values[parameter]]

    def are_weights(self, *parameters: str) -> bool:
        return all(self.values[parameter] in self.graph.weights for parameter in parameters)

    def can_be_joined(self, *parameters: str) -> bool:
        """Weights stored in one way: rows of one can be put below rows of another."""
        formats = {self.graph.formats.get(self.values[parameter]) for parameter in parameters}
        return self.are_weights(*parameters) and len(formats) == 1

    def have_same_type(self, *parameters: str) -> bool:
        return len({self.type_of(parameter) for parameter in parameters}) == 1

    def readers(self, parameter: str) -> list[Node]:
        """All nodes that read what a parameter stands for, in order."""
        return self.index.readers(self.values[parameter])

    def copy(self) -> "Match":
        return Match(self.index, dict(self.values), dict(self.nodes))


class Rule:
    """One pattern and what replaces it.

    `where` may refuse a match; `attributes` computes numbers for the replacement.
    """

    def __init__(
        self,
        pattern: Callable[..., Any],
        replacement: Callable[..., Any],
        *,
        where: Callable[[Match], bool] = lambda match: True,
        attributes: Callable[[Match], dict[str, Any]] = lambda match: {},
    ) -> None:
        self.where, self.attributes, self._replacement = where, attributes, replacement
        self.symbols = {
            name: Symbol(name, is_optional=NoneType in get_args(parameter.annotation))
            for name, parameter in inspect.signature(pattern).parameters.items()
        }
        self.nodes, self.outputs = ops.record(pattern, list(self.symbols.values()))

    def record_replacement(self, match: Match) -> tuple[list[SymbolicNode], list[Symbol]]:
        computed = self.attributes(match)
        names = inspect.signature(self._replacement).parameters
        arguments = [computed[name] if name in computed else self.symbols[name] for name in names]
        nodes, results = ops.record(self._replacement, arguments)
        if len(results) != len(self.outputs):
            raise BuildError(
                f"a replacement returns {len(results)} values where its pattern returns {len(self.outputs)}."
            )
        if any(symbol.producer is None for symbol in results):
            raise BuildError("a replacement returns one of its parameters; it must return what its ops make.")
        return nodes, results


@dataclass(frozen=True)
class Rewrite:
    """A pass made of rules, applied wherever they match until they match no more."""

    name: str
    benefit: str
    rules: tuple[Rule, ...]

    def run(self, graph: Graph) -> int:
        """Rewrite the graph in place; returns how many places changed."""
        return sum(_apply(graph, rule) for rule in self.rules)


def _apply(graph: Graph, rule: Rule) -> int:
    changed, sweeps = 0, len(graph.nodes) + 1  # what a sweep makes may match again, each time nearer to an end
    while found := _sweep(graph, rule):
        if sweeps == 0:
            raise BuildError("its pattern finds what its replacement makes, again and again; refuse that in `where`.")
        _replace(graph, rule, found)
        changed, sweeps = changed + len(found), sweeps - 1
    return changed


def _sweep(graph: Graph, rule: Rule) -> list[tuple[int, Match]]:
    """Matches that can be replaced together, each with the place of its replacement.

    None of them writes what another reads or writes, so each stays legal whatever becomes of the others.
    """
    index = _Index(graph)
    finder = _Finder(index, rule)
    found: list[tuple[int, Match]] = []
    read, written = set[str](), set[str]()
    for node in graph.nodes:
        for match in finder.matches_ending_in(node):
            reads, writes = _reads_and_writes(match)
            if writes & (read | written) or reads & written:
                continue
            place = _place(rule, match)
            if place is not None:
                found.append((place, match))
                read |= reads
                written |= writes
                break
    return found


def _reads_and_writes(match: Match) -> tuple[set[str], set[str]]:
    reads = {name for node in match.nodes.values() for name in node.inputs if name is not None}
    writes = {name for node in match.nodes.values() for name in (*node.outputs, *mutated_values(node))}
    return reads, writes


class _Finder:
    def __init__(self, index: _Index, rule: Rule) -> None:
        self._index, self._rule = index, rule
        self._outputs = set(index.graph.outputs)

    def matches_ending_in(self, node: Node) -> Iterator[Match]:
        """All matches in which this node is the last op of the pattern."""
        if node.op == self._rule.nodes[-1].op:
            for match in self._complete(Match(self._index), self._rule.nodes[-1], node):
                if self._is_closed(match) and self._rule.where(match):
                    yield match

    def _complete(self, match: Match, symbolic: SymbolicNode, node: Node) -> Iterator[Match]:
        """All ways to match every recorded op, given that this one is this node."""
        for extended in self._unify(match, symbolic, node):
            missing = next((other for other in reversed(self._rule.nodes) if other not in extended.nodes), None)
            if missing is None:
                yield extended
                continue
            for candidate in self._siblings(extended, missing):
                yield from self._complete(extended, missing, candidate)

    def _siblings(self, match: Match, missing: SymbolicNode) -> list[Node]:
        """Nodes that read something already matched which the missing op reads too."""
        for symbol in missing.inputs:
            name = self._name(match, symbol)
            if name is not None:
                taken = {id(node) for node in match.nodes.values()}
                readers = self._index.readers(name)
                return [node for node in readers if node.op == missing.op and id(node) not in taken]
        return []

    def _name(self, match: Match, symbol: Symbol | None) -> str | None:
        if symbol is None:
            return None
        if symbol.producer is None:
            return match.values.get(symbol.name)
        node = match.nodes.get(symbol.producer)
        return None if node is None else node.outputs[symbol.index]

    def _unify(self, match: Match, symbolic: SymbolicNode, node: Node) -> Iterator[Match]:
        """All ways in which this recorded op is this node: the match with what it then stands for."""
        if symbolic in match.nodes:
            if match.nodes[symbolic] is node:
                yield match
            return
        same_form = node.op == symbolic.op and len(node.inputs) == len(symbolic.inputs)
        if not same_form or len(node.outputs) != len(symbolic.outputs):
            return
        if any(node is taken for taken in match.nodes.values()):
            return  # it stands for another op of the pattern
        match = match.copy()
        match.nodes[symbolic] = node
        if all(_bind(match, value, node.attributes[name]) for name, value in symbolic.attributes.items()):
            for inputs in _orders(node):
                yield from self._unify_values(match, symbolic.inputs, inputs)

    def _unify_values(
        self, match: Match, symbols: tuple[Symbol | None, ...], names: tuple[str | None, ...]
    ) -> Iterator[Match]:
        if not symbols:
            yield match
            return
        for extended in self._unify_value(match, symbols[0], names[0]):
            yield from self._unify_values(extended, symbols[1:], names[1:])

    def _unify_value(self, match: Match, symbol: Symbol | None, name: str | None) -> Iterator[Match]:
        if symbol is None:
            if name is None:
                yield match
        elif symbol.producer is None:
            extended = match.copy()
            if (name is not None or symbol.is_optional) and _bind(extended, symbol, name):
                yield extended
        elif name is not None:
            node = self._index.producers.get(name)
            if node is not None and node.outputs.index(name) == symbol.index:
                yield from self._unify(match, symbol.producer, node)

    def _is_closed(self, match: Match) -> bool:
        """Nobody outside reads what the replacement will not make, and no parameter stands for what is made inside."""
        inside = {id(node) for node in match.nodes.values()}
        made = {name for node in match.nodes.values() for name in node.outputs}
        if any(isinstance(value, str) and value in made for value in match.values.values()):
            return False
        for symbolic, node in match.nodes.items():
            for symbol, name in zip(symbolic.outputs, node.outputs, strict=True):
                if symbol in self._rule.outputs:
                    continue
                if name in self._outputs or any(id(user) not in inside for user in self._index.readers(name)):
                    return False
        return True


def _orders(node: Node) -> Iterator[tuple[str | None, ...]]:
    """The inputs as they are written, and the other way round where that means the same."""
    yield node.inputs
    if node.op in _COMMUTATIVE and node.inputs[0] != node.inputs[1]:
        yield node.inputs[::-1]


def _bind(match: Match, symbol: Any, value: Any) -> bool:
    if not isinstance(symbol, Symbol):
        return bool(symbol == value)
    return bool(match.values.setdefault(symbol.name, value) == value)


def _place(rule: Rule, match: Match) -> int | None:
    """Index at which the replacement may stand: after all it reads, before all that reads it, or None.

    Around a value that anyone mutates (the KV cache) the order of its readers and writers stays as it is.
    """
    index = match.index
    inside = {id(node) for node in match.nodes.values()}
    parameters = [value for value in match.values.values() if isinstance(value, str)]
    makes = [match.nodes[s.producer].outputs[s.index] for s in rule.outputs if s.producer is not None]
    producers = [index.producers[name] for name in parameters if name in index.producers]
    readers = [node for name in makes for node in index.readers(name) if id(node) not in inside]
    earliest = max((index.position(node) + 1 for node in producers), default=0)
    latest = min((index.position(node) for node in readers), default=len(index.graph.nodes))
    for value in filter(index.is_mutated, parameters):
        touching = [index.position(node) for symbol in rule.nodes if value in (node := match.nodes[symbol]).inputs]
        if touching != sorted(touching):
            return None  # the pattern writes before it reads, these nodes the other way round
        mutates = any(index.mutates(node, value) for node in match.nodes.values())
        for node in index.readers(value):
            if id(node) not in inside and (mutates or index.mutates(node, value)):
                position = index.position(node)
                earliest = max(earliest, position + 1) if position < touching[-1] else earliest
                latest = min(latest, position) if position > touching[0] else latest
    return latest if earliest <= latest else None


def _replace(graph: Graph, rule: Rule, found: list[tuple[int, Match]]) -> None:
    names = NewNames(graph.types)
    removed = {id(node) for _, match in found for node in match.nodes.values()}
    arriving: dict[int, list[Node]] = {}
    for place, match in found:
        made = _instantiate(rule, match, names)
        arriving.setdefault(place, []).extend(made)
        for node in made:
            graph.types |= infer_node(node, graph.types)
    nodes: list[Node] = []
    for position, node in enumerate(graph.nodes):
        nodes += arriving.get(position, [])
        if id(node) not in removed:
            nodes.append(node)
    graph.nodes[:] = [*nodes, *arriving.get(len(graph.nodes), [])]


def _instantiate(rule: Rule, match: Match, new_names: "NewNames") -> list[Node]:
    """The replacement as nodes: parameters become what they stand for, results keep the names they had."""
    recorded, results = rule.record_replacement(match)
    old = [match.nodes[s.producer].outputs[s.index] for s in rule.outputs if s.producer is not None]
    names: dict[Symbol, str] = dict(zip(results, old, strict=True))
    nodes = []
    for symbolic in recorded:
        inputs = tuple(
            None if s is None else names[s] if s.producer else match.values.get(s.name, s.name) for s in symbolic.inputs
        )
        attributes = {
            name: match.values[value.name] if isinstance(value, Symbol) else value
            for name, value in symbolic.attributes.items()
        }
        for symbol, name in zip(symbolic.outputs, new_names.of(symbolic.op, len(symbolic.outputs)), strict=True):
            names.setdefault(symbol, name)
        nodes.append(Node(symbolic.op, inputs, tuple(names[symbol] for symbol in symbolic.outputs), attributes))
    return nodes


class NewNames:
    """Names for new values: linear, linear_1, linear_2, ...; split.0 and split.1 where an op makes several."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = {name.partition(".")[0] for name in taken}
        self._next: dict[str, int] = {}

    def of(self, op: str, count: int) -> tuple[str, ...]:
        """Names of an op's `count` outputs."""
        base = op
        while base in self._taken:
            self._next[op] = self._next.get(op, 0) + 1
            base = f"{op}_{self._next[op]}"
        self._taken.add(base)
        return (base,) if count == 1 else tuple(f"{base}.{index}" for index in range(count))
