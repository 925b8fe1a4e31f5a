"""y = x Wᵀ + b with NVFP4 weights: E2M1 numbers, 16 of which share an E4M3 scale, and a float32 scale for all.

Two neighbouring columns share a byte, the earlier in its low half. The float32 scale is one number in the tools of the
field; here each row has it, so that q, k and v are joined without requantizing. E2M1 times E4M3 has six significant
bits: a tile of both is exact in bfloat16 and float16, and the row's scale is applied to the sum. Activations stay as
they are: no GPU before Blackwell, and no CPU, multiplies E2M1.
"""

import torch
from torch import Tensor

from slipstream.kernels.cpu.library import native
from slipstream.kernels.fits import need, need_floats, need_shape
from slipstream.kernels.linear import w4a16
from slipstream.kernels.linear.groups import per_column, product
from slipstream.kernels.registry import kernel, on_gpu_with_fp8, op

GROUP_SIZE = 16
LARGEST = 6.0
_BETWEEN = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # two magnitudes: there the even number is the nearest
_FROM = torch.tensor(
    [middle if index % 2 == 0 else float(torch.tensor(middle).nextafter(torch.zeros(()))) for index, middle
     in enumerate(_BETWEEN)]
)  # fmt: skip


def nearest(numbers: Tensor) -> Tensor:
    """The E2M1 number nearest to each, as the uint8 that stands for it; what is larger than 6 becomes 6."""
    magnitude = torch.bucketize(numbers.abs(), _FROM.to(numbers.device), out_int32=True).to(torch.uint8)
    return magnitude | torch.signbit(numbers).to(torch.uint8) << 3


def numbers_of(codes: Tensor) -> Tensor:
    """E2M1 in float32, of uint8 codes: computed, as a table cannot be copied to a GPU while a step is recorded."""
    codes = codes.int()
    exponent, fraction = codes >> 1 & 3, codes & 1
    magnitude = torch.where(exponent > 0, fraction + 2 << exponent, 2 * fraction) / 4  # 0, 0.5, 1, 1.5, 2, 3, 4, 6
    return torch.where(codes > 7, -magnitude, magnitude)


def weight(packed: Tensor, scale_NG: Tensor, row_scale_N1: Tensor, num_in: int) -> Tensor:
    """The weight in float32 [N, num_in]."""
    numbers_NK = numbers_of(w4a16.unpack(packed, num_in))
    return numbers_NK * per_column(scale_NG.float() * row_scale_N1, num_in, GROUP_SIZE)


def _shapes(x_MK: Tensor, packed: Tensor, scale_NG: Tensor, row_scale_N1: Tensor, bias_N: Tensor | None) -> Tensor:
    need_floats(x=x_MK, row_scale=row_scale_N1, bias=bias_N)
    need(packed.dtype == torch.uint8, "packed must be uint8")
    need(scale_NG.dtype == torch.float8_e4m3fn, "scale must be float8_e4m3fn")
    (num_rows, num_in), num_out = x_MK.shape, packed.shape[0]
    need_shape("packed", packed, num_out, -(-num_in // 2))
    need_shape("scale", scale_NG, num_out, -(-num_in // GROUP_SIZE))
    need_shape("row_scale", row_scale_N1, num_out, 1)
    need_shape("bias", bias_N, num_out)
    return x_MK.new_empty(num_rows, num_out)


@op("linear_nvfp4a16(Tensor x, Tensor packed, Tensor scale, Tensor row_scale, Tensor? bias) -> Tensor", shapes=_shapes)
def linear_nvfp4a16(
    x_MK: Tensor, packed: Tensor, scale_NG: Tensor, row_scale_N1: Tensor, bias_N: Tensor | None
) -> Tensor:
    """packed uint8 [N, ⌈K/2⌉], scale E4M3 [N, ⌈K/16⌉], row_scale float32 [N, 1]."""
    return product(x_MK, weight(packed, scale_NG, row_scale_N1, x_MK.shape[1]), bias_N, x_MK.dtype)


@kernel(linear_nvfp4a16, "triton", on_gpu_with_fp8)
def linear_nvfp4a16_triton(
    x_MK: Tensor, packed: Tensor, scale_NG: Tensor, row_scale_N1: Tensor, bias_N: Tensor | None,
    is_batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    from slipstream.kernels.triton import nvfp4

    if not nvfp4.supports(x_MK):
        weight_NK = weight(packed, scale_NG, row_scale_N1, x_MK.shape[1])
        return product(x_MK, weight_NK, bias_N, x_MK.dtype, is_batch_invariant)
    return nvfp4.product(x_MK, packed, scale_NG, row_scale_N1, bias_N, is_batch_invariant)


native(linear_nvfp4a16, packed=("uint8",), scale=("float8_e4m3fn",))
