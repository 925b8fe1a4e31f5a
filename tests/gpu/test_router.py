"""Routers on the GPU: the experts and shares of float64, among them none that is not there."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.kernels.registry import known_ops

HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
SOFTMAX = {"eight": (8, 64, 2), "as many as there are": (5, 24, 5), "many": (128, 128, 8), "of 160": (160, 32, 6)}
SIGMOID = {
    "groups": (16, 64, 4, 4, 2),
    "no groups": (24, 64, 3, 1, 1),
    "odd groups": (30, 24, 5, 6, 3),
    "many": (256, 64, 8, 8, 4),
}


def arguments(
    device: torch.device, num_tokens: int, num_experts: int, hidden_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    x_TH = torch.randn(num_tokens, hidden_size, device=device).to(dtype)
    weight_EH = (torch.randn(num_experts, hidden_size, device=device) * hidden_size**-0.5).to(dtype)
    return x_TH, weight_EH, torch.randn(num_experts, device=device).to(dtype)


def check(name: str, tensors: tuple[Tensor, ...], *attributes: Any) -> None:
    """Near a tie either expert is right, so it is their scores that are compared."""
    op = known_ops()[name]
    shares_TK, ids_TK = op.kernels["triton"].function(*tensors, *attributes)
    expected_TK, expected_ids_TK = op.reference(*(each.double() for each in tensors), *attributes)
    assert shares_TK.dtype == torch.float32 and ids_TK.dtype == torch.int64
    assert ids_TK.shape == expected_ids_TK.shape
    is_same = ids_TK.sort(1).values == expected_ids_TK.sort(1).values
    assert is_same.all(1).float().mean() > 0.9 or not len(ids_TK)
    rows = is_same.all(1)
    places = (each[rows].argsort(1) for each in (ids_TK, expected_ids_TK))
    shares = (each[rows].double().gather(1, at) for each, at in zip((shares_TK, expected_TK), places, strict=True))
    torch.testing.assert_close(*shares, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 20])
def test_the_most_probable_experts(num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    for num_experts, hidden_size, top_k in SOFTMAX.values():
        tensors = arguments(device, num_tokens, num_experts, hidden_size, dtype)
        for is_normalized in (False, True):
            check("route_softmax", tensors, top_k, is_normalized)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 20])
def test_experts_of_the_best_groups(num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    for num_experts, hidden_size, top_k, num_groups, top_groups in SIGMOID.values():
        tensors = arguments(device, num_tokens, num_experts, hidden_size, dtype)
        for is_normalized in (False, True):
            check("route_sigmoid", tensors, top_k, num_groups, top_groups, is_normalized, 2.5)


def test_rows_of_nan_go_to_experts_that_there_are(device: torch.device) -> None:
    x_TH, weight_EH, offsets_E = arguments(device, 3, 12, 32, HALF)
    x_TH[1] = math.nan
    for name, attributes in (("route_softmax", (3, True)), ("route_sigmoid", (3, 3, 2, True, 1.0))):
        shares_TK, ids_TK = known_ops()[name].kernels["triton"].function(x_TH, weight_EH, offsets_E, *attributes)
        assert ((ids_TK >= 0) & (ids_TK < 12)).all()
        assert shares_TK.isnan().all(1).tolist() == [False, True, False]
