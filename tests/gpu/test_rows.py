"""Norms and gated activations on the GPU: what the ops mean in float64, from rows that lie apart."""

from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.kernels.registry import known_ops

DTYPES = {"float32": 2e-5, "bfloat16": 2e-2}
ROUNDED = {"int8": (torch.int8, 1.01), "float8_e4m3fn": (torch.float8_e4m3fn, 32.5)}  # the widest step between numbers
SIZES = (24, 96, 128)
NUM_ROWS = (0, 1, 3)


def numbers(device: torch.device, dtype: str, *shape: int) -> Tensor:
    """Rows of a wider tensor, so that they lie apart."""
    wide = torch.randn(*shape[:-1], shape[-1] + 8, device=device).to(getattr(torch, dtype))
    return wide[..., : shape[-1]] if len(shape) > 1 else wide[: shape[0]].contiguous()


def check(name: str, arguments: tuple[Any, ...], dtype: str) -> None:
    op = known_ops()[name]
    expected = op.reference(*[each.double() if isinstance(each, Tensor) else each for each in arguments])
    actual = op.kernels["triton"].function(*arguments)
    if isinstance(actual, Tensor):
        actual, expected = (actual,), (expected,)
    for ours, naive in zip(actual, expected, strict=True):
        assert ours.shape == naive.shape
        tolerance = DTYPES[dtype]
        torch.testing.assert_close(ours.double(), naive.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_norms(num_rows: int, size: int, dtype: str, device: torch.device) -> None:
    x, residual = (numbers(device, dtype, num_rows, size) for _ in range(2))
    heads = numbers(device, dtype, num_rows, 3 * size)
    weight, bias = numbers(device, dtype, size), numbers(device, dtype, size)
    for offset in (0.0, 1.0):
        check("rms_norm", (heads, weight, 1e-5, offset), dtype)
        check("add_rms_norm", (x, residual, weight, 1e-5, offset), dtype)
    for each in (bias, None):
        check("layer_norm", (x, weight, each, 1e-5), dtype)
        check("add_layer_norm", (x, residual, weight, each, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_rows", NUM_ROWS)
def test_gated_activations(num_rows: int, size: int, dtype: str, device: torch.device) -> None:
    x = numbers(device, dtype, num_rows, 2 * size)
    check("silu_and_mul", (x,), dtype)
    for approximate in (False, True):
        check("gelu_and_mul", (x, approximate), dtype)


@pytest.mark.parametrize("group_size", [0, 32, 24])
@pytest.mark.parametrize("static", [0.0, 0.02])
@pytest.mark.parametrize("rounded", ROUNDED)
@pytest.mark.parametrize("size", [96, 128])
def test_quantized(size: int, rounded: str, static: float, group_size: int, device: torch.device) -> None:
    """The scales are the reference's; a number next to a tie may be its neighbour."""
    x, residual = (numbers(device, "float32", 5, size) for _ in range(2))
    x[2] = 0
    weight, how = numbers(device, "float32", size), (static, group_size, rounded)
    gated = numbers(device, "float32", 5, 2 * size)
    calls: dict[str, tuple[Any, ...]] = {
        "rms_norm_quantize": (x, weight, 1e-5, 0.0, *how),
        "add_rms_norm_quantize": (x, residual, weight, 1e-5, 0.0, *how),
        "layer_norm_quantize": (x, weight, None, 1e-5, *how),
        "add_layer_norm_quantize": (x, residual, weight, weight, 1e-5, *how),
        "silu_and_mul_quantize": (gated, *how),
        "gelu_quantize": (x, False, *how),
        "quantize_w8a8" if rounded == "int8" else "quantize_fp8": (x, static, group_size),
        "gelu_and_mul_quantize": (gated, True, *how),
    }
    dtype, step = ROUNDED[rounded]
    for name, arguments in calls.items():
        op = known_ops()[name]
        actual, expected = op.kernels["triton"].function(*arguments), op.reference(*arguments)
        assert actual[0].dtype == expected[0].dtype == dtype
        torch.testing.assert_close(actual[1], expected[1], atol=1e-12, rtol=1e-5)
        difference = (actual[0].float() - expected[0].float()).abs()
        if device.type == "cpu" and rounded != "int8":  # the interpreter's E4M3 loses a carry into the exponent
            difference[expected[0].float().frexp().mantissa.abs() == 0.5] = 0
        assert difference.max() <= step
        assert (difference > 0).float().mean() < 0.02
        for ours, naive in zip(actual[2:], expected[2:], strict=True):
            torch.testing.assert_close(ours, naive)


@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("rounded", ROUNDED)
def test_one_row_may_stay_as_it_is(rounded: str, group_size: int, device: torch.device) -> None:
    """In E4M3, whose product takes either; not where rows must not depend on how many there are."""
    x, residual, gated = (numbers(device, "float16", 1, size) for size in (128, 128, 256))
    weight, how = numbers(device, "float16", 128), (0.0, group_size, rounded)
    calls: dict[str, tuple[tuple[Any, ...], Any]] = {
        "add_rms_norm_quantize": ((x, residual, weight, 1e-5, 0.0, *how), ("add_rms_norm", 1e-5, 0.0)),
        "silu_and_mul_quantize": ((gated, *how), ("silu_and_mul",)),
        "quantize_w8a8" if rounded == "int8" else "quantize_fp8": ((x, 0.0, group_size), None),
    }
    for name, (arguments, plain) in calls.items():
        kernel = known_ops()[name].kernels["triton"]
        found, scales = kernel.function(*arguments)[:2]
        assert scales.shape == (1, 128 // group_size if group_size else 1)
        if rounded == "int8":
            assert found.dtype == torch.int8
            continue
        tensors = [each for each in arguments if isinstance(each, torch.Tensor)]
        expected = x if plain is None else known_ops()[plain[0]].kernels["triton"].function(*tensors, *plain[1:])
        assert torch.equal(found, expected[0] if isinstance(expected, tuple) else expected)
        assert torch.equal(scales, torch.ones_like(scales))
        assert kernel.batch_invariant is not None
        assert kernel.batch_invariant(*arguments)[0].dtype == torch.float8_e4m3fn
