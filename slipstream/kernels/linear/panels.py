"""y = x Wᵀ + b with weights of 8 or 4 bits and activations of 8, in the order in which a CPU multiplies bytes.

A panel is 16 rows of a weight (zeros where there are fewer), as unsigned bytes. 64 bytes hold four columns of each row,
row by row; with 4 bits eight, the first four in the low halves. Panels are written when an engine is: nothing is
reordered when it starts.
"""

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.kernels.cpu.library import native
from slipstream.kernels.fits import need, need_floats, need_shape
from slipstream.kernels.linear.groups import dequantize, num_groups, per_column, product
from slipstream.kernels.linear.w4a16 import SYMMETRIC_ZERO, unpack
from slipstream.kernels.registry import op

ROWS = 16
ZEROS = {8: 128, 4: SYMMETRIC_ZERO}  # bits → what was added to each number; nothing in 4 bits with a shift
COLUMNS = {8: 4, 4: 8}  # bits → columns in 64 bytes


def _panels_shapes(packed: Tensor, bits: int) -> Tensor:
    need(bits in ZEROS and packed.dtype == (torch.int8 if bits == 8 else torch.uint8), "bits must be 8 or 4, as packed")
    num_out, num_bytes = packed.shape
    steps = -(-num_bytes // 4)  # a byte is a column, or two
    return packed.new_empty(-(-num_out // ROWS), steps * 64, dtype=torch.uint8)


@op("to_panels(Tensor packed, int bits) -> Tensor", shapes=_panels_shapes)
def to_panels(packed: Tensor, bits: int) -> Tensor:
    """int8 [N, K], or uint8 [N, ⌈K/2⌉] of two columns a byte (w4a16.py) → uint8 [⌈N/16⌉, bytes]."""
    zero = ZEROS[bits]
    values_NK = (packed.short() + zero).byte() if bits == 8 else unpack(packed, 2 * packed.shape[1])
    num_out, num_in = values_NK.shape
    values_NK = functional.pad(values_NK, (0, -num_in % COLUMNS[bits], 0, -num_out % ROWS))
    panels_PRSC = values_NK.unflatten(1, (-1, COLUMNS[bits])).unflatten(0, (-1, ROWS))
    panels_PSRC = panels_PRSC.transpose(1, 2)
    if bits == 4:
        panels_PSRC = panels_PSRC[..., :4] | panels_PSRC[..., 4:] << 4
    return panels_PSRC.flatten(1).contiguous()


def _scales_shapes(scale_NG: Tensor, zero_NG: Tensor | None) -> Tensor:
    need_floats(scale=scale_NG)
    need_shape("zero", zero_NG, *scale_NG.shape)
    num_out, groups = scale_NG.shape
    keeps = zero_NG is None and scale_NG.dtype == torch.float16 and groups > 1
    dtype = torch.float16 if keeps else torch.float32
    return scale_NG.new_empty(-(-num_out // ROWS), groups * ROWS, dtype=dtype)


@op("to_panel_scales(Tensor scale, Tensor? zero) -> Tensor", shapes=_scales_shapes)
def to_panel_scales(scale_NG: Tensor, zero_NG: Tensor | None) -> Tensor:
    """A number for each row and group, panel by panel and group by group: the scales, or zero · scale."""
    values_NG = scale_NG.to(_scales_shapes(scale_NG, zero_NG).dtype)
    if zero_NG is not None:
        values_NG = values_NG * zero_NG.float()
    values_NG = functional.pad(values_NG, (0, 0, 0, -len(values_NG) % ROWS))
    return values_NG.unflatten(0, (-1, ROWS)).transpose(1, 2).flatten(1).contiguous()


def _shapes(
    x_MK: Tensor, x_scale_MG: Tensor, panels: Tensor, scale: Tensor, shift: Tensor | None, bias_N: Tensor | None,
    bits: int, group_size: int, input_group_size: int, num_out: int,
) -> Tensor:  # fmt: skip
    need(x_MK.dtype == torch.int8 and panels.dtype == torch.uint8, "x must be int8, and panels uint8")
    need(x_scale_MG.dtype == torch.float32, "x_scale must be float32")
    need(bits in ZEROS and group_size >= 0 <= input_group_size, "bits must be 8 or 4, and groups have no less than 0")
    small, large = sorted((group_size, input_group_size))
    need(
        small % 8 == 0 and (not small or large % small == 0) and large % 8 == 0, "groups must be 8 columns, or 16, ..."
    )
    need_floats(scale=scale, shift=shift, bias=bias_N)
    num_rows, num_in = x_MK.shape
    num_panels, groups = -(-num_out // ROWS), num_groups(num_in, group_size)
    need_shape("x_scale", x_scale_MG, num_rows, num_groups(num_in, input_group_size))
    need_shape("panels", panels, num_panels, -(-num_in // COLUMNS[bits]) * 64)
    need_shape("scale", scale, num_panels, groups * ROWS)
    need_shape("shift", shift, num_panels, groups * ROWS)
    need_shape("bias", bias_N, num_out)
    return x_MK.new_empty(num_rows, num_out, dtype=torch.float32)


@op(
    "linear_panels(Tensor x, Tensor x_scale, Tensor panels, Tensor scale, Tensor? shift, Tensor? bias, int bits, "
    "int group_size, int input_group_size, int num_out) -> Tensor",
    shapes=_shapes,
)
def linear_panels(
    x_MK: Tensor, x_scale_MG: Tensor, panels: Tensor, scale: Tensor, shift: Tensor | None, bias_N: Tensor | None,
    bits: int, group_size: int, input_group_size: int, num_out: int,
) -> Tensor:  # fmt: skip
    """x int8 and its scales as quantize_w8a8 gives them; W = (panels - zero) · scale - shift.

    The zero is 128 in 8 bits; in 4 bits 8, or 0 where there is a shift. scale and shift are as to_panel_scales gives
    them. Groups of W and of x are multiples of 8 columns, one of the other; a size of 0 means a row.
    """
    weight_NK = panel_weight(panels, scale, shift, bits, group_size, num_out, x_MK.shape[1])
    return product(dequantize(x_MK, x_scale_MG, None, input_group_size), weight_NK, bias_N, torch.float32)


def _embedding_shapes(
    panels: Tensor, scale: Tensor, shift: Tensor | None, token_ids_T: Tensor, bits: int, group_size: int, num_in: int
) -> Tensor:
    need(bits in ZEROS and panels.dtype == torch.uint8, "bits must be 8 or 4, and panels uint8")
    need_floats(scale=scale, shift=shift)
    (num_tokens,), num_panels, groups = token_ids_T.shape, panels.shape[0], num_groups(num_in, group_size)
    need_shape("panels", panels, num_panels, -(-num_in // COLUMNS[bits]) * 64)
    need_shape("scale", scale, num_panels, groups * ROWS)
    need_shape("shift", shift, num_panels, groups * ROWS)
    return panels.new_empty(num_tokens, num_in, dtype=torch.float32)


@op(
    "embedding_panels(Tensor panels, Tensor scale, Tensor? shift, Tensor token_ids, int bits, int group_size, "
    "int num_in) -> Tensor",
    shapes=_embedding_shapes,
    is_row_by_row=True,
)
def embedding_panels(
    panels: Tensor, scale: Tensor, shift: Tensor | None, token_ids_T: Tensor, bits: int, group_size: int, num_in: int
) -> Tensor:
    """Rows of a weight as linear_panels has it: of a table that is the head, too, or was stored in such numbers."""
    found = token_ids_T // ROWS  # a panel each, of which one row is wanted
    shifts = None if shift is None else shift[found]
    rows = panel_weight(panels[found], scale[found], shifts, bits, group_size, ROWS * len(found), num_in)
    return rows.unflatten(0, (-1, ROWS))[torch.arange(len(found), device=found.device), token_ids_T % ROWS]


def panel_weight(
    panels: Tensor, scale: Tensor, shift: Tensor | None, bits: int, group_size: int, num_out: int, num_in: int
) -> Tensor:
    """The weight in float32 [N, K]."""
    bytes_PSRC = panels.unflatten(1, (-1, ROWS, 4))
    if bits == 4:
        bytes_PSRC = torch.cat([bytes_PSRC & 15, bytes_PSRC >> 4], 3)
    values_NK = bytes_PSRC.transpose(1, 2).flatten(2).flatten(0, 1)[:num_out, :num_in].float()

    def by_column(each: Tensor) -> Tensor:
        values_NG = each.float().unflatten(1, (-1, ROWS)).transpose(1, 2).flatten(0, 1)[:num_out]
        return per_column(values_NG, num_in, group_size)

    if bits == 8 or shift is None:
        values_NK -= ZEROS[bits]
    weight_NK = values_NK * by_column(scale)
    return weight_NK if shift is None else weight_NK - by_column(shift)


native(
    linear_panels,
    x=("int8",),
    panels=("uint8",),
    scale=("float32", "float16"),
    shift=("float32", "float16"),
)
native(embedding_panels, panels=("uint8",), scale=("float32", "float16"), shift=("float32", "float16"))
