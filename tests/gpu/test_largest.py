"""The largest numbers of rows, as torch finds them."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

kernels = pytest.importorskip("slipstream.kernels.triton.largest")

PHASES = (Phase.explicit, Phase.generate)  # the interpreter is too slow to make a failure smaller


def check(x: torch.Tensor, count: int) -> None:
    values, places = kernels.largest(x, count)
    expected, order = x.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(values, expected[..., :count]) and values.dtype == x.dtype
    assert torch.equal(places, order[..., :count])


@settings(max_examples=8, deadline=None, phases=PHASES)
@given(
    size=st.integers(1, 150), count=st.integers(1, 64), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_they_are_those_of_a_stable_sort(
    size: int, count: int, seed: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Among many equals, infinities and both zeros too."""
    generator = torch.Generator().manual_seed(seed)
    some = torch.tensor([0.0, -0.0, 1.5, -2.0, float("inf"), float("-inf"), 300.0, -0.001])
    x = torch.where(
        torch.rand(2, size, generator=generator) < 0.5,
        some[torch.randint(len(some), (2, size), generator=generator)],
        torch.randn(2, size, generator=generator),
    )
    check(x.to(device, dtype), min(count, size))


@pytest.mark.parametrize("count", [1, 10])
def test_rows_of_several_parts_in_any_layout(count: int, device: torch.device) -> None:
    x = torch.randn(3, 2, kernels.PART + 700, generator=torch.Generator().manual_seed(count)).to(device)
    check(x[:, :1], count)
    assert kernels.largest(x[:0], count)[0].shape == (0, 2, count)
