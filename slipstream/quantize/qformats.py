"""QFORMATS: what --qformat may be; which method chooses the numbers, and what they are stored as."""

from dataclasses import dataclass, replace

from slipstream.errors import ModelError
from slipstream.schema.format import INTEGERS_OF_4_BITS, NVFP4, WeightFormat


@dataclass(frozen=True, kw_only=True)
class QFormat:
    """format None: nothing is quantized."""

    title: str
    format: WeightFormat | None = None
    rows_per_scale: int = 1
    smooths: bool = False  # SmoothQuant
    scales_columns: bool = False  # AWQ
    compensates: bool = False  # GPTQ
    orders_columns: bool = False  # its act-order also where groups are made in it: those of large inputs first
    needs_text: bool = True  # to be what its name says
    includes_head: bool = False  # where it rounds without texts
    layout: str = ""  # of a Hugging Face folder (checkpoint/quantized); "": as others mostly store such numbers

    @property
    def uses_text(self) -> bool:
        return self.smooths or self.scales_columns or self.compensates

    @property
    def chooses_groups(self) -> bool:
        """Whether weights are in groups of a size that may be chosen."""
        return self.format is not None and self.format.kind in INTEGERS_OF_4_BITS

    def with_group_size(self, group_size: int) -> "QFormat":
        """Of weights in groups; raises ModelError for a size that no kernel has."""
        if self.format is None or not self.chooses_groups:
            return self
        if group_size not in GROUP_SIZES:
            raise ModelError(f"groups of {group_size} are not supported; give {', '.join(map(str, GROUP_SIZES))}.")
        return replace(self, format=replace(self.format, group_size=group_size))

    def with_act_order(self) -> "QFormat":
        """Raises ModelError where columns cannot be stored in another order."""
        if not self.compensates or self.format is None or self.format.kind != "w4a16":
            raise ModelError("--desc_act is GPTQ's order of columns; give it with --qformat int4_gptq.")
        return replace(self, orders_columns=True)


GROUP_SIZES = (32, 64, 128)

_INT4 = WeightFormat(kind="w4a16", group_size=128, scale_dtype="float16")

QFORMATS = {
    "full_prec": QFormat(title="as it is", needs_text=False),
    "fp8": QFormat(
        title="E4M3 weights by row, E4M3 activations by token",
        format=WeightFormat(kind="fp8"), compensates=True, needs_text=False,
    ),
    "fp8_block": QFormat(
        title="E4M3 weights in blocks of 128 by 128, E4M3 activations in groups of 128",
        format=WeightFormat(kind="fp8", group_size=128, input_group_size=128), rows_per_scale=128,
        compensates=True, needs_text=False,
    ),
    "int8": QFormat(
        title="INT8 weights and activations by row", format=WeightFormat(kind="w8a8"), needs_text=False,
        includes_head=True,
    ),
    "int8_sq": QFormat(title="INT8 weights and activations, smoothed", format=WeightFormat(kind="w8a8"), smooths=True),
    "int8_wo": QFormat(title="INT8 weights by row", format=WeightFormat(kind="w8a16"), needs_text=False),
    "int4_wo": QFormat(title="INT4 weights in groups, to the nearest", format=_INT4, needs_text=False),
    "int4_awq": QFormat(
        title="INT4 weights in groups, activation-aware", format=replace(_INT4, has_zeros=True), scales_columns=True
    ),
    "int4_gptq": QFormat(
        title="INT4 weights in groups, errors compensated", format=_INT4, compensates=True, layout="gptq"
    ),
    "w4a8_awq": QFormat(
        title="INT4 weights in groups, activation-aware, E4M3 activations",
        format=replace(_INT4, kind="w4afp8"), scales_columns=True,
    ),
    "nvfp4": QFormat(
        title="E2M1 weights in groups of 16, errors compensated; activations as they are", format=NVFP4,
        compensates=True, needs_text=False,
    ),
}  # fmt: skip


def qformat_of(name: str) -> QFormat:
    if name not in QFORMATS:
        raise ModelError(f"qformat is {name!r}; it must be {', '.join(QFORMATS)}.")
    return QFORMATS[name]
