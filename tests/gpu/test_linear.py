"""Products of few rows against float64, for each format, number of rows and way to cut them up."""

import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from slipstream.kernels.linear import nvfp4
from slipstream.kernels.linear.groups import dequantize
from slipstream.kernels.linear.w4a16 import pack
from slipstream.kernels.registry import known_ops
from slipstream.schema.format import INTEGERS_OF_4_BITS
from tests.seed import SEED

linear = pytest.importorskip("slipstream.kernels.triton.linear")
Tiles, Weight = linear.Tiles, linear.Weight

IS_GPU = torch.cuda.is_available()
WIDE = torch.bfloat16 if IS_GPU else torch.float16  # the interpreter multiplies the bits of bfloat16s
FORMATS = {  # group of columns of W that share a scale, of x, and whether there are zero points
    "dense": (0, 0, False),
    "fp8": (0, 0, False),
    "fp8 blocks": (128, 128, False),
    "fp8 mixed": (64, 0, False),
    "fp8a16": (0, 0, False),
    "fp8a16 groups": (64, 0, False),
    "w8a16": (0, 0, False),
    "w8a16 groups": (32, 0, True),
    "w4a16": (0, 0, False),
    "w4a16 groups": (128, 0, True),
    "w4a16 small groups": (32, 0, True),
    "w4a16 symmetric": (64, 0, False),
    "w4afp8": (0, 0, False),
    "w4afp8 groups": (128, 0, False),
    "w4afp8 small groups": (32, 64, False),
    "w8a8": (0, 0, False),
    "w8a8 groups": (128, 64, False),
}
WAYS = {
    "row": Tiles(8, 256, splits=0, warps=2),
    "row of one step": Tiles(4, 2048, splits=0),
    "dot": Tiles(32, 128),
    "dot of few": Tiles(16, 64, warps=2, stages=6),
    "split": Tiles(16, 128, splits=3),  # of 11 groups of 32 columns: the last part ends after them
    "swapped": Tiles(64, 64, is_swapped=True),
    "swapped split": Tiles(64, 128, splits=2, is_swapped=True),
}


class Problem:
    """x [M, K] and W [N, K] as a format stores them, and their product in float64."""

    def __init__(self, name: str, num_rows: int, num_out: int, num_in: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(SEED)
        kind, (group, x_group, has_zeros) = name.split()[0], FORMATS[name]

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def whole(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        def scales(rows: int, size: int) -> Tensor:
            return torch.rand(rows, -(-num_in // size) if size else 1, generator=generator) + 0.5

        scale_NG, x_scale_MG, zero_NG, x_MK = scales(num_out, group), None, None, normal(num_rows, num_in).to(WIDE)
        if kind == "dense":
            values_NK = normal(num_out, num_in).to(WIDE)
        elif kind.startswith("fp8"):
            values_NK = normal(num_out, num_in).to(torch.float8_e4m3fn)
        elif kind in INTEGERS_OF_4_BITS:
            values_NK = whole(0, 16, num_out, num_in).to(torch.uint8)
            zero_NG = whole(0, 16, *scale_NG.shape).to(torch.uint8) if has_zeros else None
        else:
            values_NK = whole(-128, 128, num_out, num_in).to(torch.int8)
            zero_NG = whole(-128, 128, *scale_NG.shape).to(torch.int8) if has_zeros else None
        if kind in ("fp8", "w8a8", "w4afp8"):
            x_MK = whole(-128, 128, num_rows, num_in).to(torch.int8) if kind == "w8a8" else x_MK.to(torch.float8_e4m3fn)
            x_scale_MG = scales(num_rows, x_group)

        wide_MK = x_MK.double() if x_scale_MG is None else dequantize(x_MK, x_scale_MG, None, x_group).double()
        if kind == "dense":
            wide_NK = values_NK.double()
        else:
            zeros_NG = torch.full_like(scale_NG, 8) if kind in INTEGERS_OF_4_BITS and zero_NG is None else zero_NG
            wide_NK = dequantize(values_NK, scale_NG, zeros_NG, group).double()
        self.bias_N = normal(num_out)
        self.expected_MN = wide_MK @ wide_NK.t() + self.bias_N.double()
        self.bias_N, self.x_MK = self.bias_N.to(device), x_MK.to(device)
        packed = pack(values_NK) if kind in INTEGERS_OF_4_BITS else values_NK
        parts = (None if part is None else part.to(device) for part in (packed, scale_NG, zero_NG, x_scale_MG))
        packed, scale_NG, zero_NG, x_scale_MG = parts
        scale_NG = None if kind == "dense" else scale_NG
        self.weight = Weight(packed, scale_NG, zero_NG, group, x_scale_MG, x_group)

    def error(self, y_MN: Tensor) -> float:
        assert y_MN.shape == self.expected_MN.shape
        return float((y_MN.cpu().double() - self.expected_MN).norm() / self.expected_MN.norm())


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_float64(name: str, way: str, device: torch.device, poisoned: None) -> None:
    """Sizes that no tile divides, and sizes that all do; the sum is the same every time."""
    sizes = [(1, 20, 352), (1, 16, 1024)] if way.startswith("row") else [(3, 70, 352), (17, 64, 384)]
    if IS_GPU:
        sizes += [(num_rows, 4096 + 48, 4096) for num_rows, _, _ in sizes]
    for num_rows, num_out, num_in in sizes:
        problem = Problem(name, num_rows, num_out, num_in, device)
        y_MN = linear.product(problem.x_MK, problem.weight, problem.bias_N, torch.float32, WAYS[way])
        assert problem.error(y_MN) < (2e-3 if IS_GPU and name.startswith("fp8") else 1e-5), f"seed {SEED}"
        again_MN = linear.product(problem.x_MK, problem.weight, problem.bias_N, torch.float32, WAYS[way])
        assert torch.equal(y_MN, again_MN)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 16, 33, 130])
def test_rows_that_are_padding_disturb_no_other(num_rows: int, device: torch.device) -> None:
    problem = Problem("dense", num_rows, 48, 160, device)
    y_MN = linear.product(problem.x_MK, problem.weight, problem.bias_N, torch.float32)
    assert problem.error(y_MN) < 1e-5, f"seed {SEED}"
    problem.x_MK[-1] = math.nan
    with_nan_MN = linear.product(problem.x_MK, problem.weight, problem.bias_N, torch.float32)
    assert torch.equal(with_nan_MN[:-1], y_MN[:-1])
    assert with_nan_MN[-1].isnan().all()


@pytest.mark.parametrize("num_rows", [2, 9, 25, 61])
@pytest.mark.parametrize(("num_out", "num_in"), [(40, 96), (1040, 96), (1040, 1152), (4112, 96)])
def test_little_weights_have_tiles_of_their_own(num_rows: int, num_out: int, num_in: int, device: torch.device) -> None:
    problem = Problem("dense", num_rows, num_out, num_in, device)
    y_MN = linear.product(problem.x_MK, problem.weight, problem.bias_N, torch.float32)
    assert problem.error(y_MN) < 1e-5, f"seed {SEED}"


@pytest.mark.parametrize("num_in", [1024, 2048, 3072, 4096, 8192])
@pytest.mark.parametrize("num_out", [24, 16384])
def test_a_row_of_four_bits_is_read_by_parts_that_end_with_it(num_in: int, num_out: int, device: torch.device) -> None:
    tiles = linear.choose_tiles(1, num_out, num_in, 128, WIDE, torch.uint8)
    assert tiles.splits == 0 and num_in // 8 % tiles.columns == 0
    problem = Problem("w4a16 groups", 1, 24, num_in, device)
    y_MN = linear.product(problem.x_MK, problem.weight, problem.bias_N, torch.float32, tiles)
    assert problem.error(y_MN) < 1e-5, f"seed {SEED}"


@pytest.mark.parametrize("name", [name for name in FORMATS if "a16" in name])
def test_many_rows_go_through_a_dense_weight(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is made in parts, the last of them shorter."""
    monkeypatch.setattr(linear, "_WIDE_BYTES", 0)
    problem = Problem(name, 257, 150, 160, device)
    y_MN = linear.product(problem.x_MK, problem.weight, problem.bias_N.to(WIDE), WIDE)
    assert problem.error(y_MN) < 1e-2, f"seed {SEED}"


@pytest.mark.parametrize("num_rows", [0, 1, 5])
@pytest.mark.parametrize(
    "name", ["linear", "linear_fp8", "linear_fp8a16", "linear_w8a16", "linear_w4a16", "linear_w8a8", "linear_w4afp8"]
)
def test_the_op_takes_the_kernel_where_it_can_and_else_the_reference(
    name: str, num_rows: int, device: torch.device
) -> None:
    """Columns in an order of their own, a number of columns that vectors do not divide, no rows at all."""
    op = known_ops()[name]
    for num_in, has_order in ((96, True), (50, False)):
        kind = name.removeprefix("linear_").replace("linear", "dense")
        problem = Problem(kind, num_rows, 48, num_in, device)
        weight, bias = problem.weight, problem.bias_N.to(WIDE)
        arguments = {
            "linear": (weight.packed, bias),
            "linear_fp8": (weight.x_scale_MG, weight.packed, weight.scale_NG, bias, 0, 0, "float32"),
            "linear_fp8a16": (weight.packed, weight.scale_NG, bias, 0),
            "linear_w8a8": (weight.x_scale_MG, weight.packed, weight.scale_NG, None, bias, 0, 0, "float32"),
            "linear_w4afp8": (weight.x_scale_MG, weight.packed, weight.scale_NG, bias, 0, 0, "float32"),
        }
        if name not in arguments:
            order_K = torch.randperm(num_in).to(torch.int32).to(device) if has_order else None
            arguments[name] = (weight.packed, weight.scale_NG, None, order_K, bias, 0)
        y_MN = op.kernels["triton"].function(problem.x_MK, *arguments[name])
        expected_MN = op.reference(problem.x_MK, *arguments[name])
        assert y_MN.dtype == expected_MN.dtype and y_MN.shape == expected_MN.shape
        assert (y_MN - expected_MN).float().norm() <= 2e-2 * expected_MN.float().norm()


@pytest.mark.parametrize("candidate", ["triton", "cublas"])
def test_fp8_multiplies_one_row_that_is_not_rounded(candidate: str, device: torch.device) -> None:
    problem = Problem("fp8a16", 1, 48, 96, device)
    weight = problem.weight
    call = known_ops()["linear_fp8"].kernels[candidate].function
    ones = torch.ones(1, 1, device=device)
    y_MN = call(problem.x_MK, ones, weight.packed, weight.scale_NG, None, 0, 0, "float32")
    expected_MN = problem.expected_MN - problem.bias_N.cpu().double()
    assert (y_MN.cpu().double() - expected_MN).norm() <= 1e-5 * expected_MN.norm(), f"seed {SEED}"


@pytest.mark.parametrize("num_rows", [0, 1, 5, 19, 130])
@pytest.mark.parametrize("num_in", [176, 24])
def test_nvfp4_is_that_of_float64(num_rows: int, num_in: int, device: torch.device, poisoned: None) -> None:
    """Rows, columns of the weight and of x that no tile divides; 24 columns are left to the reference."""
    generator = torch.Generator().manual_seed(SEED)
    packed = torch.randint(256, (70, num_in // 2), generator=generator).to(torch.uint8)
    scale_NG = (torch.rand(70, -(-num_in // 16), generator=generator) * 448).to(torch.float8_e4m3fn)
    row_scale_N1, bias_N = torch.rand(70, 1, generator=generator) / 1e3, torch.randn(70, generator=generator)
    x_MK = torch.randn(num_rows, num_in, generator=generator).to(WIDE)
    expected_MN = x_MK.double() @ nvfp4.weight(packed, scale_NG, row_scale_N1, num_in).double().t() + bias_N
    arguments = [each.to(device) for each in (x_MK, packed, scale_NG, row_scale_N1, bias_N)]
    for call in (nvfp4.linear_nvfp4a16_triton, partial(nvfp4.linear_nvfp4a16_triton, is_batch_invariant=True)):
        y_MN = call(*arguments).cpu().double()
        torch.testing.assert_close(y_MN, expected_MN, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(not IS_GPU, reason="cuBLASLt is on a GPU alone")
@pytest.mark.parametrize("name", ["fp8", "fp8 blocks", "fp8 mixed"])
@pytest.mark.parametrize(("num_rows", "num_in"), [(0, 256), (1, 4096), (7, 4096), (300, 1536), (5, 160)])
def test_cublas_takes_scales_by_row_and_by_block(name: str, num_rows: int, num_in: int, device: torch.device) -> None:
    problem = Problem(name, num_rows, 272, num_in, device)
    weight, (group, x_group, _) = problem.weight, FORMATS[name]
    call = known_ops()["linear_fp8"].kernels["cublas"].function
    y_MN = call(
        problem.x_MK, weight.x_scale_MG, weight.packed, weight.scale_NG, None, group, x_group, "bfloat16"
    )  # fmt: skip
    expected_MN = problem.expected_MN - problem.bias_N.cpu().double()
    assert (y_MN.cpu().double() - expected_MN).norm() <= 1e-2 * expected_MN.norm(), f"seed {SEED}"
