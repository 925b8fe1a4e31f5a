"""Engines written to do harm: opened and compiled they work or raise SlipstreamError, and run nothing but ops.

The digest in config.json always matches, as it would if a stranger had made the engine. Budgets are fixed, and examples
the same each time.
"""

import json
import random
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slipstream.engine.choices import Choices
from slipstream.engine.folder import open_engine
from slipstream.engine.graph import MAX_NODES, graph_from_json
from slipstream.errors import EngineError, SlipstreamError
from slipstream.runtime.engine import start_engine
from slipstream.runtime.worker.graphs import compile_graph
from slipstream.schema.request import FinishReason, GenerateRequest
from slipstream.schema.sampling import SamplingParams
from tests.engine.fuzz import make_engines
from tests.engine.mutants import Parts, make_agree
from tests.engine.support import assert_calls_only_ops, changed_engine, read_header, stored_graph, write_header

CPU = torch.device("cpu")
BUDGET = settings(
    max_examples=300,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAMES = [
    "", "linear", "attention", "kv_write", "concat", "magic", "__import__('os')", "os.system", "x; import os", "a\nb",
    "kv.0", "step.slots", "step.token_ids", "norm.weight", "x" * 300, "v0", "k0", "inputs", "é", "eval", "__builtins__",
]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 0.5, 2**31, 2**62, 2**63, 10**400, float("nan"), float("inf"), 1e308, True, None]
HOSTILE = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(NUMBERS),
    st.lists(st.sampled_from([*NAMES, *NUMBERS]), max_size=4),
    st.dictionaries(st.sampled_from(NAMES), st.sampled_from([*NAMES, *NUMBERS]), max_size=3),
)


@st.composite
def edits(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Callable[[dict[str, Any]], None]:
    """A function that changes up to three places of a JSON value: replaced, removed, doubled or swapped."""
    plan = draw(
        st.lists(
            st.tuples(st.sampled_from("rrdmsn"), st.lists(st.integers(0, 99), min_size=2, max_size=6), HOSTILE),
            min_size=1, max_size=3,
        )
    )  # fmt: skip

    def apply(values: Any) -> None:
        for kind, path, hostile in plan:
            _edit(values, kind, path, hostile)

    return apply


def _edit(values: Any, kind: str, path: list[int], hostile: Any) -> None:
    owner, key = values, None
    for step in path:
        keys = list(owner) if isinstance(owner, dict) else range(len(owner))
        if not keys:
            break
        key = keys[step % len(keys)]
        if kind == "n" and isinstance(owner[key], str):
            break
        if not isinstance(owner[key], dict | list) or step == path[-1]:
            break
        owner = owner[key]
    if key is None or key not in (owner if isinstance(owner, dict) else range(len(owner))):
        return
    if kind == "m":
        del owner[key]
    elif kind == "d" and isinstance(owner, list):
        owner.insert(key, owner[key])
    elif kind == "s" and isinstance(owner, list):
        other = path[-1] % len(owner)
        owner[key], owner[other] = owner[other], owner[key]
    elif kind == "n":
        owner[key] = NAMES[path[-1] % len(NAMES)]
    else:
        owner[key] = hostile


def open_and_compile(folder: Path) -> Any:
    """The step function, or None where the engine was refused as it should be."""
    try:
        engine = open_engine(folder)
    except SlipstreamError:
        return None
    try:
        weights = {name: engine.weights.read(name) for name in engine.graph.weights}
        step = compile_graph(engine.graph, weights, Choices("none"), CPU).run
    except SlipstreamError:
        return None
    finally:
        engine.close()
    assert_calls_only_ops(step)
    return step


def test_the_engine_itself_compiles_to_calls_of_ops(tiny_engine: Path) -> None:
    step = open_and_compile(tiny_engine)
    step.__globals__["k0"] = print
    with pytest.raises(AssertionError):
        assert_calls_only_ops(step)


@BUDGET
@given(edits())
def test_a_changed_config_opens_or_is_refused(tiny_engine: Path, tmp_path: Path, edit: Any) -> None:
    folder = tmp_path / "engine"
    shutil.rmtree(folder, ignore_errors=True)
    open_and_compile(changed_engine(tiny_engine, folder, manifest=edit))


@BUDGET
@given(edits())
def test_a_changed_header_opens_or_is_refused(tiny_engine: Path, tmp_path: Path, edit: Any) -> None:
    folder = tmp_path / "engine"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny_engine, folder)
    header, data = read_header(folder / "rank0.engine")
    edit(header)
    write_header(folder / "rank0.engine", header, data)
    open_and_compile(folder)


@settings(BUDGET, max_examples=1000)
@given(edits())
def test_a_changed_graph_compiles_to_calls_of_ops_or_is_refused(tiny_engine: Path, tmp_path: Path, edit: Any) -> None:
    folder = tmp_path / "engine"
    shutil.rmtree(folder, ignore_errors=True)
    open_and_compile(changed_engine(tiny_engine, folder, graph=edit))


def add_node(op: str, inputs: list[str], output: str, kind: list[Any], **attributes: Any) -> Any:
    """One more op at the end, of which nothing is read."""

    def change(graph: dict[str, Any]) -> None:
        graph["nodes"].append({"op": op, "in": inputs, "out": [output], "attributes": attributes})
        graph["types"][output] = kind

    return change


def attribute(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Another value of an attribute of the first such op."""

    def change(graph: dict[str, Any]) -> None:
        next(each for each in graph["nodes"] if each["op"] == name)["attributes"][key] = value

    return change


def node(index: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda graph: graph["nodes"][index].update(changes)


def op(name: str, place: int, value: str) -> Callable[[dict[str, Any]], None]:
    """Another value as an input of the first such op."""

    def change(graph: dict[str, Any]) -> None:
        next(each for each in graph["nodes"] if each["op"] == name)["in"][place] = value

    return change


def rename_everywhere(old: str, new: str) -> Callable[[dict[str, Any]], Any]:
    return lambda graph: json.loads(json.dumps(graph).replace(json.dumps(old), json.dumps(new)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (node(0, op="magic"), "calls 'magic', which is no op of this version"),
        (node(0, op="__import__"), "calls '__import__', which is no op"),
        (node(0, op="__import__('os')"), "not a stored graph"),
        (node(0, **{"in": ["embed.weight"]}), "embedding in a way it cannot be called"),
        (node(0, **{"in": ["embed.weight", None]}), "embedding in a way it cannot be called"),
        (node(0, **{"in": "embed.weight"}), "is not a list"),
        (node(0, **{"in": ["embed.weight", "linear_3"]}), "'linear_3', which nothing before it writes"),
        (node(0, **{"in": ["embedding", "step.token_ids"]}), "'embedding', which nothing before it writes"),
        (node(0, out=["embedding", "embedding"]), "'embedding' is written twice"),
        (node(0, out=["kv.0"]), r"'kv\.0' is written twice"),
        (node(0, out=["norm.weight"]), r"'norm\.weight' is written twice"),
        (node(0, out=[]), "which nothing before it writes"),
        (node(0, attributes={"eps": 1}), "embedding in a way it cannot be called"),
        (node(1, attributes={"scale": "1.0"}), "not a stored graph"),
        (node(1, attributes={"scale": [1.0]}), "rope_cos_sin in a way it cannot be called"),
        (node(1, attributes={"scale": None}), "rope_cos_sin in a way it cannot be called"),
        (node(1, attributes={"scale": True}), "rope_cos_sin in a way it cannot be called"),
        (node(1, attributes={"scale": float("nan")}), "not a stored graph"),
        (node(1, attributes={"scale": float("inf")}), "not a stored graph"),
        (node(1, attributes={"scale": 10**400}), "not a stored graph"),
        (node(1, attributes={"__class__": 1}), "rope_cos_sin in a way it cannot be called"),
        (node(4, attributes={"sizes": [64.0, 32, 32]}), "split in a way it cannot be called"),
        (node(4, attributes={"sizes": [[64], 32, 32]}), "not a stored graph"),
        (lambda graph: graph.update(outputs=[]), "outputs are not the selected logits"),
        (lambda graph: graph.update(outputs=graph["outputs"] * 2), "outputs are not the selected logits"),
        (lambda graph: graph.update(outputs=["embedding"]), "outputs are not the selected logits"),
        (lambda graph: graph.update(outputs=["nothing"]), "the output 'nothing' is never written"),
        (lambda graph: graph.update(types={}), "has no type, or two"),
        (lambda graph: graph["types"].update(embedding=["load", 1]), "dtype 'load'"),
        (lambda graph: graph["types"].update(embedding=["float32", "Z"]), "size 'Z'"),
        (lambda graph: graph["types"].update(embedding=["float32", -1]), "size -1"),
        (lambda graph: graph["types"].update({"kv.0": ["float32", 1]}), r"'kv\.0' has no type, or two"),
        (lambda graph: graph["inputs"].update({"norm.weight": ["float32", 64]}), "both an input and a weight"),
        (lambda graph: graph["nodes"].reverse(), "which nothing before it writes"),
        (lambda graph: graph["nodes"].append(None), "not a stored graph"),
        (lambda graph: graph.pop("weights"), "not a stored graph"),
        (
            op("rope_kv_write", 6, "step.token_ids"),
            "gives rope_kv_write step.token_ids as slots, which must be step.slots",
        ),
        (op("rope_kv_write", 5, "norm.weight"), "gives rope_kv_write norm.weight as kv, which must be a KV cache"),
        (op("attention", 1, "embedding"), "gives attention embedding as kv, which must be a KV cache"),
        (op("attention", 2, "step.kv_lens"), "which must be step.query_starts"),
        (op("select_rows", 1, "step.slots"), "gives select_rows step.slots as rows, which must be step.logit_rows"),
        (op("embedding", 1, "step.slots"), "looks up step.slots in embed.weight, which has 128 rows"),
        (op("embedding", 0, "norm.weight"), "looks up step.token_ids in norm.weight, which has 64 rows"),
        (op("silu_and_mul", 0, "embedding"), r"cannot run: .*linear does not take \(float32\[T, 32\]"),
        (op("add_rms_norm", 0, "kv.0"), "kv.0|cannot run"),
        (lambda graph: graph["types"].update(linear=["float32", "T", 129]), "says linear is .*129.*, but it is"),
        (lambda graph: graph["types"].update(embedding=["float32", "T", 0]), "size 0"),
        (
            lambda graph: graph["inputs"].update(x=["float32", "T"]) or graph["types"].update(x=["float32", "T"]),
            r"reads x: float32\[T\], which no step has",
        ),
        (node(4, op="concat", **{"in": ["embedding", "embedding"]}, attributes={}, out=["concat"]), "concat|writes"),
        (node(4, attributes={"sizes": [1] * 5000}), "an attribute of 5000 numbers"),
        (rename_everywhere("embedding", "__import__('os')"), "not a stored graph"),
        # Names that a start adds: with two windows step.slots.1 would be read as where keys and values go.
        (
            add_node("silu", ["embedding"], "step.slots.1", ["float32", "T", 64]),
            r"a value step\.slots\.1, as only a step",
        ),
        (add_node("silu", ["embedding"], "x.for_sinks", ["float32", "T", 64]), r"x\.for_sinks, as only a step may"),
        (
            lambda graph: (
                [graph[part].update({"kv.9": ["float32", 2, "N", 16, 2, 16]}) for part in ("inputs", "types")] and None
            ),
            r"reads kv\.9: .*, which no step has",
        ),
        (add_node("silu", ["kv.0"], "x", ["float32", 2, "N", 16, 2, 16]), r"kv\.0 as x, which a KV cache cannot be"),
        (
            add_node("place_in_window", ["step.positions"], "x", ["int64", "T"], window=4),
            "only a start with sink tokens",
        ),
        (add_node("concat", ["embed.weight"], "x", ["float32", 128, 64]), "calls concat, which only a build may"),
        (add_node("select_rows", ["embed.weight", "step.logit_rows"], "x", ["float32", "R", 64]), "have a row a token"),
        (add_node("add", ["step.slots", "step.slots"], "x", ["int64", "T"]), "x must be of floating-point numbers"),
        (add_node("split", ["embedding"], "x", ["float32", "T", 64], sizes=[32, 32]), "cannot run: .*split"),
        (attribute("attention", "value_dim", 17), "value_dim must be from 1 to 16"),
        (attribute("attention", "window", -1), "window must not be negative"),
        (attribute("split", "sizes", [64, 32, 31]), "the sizes must add up to 128 columns"),
        (op("rope_kv_write", 2, "embedding"), r"cannot run: .*v must be \[T, 32\], not \[T, 64\]"),
        (op("add_rms_norm", 1, "silu_and_mul"), "residual must be|which nothing before it writes"),
    ],
)
def test_a_graph_that_no_build_writes_is_named(tiny_engine: Path, tmp_path: Path, change: Any, message: str) -> None:
    folder = changed_engine(tiny_engine, tmp_path / "engine", graph=change)
    with pytest.raises(EngineError, match=message):
        engine = open_engine(folder)
        weights = {name: engine.weights.read(name) for name in engine.graph.weights}
        compile_graph(engine.graph, weights, Choices("none"), CPU)


@pytest.mark.parametrize(
    "name", ["__import__", "exec", "inputs", "step_", "k0", "a1_0", "w0", "lambda", "None", "v-1+2"]
)
def test_names_that_look_like_code_are_names(tiny_engine: Path, tmp_path: Path, name: str) -> None:
    """A value may be called anything the pattern allows; the generated source uses names of its own."""

    def change(graph: dict[str, Any]) -> Any:
        text = json.dumps(graph)
        for old in ("rope_kv_write", "silu_and_mul"):  # their values, not the ops
            text = text.replace(f'"out": ["{old}"]', f'"out": ["{name}"]').replace(
                f'"in": ["{old}"', f'"in": ["{name}"'
            )
            text = text.replace(f'"{old}": ["float32"', f'"{name}": ["float32"')
            break
        return json.loads(text)

    step = open_and_compile(changed_engine(tiny_engine, tmp_path / "engine", graph=change))
    assert step is not None


def test_an_input_s_name_reaches_the_source_only_as_a_string() -> None:
    text = {"inputs": {"eval.x": ["float32", "T", 8]}, "weights": {}, "outputs": ["silu"], "types": {}}
    text["nodes"] = [{"op": "silu", "in": ["eval.x"], "out": ["silu"]}]
    text["types"] = {"eval.x": ["float32", "T", 8], "silu": ["float32", "T", 8]}
    step = compile_graph(graph_from_json(json.dumps(text)), {}, Choices("none"), CPU).run
    assert_calls_only_ops(step)
    assert torch.equal(step({"eval.x": torch.zeros(1, 8)})[0], torch.zeros(1, 8))


@pytest.fixture(scope="session")
def packed_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts, in a format whose columns have an order in its other linears."""
    return make_engines(tmp_path_factory.mktemp("packed"), ["mixtral"])[0]


@pytest.fixture(scope="session")
def ordered_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engines(tmp_path_factory.mktemp("ordered"), ["gptq"])[0]


def rewritten(engine: Path, folder: Path, change: Callable[[Parts], None]) -> Path:
    """A copy with a change to the weights as well, in which everything agrees with them."""
    shutil.copytree(engine, folder)
    parts = Parts.of(folder)
    change(parts)
    make_agree(random.Random(0), parts, keep_values=True)
    parts.write(folder)
    return folder


@pytest.mark.parametrize("hostile", [[-1], [64], [2**31 - 1], [1, 1]])
def test_an_order_of_columns_that_is_no_permutation_is_refused(
    ordered_engine: Path, tmp_path: Path, hostile: list[int]
) -> None:
    """It is the one index that comes out of the file."""
    assert open_and_compile(ordered_engine) is not None

    def change(parts: Parts) -> None:
        name = next(name for name in parts.graph["weights"] if name.endswith(".order"))
        begin, end = parts.header[name]["data_offsets"]
        order = torch.frombuffer(bytearray(parts.data[begin:end]), dtype=torch.int32)
        order[: len(hostile)] = torch.tensor(hostile)
        parts.data = parts.data[:begin] + order.numpy().tobytes() + parts.data[end:]

    with pytest.raises(EngineError, match=r"order is no order of columns, each of them once"):
        open_engine(rewritten(ordered_engine, tmp_path / "engine", change))


def test_where_the_cache_is_written_cannot_come_out_of_the_file(tiny_engine: Path, tmp_path: Path) -> None:
    def change(parts: Parts) -> None:
        del parts.graph["inputs"]["step.slots"]
        parts.graph["weights"]["step.slots"] = parts.graph["types"]["step.slots"] = ["int64", 4]

    with pytest.raises(EngineError, match=r"a value step\.slots, as only a step may"):
        open_engine(rewritten(tiny_engine, tmp_path / "engine", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (attribute("route_softmax", "top_k", 5), "top_k must be from 1 to 4"),
        (attribute("route_softmax", "top_k", 0), "top_k must be from 1 to 4"),
        (attribute("experts_w4a16", "group_size", 2**40), "scale must be"),
        (attribute("experts_w4a16", "group_size", -1), "a group cannot"),
        (attribute("experts_w4a16", "input_group_size", -1), "a group cannot"),
        (op("experts_w4a16", 2, "step.block_tables"), "expert_ids, which must be what a router chose"),
        (op("experts_w4a16", 2, "embed.weight"), "embed.weight as expert_ids, which must be what a router chose"),
        (op("route_softmax", 1, "embed.weight"), r"a router of \[128\] experts for \[4\]"),
    ],
)
def test_experts_are_chosen_by_a_router_that_knows_as_many(
    packed_engine: Path, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        open_engine(changed_engine(packed_engine, tmp_path / "engine", graph=change))


def test_a_weight_may_not_be_as_long_as_what_stands_for_the_tokens(tiny_engine: Path, tmp_path: Path) -> None:
    def change(parts: Parts) -> None:
        parts.graph["weights"]["long"] = parts.graph["types"]["long"] = ["uint8", 1_000_003]

    with pytest.raises(EngineError, match="1000003 is kept to stand for a size that varies"):
        open_engine(rewritten(tiny_engine, tmp_path / "engine", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "\x1b[2J"}, "name is"),
        ({"name": "\ud800"}, "name is"),
        ({"tokens_per_block": 2**17}, "tokens_per_block is"),
    ],
)
def test_a_config_that_no_build_writes_is_refused(
    tiny_engine: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = changed_engine(tiny_engine, tmp_path / "engine", manifest=lambda values: values.update(change))
    with pytest.raises(EngineError, match=message):
        open_engine(folder)


def test_a_cache_too_large_to_count_is_refused(tiny_engine: Path, tmp_path: Path) -> None:
    sizes = {"tokens_per_block": 2**16, "num_kv_heads": 2**31, "head_dim": 2**31}

    def change(graph: dict[str, Any]) -> None:
        for part in ("inputs", "types"):
            graph[part]["kv.0"] = ["float32", 2, "N", *sizes.values()]

    folder = changed_engine(tiny_engine, tmp_path / "engine", graph=change, manifest=lambda each: each.update(sizes))
    with pytest.raises(EngineError, match="cannot run"):
        open_engine(folder)


def test_an_engine_that_lies_about_its_memory_is_refused(tiny_engine: Path, tmp_path: Path) -> None:
    """The plan is what decides how large the KV cache may be, so it is counted again."""
    for name, change in (("lower", {"activations": 1}), ("gone", {})):
        folder = changed_engine(tiny_engine, tmp_path / name, manifest=lambda values, c=change: values.update(memory=c))
        with pytest.raises(EngineError, match=r"takes more or less memory than config\.json says"):
            open_engine(folder)


def test_an_op_of_a_module_that_is_not_imported_is_named_and_nothing_is(tiny_engine: Path, tmp_path: Path) -> None:
    folder = changed_engine(
        tiny_engine, tmp_path / "engine",
        graph=node(0, op="magic"), manifest=lambda values: values.update(op_modules=["this", "antigravity"]),
    )  # fmt: skip
    with pytest.raises(EngineError, match=r"ops of this, antigravity: if you trust that code, .* --plugin this or LLM"):
        open_engine(folder)
    assert "antigravity" not in sys.modules


def test_a_million_nodes_are_refused_before_anything_is_made_of_them(tiny_engine: Path, tmp_path: Path) -> None:
    graph = stored_graph(tiny_engine)
    graph["nodes"] = []
    many = json.dumps(graph).replace('"nodes": []', '"nodes": [' + ",".join(["{}"] * 1_000_000) + "]")
    with pytest.raises(EngineError, match=f"1000000 nodes; the most allowed is {MAX_NODES}"):
        graph_from_json(many)


def test_a_deep_graph_is_refused() -> None:
    with pytest.raises(EngineError, match="not a stored graph"):
        graph_from_json('{"inputs": ' + "[" * 100_000)


def test_a_long_chain_within_the_limit_compiles(tiny_engine: Path) -> None:
    kind = ["float32", "T", 8]
    names = [f"v{i}" for i in range(5000)]
    text = json.dumps({
        "inputs": {"x": kind}, "weights": {}, "outputs": names[-1:],
        "nodes": [{"op": "silu", "in": [a], "out": [b]} for a, b in zip(["x", *names], names, strict=False)],
        "types": dict.fromkeys(["x", *names], kind),
    })  # fmt: skip
    step = compile_graph(graph_from_json(text), {}, Choices("none"), CPU).run
    assert_calls_only_ops(step)
    assert step({"x": torch.ones(2, 8)})[0].shape == (2, 8)


def test_opening_allocates_in_proportion_to_the_file(tiny_engine: Path, tmp_path: Path) -> None:
    """Sizes in the thousands of billions are read, compared and refused; nothing is made of them."""

    def enlarge(graph: dict[str, Any]) -> None:
        graph["weights"]["norm.weight"] = graph["types"]["norm.weight"] = ["float32", 2**40]

    folder = changed_engine(tiny_engine, tmp_path / "engine", graph=enlarge)
    tracemalloc.start()
    with pytest.raises(EngineError, match="norm"):
        open_engine(folder)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_shapes_that_do_not_fit_at_run_time_end_the_requests_of_the_step(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no check foresaw (here: what was changed after it): the requests fail, the engine goes on.

    Torch's kernels look at shapes in each step; native ones rely on what was proved when the engine was opened.
    """
    monkeypatch.setenv("SLIPSTREAM_CPU_LEVEL", "torch")
    folder = open_engine(tiny_engine)
    place, write = next((i, node) for i, node in enumerate(folder.graph.nodes) if node.op == "rope_kv_write")
    q, k, _, *rest = write.inputs
    folder.graph.nodes[place] = replace(write, inputs=(q, k, "embedding", *rest))
    engine = start_engine(folder, Choices("none"), CPU, kv_cache_max_tokens=64)
    for round_number in range(2):
        for request in range(2):
            name = f"{round_number}-{request}"
            engine.add(GenerateRequest(name, (1, 2, 3), SamplingParams(temperature=0), seed=0, max_tokens=4))
        events = engine.step()
        assert {event.finish_reason for event in events} == {FinishReason.ERROR}
        assert all(event.error is not None and "the step failed" in event.error for event in events)
        assert not engine.has_work
        assert engine.stats.num_blocks_used == 0
