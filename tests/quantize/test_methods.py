"""Each method against its equations in float64, and on a layer with outliers that rounding to nearest fails."""

import pytest
import torch
from torch import Tensor

from slipstream.kernels.linear.parts import dense_weight
from slipstream.quantize import awq, smoothquant
from slipstream.quantize.gptq import Hessian, gptq
from slipstream.quantize.numbers import Scales, find_scales, from_values, nearest, round_to, row_scale_of, to_parts
from slipstream.schema.format import NVFP4, WeightFormat

FORMATS = {
    "w4a16": WeightFormat(kind="w4a16", group_size=32, scale_dtype="float16"),
    "w4a16 zeros": WeightFormat(kind="w4a16", group_size=32, scale_dtype="float16", has_zeros=True),
    "w4a16 ragged": WeightFormat(kind="w4a16", group_size=128),
    "w8a16": WeightFormat(kind="w8a16"),
    "w8a8": WeightFormat(kind="w8a8"),
    "fp8": WeightFormat(kind="fp8"),
    "w4afp8": WeightFormat(kind="w4afp8", group_size=32),
    "nvfp4": NVFP4,
}


def outliers(num_rows: int = 48, num_columns: int = 96) -> tuple[Tensor, Tensor]:
    """(W, x): three columns meet activations a hundred times as large as the others."""
    generator = torch.Generator().manual_seed(1)
    weight_NK = torch.randn(num_rows, num_columns, generator=generator)
    x_MK = torch.randn(256, num_columns, generator=generator)
    x_MK[:, [5, 21, 33]] *= 100
    return weight_NK, x_MK


def result_error(weight_NK: Tensor, rounded_NK: Tensor, x_MK: Tensor) -> float:
    expected = x_MK.double() @ weight_NK.double().t()
    return float((x_MK.double() @ rounded_NK.double().t() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_are_the_nearest_and_come_back_from_their_parts(name: str) -> None:
    format, weight_NK = FORMATS[name], outliers()[0]
    scales = find_scales(weight_NK, format)
    values_NK = round_to(weight_NK, scales, format)
    found_NK = from_values(values_NK, scales, format)
    parts = to_parts(values_NK, scales, format)
    assert {part: (tuple(each.shape), str(each.dtype)[6:]) for part, each in parts.items()} == format.parts(48, 96)
    torch.testing.assert_close(dense_weight(format, parts, 96), found_NK, rtol=0, atol=0)
    for step in (-1, 1):  # no neighbour is nearer
        if name in ("fp8", "nvfp4"):
            break
        other_NK = from_values(values_NK + step, scales, format)
        is_legal = round_to(other_NK, scales, format) == values_NK + step
        assert ((found_NK - weight_NK).abs() <= (other_NK - weight_NK).abs() + 1e-6)[is_legal].all()


def test_scales_may_be_shared_by_rows_and_cut_off_what_is_large() -> None:
    weight_NK = outliers()[0]
    block = WeightFormat(kind="fp8", group_size=32)
    shared = find_scales(weight_NK, block, num_rows=16).scale_NG
    expected = weight_NK.unflatten(0, (3, 16)).unflatten(2, (3, 32)).abs().amax((1, 3)) / 448
    torch.testing.assert_close(shared[::16], expected)
    assert torch.equal(shared[:16], shared[:1].expand(16, -1))
    whole, half = (find_scales(weight_NK, FORMATS["w8a16"], shrink=shrink).scale_NG for shrink in (1.0, 0.5))
    torch.testing.assert_close(half, whole / 2)


def test_a_weight_of_zeros_stays_one() -> None:
    for format in FORMATS.values():
        scales = find_scales(torch.zeros(4, 96), format)
        assert scales.scale_NG.isfinite().all() and (scales.scale_NG > 0).all()
        assert not from_values(round_to(torch.zeros(4, 96), scales, format), scales, format).any()


def test_columns_that_grew_beyond_the_largest_scale_are_cut_off() -> None:
    """As those do that make up for others' errors: torch 2.11 makes NaN of what E4M3 cannot hold, later ones do not."""
    weight_NK = outliers()[0]
    scales = find_scales(2 * weight_NK, NVFP4, row_scale=row_scale_of(weight_NK, NVFP4))
    assert scales.scale_NG.isfinite().all()
    assert scales.scale_NG.max() == pytest.approx(448 * scales.row_scale)


def gptq_by_definition(weight_NK: Tensor, hessian_KK: Tensor, scale_N1: Tensor, damping: float) -> Tensor:
    """Column by column from the inverse of what is left of H (Optimal Brain Surgeon), in float64."""
    weight_NK, hessian_KK = weight_NK.double().clone(), hessian_KK.double().clone()
    hessian_KK.diagonal().add_(damping * hessian_KK.diagonal().mean())
    rounded_NK = torch.empty_like(weight_NK)
    for column in range(weight_NK.shape[1]):
        inverse = torch.linalg.inv(hessian_KK[column:, column:])
        rounded_NK[:, column] = (weight_NK[:, column] / scale_N1[:, 0]).round().clamp(-128, 127) * scale_N1[:, 0]
        error_N = (weight_NK[:, column] - rounded_NK[:, column]) / inverse[0, 0]
        weight_NK[:, column:] -= error_N[:, None] * inverse[0]
    return rounded_NK


def test_gptq_is_what_its_definition_says() -> None:
    weight_NK, x_MK = outliers(num_columns=40)
    x_MK = x_MK @ torch.randn(40, 40, generator=torch.Generator().manual_seed(2))  # columns that know of each other
    hessian = Hessian.empty(40, torch.device("cpu"))
    for part in x_MK.split(100):
        hessian.add(part)
    expected_KK = 2 * x_MK.double().t() @ x_MK.double() / len(x_MK)
    (sum_KK,) = hessian.sums
    hessian_KK = sum_KK / hessian.num_rows
    torch.testing.assert_close(hessian_KK.double(), expected_KK, rtol=1e-4, atol=1e-2)
    format = FORMATS["w8a16"]
    found = gptq(weight_NK, hessian.compensation(), format)
    expected_NK = gptq_by_definition(weight_NK, hessian_KK, found.scales.scale_NG.double(), 0.01)
    same = (from_values(found.values_NK, found.scales, format) - expected_NK).abs() < 1e-4
    assert same.float().mean() > 0.99  # a number at a tie may go the other way, and what follows with it


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_survives_what_rounding_to_nearest_does_not(act_order: bool) -> None:
    weight_NK, x_MK = outliers()
    x_MK = x_MK @ (torch.eye(96) + 0.3 * torch.randn(96, 96, generator=torch.Generator().manual_seed(3)))
    hessian = Hessian.empty(96, torch.device("cpu"))
    hessian.add(x_MK)
    format = FORMATS["w4a16"]
    nearest = find_scales(weight_NK, format)
    error = result_error(weight_NK, from_values(round_to(weight_NK, nearest, format), nearest, format), x_MK)
    found = gptq(weight_NK, hessian.compensation(act_order=act_order), format)
    rounded_NK = from_values(found.values_NK, found.scales, format)
    if found.order_K is not None:
        rounded_NK = torch.empty_like(rounded_NK).index_copy_(1, found.order_K, rounded_NK)
    assert result_error(weight_NK, rounded_NK, x_MK) < 0.5 * error


def test_many_columns_make_up_for_errors_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is rounded as if it were a weight of its own."""
    weight_NK, x_MK = outliers(num_columns=300)
    monkeypatch.setattr("slipstream.quantize.gptq.MOST_COLUMNS", 256)
    format = FORMATS["w4a16"]
    for act_order in (False, True):
        hessian = Hessian.empty(300, torch.device("cpu"))
        hessian.add(x_MK)
        assert [len(each) for each in hessian.sums] == [256, 44]
        found = gptq(weight_NK, hessian.compensation(act_order=act_order), format)
        for first, part_NK, part_MK in zip((0, 256), weight_NK.split(256, 1), x_MK.split(256, 1), strict=True):
            alone = Hessian.empty(part_NK.shape[1], torch.device("cpu"))
            alone.add(part_MK)
            expected = gptq(part_NK, alone.compensation(act_order=act_order), format)
            columns = slice(first, first + part_NK.shape[1])
            assert torch.equal(found.values_NK[:, columns], expected.values_NK)
            if found.order_K is not None and expected.order_K is not None:
                assert torch.equal(found.order_K[columns], first + expected.order_K)


def test_columns_of_one_scale_return_from_their_order() -> None:
    weight_NK, x_MK = outliers()
    x_MK = x_MK @ (torch.eye(96) + 0.3 * torch.randn(96, 96, generator=torch.Generator().manual_seed(3)))
    hessian = Hessian.empty(96, torch.device("cpu"))
    hessian.add(x_MK)
    format = FORMATS["fp8"]
    found = gptq(weight_NK, hessian.compensation(act_order=True), format)
    assert found.order_K is None
    nearest_NK = nearest(weight_NK, format)
    assert result_error(weight_NK, from_values(found.values_NK, found.scales, format), x_MK) < 0.8 * result_error(
        weight_NK, nearest_NK, x_MK
    )


def test_blocks_make_up_for_errors_too() -> None:
    """Rows that share a scale share it in each group, whose largest number it maps to 448 when its turn comes."""
    weight_NK, x_MK = outliers()
    x_MK = x_MK @ (torch.eye(96) + 0.3 * torch.randn(96, 96, generator=torch.Generator().manual_seed(3)))
    hessian = Hessian.empty(96, torch.device("cpu"))
    hessian.add(x_MK)
    format = WeightFormat(kind="fp8", group_size=32)
    found = gptq(weight_NK, hessian.compensation(), format, num_rows=16)
    assert found.scales.scale_NG.shape == (48, 3)
    assert all(torch.equal(each, each[:1].expand(16, -1)) for each in found.scales.scale_NG.split(16))
    assert found.values_NK.unflatten(0, (3, 16)).unflatten(2, (3, 32)).abs().amax((1, 3)).min() > 400
    rounded_NK, nearest_NK = from_values(found.values_NK, found.scales, format), nearest(weight_NK, format, 16)
    assert result_error(weight_NK, rounded_NK, x_MK) < 0.8 * result_error(weight_NK, nearest_NK, x_MK)


def test_gptq_takes_inputs_that_are_always_zero() -> None:
    weight_NK, x_MK = outliers()
    x_MK[:, 7] = 0
    hessian = Hessian.empty(96, torch.device("cpu"))
    hessian.add(x_MK)
    found = gptq(weight_NK, hessian.compensation(), FORMATS["w4a16"])
    assert from_values(found.values_NK, found.scales, FORMATS["w4a16"]).isfinite().all()


def test_awq_scales_and_clips() -> None:
    weight_NK, x_MK = outliers()
    format = FORMATS["w4a16 zeros"]

    def error_of(scale_K: Tensor, scales_of: object = None) -> float:
        scaled_NK = weight_NK * scale_K
        scales: Scales = find_scales(scaled_NK, format)
        if scales_of is not None:
            scales = awq.clipped_scales(scaled_NK, x_MK / scale_K, format)
        return result_error(weight_NK, from_values(round_to(scaled_NK, scales, format), scales, format) / scale_K, x_MK)

    mean_K = x_MK.abs().mean(0)
    for ratio in (0.25, 0.5):
        scale_K = awq.awq_scales(mean_K, ratio)
        expected = mean_K.double() ** ratio
        expected = expected / (expected.max() * expected.min()).sqrt()
        torch.testing.assert_close(scale_K.double(), expected, rtol=1e-5, atol=1e-6)
    errors = {ratio: error_of(awq.awq_scales(mean_K, ratio)) for ratio in awq.RATIOS}
    best = min(errors, key=lambda ratio: errors[ratio])
    assert best > 0 and errors[best] < 0.5 * errors[0.0]
    assert error_of(awq.awq_scales(mean_K, best), "clipped") <= errors[best] * 1.001


@pytest.mark.parametrize("name", ["w4a16 zeros", "w4a16"])
def test_ranges_are_cut_off_where_that_is_best(name: str) -> None:
    """Each group's of each row by itself: the best of all shares of its range, in float64."""
    weight_NK, x_MK = outliers(num_rows=12)
    weight_NK[:, [1, 40, 70]] *= 4  # a range that is wide for one column
    format = FORMATS[name]
    found = awq.clipped_scales(weight_NK, x_MK, format)
    losses, scales = [], []
    for shrink in awq.SHRINKS:
        each = find_scales(weight_NK, format, shrink=shrink)
        error_NK = from_values(round_to(weight_NK, each, format), each, format).double() - weight_NK
        parts = zip(error_NK.split(32, 1), x_MK.double().split(32, 1), strict=True)
        losses.append(torch.stack([(error @ x.t()).square().sum(1) for error, x in parts], 1))
        scales.append(each.scale_NG)
    best_NG = torch.stack(losses).argmin(0)
    expected_NG = torch.stack(scales).gather(0, best_NG[None])[0]
    torch.testing.assert_close(found.scale_NG, expected_NG, rtol=0, atol=0)
    assert len(best_NG.unique()) > 3  # of the ten


def test_smoothquant_moves_outliers_into_the_weight() -> None:
    weight_NK, x_MK = outliers()
    x_amax_K, weight_amax_K = x_MK.abs().amax(0), weight_NK.abs().amax(0)
    scale_K = smoothquant.smoothing(x_amax_K, weight_amax_K, 0.5)
    torch.testing.assert_close(scale_K.double(), (x_amax_K.double() / weight_amax_K.double()).sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        ((x_MK / scale_K) @ (weight_NK * scale_K).t()), x_MK @ weight_NK.t(), rtol=1e-3, atol=1e-2
    )

    def error_of(scale_K: Tensor) -> float:
        format, scaled_NK, smooth_MK = FORMATS["w8a8"], weight_NK * scale_K, x_MK / scale_K
        scales = find_scales(scaled_NK, format)
        rounded_NK = from_values(round_to(scaled_NK, scales, format), scales, format)
        x_scale_M1 = smooth_MK.abs().amax(1, keepdim=True) / 127
        rounded_MK = (smooth_MK / x_scale_M1).round() * x_scale_M1
        expected = x_MK.double() @ weight_NK.double().t()
        return float((rounded_MK.double() @ rounded_NK.double().t() - expected).norm() / expected.norm())

    assert error_of(scale_K) < 0.5 * error_of(torch.ones(96))
