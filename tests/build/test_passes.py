"""Every file of slipstream/build/passes: its example is changed, stays legal, and computes what it computed."""

import importlib
import pkgutil
from types import ModuleType

import pytest

from slipstream.build import passes
from slipstream.build.example import trace
from slipstream.build.passes import dead_code, fold_constants, fold_scales, last_token, renumber
from slipstream.build.pipeline import CLEAN_UP, FUSIONS, LOWERING
from slipstream.build.rewrite import Symbol, ops
from slipstream.engine.graph import Graph, TensorType
from slipstream.engine.shapes import infer_types
from slipstream.schema.format import WeightFormat
from tests.build.support import assert_same, copied

FILES = [importlib.import_module(f"{passes.__name__}.{each.name}") for each in pkgutil.iter_modules(passes.__path__)]
every_pass = pytest.mark.parametrize("file", FILES, ids=[file.__name__.rpartition(".")[2] for file in FILES])


@every_pass
def test_a_pass_is_named_after_its_file_and_is_in_the_pipeline(file: ModuleType) -> None:
    assert file.PASS.name == file.__name__.rpartition(".")[2]
    assert file.PASS.benefit
    assert file.PASS in (*FUSIONS, *LOWERING, *CLEAN_UP)


@every_pass
def test_a_pass_changes_its_example(file: ModuleType) -> None:
    graph = file.example()
    before = graph.to_json()
    assert file.PASS.run(graph) >= 1
    assert graph.to_json() != before


@every_pass
def test_a_changed_example_is_legal_and_its_types_are_known(file: ModuleType) -> None:
    graph = file.example()
    file.PASS.run(graph)
    graph.check()
    inferred = infer_types(graph)
    assert graph.types.items() >= inferred.items()


@every_pass
@pytest.mark.parametrize("seed", range(3))
def test_a_changed_example_computes_the_same(file: ModuleType, seed: int) -> None:
    before, after = file.example(), file.example()
    file.PASS.run(after)
    assert_same(before, after, seed, select=file is last_token)


@every_pass
def test_a_second_run_finds_nothing(file: ModuleType) -> None:
    graph = file.example()
    file.PASS.run(graph)
    before = graph.to_json()
    assert file.PASS.run(graph) == 0
    assert graph.to_json() == before


def test_fold_names_joined_weights_after_their_parts() -> None:
    graph = fold_constants.example()
    fold_constants.PASS.run(graph)
    assert list(graph.weights) == ["mlp.a+b.weight"]
    assert graph.prologue[0].inputs == ("mlp.a.weight", "mlp.b.weight")


def folded(block: object, shapes: dict[str, tuple[int, ...]]) -> tuple[Graph, Graph]:
    before = trace(block, inputs={"x": ("T", 8)}, weights=shapes)  # type: ignore[arg-type]
    after = copied(before)
    fold_constants.PASS.run(after)
    after.check()
    return before, after


def test_fold_keeps_two_results_of_the_same_weights_apart() -> None:
    def block(x: Symbol, a: Symbol, b: Symbol) -> Symbol:
        return ops.linear(ops.linear(x, ops.add(a, b)), ops.mul(a, b))

    before, after = folded(block, {"a": (8, 8), "b": (8, 8)})
    assert len(after.weights) == 2
    assert_same(before, after)


def test_fold_computes_a_join_once_where_layers_share_it() -> None:
    def block(x: Symbol, a: Symbol, b: Symbol) -> Symbol:
        return ops.add(ops.linear(x, ops.concat(a, b)), ops.linear(x, ops.concat(a, b)))

    before, after = folded(block, {"a": (3, 8), "b": (5, 8)})
    assert len(after.weights) == len(after.prologue) == 1
    assert_same(before, after)


def test_fold_follows_a_chain_of_weights() -> None:
    def block(x: Symbol, a: Symbol, b: Symbol) -> Symbol:
        return ops.linear(x, ops.silu(ops.concat(ops.mul(a, a), b)))

    before, after = folded(block, {"m.a.weight": (3, 8), "m.b.weight": (5, 8)})
    assert [node.op for node in after.nodes] == ["linear"]
    assert_same(before, after)


def test_fold_leaves_an_output_and_a_part_that_is_still_read() -> None:
    def block(x: Symbol, a: Symbol, b: Symbol) -> tuple[Symbol, ...]:
        return ops.mul(a, b), ops.linear(ops.linear(x, ops.add(a, b)), a)

    before, after = folded(block, {"a": (8, 8), "b": (8, 8)})
    assert "a" in after.weights
    assert_same(before, after)


def test_scales_are_folded_where_that_is_right() -> None:
    """In float32 always; in 16 bits by a power of two; never into what another reads, or into what is packed."""

    def scaled(dtype: str, factor: float, *, is_read_twice: bool = False, is_packed: bool = False) -> int:
        def block(x: Symbol, weight: Symbol) -> Symbol:
            y = ops.scale(ops.linear(x, weight), factor=factor)
            return ops.linear(y, weight) if is_read_twice else y

        graph = trace(block, inputs={"x": ("T", 8)}, weights={"weight": (8, 8)})
        graph.types = {name: TensorType(kind.shape, dtype) for name, kind in graph.types.items()}
        graph.inputs, graph.weights = (
            {name: graph.types[name] for name in each} for each in (graph.inputs, graph.weights)
        )
        graph.formats = {"weight": WeightFormat(kind="w8a16")} if is_packed else {}
        return fold_scales.PASS.run(graph)

    assert scaled("float32", 0.22) == scaled("bfloat16", 0.125) == scaled("float16", -2.0) == 1
    assert scaled("bfloat16", 0.22) == scaled("float16", 3.0) == 0
    assert scaled("float32", 0.22, is_read_twice=True) == scaled("float32", 0.22, is_packed=True) == 0


def test_a_scale_of_a_table_is_folded_and_the_engine_has_one_op_less() -> None:
    def block(token_ids: Symbol, table: Symbol) -> Symbol:
        return ops.scale(ops.embedding(table, token_ids), factor=12.0)

    before = trace(block, inputs={"step.token_ids": ("T",)}, weights={"table": (16, 8)})
    after = copied(before)
    assert fold_scales.PASS.run(after) == fold_constants.PASS.run(after) == 1
    assert [node.op for node in after.nodes] == ["embedding"]
    assert_same(before, after)


def test_dead_code_keeps_what_writes_the_cache() -> None:
    def block(k: Symbol, v: Symbol, kv: Symbol, slots: Symbol, w: Symbol) -> Symbol:
        ops.linear(k, w)
        ops.kv_write(ops.silu(k), v, kv, slots)
        return ops.add(k, v)

    shapes: dict[str, tuple[int | str, ...]] = {"k": ("T", 4), "v": ("T", 4), "kv": (2, "N", 2, 1, 4), "slots": ("T",)}
    graph = trace(block, inputs=shapes, weights={"w": (4, 4)})
    assert dead_code.PASS.run(graph) == 1
    assert graph.count_ops() == {"add": 1, "kv_write": 1, "silu": 1}
    assert graph.weights == {}


def test_renumber_names_values_in_order_and_avoids_inputs_and_weights() -> None:
    def block(x: Symbol, silu: Symbol, w: Symbol) -> tuple[Symbol, ...]:
        first, second = ops.split(ops.silu(ops.add(x, silu)), sizes=[4, 4])
        return ops.linear(ops.silu(first), w), second

    graph = trace(block, inputs={"x": ("T", 8), "silu": ("T", 8)}, weights={"linear.weight": (4, 4)})
    before = copied(graph)
    renumber.PASS.run(graph)
    assert [node.outputs for node in graph.nodes] == [
        ("add",), ("silu_1",), ("split.0", "split.1"), ("silu_2",), ("linear_1",),
    ]  # fmt: skip
    assert graph.outputs == ("linear_1", "split.1")
    assert graph.types == infer_types(graph)
    assert_same(before, graph)
