"""What a device can do, measured: the bytes that it moves in a second and the products it computes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from slipstream.build.timing import made_up, time_kernels
from slipstream.build.tune import describe_device
from slipstream.engine.graph import TensorType
from slipstream.kernels.costs import Work
from slipstream.kernels.linear.panels import ROWS
from slipstream.kernels.registry import Kernel, known_ops

Kind = tuple[tuple[int, ...], str] | None  # of a tensor: shape and dtype

# Far beyond any cache; and large enough that a product's rate no longer grows.
READ_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
_READ_COLUMNS = 4096


@dataclass(frozen=True)
class Machine:
    name: str
    read: float  # bytes a second
    copy: float  # bytes read and written a second
    products: dict[str, float]  # FLOPs a second, by the dtype of what is multiplied; the engine's is the first

    def floor(self, work: Work) -> float:
        """Seconds that this work takes at least."""
        dtype = str(work.dtype).removeprefix("torch.")
        rate = self.products.get(dtype, next(iter(self.products.values())))
        return max(work.num_bytes / max(self.read, self.copy), work.flops / rate)

    def at_best(self, again: Self) -> Self:
        """Of two measurements, between which others may have come and gone, the faster in everything."""
        products = {dtype: max(rate, again.products[dtype]) for dtype, rate in self.products.items()}
        return replace(self, read=max(self.read, again.read), copy=max(self.copy, again.copy), products=products)


def measure_machine(dtype: str, device: torch.device) -> Machine:
    """For an engine of this dtype: what the fastest candidate of the linears reaches where nothing is small."""
    num_bytes, size = READ_BYTES[device.type], PRODUCT_SIZE[device.type]
    num_rows = num_bytes // getattr(torch, dtype).itemsize // _READ_COLUMNS
    row, matrix, square = ((1, _READ_COLUMNS), dtype), ((num_rows, _READ_COLUMNS), dtype), ((size, size), dtype)
    read = num_bytes / _seconds(_candidates("linear", dtype, device), [row, matrix, None], {}, device)
    flops = 2 * size**3
    products = {dtype: flops / _seconds(_candidates("linear", dtype, device), [square, square, None], {}, device)}
    for op, narrow, weight, how in _narrow_products(size, dtype):
        kernels = _candidates(op, dtype, device)
        del kernels["reference"]  # which multiplies float32
        if kernels:
            x = [((size, size), narrow), ((size, 1), "float32")]
            rate = flops / _seconds(kernels, [*x, *weight], how, device)
            products[narrow] = max(rate, products.get(narrow, 0.0))
    return Machine(describe_device(device), read, _copy_rate(num_bytes, device), products)


def _narrow_products(size: int, dtype: str) -> Iterator[tuple[str, str, list[Kind], dict[str, object]]]:
    """Ops on 8 bits: what they multiply, their arguments after x and its scales, and their attributes."""
    how = {"group_size": 0, "input_group_size": 0}
    for op, narrow, absent in (("linear_fp8", "float8_e4m3fn", [None]), ("linear_w8a8", "int8", [None, None])):
        yield op, narrow, [((size, size), narrow), ((size, 1), "float32"), *absent], {**how, "dtype": dtype}
    panels, scales = ((size // ROWS, size * ROWS), "uint8"), ((size // ROWS, ROWS), "float32")
    yield "linear_panels", "int8", [panels, scales, None, None], {"bits": 8, **how, "num_out": size}


def _candidates(op: str, dtype: str, device: torch.device) -> dict[str, Kernel]:
    return known_ops()[op].candidates(device, getattr(torch, dtype))


def _seconds(
    kernels: Mapping[str, Kernel],
    kinds: Sequence[Kind],
    attributes: Mapping[str, object],
    device: torch.device,
) -> float:
    """Of the fastest of these kernels on inputs of these shapes and dtypes."""
    inputs: list[Tensor | None] = [kind and made_up(TensorType(*kind), {}, device) for kind in kinds]
    return min(time_kernels(kernels, [inputs], attributes, device).values())


def _copy_rate(num_bytes: int, device: torch.device) -> float:
    copy = Kernel("copy", torch.Tensor.copy_, lambda device, dtype: True)
    whole = (num_bytes,), "uint8"
    return 2 * num_bytes / _seconds({"copy": copy}, [whole, whole], {}, device)
