"""The rules of the matcher, each on the smallest graph that shows it; then random graphs through every pass."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.build.capture import capture
from slipstream.build.example import trace
from slipstream.build.passes import fuse_add_norm, fuse_gate_up, fuse_qkv, fuse_rope_kv_write
from slipstream.build.pipeline import CLEAN_UP, FUSIONS, run_pipeline
from slipstream.build.rewrite import Rewrite, Rule, Symbol, ops
from slipstream.engine.graph import Graph, Node
from slipstream.errors import BuildError
from slipstream.models import llama, read_config
from tests.build.support import assert_same, copied

X = {"x": ("T", 8), "y": ("T", 8)}

PLAIN = {"window": 0, "soft_cap": 0.0, "value_dim": 4}  # attention without options


def rewrite(pattern: Callable[..., Any], replacement: Callable[..., Any], **options: Any) -> Rewrite:
    return Rewrite("test", "none", (Rule(pattern, replacement, **options),))


def changed(graph: Graph, rule: Rewrite) -> int:
    """Matches; what the graph computes stays the same."""
    before = copied(graph)
    count = rule.run(graph)
    graph.check()
    assert_same(before, graph)
    return count


GATED = rewrite(lambda gate, up: ops.mul(ops.silu(gate), up), lambda gate, up: ops.mul(up, ops.silu(gate)))


def test_a_value_read_outside_blocks_the_match() -> None:
    def pattern(x: Symbol, y: Symbol) -> Symbol:
        return ops.mul(ops.silu(x), y)

    def replacement(x: Symbol, y: Symbol) -> Symbol:
        return ops.mul(y, ops.silu(x))

    def read_twice(x: Symbol, y: Symbol) -> Symbol:
        inner = ops.silu(x)
        return ops.add(ops.mul(inner, y), inner)

    assert rewrite(pattern, replacement).run(trace(read_twice, X, {})) == 0

    def is_output(x: Symbol, y: Symbol) -> tuple[Symbol, ...]:
        inner = ops.silu(x)
        return ops.mul(inner, y), inner

    assert rewrite(pattern, replacement).run(trace(is_output, X, {})) == 0


def test_a_returned_value_may_be_read_outside_and_keeps_its_name() -> None:
    def block(x: Symbol, y: Symbol, w: Symbol) -> tuple[Symbol, ...]:
        total = ops.add(x, y)
        return ops.mul(ops.rms_norm(total, w, eps=1e-5, weight_offset=0.0), total), total

    graph = trace(block, X, {"w": (8,)})
    outputs = graph.outputs
    assert changed(graph, fuse_add_norm.PASS) == 1
    assert graph.outputs == outputs


def test_an_attribute_binds_to_a_parameter() -> None:
    graph = fuse_add_norm.example()
    fuse_add_norm.PASS.run(graph)
    assert graph.nodes[0].attributes == {"eps": 1e-5, "weight_offset": 0.0}


def test_a_number_in_a_pattern_must_be_that_number() -> None:
    only_one = rewrite(lambda x, w: ops.rms_norm(x, w, eps=1.0, weight_offset=0.0), lambda x, w: ops.mul(x, x))

    def block(x: Symbol, y: Symbol, w: Symbol) -> Symbol:
        return ops.rms_norm(x, w, eps=1e-5, weight_offset=0.0)

    assert only_one.run(trace(block, X, {"w": (8,)})) == 0


def test_equal_parameters_stand_for_equal_values() -> None:
    square = rewrite(lambda x: ops.mul(x, x), lambda x: ops.add(x, x))
    assert square.run(trace(lambda x, y: ops.mul(x, y), X, {})) == 0
    assert square.run(trace(lambda x, y: ops.mul(y, y), X, {})) == 1


def test_equal_parameters_stand_for_equal_numbers() -> None:
    def pattern(x: Symbol, w: Symbol, eps: Symbol) -> Symbol:
        return ops.rms_norm(ops.rms_norm(x, w, eps=eps, weight_offset=0.0), w, eps=eps, weight_offset=0.0)

    rule = rewrite(pattern, lambda x, w, eps: ops.rms_norm(x, w, eps=eps, weight_offset=0.0))

    def block(second: float) -> Callable[..., Symbol]:
        return lambda x, y, w: ops.rms_norm(
            ops.rms_norm(x, w, eps=1e-5, weight_offset=0.0), w, eps=second, weight_offset=0.0
        )

    assert rule.run(trace(block(1e-6), X, {"w": (8,)})) == 0
    assert rule.run(trace(block(1e-5), X, {"w": (8,)})) == 1


def test_a_parameter_never_stands_for_a_value_made_inside_the_match() -> None:
    """mul(silu(x), up) with up = silu(x) itself: the replacement would read what it removes."""
    graph = trace(lambda x, y: (lambda inner: ops.mul(inner, inner))(ops.silu(x)), X, {})
    before = graph.to_json()
    assert GATED.run(graph) == 0
    assert graph.to_json() == before


def test_two_ops_of_a_pattern_are_two_nodes() -> None:
    both = rewrite(
        lambda x, a, b: (ops.linear(x, a), ops.linear(x, b)),
        lambda x, a, b: ops.split(ops.linear(x, ops.concat(a, b)), sizes=[8, 8]),
    )
    graph = trace(lambda x, y, w: ops.linear(x, w), X, {"w": (8, 8)})
    assert both.run(graph) == 0


def test_overlapping_places_are_rewritten_once_each_until_none_is_left() -> None:
    """Five sums in a chain, rewritten in pairs: the places overlap, and what is left over stays."""
    pairs = rewrite(lambda x, y, z: ops.add(ops.add(x, y), z), lambda x, y, z: ops.add(x, ops.mul(y, z)))

    def chain(x: Symbol, y: Symbol) -> Symbol:
        value = x
        for _ in range(5):
            value = ops.add(value, y)
        return value

    graph = trace(chain, X, {})
    assert pairs.run(graph) == 4
    graph.check()
    assert graph.count_ops() == {"add": 1, "mul": 4}


def test_neighbours_that_read_each_other_are_both_rewritten() -> None:
    def block(x: Symbol, y: Symbol, w: Symbol) -> Symbol:
        first = ops.add(x, y)
        second = ops.add(first, ops.rms_norm(first, w, eps=1e-5, weight_offset=0.0))
        third = ops.add(second, ops.rms_norm(second, w, eps=1e-5, weight_offset=0.0))
        return ops.mul(third, ops.rms_norm(third, w, eps=1e-5, weight_offset=0.0))

    graph = trace(block, X, {"w": (8,)})
    assert changed(graph, fuse_add_norm.PASS) == 3
    assert graph.count_ops() == {"add_rms_norm": 3, "mul": 1}


def test_a_replacement_must_return_as_much_as_its_pattern_and_make_it() -> None:
    graph = trace(lambda x, y: ops.add(x, y), X, {})
    with pytest.raises(BuildError, match="returns 2 values where its pattern returns 1"):
        rewrite(lambda x, y: ops.add(x, y), lambda x, y: (ops.mul(x, y), ops.mul(x, y))).run(graph)
    with pytest.raises(BuildError, match="one of its parameters"):
        rewrite(lambda x, y: ops.add(x, y), lambda x, y: x).run(graph)


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("linear_first", [True, False])
def test_gate_and_up_are_found_in_any_order(gate_first: bool, linear_first: bool) -> None:
    def block(x: Symbol, gate: Symbol, up: Symbol) -> Symbol:
        early = ops.linear(x, up) if linear_first else None
        gated = ops.silu(ops.linear(x, gate))
        other = ops.linear(x, up) if early is None else early
        return ops.mul(gated, other) if gate_first else ops.mul(other, gated)

    graph = trace(block, {"x": ("T", 8)}, {"gate": (6, 8), "up": (6, 8)})
    assert changed(graph, fuse_gate_up.PASS) == 1
    (concat,) = [node for node in graph.nodes if node.op == "concat"]
    assert concat.inputs == ("gate", "up")


@pytest.mark.parametrize(
    "block",
    [
        lambda x, y: ops.add(ops.mul(x, y), x),
        lambda x, y: ops.add(ops.mul(y, x), x),
        lambda x, y: ops.add(x, ops.mul(x, y)),
        lambda x, y: ops.add(x, ops.mul(y, x)),
    ],
)
def test_orders_inside_one_another_are_all_tried(block: Any) -> None:
    def pattern(x: Symbol, y: Symbol) -> Symbol:
        return ops.add(ops.mul(x, y), x)

    def replacement(x: Symbol, y: Symbol) -> Symbol:
        return ops.mul(x, ops.mul(y, y))

    graph = trace(block, X, {})
    assert rewrite(pattern, replacement).run(graph) == 1
    assert [node.inputs for node in graph.nodes] == [("y", "y"), ("x", "mul")]


def test_a_product_with_itself_is_one_match() -> None:
    square = rewrite(lambda x, y: ops.mul(x, y), lambda x, y: ops.add(x, y))
    graph = trace(lambda x, y: ops.mul(x, x), X, {})
    assert square.run(graph) == 1


# ----- qkv, gate and up, add and norm

QKV = {"q": (8, 8), "k": (4, 8), "v": (4, 8)}


@pytest.mark.parametrize("order", ["qkv", "qvk", "kqv", "vkq"])
def test_qkv_of_any_order_is_fused_in_the_order_of_its_readers(order: str) -> None:
    graph = trace(
        lambda x, q, k, v: tuple(ops.linear(x, {"q": q, "k": k, "v": v}[name]) for name in order), {"x": ("T", 8)}, QKV
    )
    assert changed(graph, fuse_qkv.PASS) == 1
    (concat,) = [node for node in graph.nodes if node.op == "concat"]
    assert concat.inputs == tuple(order)


def test_qkv_with_an_mlp_beside_it_is_fused_and_the_mlp_stays() -> None:
    graph = trace(
        lambda x, q, k, v, up: (ops.linear(x, q), ops.linear(x, k), ops.linear(x, v), ops.linear(x, up)),
        {"x": ("T", 8)},
        QKV | {"up": (16, 8)},
    )
    assert changed(graph, fuse_qkv.PASS) == 1
    assert [node.inputs[1] for node in graph.nodes if node.op == "linear"].count("up") == 1


def test_qkv_of_activations_is_left_alone() -> None:
    inputs: dict[str, tuple[int | str, ...]] = {"x": ("T", 8)} | QKV
    graph = trace(lambda x, q, k, v: (ops.linear(x, q), ops.linear(x, k), ops.linear(x, v)), inputs, {})
    assert fuse_qkv.PASS.run(graph) == 0


def test_qkv_with_biases() -> None:
    weights: dict[str, tuple[int, ...]] = {"q": (8, 8), "qb": (8,), "k": (4, 8), "kb": (4,), "v": (4, 8), "vb": (4,)}
    graph = trace(fuse_qkv.pattern_bias, {"x": ("T", 8)}, weights)
    assert changed(graph, fuse_qkv.PASS) == 1
    assert graph.count_ops() == {"concat": 2, "linear": 1, "split": 1}


def test_qkv_with_a_bias_on_some_is_left_alone() -> None:
    graph = trace(
        lambda x, q, k, v, b: (ops.linear(x, q, b), ops.linear(x, k), ops.linear(x, v)),
        {"x": ("T", 8)},
        QKV | {"b": (8,)},
    )
    assert fuse_qkv.PASS.run(graph) == 0


def test_gate_and_up_with_biases() -> None:
    weights: dict[str, tuple[int, ...]] = {"gate": (6, 8), "gb": (6,), "up": (6, 8), "ub": (6,)}
    graph = trace(
        lambda x, gate, gb, up, ub: ops.mul(ops.silu(ops.linear(x, gate, gb)), ops.linear(x, up, ub)),
        {"x": ("T", 8)},
        weights,
    )
    assert changed(graph, fuse_gate_up.PASS) == 1
    assert graph.count_ops() == {"concat": 2, "linear": 1, "silu_and_mul": 1}


@pytest.mark.parametrize("approximate", [True, False])
def test_gate_and_up_of_gelu(approximate: bool) -> None:
    graph = trace(
        lambda x, gate, up: ops.mul(ops.gelu(ops.linear(x, gate), approximate=approximate), ops.linear(x, up)),
        {"x": ("T", 8)},
        {"gate": (6, 8), "up": (6, 8)},
    )
    assert changed(graph, fuse_gate_up.PASS) == 1
    assert graph.count_ops() == {"concat": 1, "gelu_and_mul": 1, "linear": 1}


def test_an_optional_tensor_may_be_absent() -> None:
    def pattern(x: Symbol, w: Symbol, bias: Symbol | None) -> Symbol:
        return ops.silu(ops.linear(x, w, bias))

    def replacement(x: Symbol, w: Symbol, bias: Symbol | None) -> Symbol:
        return ops.gelu(ops.linear(x, w, bias), approximate=True)

    rule = Rewrite("test", "none", (Rule(pattern, replacement),))
    for bias in (None, "b"):
        graph = trace(lambda x, w, b: ops.silu(ops.linear(x, w, b)), {"x": ("T", 8)}, {"w": (6, 8), "b": (6,)})
        graph.nodes[0] = Node("linear", ("x", "w", bias), graph.nodes[0].outputs)
        assert rule.run(graph) == 1
        assert graph.nodes[0].inputs == ("x", "w", bias)


def test_a_gate_that_broadcasts_is_left_alone() -> None:
    graph = trace(
        lambda x, gate, up: ops.mul(ops.silu(ops.linear(x, gate)), ops.linear(x, up)),
        {"x": ("T", 8)},
        {"gate": (1, 8), "up": (6, 8)},
    )
    assert fuse_gate_up.PASS.run(graph) == 0


def test_a_sum_that_broadcasts_is_not_fused_with_its_norm() -> None:
    graph = trace(
        lambda x, row, w: ops.rms_norm(ops.add(x, row), w, eps=1e-5, weight_offset=0.0),
        {"x": ("T", 8), "row": (8,)},
        {"w": (8,)},
    )
    assert fuse_add_norm.PASS.run(graph) == 0


# ----- the order of what writes the cache

CACHE: dict[str, tuple[int | str, ...]] = {
    "q": ("T", 8), "k": ("T", 4), "v": ("T", 4), "cos": ("T", 2), "sin": ("T", 2), "kv": (2, "N", 2, 1, 4),
    "slots": ("T",), "query_starts": ("S1",), "kv_lens": ("S",), "block_tables": ("S", "B"),
}  # fmt: skip


def cached(block: Callable[..., Any]) -> Graph:
    """A graph of block(a namespace of the inputs above)."""

    class Inputs:
        def __init__(self, symbols: list[Symbol]) -> None:
            self.__dict__.update(zip(CACHE, symbols, strict=True))

    def function(q: Any, k: Any, v: Any, cos: Any, sin: Any, kv: Any, slots: Any, a: Any, b: Any, c: Any) -> Any:
        return block(Inputs([q, k, v, cos, sin, kv, slots, a, b, c]))

    return trace(function, CACHE, {})


def attend(i: Any, q: Symbol) -> Symbol:
    return ops.attention(q, i.kv, i.query_starts, i.kv_lens, i.block_tables, scale=0.5, **PLAIN)


def test_attention_before_the_write_is_not_fused_with_it() -> None:
    """It sees the cache as it was; the fused op would show it the new keys."""

    def block(i: Any) -> Symbol:
        out = attend(i, ops.rope(i.q, i.cos, i.sin, head_dim=4))
        ops.kv_write(ops.rope(i.k, i.cos, i.sin, head_dim=4), i.v, i.kv, i.slots)
        return out

    assert changed(cached(block), fuse_rope_kv_write.PASS) == 0


def test_a_reader_between_write_and_attention_stays_between() -> None:
    def block(i: Any) -> tuple[Symbol, ...]:
        ops.kv_write(ops.rope(i.k, i.cos, i.sin, head_dim=4), i.v, i.kv, i.slots)
        between = attend(i, i.q)
        return attend(i, ops.rope(i.q, i.cos, i.sin, head_dim=4)), between

    changed(cached(block), fuse_rope_kv_write.PASS)


def test_a_write_never_moves_across_another_write_or_reader() -> None:
    def block(i: Any) -> tuple[Symbol, ...]:
        before = attend(i, i.q)
        ops.kv_write(ops.rope(i.k, i.cos, i.sin, head_dim=4), i.v, i.kv, i.slots)
        first = attend(i, ops.rope(i.q, i.cos, i.sin, head_dim=4))
        ops.kv_write(ops.silu(i.k), i.v, i.kv, i.slots)
        return before, first, attend(i, i.q)

    graph = cached(block)
    assert changed(graph, fuse_rope_kv_write.PASS) == 1
    assert [node.op for node in graph.nodes if "kv" in node.inputs] == [
        "attention", "rope_kv_write", "attention", "kv_write", "attention",
    ]  # fmt: skip


def test_a_reader_in_a_match_never_moves_across_a_write_outside_it() -> None:
    """The pattern only reads the cache, and its last op comes after a write that its first op must not see."""
    rule = rewrite(
        lambda q, kv, a, b, c, y, scale: ops.mul(ops.attention(q, kv, a, b, c, scale=scale, **PLAIN), y),
        lambda q, kv, a, b, c, y, scale: ops.mul(y, ops.attention(q, kv, a, b, c, scale=scale, **PLAIN)),
    )

    def block(i: Any) -> Symbol:
        out = attend(i, i.q)
        ops.kv_write(i.k, i.v, i.kv, i.slots)
        return ops.mul(out, ops.silu(attend(i, i.q)))

    assert changed(cached(block), rule) == 0


# ----- speed, and random graphs


def test_the_work_of_the_passes_grows_with_the_layers_and_no_faster() -> None:
    assert 3.5 < calls_to_rewrite(80) / calls_to_rewrite(20) < 4.2


def calls_to_rewrite(num_layers: int) -> int:
    """How many functions the passes call: a measure that no other machine and no neighbour changes."""
    _, config = read_config(llama.TINY | {"num_hidden_layers": num_layers}, "tiny")
    graph = capture(llama.Model, config, "float32", 16).graph
    calls = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        reports = run_pipeline(graph, promised=llama.PROMISED_PASSES, disabled=())
    finally:
        sys.setprofile(None)
    assert {report.name: report.matches for report in reports}["fuse_add_norm"] == 2 * num_layers
    return calls


@st.composite
def random_graphs(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Graph:
    """DAGs of sums, products, norms, activations and linears, with shared weights and many readers."""
    weights: dict[str, tuple[int, ...]] = {f"w{i}.weight": (8, 8) for i in range(4)}
    weights |= {f"n{i}.weight": (8,) for i in range(2)}
    plan = draw(st.lists(st.tuples(st.integers(0, 6), *[st.integers(0, 30)] * 3), min_size=1, max_size=14))
    num_outputs = draw(st.integers(1, 3))

    def block(x: Symbol, y: Symbol, w0: Any, w1: Any, w2: Any, w3: Any, n0: Any, n1: Any) -> tuple[Symbol, ...]:
        values, matrices, vectors = [x, y], [w0, w1, w2, w3], [n0, n1]
        for kind, first, second, third in plan:
            # mostly recent values, so that chains grow
            a, b = values[-1 - first % min(3, len(values))], values[-1 - second % len(values)]
            matrix, vector = matrices[third % 4], vectors[third % 2]
            if kind == 0:
                values.append(ops.add(a, b))
            elif kind == 1:
                values.append(ops.mul(a, b))
            elif kind == 2:
                values.append(ops.silu(a))
            elif kind == 3:
                values.append(ops.rms_norm(a, vector, eps=1e-5, weight_offset=0.0))
            elif kind == 4:
                values.append(ops.linear(a, matrix, vector if second % 3 == 0 else None))
            elif kind == 5:
                values.append(ops.mul(ops.silu(ops.linear(a, matrix)), ops.linear(a, matrices[second % 4])))
            else:
                values += [ops.linear(a, matrices[(third + i) % 4]) for i in range(3)]
            if kind in (1, 4, 5, 6):  # keep the numbers small
                values.append(ops.rms_norm(values[-1], vectors[0], eps=1e-5, weight_offset=0.0))
        return tuple(dict.fromkeys(values[-num_outputs:]))

    return trace(block, {"x": ("T", 8), "y": ("T", 8)}, weights)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(random_graphs(), st.permutations([each for each in FUSIONS if each.name != "last_token"]))
def test_passes_keep_the_results_of_random_graphs(graph: Graph, fusions: list[Any]) -> None:
    before = copied(graph)
    for each in (*fusions, *CLEAN_UP):
        each.run(graph)
        graph.check()
        assert_same(before, graph)
