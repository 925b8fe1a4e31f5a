"""The C++ kernels of CPUs: awkward shapes at every level of instructions that this machine has, and who compiles them.

What each op must be is in test_ops.py and test_kv_cache.py, which walk the registry and meet these kernels too.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.errors import UsageError
from slipstream.kernels.attention.paged import attention
from slipstream.kernels.attention.streaming import streaming_attention
from slipstream.kernels.attention.tree import tree_attention
from slipstream.kernels.cpu import compiler, library
from slipstream.kernels.cpu.compiler import LEVELS, CompileError, levels_here
from slipstream.kernels.linear import panels, w4a16
from slipstream.kernels.linear.dense import linear
from slipstream.kernels.linear.fp8 import linear_fp8a16
from slipstream.kernels.linear.groups import dequantize, per_column
from slipstream.kernels.linear.nvfp4 import linear_nvfp4a16
from slipstream.kernels.linear.panels import embedding_panels, linear_panels
from slipstream.kernels.linear.w4a16 import linear_w4a16
from slipstream.kernels.linear.w8a8 import quantize_w8a8
from slipstream.kernels.linear.w8a16 import linear_w8a16
from slipstream.kernels.norm import rms_norm
from slipstream.kernels.quantized import linear_panels_silu_and_mul_quantize, silu_and_mul_quantize
from slipstream.kernels.registry import Op
from tests.kernels.test_ops import attention_inputs, naive_attention, streaming_inputs, tree_inputs
from tests.seed import SEED

CPU = torch.device("cpu")
SHAPES = [(1, 1, 1), (1, 5, 63), (2, 64, 64), (3, 7, 65), (5, 96, 576), (7, 130, 100), (13, 31, 129), (65, 50, 257)]


@pytest.fixture(params=levels_here())
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("SLIPSTREAM_CPU_LEVEL", request.param)
    found = library.library()
    assert found is not None and found.level == request.param
    yield request.param


@pytest.fixture
def generator() -> torch.Generator:
    print(f"seed {SEED}")
    return torch.Generator().manual_seed(SEED)


@pytest.fixture
def two_threads() -> Iterator[None]:
    library.use_threads(2)
    yield
    library.use_threads(torch.get_num_threads())


def native(op: Op, *args: object) -> Tensor:
    return op.candidates(CPU, torch.float32)["native"].function(*args)


@pytest.mark.parametrize(("num_rows", "num_out", "num_in"), SHAPES, ids=str)
@pytest.mark.usefixtures("two_threads")
def test_products_of_awkward_shapes(
    level: str, generator: torch.Generator, num_rows: int, num_out: int, num_in: int
) -> None:
    wide, weight = (torch.randn(size, num_in + 3, generator=generator) for size in (num_rows, num_out))
    x, weight, bias = wide[:, :num_in], weight[:, 3:].contiguous(), torch.randn(num_out, generator=generator)
    expected = x.double() @ weight.double().t() + bias
    torch.testing.assert_close(native(linear, x, weight, bias).double(), expected, atol=1e-4, rtol=1e-5)


def times_bytes(x: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """By linear_panels, of a weight of 8 bits as linear_w8a8 has it."""
    scales = panels.to_panel_scales.reference(scale, None)
    return native(
        linear_panels, x, x_scale, panels.to_panels.reference(packed, 8), scales, None, bias, 8, 0, 0, len(packed)
    )


@pytest.mark.parametrize(("num_rows", "num_out", "num_in"), [*SHAPES, (8, 33, 64), (9, 16, 4)], ids=str)
@pytest.mark.usefixtures("two_threads")
def test_products_of_bytes_of_awkward_shapes(
    level: str, generator: torch.Generator, num_rows: int, num_out: int, num_in: int
) -> None:
    x, bias = torch.randn(num_rows, num_in, generator=generator), torch.randn(num_out, generator=generator)
    numbers, x_scale = native(quantize_w8a8, x, 0.0, 0)
    packed = torch.randint(-128, 128, (num_out, num_in), generator=generator, dtype=torch.int8)
    scale = torch.rand(num_out, 1, generator=generator).to(torch.bfloat16)
    expected = (numbers.double() * x_scale) @ (packed.double() * scale).t() + bias
    found = times_bytes(numbers, x_scale, packed, scale, bias)
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-5)

    for bits, group_size, x_group_size, has_zeros in itertools.product(
        (8, 4), (0, 32, 64), (0, 32, 128), (False, True)
    ):
        numbers, x_scale = native(quantize_w8a8, x, 0.0, x_group_size)
        groups = -(-num_in // group_size) if group_size else 1
        if bits == 4:
            packed = torch.randint(256, (num_out, -(-num_in // 2)), generator=generator).to(torch.uint8)
        scale = torch.rand(num_out, groups, generator=generator).half()
        zero = torch.randint(16, scale.shape, generator=generator) if has_zeros else 8 if bits == 4 else 0
        shift = (zero * scale.float()).to(torch.float16 if num_rows % 2 else torch.float32)
        values = (packed if bits == 8 else w4a16.unpack(packed, num_in)).double()[:, :num_in]
        off = per_column(shift if has_zeros else zero * scale.double(), num_in, group_size)
        weight = dequantize(values, scale, None, group_size).double() - off
        stored = (
            panels.to_panels.reference(packed, bits), panels.to_panel_scales.reference(scale, None),
            panels.to_panel_scales.reference(shift, None) if has_zeros else None,
        )  # fmt: skip
        found = native(linear_panels, numbers, x_scale, *stored, bias, bits, group_size, x_group_size, num_out)
        ids = torch.randint(num_out, (num_rows,), generator=generator)
        rows = native(embedding_panels, *stored, ids, bits, group_size, num_in)
        torch.testing.assert_close(rows.double(), weight[ids], atol=1e-5, rtol=1e-5)
        expected = dequantize(numbers, x_scale, None, x_group_size).double() @ weight.t() + bias
        size = expected.abs().max().item()
        torch.testing.assert_close(found.double(), expected, atol=1e-5 * size, rtol=1e-5)


@pytest.mark.usefixtures("two_threads")
def test_gate_and_up_in_one_kernel_are_those_of_two(level: str, generator: torch.Generator) -> None:
    """To the last bit, for few rows and for many more than are put beside each other at once."""
    for num_rows, (bits, has_shift), size in itertools.product(
        (1, 3, 9, 65, 200), ((4, True), (4, False), (8, False)), (16, 32, 96)
    ):
        x = torch.randn(num_rows, 100, generator=generator)
        numbers, x_scale = native(quantize_w8a8, x, 0.0, 32)
        packed = torch.randint(256, (192, 100 if bits == 8 else 50), generator=generator)
        packed = packed.to(torch.uint8) if bits == 4 else (packed - 128).to(torch.int8)
        scale, shift = torch.rand(2, 192, 4, generator=generator).half() / 100
        stored = (
            panels.to_panels.reference(packed, bits), panels.to_panel_scales.reference(scale, None),
            panels.to_panel_scales.reference(shift, None) if has_shift else None,
            torch.randn(192, generator=generator) if num_rows % 2 else None,
        )  # fmt: skip
        how = bits, 32, 32, 192
        product = native(linear_panels, numbers, x_scale, *stored, *how)
        expected = native(silu_and_mul_quantize, product, 0.0, size, "int8")
        found = native(linear_panels_silu_and_mul_quantize, numbers, x_scale, *stored, *how, size)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_the_largest_numbers_of_8_bits_are_multiplied_exactly(level: str) -> None:
    x, packed = (torch.full((size, 200), -128, dtype=torch.int8) for size in (2, 5))
    ones = torch.ones(5, 1)
    assert (times_bytes(x, ones[:2], packed, ones) == 200 * 128 * 128).all()
    packed.fill_(127)
    assert (times_bytes(x, ones[:2], packed, ones) == -200 * 128 * 127).all()


@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.usefixtures("two_threads")
def test_attention_over_several_tiles_of_keys(
    level: str, generator: torch.Generator, window: int, poison: float
) -> None:
    """Longer than a tile, chunks that begin inside one, many query heads, heads of odd sizes."""
    chunks = [(1, 300), (17, 120), (3, 128), (1, 0), (30, 0)]
    for heads, head_dim in (((6, 2), 8), ((40, 1), 8), ((4, 2), 75)):
        arguments = attention_inputs(
            generator, chunks, heads, poison, window=window, has_sinks=True, soft_cap=4.0, head_dim=head_dim
        )
        exact = [each.double() if isinstance(each, Tensor) and each.is_floating_point() else each for each in arguments]
        torch.testing.assert_close(native(attention, *arguments).double(), naive_attention(*exact), atol=2e-5, rtol=0)


@pytest.mark.usefixtures("two_threads")
def test_trees_and_sinks_over_several_tiles_of_keys(level: str, generator: torch.Generator) -> None:
    """Nodes and sinks on both sides of a tile's end, against references that test_ops.py holds against naive ones."""
    chunks = [(1, 300), (30, 250), (70, 100), (5, 127), (9, 0)]
    cases: list[tuple[Op, tuple[Any, ...]]] = [
        (tree_attention, tree_inputs(generator, chunks, heads=(6, 2), head_dim=64)),
        (tree_attention, tree_inputs(generator, chunks, window=140, has_slopes=True, has_sinks=True, soft_cap=3.0)),
        (streaming_attention, streaming_inputs(generator, chunks, window=160, sinks=5)),
        (streaming_attention, streaming_inputs(generator, chunks, window=200, sinks=135, soft_cap=2.0)),
    ]
    for op, arguments in cases:
        exact = [each.double() if isinstance(each, Tensor) and each.is_floating_point() else each for each in arguments]
        torch.testing.assert_close(native(op, *arguments).double(), op.reference(*exact), atol=2e-5, rtol=0)


@pytest.mark.parametrize("group_size", [0, 8, 32, 128])
@pytest.mark.parametrize("op", [linear_w4a16, linear_w8a16, linear_fp8a16], ids=lambda op: op.name)
@pytest.mark.usefixtures("two_threads")
def test_packed_weights_with_activations_as_they_are(
    level: str, generator: torch.Generator, op: Op, group_size: int
) -> None:
    for num_rows, num_out, num_in in SHAPES:
        groups = -(-num_in // group_size) if group_size else 1
        x, bias = torch.randn(num_rows, num_in, generator=generator), torch.randn(num_out, generator=generator)
        scale = torch.rand(num_out, groups, generator=generator).to(torch.float16)
        bits = torch.randint(256, (num_out, num_in), generator=generator).to(torch.uint8)
        if op is linear_w4a16:
            zero = torch.randint(16, scale.shape, generator=generator).to(torch.uint8)
            rest = [w4a16.pack(bits % 16), scale, zero if num_rows % 2 else None, None]
        elif op is linear_w8a16:
            zero = torch.randint(-128, 128, scale.shape, generator=generator, dtype=torch.int8)
            rest = [bits.view(torch.int8), scale, zero if num_rows % 2 else None, None]
        else:
            rest = [bits.where(bits % 128 != 127, 0).view(torch.float8_e4m3fn), scale]
        expected = op.reference(x.double(), *rest, bias.double(), group_size)
        size = expected.abs().max().item()
        torch.testing.assert_close(
            native(op, x, *rest, bias, group_size).double(), expected, atol=1e-5 * size, rtol=1e-5
        )


@pytest.mark.usefixtures("two_threads")
def test_nvfp4_with_scales_of_two_levels(level: str, generator: torch.Generator) -> None:
    for num_rows, num_out, num_in in SHAPES:
        x, bias = torch.randn(num_rows, num_in, generator=generator), torch.randn(num_out, generator=generator)
        packed = torch.randint(256, (num_out, -(-num_in // 2)), generator=generator).to(torch.uint8)
        scale = (torch.rand(num_out, -(-num_in // 16), generator=generator) * 448).to(torch.float8_e4m3fn)
        rest = packed, scale, torch.rand(num_out, 1, generator=generator)
        expected = linear_nvfp4a16.reference(x.double(), *rest, bias.double())
        size = expected.abs().max().item()
        torch.testing.assert_close(
            native(linear_nvfp4a16, x, *rest, bias).double(), expected, atol=1e-5 * size, rtol=1e-5
        )


@pytest.mark.usefixtures("two_threads")
def test_a_row_does_not_depend_on_the_others(level: str, generator: torch.Generator) -> None:
    """To the last bit: alone, and in the middle of others."""
    x, weight = torch.randn(23, 200, generator=generator), torch.randn(37, 200, generator=generator)
    numbers, scales = native(quantize_w8a8, x, 0.0, 0)
    packed, scale = native(quantize_w8a8, weight, 0.0, 0)
    product = native(linear, x, weight, None)
    rounded = times_bytes(numbers, scales, packed, scale)
    for row in (slice(0, 1), slice(7, 8), slice(20, 23)):
        assert torch.equal(native(linear, x[row], weight, None), product[row])
        alone = times_bytes(numbers[row], scales[row], packed, scale)
        assert torch.equal(alone, rounded[row])


@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.usefixtures("two_threads")
def test_a_row_of_attention_does_not_depend_on_its_chunk(level: str, generator: torch.Generator, window: int) -> None:
    """Nor on how its keys are shared out: a row alone has a task for each tile."""
    for head_dim in (8, 64):
        q, kv, _, lens, tables, *rest = attention_inputs(generator, [(150, 250)], window=window, head_dim=head_dim)
        whole = native(attention, q, kv, torch.tensor([0, 150]), lens, tables, *rest)
        for first, end in ((0, 1), (17, 60), (149, 150)):
            starts, kv_lens = torch.tensor([0, end - first]), torch.tensor([250 + end])
            assert torch.equal(native(attention, q[first:end], kv, starts, kv_lens, tables, *rest), whole[first:end])


def test_nan_comes_out(level: str) -> None:
    """What an earlier layer spoilt is not made a number of again, which would be sampled."""
    x = torch.ones(1, 40)
    x[0, 3] = float("nan")
    assert native(rms_norm, x, torch.ones(40), 1e-5, 0.0).isnan().all()
    numbers, scales = native(quantize_w8a8, x, 0.0, 0)
    assert times_bytes(numbers, scales, torch.ones(3, 40).char(), torch.ones(3, 1)).isnan().all()


# ----- who compiles, and what is said where nobody can


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    library._loaded.cache_clear()
    yield tmp_path
    library._loaded.cache_clear()


def test_without_a_compiler_torch_computes_which_is_said_once(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(empty_cache))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.warns(
        UserWarning, match=r"no C\+\+ compiler \(c\+\+, g\+\+ or clang\+\+\) on PATH.*such as g\+\+"
    ) as said:
        assert library.library() is None
        assert list(linear.candidates(CPU, torch.float32)) == ["reference", "weight_first"]
    assert len(said) == 1


def test_a_compiler_that_fails_is_named(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(CompileError, match="false failed: exit code 1"):
        compiler.compiled_library(next(iter(levels_here())))
    assert not list((empty_cache / "cpu").glob("*.so"))


def test_a_compiled_library_is_found_again_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    best = next(iter(levels_here()))
    compiled = compiler.compiled_library(best)
    monkeypatch.setenv("CXX", "false")
    assert compiler.compiled_library(best) == compiled


def test_a_level_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_CPU_LEVEL", "avx1024")
    with pytest.raises(UsageError, match=r"SLIPSTREAM_CPU_LEVEL is 'avx1024'; this machine has .*baseline, torch"):
        library.library()
    monkeypatch.setenv("SLIPSTREAM_CPU_LEVEL", "torch")
    assert library.library() is None


def test_levels_are_those_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler.platform, "machine", lambda: "x86_64")
    levels = LEVELS["x86_64"]
    for features, expected in (
        (frozenset(), ["baseline"]),
        (levels["avx2"].needs, ["avx2", "baseline"]),
        (levels["avx512_vnni"].needs, ["avx512_vnni", "avx2", "baseline"]),
    ):
        monkeypatch.setattr(compiler, "_cpu_features", lambda features=features: features)
        assert list(levels_here()) == expected
    monkeypatch.setattr(compiler.platform, "machine", lambda: "riscv64")
    assert list(levels_here()) == [] and compiler.chosen_level() is None
