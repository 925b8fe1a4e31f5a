"""What a format costs one product of made-up numbers, by its width: the error of W x, in per cent, on rows held out.

    python benchmarks/quantization_width.py [--widths 576,2048,8192]

Three kinds of numbers. independent: W and x normal, so that the terms of each sum have nothing to do with each other.
outliers: the same, three columns of x thirty times as large. shared: x moves in 32 directions, W reads these and little
else, and each product's terms add up, as those of a trained model do in part. Methods are those of `slipstream
quantize`, groups of 128, with twice as many rows to calibrate with as there are columns.
"""

import argparse

import torch
from torch import Tensor

from slipstream.quantize import awq
from slipstream.quantize.blocks import rounding_of
from slipstream.quantize.gptq import Hessian, gptq
from slipstream.quantize.numbers import Scales, from_values, nearest, round_to
from slipstream.schema.format import NVFP4, WeightFormat

ROWS, HELD_OUT, DIRECTIONS = 256, 256, 32
FP8, INT8 = WeightFormat(kind="fp8"), WeightFormat(kind="w8a8")
INT4 = WeightFormat(kind="w4a16", group_size=128, scale_dtype="float16")
INT4_ZEROS = WeightFormat(kind="w4a16", group_size=128, scale_dtype="float16", has_zeros=True)
COLUMNS = (
    "int8_wo", "int8", "fp8, W alone", "fp8, x alone", "fp8", "fp8, compensated", "nvfp4", "int4_wo", "int4_gptq",
    "int4_awq",
)  # fmt: skip


def numbers(kind: str, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(W, x): x has the rows that are held out first."""
    count = HELD_OUT + 2 * width
    weight_NK = torch.randn(ROWS, width, generator=generator)
    x_MK = torch.randn(count, width, generator=generator)
    if kind == "outliers":
        x_MK[:, [5, 121, 333]] *= 30
    if kind == "shared":
        directions_DK = torch.randn(DIRECTIONS, width, generator=generator)
        x_MK = torch.randn(count, DIRECTIONS, generator=generator) @ directions_DK / DIRECTIONS**0.5 + 0.1 * x_MK
        weight_NK = torch.randn(ROWS, DIRECTIONS, generator=generator) @ directions_DK / DIRECTIONS**0.5 + weight_NK
    return weight_NK, x_MK


def errors(weight_NK: Tensor, x_MK: Tensor) -> list[float]:
    held_out_MK, calibration_MK = x_MK[:HELD_OUT], x_MK[HELD_OUT:]
    exact_MN = held_out_MK.double() @ weight_NK.double().t()

    def error(rounded_NK: Tensor, x_MK: Tensor = held_out_MK) -> float:
        return 100 * float((x_MK.double() @ rounded_NK.double().t() - exact_MN).norm() / exact_MN.norm())

    hessian = Hessian.empty(weight_NK.shape[1], weight_NK.device)
    hessian.add(calibration_MK)
    compensation = hessian.compensation()

    def compensated(format: WeightFormat) -> Tensor:
        found = gptq(weight_NK, compensation, format)
        return from_values(found.values_NK, found.scales, format)

    x_fp8_MK, x_int8_MK = (rounding_of(format)(held_out_MK) for format in (FP8, INT8))
    return [
        error(nearest(weight_NK, INT8)), error(nearest(weight_NK, INT8), x_int8_MK), error(nearest(weight_NK, FP8)),
        error(weight_NK, x_fp8_MK), error(nearest(weight_NK, FP8), x_fp8_MK), error(compensated(FP8), x_fp8_MK),
        error(nearest(weight_NK, NVFP4)), error(nearest(weight_NK, INT4)), error(compensated(INT4)),
        error(by_awq(weight_NK, calibration_MK)),
    ]  # fmt: skip


def by_awq(weight_NK: Tensor, x_MK: Tensor) -> Tensor:
    """Columns scaled by the best ratio, then ranges cut off: judged on 512 rows to calibrate with."""
    sample_MK, mean_K = x_MK[:512], x_MK.abs().mean(0)
    exact_MN = sample_MK @ weight_NK.t()
    found = []
    for ratio in awq.RATIOS:
        scale_K = awq.awq_scales(mean_K, ratio)
        loss = (sample_MK @ nearest(weight_NK, INT4_ZEROS, scale=scale_K).t() - exact_MN).norm()
        found.append((float(loss), ratio))
    scale_K = awq.awq_scales(mean_K, min(found)[1])
    rounded = [rounded_of(part_NK * scale_K, sample_MK / scale_K) for part_NK in weight_NK.split(32)]
    return torch.cat(rounded) / scale_K


def rounded_of(weight_NK: Tensor, x_MK: Tensor) -> Tensor:
    scales: Scales = awq.clipped_scales(weight_NK, x_MK, INT4_ZEROS)
    return from_values(round_to(weight_NK, scales, INT4_ZEROS), scales, INT4_ZEROS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="576,2048,8192")
    parser.add_argument("--kinds", default="independent,outliers,shared")
    arguments = parser.parse_args()
    print(f"| numbers | columns | {' | '.join(COLUMNS)} |\n{(2 + len(COLUMNS)) * '| --- '}|")
    with torch.inference_mode():
        for kind in arguments.kinds.split(","):
            for width in map(int, arguments.widths.split(",")):
                made = errors(*numbers(kind, width, torch.Generator().manual_seed(0)))
                print(f"| {kind} | {width:,} | {' | '.join(f'{each:.2f}' for each in made)} |", flush=True)


if __name__ == "__main__":
    main()
