"""Deterministic runs: a row's result is to the last bit what it is alone, however many rows there are beside it."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from slipstream import LLM, SamplingParams
from slipstream.checkpoint.random import write_random_model
from slipstream.kernels.registry import known_ops
from slipstream.kernels.triton import attention as tiles
from slipstream.kernels.triton import linear
from slipstream.models import known_models, model_file
from slipstream.runtime.worker import worker
from slipstream.runtime.worker.graphs import CompiledGraph, compile_graph
from tests.gpu.test_attention import make
from tests.gpu.test_experts import SIZES
from tests.gpu.test_experts import Problem as ExpertsProblem
from tests.gpu.test_linear import FORMATS, Problem
from tests.seed import SEED

IS_GPU = torch.cuda.is_available()
HALF = torch.bfloat16 if IS_GPU else torch.float16  # the interpreter multiplies the bits of a bfloat16
NUM_ROWS = 300 if IS_GPU else 65
PARTS = ((0, 1), (3, 20), (0, 64)) if not IS_GPU else ((0, 1), (7, 8), (3, 20), (0, 64), (1, 130), (64, 300))


def assert_rows_are_their_own(call: Callable[[slice], Tensor]) -> None:
    """call: the result of some rows of one and the same input."""
    together = call(slice(0, NUM_ROWS))
    assert together.isfinite().all()
    for first, end in PARTS:
        rows = slice(first, end)
        assert torch.equal(call(rows), together[rows]), f"rows {rows}, seed {SEED}"


def invariant(name: str) -> Callable[..., Any]:
    """The kernel that a GPU's deterministic runs call."""
    op = known_ops()[name]
    kernels = [op.kernels[each].batch_invariant for each in ("triton",) if each in op.kernels]
    (found,) = kernels or [op.candidates(torch.device("cpu"), HALF)["reference"].batch_invariant]
    assert found is not None
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_products(name: str, device: torch.device) -> None:
    num_out, num_in = (4096, 4096) if IS_GPU else (70, 384)
    problem = Problem(name, NUM_ROWS, num_out, num_in, device)

    def call(rows: slice) -> Tensor:
        scale_MG = problem.weight.x_scale_MG
        weight = problem.weight._replace(x_scale_MG=None if scale_MG is None else scale_MG[rows])
        return linear.product(problem.x_MK[rows], weight, problem.bias_N, torch.float32, is_batch_invariant=True)

    assert_rows_are_their_own(call)
    assert problem.error(call(slice(0, NUM_ROWS))) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("num_in", [50, 96])  # 50: no whole vectors
def test_dense_products_of_any_size_and_stride(num_in: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(SEED)
    x_MK, weight_NK, bias_N = (
        torch.randn(shape, generator=generator).to(device, dtype) for shape in ((NUM_ROWS, 200), (40, num_in), (40,))
    )
    x_MK = x_MK[:, 60 : 60 + num_in]
    assert_rows_are_their_own(lambda rows: invariant("linear")(x_MK[rows], weight_NK, bias_N))
    torch.testing.assert_close(
        invariant("linear")(x_MK, weight_NK, bias_N), x_MK @ weight_NK.t() + bias_N, rtol=2e-2, atol=0.1
    )


@pytest.mark.parametrize("is_transposed", [False, True])
def test_linears_of_heads(is_transposed: bool, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(SEED)
    weight_ND = torch.randn(3 * 16, 24, generator=generator).to(device, HALF)
    x_TX = torch.randn(NUM_ROWS, 3 * (16 if is_transposed else 24), generator=generator).to(device, HALF)
    assert_rows_are_their_own(lambda rows: invariant("head_linear")(x_TX[rows], weight_ND, 3, is_transposed))
    expected = known_ops()["head_linear"].reference(x_TX, weight_ND, 3, is_transposed)
    torch.testing.assert_close(
        invariant("head_linear")(x_TX, weight_ND, 3, is_transposed), expected, rtol=1e-2, atol=0.1
    )


@pytest.mark.parametrize("name", ["dense", "w4a16", "w8a8", "fp8 blocks", "w4a16 odd groups"] if IS_GPU else ["dense"])
def test_experts(name: str, device: torch.device) -> None:
    """By pairs found in the ids, and sorted before."""
    problem = ExpertsProblem(name, NUM_ROWS, SIZES[-1 if IS_GPU else 0], device)
    x_TH, shares_TK, ids_TK, *rest = problem.arguments
    experts = invariant(problem.op.name)
    assert_rows_are_their_own(lambda rows: experts(x_TH[rows], shares_TK[rows], ids_TK[rows], *rest))


@pytest.mark.parametrize("dtype", [torch.float32, HALF] if IS_GPU else [HALF], ids=str)
def test_routers(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(SEED)
    x_TH, weight_EH = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((NUM_ROWS, 96), (8, 96)))
    correction_E = torch.randn(8, generator=generator).to(device)
    softmax, sigmoid = invariant("route_softmax"), invariant("route_sigmoid")
    assert_rows_are_their_own(lambda rows: softmax(x_TH[rows], weight_EH, None, 3, True)[0])
    assert_rows_are_their_own(lambda rows: sigmoid(x_TH[rows], weight_EH, correction_E, 3, 4, 2, True, 2.5)[0])


LENGTH = 1000 if IS_GPU else 50
CHUNKS = ((0, 1), (1, 30), (30, 31), (31, 32), (32, LENGTH - 1), (LENGTH - 1, LENGTH))  # first query row, and the end


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": (6, 2), "head_dim": 80, "soft_cap": 2.0, "has_sinks": True},
        {"window": 20, "block_size": 4, "has_slopes": True},
        {"window": 37, "block_size": 64},
        {"head_dim": 80, "value_dim": 64, "num_planes": 1, "heads": (20, 1)},
        {"kv_dtype": torch.int8},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_attention(options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """A text at once, and in chunks beside each other; pages that a chunk's window has left are another's."""
    q, kv, _, _, tables, *rest = make(device, [(LENGTH, 0)], dtype=dtype, **options)
    window, block_size = options.get("window", 0), kv.shape[2]

    def call(chunks: tuple[tuple[int, int], ...]) -> Tensor:
        starts = torch.tensor([0, *(end - first for first, end in chunks)], device=device).cumsum(0)
        table = tables.repeat(len(chunks), 1)
        for sequence, (first, _) in enumerate(chunks):
            table[sequence, : max(0, first + 1 - window) // block_size if window else 0] = 0
        lens = torch.tensor([end for _, end in chunks], device=device)
        rows = torch.cat([q[first:end] for first, end in chunks])
        return tiles.attention(rows, kv, starts, lens, table, *rest, is_batch_invariant=True)

    whole = call(((0, LENGTH),))
    assert torch.equal(call(CHUNKS), whole)
    for first, end in CHUNKS:
        assert torch.equal(call(((first, end),)), whole[first:end])


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Options of a deterministic LLM; without a GPU, one on the CPU with the interpreted kernels of a GPU."""
    if IS_GPU:
        yield {"device": "cuda", "deterministic": True}
        return

    def compile_for_gpu(graph: Any, weights: Any, choices: Any, device: torch.device, **_: Any) -> CompiledGraph:
        return compile_graph(graph, weights, choices, torch.device("cuda"), is_batch_invariant=True)

    monkeypatch.setattr(worker, "compile_graph", compile_for_gpu)
    yield {"device": "cpu"}


@pytest.mark.parametrize("model_type", known_models() if IS_GPU else ["llama"])
def test_a_request_beside_others(model_type: str, tmp_path: Path, deterministic: dict[str, Any]) -> None:
    """In chunks of other sizes, with a prefix that is there already, and greedy beside drawn by a seed."""
    options = model_file(model_type).TINY
    if not IS_GPU:
        options = options | {"num_hidden_layers": 2}
    model = write_random_model(tmp_path / "model", options, seed=3)
    chooser = random.Random(SEED)
    shared = [chooser.randrange(100) for _ in range(17)]
    prompts = [[*shared, 1, 2], [5], [*shared, 3]]
    sampling = [
        SamplingParams(max_tokens=2, temperature=index % 2, seed=index, ignore_eos=True, logprobs=2)
        for index in range(len(prompts))
    ]
    limits = {"dtype": "float32", "max_batch_size": 4, "max_seq_len": 64, "kv_cache_max_tokens": 512, **deterministic}

    def found(outputs: list[Any]) -> list[Any]:
        assert not any(output.error for output in outputs)
        return [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]

    with LLM(model, max_num_tokens=64, enable_block_reuse=False, **limits) as llm:
        alone = [found(llm.generate([prompt], [each]))[0] for prompt, each in zip(prompts, sampling, strict=True)]
        engine = llm._folder.path
    with LLM(engine, max_num_tokens=13, **limits) as llm:
        together = found(llm.generate(prompts, sampling))
    assert together == alone, f"seed {SEED}"
