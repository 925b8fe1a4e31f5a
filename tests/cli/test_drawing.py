"""Drawings of graphs: well-formed, nothing overlaps, equal layers are drawn once."""

from itertools import combinations, pairwise
from typing import Any
from xml.etree import ElementTree

import pytest

from slipstream.build.capture import capture
from slipstream.build.example import trace
from slipstream.build.pipeline import run_pipeline
from slipstream.build.rewrite import Symbol, ops
from slipstream.cli import _drawing
from slipstream.cli._drawing import draw
from slipstream.cli._folding import Stretch, fold
from slipstream.cli._layout import Box, place
from slipstream.engine.graph import Graph
from slipstream.errors import UsageError
from slipstream.models import llama, read_config

SVG = "{http://www.w3.org/2000/svg}"


def llama_graph(num_layers: int, *, rewritten: bool) -> Graph:
    _, config = read_config(llama.TINY | {"num_hidden_layers": num_layers}, "tiny")
    graph = capture(llama.Model, config, "float32", 16).graph
    if rewritten:
        run_pipeline(graph, promised=llama.PROMISED_PASSES, disabled=())
    return graph


@pytest.mark.parametrize(("rewritten", "length"), [(False, 17), (True, 10)])
def test_layers_are_found_and_drawn_once(rewritten: bool, length: int) -> None:
    graph = llama_graph(7, rewritten=rewritten)
    repeated = [stretch for stretch in fold(graph) if stretch.times > 1]
    assert [(stretch.length, stretch.times) for stretch in repeated] == [(length, 7)]
    tree = ElementTree.fromstring(draw(graph, "seven layers"))
    texts = [text.text for text in tree.iter(f"{SVG}text")]
    assert texts.count("×7") == 1
    assert texts.count("attention") == 1


def test_every_node_is_in_one_stretch_in_order() -> None:
    graph = llama_graph(3, rewritten=True)
    stretches = fold(graph)
    assert [s.start for s in stretches] == [0, *(s.end for s in stretches[:-1])]
    assert stretches[-1].end == len(graph.nodes)


def test_layers_of_two_kinds_in_turn_are_one_stretch() -> None:
    def block(x: Symbol, w: Symbol) -> Symbol:
        x = ops.add(x, x)
        for _ in range(4):
            for eps in (1e-5, 1e-6):
                x = ops.rms_norm(ops.silu(ops.silu(x)), w, eps=eps, weight_offset=0.0)
        return x

    graph = trace(block, {"x": ("T", 8)}, {"w": (8,)})
    assert fold(graph) == [Stretch(0, 1, 1), Stretch(1, 6, 4)]


@pytest.mark.parametrize("rewritten", [False, True])
def test_boxes_keep_apart_and_lines_go_down(rewritten: bool) -> None:
    graph = llama_graph(2, rewritten=rewritten)
    shown = _drawing._Shown(graph, fold(graph))
    edges = place(shown.boxes, [(source, target) for source, target, _ in _drawing._pairs(graph, shown)])
    for one, other in combinations(shown.boxes, 2):
        assert (
            abs(one.x - other.x) >= (one.width + other.width) / 2
            or abs(one.y - other.y) >= (one.height + other.height) / 2
        )
    for edge in edges:
        assert all(upper.band[1] < lower.band[0] for upper, lower in pairwise(edge.points))
        for point in edge.points[1:-1]:  # around the boxes of its row
            assert all(abs(point.x - box.x) > box.width / 2 for box in shown.boxes if box.row == point.row)


def test_names_are_escaped() -> None:
    graph = trace(lambda x: ops.silu(x), {"x": ("T", 8)}, {})
    ElementTree.fromstring(draw(graph, '<a> & "b"'))


def test_a_graph_that_is_too_long_to_read_is_refused() -> None:
    def block(x: Symbol, w: Symbol) -> Any:
        for number in range(1100):
            x = ops.rms_norm(x, w, eps=float(number), weight_offset=0.0)
        return x

    graph = trace(block, {"x": ("T", 8)}, {"w": (8,)})
    with pytest.raises(UsageError, match="1100 ops that do not repeat"):
        draw(graph, "long")


def test_one_box_is_placed() -> None:
    (box,) = boxes = [Box(10, 10)]
    assert place(boxes, []) == []
    assert box.y == 5
