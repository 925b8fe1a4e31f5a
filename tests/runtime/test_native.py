"""Runs of native nodes: one call gives what the nodes give one by one, wherever a node between them is torch's."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import slipstream.kernels  # noqa: F401 - registers the ops
from slipstream import LLM, SamplingParams
from slipstream.build.example import trace
from slipstream.build.rewrite import Symbol, ops
from slipstream.engine.choices import ROW_BUCKETS, Choices, key_of
from slipstream.engine.graph import Graph
from slipstream.kernels.registry import known_ops
from slipstream.runtime.worker.graphs import compile_graph

CPU = torch.device("cpu")
WEIGHTS = {"norm": (24,), "fused": (64, 24), "down": (24, 16)}


def block(x: Symbol, y: Symbol, norm: Symbol, fused: Symbol, down: Symbol) -> tuple[Symbol, ...]:
    """Views that are read by kernels, by a product whose input has rows apart, and that come out."""
    normed, total = ops.add_rms_norm(x, y, norm, eps=1e-5, weight_offset=0.0)
    first, second, last = ops.split(ops.linear(normed, fused, None), sizes=[32, 8, 24])
    gated = ops.silu_and_mul(first)
    more = ops.add(ops.linear(gated, down, None), last)
    return ops.mul(more, total), second


@pytest.fixture
def graph() -> Graph:
    return trace(block, inputs={"x": ("T", 24), "y": ("T", 24)}, weights=WEIGHTS)


def results(
    graph: Graph, choices: Choices, num_rows: int, *, is_deterministic: bool = False
) -> tuple[list[Tensor], list[str]]:
    """What the graph gives, and the names of what its function calls."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(*shape, generator=generator) / 5 for name, shape in WEIGHTS.items()}
    inputs = {name: torch.randn(num_rows, 24, generator=generator) for name in ("x", "y")}
    compiled = compile_graph(graph, weights, choices, CPU, is_batch_invariant=is_deterministic)
    calls = [name for name in compiled.run.__code__.co_names if name[0] in "nk"]
    return list(compiled.run(inputs)), calls


def by_reference(graph: Graph, *patterns: str) -> Choices:
    keys = (key_of(node, graph.types) for node in graph.nodes if node.op in patterns)
    return Choices("", {key: ["reference"] * len(ROW_BUCKETS) for key in keys})


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 200])
def test_a_whole_graph_is_one_call(graph: Graph, num_rows: int, is_deterministic: bool) -> None:
    found, calls = results(graph, Choices(""), num_rows, is_deterministic=is_deterministic)
    assert len(calls) == 1
    expected, calls = results(graph, by_reference(graph, *graph.count_ops()), num_rows)
    assert len(calls) == len(graph.nodes)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("op", ["add_rms_norm", "linear", "silu_and_mul", "add", "mul", "split"])
def test_a_node_of_torch_between_them(graph: Graph, op: str) -> None:
    """It may be given, and give, views of what a run has made."""
    expected, _ = results(graph, by_reference(graph, *graph.count_ops()), 7)
    found, calls = results(graph, by_reference(graph, op), 7)
    assert len(calls) > 1 or op == "split"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_node_of_torch_may_give_columns_that_lie_together(graph: Graph) -> None:
    keys = [key_of(node, graph.types) for node in graph.nodes if node.op == "linear"]
    found, calls = results(graph, Choices("", {key: ["weight_first"] * len(ROW_BUCKETS) for key in keys}), 7)
    expected, _ = results(graph, by_reference(graph, *graph.count_ops()), 7)
    assert len(calls) > 3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_steps_of_all_sizes_share_a_run_and_leave_each_others_results(graph: Graph) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(*shape, generator=generator) / 5 for name, shape in WEIGHTS.items()}
    step = compile_graph(graph, weights, Choices(""), CPU).run
    plain = compile_graph(graph, weights, by_reference(graph, *graph.count_ops()), CPU).run
    given = [{name: torch.randn(rows, 24, generator=generator) for name in ("x", "y")} for rows in (3, 100, 1, 64)]
    found = [step(inputs) for inputs in given]
    for inputs, result in zip(given, found, strict=True):
        torch.testing.assert_close(result, plain(inputs), atol=1e-5, rtol=1e-5)


def test_values_that_live_at_once_lie_apart() -> None:
    """Fifty values of several widths, each read long after it was made."""

    def chain(x: Symbol, weight: Symbol) -> tuple[Symbol, ...]:
        made = [x]
        for place in range(50):
            made.append(ops.add(made[place // 3], ops.scale(made[-1], factor=0.5)))
        return ops.linear(made[-1], weight, None), made[20]

    graph = trace(chain, inputs={"x": ("T", 24)}, weights={"weight": (5, 24)})
    weights, x = {"weight": torch.randn(5, 24)}, torch.randn(9, 24)
    found = compile_graph(graph, weights, Choices(""), CPU).run({"x": x})
    made = [x.double()]
    for place in range(50):
        made.append(made[place // 3] + made[-1] * 0.5)
    expected = made[-1] @ weights["weight"].double().t(), made[20]
    torch.testing.assert_close([each.double() for each in found], list(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("quantization", ["int8", "int8_wo", "int4_wo"])
def test_an_engine_of_packed_weights_says_what_it_says_on_torch(
    quantization: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for level in ("", "torch"):
        monkeypatch.setenv("SLIPSTREAM_CPU_LEVEL", level)
        with LLM(tiny_model, quantization=quantization, max_batch_size=2, max_num_tokens=16) as llm:
            sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
            output = llm.generate([list(range(3, 30))], sampling)[0]
            assert output.prompt_logprobs is not None
            found.append(torch.tensor([each.logprob for each in output.prompt_logprobs if each is not None]))
    # Activations that are rounded to 8 bits may fall to the other side of a half.
    torch.testing.assert_close(*found, atol=2e-2 if quantization == "int8" else 1e-4, rtol=0)


def test_every_native_kernel_is_in_the_library() -> None:
    for op in known_ops().values():
        kernel = op.candidates(CPU, torch.float32).get("native")
        assert kernel is None or kernel.function.address  # type: ignore[attr-defined]
