"""An engine's graph as the groups of a start run it."""

from dataclasses import replace

import pytest

from slipstream.engine.graph import Graph, Node, TensorType
from slipstream.engine.shapes import infer_types
from slipstream.errors import EngineError
from slipstream.runtime.worker.groups import with_groups, with_trees
from slipstream.schema.kv import KVGroup

STEP = ("step.query_starts", "step.kv_lens", "step.block_tables")
ATTRIBUTES = {"scale": 0.5, "window": 0, "soft_cap": 0.0, "value_dim": 4}


def graph_of(*layers: Node) -> Graph:
    inputs = {name: TensorType(("T",), "int64") for name in ("step.positions", "step.slots", *STEP)}
    inputs |= {f"kv.{layer}": TensorType((2, "N", 16, 1, 4), "float32") for layer in range(len(layers))}
    inputs["q"] = TensorType(("T", 4), "float32")
    outputs = tuple(name for node in layers for name in node.outputs)
    types = inputs | {name: TensorType(("T", 4), "float32") for name in outputs}
    return Graph(inputs, {}, list(layers), outputs, types)


def attention(layer: int, *options: str | None) -> Node:
    return Node(
        "attention", ("q", f"kv.{layer}", *STEP, *(options or (None, None)), None), (f"out{layer}",), dict(ATTRIBUTES)
    )


def test_one_group_that_sees_everything_changes_nothing():
    graph = graph_of(attention(0), attention(1))
    assert with_groups(graph, [KVGroup((0, 1))]) == graph


def test_each_layer_reads_its_groups_table_and_sees_its_window():
    graph = with_groups(graph_of(attention(0), attention(1)), [KVGroup((1,)), KVGroup((0,), window=8)])
    graph.check()
    windowed, full = graph.nodes
    assert windowed.inputs[4] == "step.block_tables.1" and windowed.attributes == ATTRIBUTES | {"window": 8}
    assert full.inputs[4] == "step.block_tables" and full.attributes == ATTRIBUTES
    assert {"step.slots.1", "step.block_tables.1"} <= set(graph.inputs)


def test_with_sinks_a_query_is_rotated_to_its_place_in_the_window_too():
    layers = [
        Node("rope_cos_sin", ("step.positions", "frequencies"), ("cos", "sin"), {"scale": 1.0}),
        Node("rope", ("q", "cos", "sin"), ("rotated",), {"head_dim": 4}),
        Node("attention", ("rotated", "kv.0", *STEP, None, None, None), ("out",), ATTRIBUTES),
    ]
    graph = graph_of(*layers)
    graph = replace(graph, inputs=graph.inputs | {"frequencies": TensorType((2,), "float32")})
    graph = replace(graph, types=infer_types(replace(graph, types={})))
    nodes = with_groups(graph, [KVGroup((0,), window=8, sink_tokens=2)]).nodes
    assert [node.op for node in nodes] == [
        "far_cos_sin", "rope", "place_in_window", "rope_cos_sin", "rope", "streaming_attention",
    ]  # fmt: skip
    placed, again = nodes[2].outputs[0], nodes[4].outputs[0]
    assert nodes[3].inputs == (placed, "frequencies") and nodes[4].inputs == ("q", *nodes[3].outputs)
    assert nodes[5].inputs == ("rotated", again, "kv.0", *STEP, None)
    assert nodes[5].attributes == ATTRIBUTES | {"window": 8, "sink_tokens": 2}


@pytest.mark.parametrize("options", [(None, None), ("slopes", None), (None, "sinks")])
def test_sinks_are_refused_where_positions_are_not_rotary_alone(options: tuple[str | None, ...]):
    with pytest.raises(EngineError, match=r"sink_token_length needs plain rotary attention .*; leave it out\.$"):
        with_groups(graph_of(attention(0, *options)), [KVGroup((0,), window=8, sink_tokens=2)])


def test_where_drafts_branch_attention_is_told_what_each_row_sees():
    graph = with_trees(with_groups(graph_of(attention(0, "q", None)), [KVGroup((0,), window=8)]), 2)
    graph.check()
    tree = ("step.positions", "step.tree_starts", "step.tree_masks")
    assert graph.nodes[0].op == "tree_attention"
    assert graph.nodes[0].inputs == ("q", "kv.0", *STEP, *tree, "q", None, None)
    assert graph.nodes[0].attributes == ATTRIBUTES | {"window": 8}
    assert graph.inputs["step.tree_masks"] == TensorType(("T", 2), "int64")


def test_an_op_that_reads_the_cache_in_its_own_way_takes_no_branches():
    graph = graph_of(replace(attention(0), op="my_attention"))
    with pytest.raises(EngineError, match="branch, which this model's op my_attention cannot; take another"):
        with_trees(graph, 1)
