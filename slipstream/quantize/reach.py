"""Reach: what of a block moves when a group of products does, up to where it meets what does not.

There a candidate for the group's columns is judged: on attention's result for q, k and v, on the MLP's for gate and up,
on their own for those behind (as in AWQ, arXiv:2306.00978). Read off the graph, so that it holds for any model.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from slipstream.engine.graph import Graph, Node
from slipstream.quantize.groups import Group
from slipstream.quantize.stream import Block


@dataclass(frozen=True)
class Reach:
    """before: makes what `moved` reads of the block, and leaves that.  moved: leaves the results to judge by."""

    before: Block
    moved: Block


def reach_of(block: Block, graph: Graph, group: Group) -> Reach:
    moved: set[str] = set()
    results: set[str] = set()
    nodes: list[Node] = []
    for node in block.nodes:
        read, others = _read([node]) & moved, _read([node]) - moved
        if node.op == "add" and read and others - graph.weights.keys():
            results |= read
        elif read or _read([node]).intersection(group.weights):
            nodes.append(node)
            moved |= _made(node)
    results |= moved & block.needed
    nodes = _with_writers(nodes, block)
    made = {name for node in nodes for name in _made(node)}
    read_of_block = {name for node in block.nodes for name in _made(node)} & _read(nodes) - made
    before = _part(block, _makers(block, read_of_block), read_of_block, graph)
    return Reach(before, _part(block, nodes, results, graph))


def _made(node: Node) -> set[str]:
    """What a node makes, the cache that it writes among it."""
    return {*node.outputs, str(node.inputs[2])} if node.op == "kv_write" else set(node.outputs)


def _read(nodes: Iterable[Node]) -> set[str]:
    return {name for node in nodes for name in node.inputs if name is not None}


def _with_writers(nodes: list[Node], block: Block) -> list[Node]:
    """Caches begin empty each time: who reads one needs who writes it."""
    caches = {name for name in _read(nodes) if name.startswith("kv.")}
    return [node for node in block.nodes if node in nodes or (node.op == "kv_write" and node.inputs[2] in caches)]


def _makers(block: Block, names: set[str]) -> list[Node]:
    """The nodes without which these are not made."""
    needed, found = set(names), []
    for node in reversed(block.nodes):
        if _made(node) & needed:
            needed |= _read([node])
            found.append(node)
    return found[::-1]


def _part(block: Block, nodes: list[Node], needed: set[str], graph: Graph) -> Block:
    return Block(block.layer, tuple(nodes), tuple(sorted(_read(nodes) & graph.weights.keys())), frozenset(needed))
