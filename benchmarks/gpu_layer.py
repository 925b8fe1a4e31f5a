"""Where a decoder layer's time goes: its kernels one after another over eight layers of weights, recorded and replayed.

    python benchmarks/gpu_layer.py --format bf16 fp8 int8 --rows 1 8 64 [--shape llama-3-8b] [--context 256]

First the products alone, then each other part is added; so what a part adds is what it costs in a step, with its launch
and cold caches, less what hides behind its neighbours. "late": launched without programmatic dependent launch. Made for
trying kernels: a build of a whole engine takes a minute, this seconds.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from gpu_step import SHAPES
from torch import Tensor
from torch.nn import functional

from slipstream.kernels.linear.fp8 import linear_fp8_cublas, linear_fp8_triton
from slipstream.kernels.triton import attention, linear, rope, rows
from slipstream.kernels.triton.linear import Weight

DEVICE, LAYERS, BLOCK = torch.device("cuda"), 8, 32
COPY_BYTES_A_SECOND = 3.03e12  # of an H100
PARTS = ("norms", "activation", "rotation", "attention")
PACKED = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int = 128

    @classmethod
    def named(cls, name: str) -> "Shape":
        given = SHAPES[name]
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        return cls(*(given[each] for each in names))

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return {
            "qkv": (qkv, self.hidden), "o": (self.hidden, self.heads * self.head_dim),
            "gate_up": (2 * self.inner, self.hidden), "down": (self.hidden, self.inner),
        }  # fmt: skip


class Layers:
    """Eight layers of random weights and pages, and their kernels in order."""

    def __init__(self, shape: Shape, format: str, num_rows: int, context: int) -> None:
        self.shape, self.format, self.num_rows = shape, format, num_rows
        self.weights = [{name: self._weight(*size) for name, size in shape.products.items()} for _ in range(LAYERS)]
        width = -(-context // BLOCK)
        pages = (2, num_rows * width + 1, BLOCK, shape.kv_heads, shape.head_dim)
        self.caches = [torch.randn(pages, device=DEVICE).bfloat16() for _ in range(LAYERS)]
        self.norms = [torch.ones(shape.hidden, device=DEVICE, dtype=torch.bfloat16) for _ in range(2 * LAYERS)]
        self.starts, self.lens = torch.arange(num_rows + 1, device=DEVICE), torch.full((num_rows,), context).cuda()
        self.tables = 1 + torch.arange(num_rows * width, device=DEVICE).view(num_rows, width)
        self.slots = self.tables[:, -1] * BLOCK + (context - 1) % BLOCK
        self.angles = torch.randn(num_rows, shape.head_dim // 2, device=DEVICE)
        self.how = rows.Quantized(0.0, 0, "float8_e4m3fn", keeps_one_row=True) if format == "fp8" else None
        self.made = {size: self._made(size) for _, size in shape.products.values()}

    def _weight(self, num_out: int, num_in: int) -> tuple[Tensor, Tensor | None]:
        if self.format == "int8":
            packed = torch.randint(-127, 128, (num_out, num_in), dtype=torch.int8, device=DEVICE)
        else:
            packed = torch.randn(num_out, num_in, device=DEVICE).to(PACKED[self.format])
        return packed, None if self.format == "bf16" else torch.full((num_out, 1), num_in**-0.5 / 100, device=DEVICE)

    def _made(self, size: int) -> tuple[Tensor, Tensor | None]:
        x = torch.randn(self.num_rows, size, device=DEVICE).bfloat16()
        return rows.quantize(x, self.how) if self.how else (x, None)

    def _multiply(self, weight: tuple[Tensor, Tensor | None], x: Tensor, x_scale: Tensor | None) -> Tensor:
        """By the kernels that win in a step: ours up to 64 rows."""
        packed, scale = weight
        if self.format == "bf16" and self.num_rows > 64:
            return functional.linear(x, packed)
        if self.format == "fp8":
            assert x_scale is not None and scale is not None
            call = linear_fp8_cublas if self.num_rows > 64 else linear_fp8_triton
            return call(x, x_scale, packed, scale, None, 0, 0, "bfloat16")
        return linear.product(x, Weight(packed, scale, None, 0, x_scale, 0), None, torch.bfloat16)

    def step(self, parts: tuple[str, ...]) -> None:
        """Parts that are left out take numbers that were made before."""
        shape = self.shape
        head_sizes = [heads * shape.head_dim for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
        x = total = torch.randn(self.num_rows, shape.hidden, device=DEVICE).bfloat16()
        for index, (weights, cache) in enumerate(zip(self.weights, self.caches, strict=True)):
            normed, scale, total = self._norm(x, total, 2 * index, parts)
            qkv = self._multiply(weights["qkv"], normed, scale)
            q, k, v = qkv.split(head_sizes, 1)
            if "rotation" in parts:
                q = rope.rope_kv_write(q, k, v, self.angles, self.angles, cache, self.slots)
            mixed, scale = self.made[head_sizes[0]]
            if "attention" in parts:
                mixed = attention.attention(
                    q, cache, self.starts, self.lens, self.tables, None, None, None, 0.1, 0, 0.0, shape.head_dim
                )
                mixed, scale = rows.quantize(mixed, self.how) if self.how else (mixed, None)
            x = self._multiply(weights["o"], mixed, scale)
            normed, scale, total = self._norm(x, total, 2 * index + 1, parts)
            gate_up = self._multiply(weights["gate_up"], normed, scale)
            inner, scale = self.made[shape.inner]
            if "activation" in parts:
                inner, scale = rows.activate(gate_up, "silu", is_gated=True, how=self.how)
            x = self._multiply(weights["down"], inner, scale if self.how else None)

    def _norm(
        self, x: Tensor, total: Tensor, index: int, parts: tuple[str, ...]
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        if "norms" not in parts:
            return *self.made[self.shape.hidden], total
        normed, scale, total = rows.norm(x, total, self.norms[index], None, 1e-5, how=self.how)
        return normed, scale if self.how else None, total

    def floor_us(self, context: int) -> float:
        weights = sum(packed.nbytes for packed, _ in self.weights[0].values())
        pages = self.num_rows * context * 2 * self.shape.kv_heads * self.shape.head_dim * 2
        return (weights + pages) / COPY_BYTES_A_SECOND * 1e6


def microseconds(call: Callable[[], None], times: int = 15) -> float:
    """Of a layer, the median of replays."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    seconds = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end))
    return 1e3 * statistics.median(seconds[2:]) / LAYERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", nargs="+", default=["bf16", "fp8"], choices=PACKED)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--context", type=int, default=256)
    arguments = parser.parse_args()
    starts_early = linear.starts_early
    print(f"| format | rows | floor us | late | early | products | {' | '.join('+ ' + part for part in PARTS)} |")
    print("| --- " * (6 + len(PARTS)) + "|")
    for format in arguments.format:
        for num_rows in arguments.rows:
            layers = Layers(Shape.named(arguments.shape), format, num_rows, arguments.context)
            times = [microseconds(partial(layers.step, PARTS[:count])) for count in range(len(PARTS) + 1)]
            for module in (attention, linear, rope, rows):
                module.starts_early = lambda device: False
            late = microseconds(partial(layers.step, PARTS))
            for module in (attention, linear, rope, rows):
                module.starts_early = starts_early
            added = [f"{after - before:.1f}" for before, after in pairwise(times)]
            cells = [f"{layers.floor_us(arguments.context):.1f}", f"{late:.1f}", f"{times[-1]:.1f}", f"{times[0]:.1f}"]
            print(f"| {format} | {num_rows} | {' | '.join([*cells, *added])} |", flush=True)
            del layers


if __name__ == "__main__":
    main()
