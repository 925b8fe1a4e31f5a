"""Products of few rows on a GPU: each way to cut them up, checked and then timed against reading W once.

    PYTHONPATH=. python benchmarks/gpu_linear.py [bf16] [fp8] [a16] [70b] [many]

Calls are recorded into a CUDA graph over copies of W that no cache holds, as a step is; the median replay counts.
"""

import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from slipstream.kernels.linear.groups import dequantize
from slipstream.kernels.linear.w4a16 import SYMMETRIC_ZERO, unpack
from slipstream.kernels.triton.linear import Tiles, Weight, product

BANDWIDTH = 3.03e12
LLAMA_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
LM_HEAD = {"lm_head": (128256, 4096)}
LLAMA_70B = {"qkv70": (10240, 8192), "o70": (8192, 8192), "gate_up70": (57344, 8192), "down70": (8192, 28672)}
COLD_BYTES, CALLS, REPLAYS = 160 << 20, 12, 7
GENERATOR_SEED = time.time_ns()


@dataclass(frozen=True)
class Case:
    kind: str  # bf16, fp8, fp8x128, w8a16, w4a16
    name: str
    rows: int
    num_out: int
    num_in: int
    tiles: tuple[Tiles, ...]


def row(rows: int, columns: int, warps: int = 4) -> Tiles:
    return Tiles(rows, columns, 0, warps)


def swapped(rows: int, columns: int, splits: int = 1, warps: int = 4, stages: int = 4) -> Tiles:
    return Tiles(rows, columns, splits, warps, stages, is_swapped=True)


TILES = {
    ("bf16", 1): (
        row(8, 1024), row(4, 1024), row(2, 1024), row(2, 2048, warps=8), Tiles(16, 256, stages=5),
    ),
    ("bf16", 8): (
        Tiles(16, 256, stages=5), Tiles(32, 256, stages=4), swapped(64, 128), swapped(64, 128, splits=2),
    ),
    ("bf16", 64): (
        Tiles(64, 128), Tiles(32, 128, stages=5), Tiles(64, 128, stages=3), Tiles(64, 64, stages=6),
    ),
    ("fp8", 1): (
        row(4, 2048), row(2, 2048), row(2, 4096, warps=8), swapped(64, 256),
    ),
    ("fp8", 8): (
        Tiles(16, 512, stages=4), Tiles(32, 256, stages=5), swapped(64, 256), swapped(64, 256, splits=2),
    ),
    ("fp8", 64): (
        Tiles(64, 256), Tiles(32, 256, stages=4), swapped(64, 256), swapped(64, 256, splits=2),
        swapped(128, 128, warps=8),
    ),
    ("fp8x128", 1): (row(8, 2048), row(8, 1024, warps=2), swapped(64, 128)),
    ("fp8x128", 8): (Tiles(32, 128, stages=6), Tiles(32, 128, 2, stages=6), swapped(64, 128, 2, stages=6)),
    ("w8a16", 8): (Tiles(32, 256, stages=4), Tiles(32, 128, stages=6), swapped(64, 128, stages=5)),
    ("w8a16", 1): (row(8, 2048), row(4, 2048), row(8, 1024, warps=2), Tiles(32, 256, stages=5)),
    ("w4a16", 1): (
        row(8, 512), row(8, 256, warps=2), row(4, 512), row(16, 256, warps=2), row(8, 512, early=True),
        Tiles(32, 128, stages=6),
    ),
    ("w4a16", 8): (Tiles(32, 128, stages=6), Tiles(32, 128, 2, stages=6), Tiles(64, 128, 2, stages=6)),
    ("fp8", 1024): (Tiles(128, 128, warps=8, stages=3), Tiles(256, 64, warps=8, stages=3)),
    ("fp8x128", 1024): (Tiles(128, 128, warps=8, stages=3),),
    ("w8a16", 1024): (Tiles(128, 64, warps=8, stages=3),),
    ("w4a16", 1024): (Tiles(128, 64, warps=8, stages=3), Tiles(128, 128, warps=8, stages=3)),
}  # fmt: skip


def cases(parts: list[str]) -> Iterator[Case]:
    for kind in ("bf16", "fp8"):
        if kind in parts:
            for rows in (1, 8, 64):
                shapes = LLAMA_8B | LM_HEAD if kind == "bf16" else LLAMA_8B
                yield from (Case(kind, name, rows, *shape, TILES[kind, rows]) for name, shape in shapes.items())
    if "a16" in parts:
        for kind, rows in (("w8a16", 1), ("w8a16", 8), ("w4a16", 1), ("w4a16", 8), ("fp8x128", 1), ("fp8x128", 8)):
            yield from (Case(kind, name, rows, *shape, TILES[kind, rows]) for name, shape in LLAMA_8B.items())
    if "70b" in parts:
        yield from (Case("fp8", name, 1, *shape, TILES["fp8", 1][:3]) for name, shape in LLAMA_70B.items())
    if "many" in parts:
        for kind in ("fp8", "fp8x128", "w8a16", "w4a16"):
            yield Case(kind, "gate_up", 1024, *LLAMA_8B["gate_up"], TILES[kind, 1024])


def make(case: Case, num_out: int, copies: int) -> tuple[Tensor, list[Weight]]:
    """Fresh random x and as many weights."""
    generator = torch.Generator("cuda").manual_seed(GENERATOR_SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    def positive(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device="cuda") + 0.5

    x_MK, group = normal(case.rows, case.num_in), {"fp8x128": 128, "w4a16": 128}.get(case.kind, 0)
    num_groups = case.num_in // group if group else 1
    if case.kind == "bf16":
        return x_MK, [Weight(normal(num_out, case.num_in)) for _ in range(copies)]
    weights = []
    x_scale_MG = positive(case.rows, num_groups) if case.kind.startswith("fp8") else None
    for _ in range(copies):
        if case.kind.startswith("fp8"):
            packed = normal(num_out, case.num_in).to(torch.float8_e4m3fn)
        else:
            width = case.num_in // 2 if case.kind == "w4a16" else case.num_in
            packed = torch.randint(256, (num_out, width), generator=generator, device="cuda", dtype=torch.uint8)
            packed = packed if case.kind == "w4a16" else packed.view(torch.int8)
        x_group = group if x_scale_MG is not None else 0
        weights.append(Weight(packed, positive(num_out, num_groups), None, group, x_scale_MG, x_group))
    return x_MK.to(torch.float8_e4m3fn) if case.kind.startswith("fp8") else x_MK, weights


def reference(x_MK: Tensor, weight: Weight) -> Tensor:
    x = dequantize(x_MK, weight.x_scale_MG, None, weight.x_group_size) if weight.x_scale_MG is not None else x_MK
    return x.float() @ dense(weight, x_MK.shape[1]).t()


def dense(weight: Weight, num_in: int) -> Tensor:
    if weight.scale_NG is None:
        return weight.packed.float()
    if weight.packed.dtype != torch.uint8:
        return dequantize(weight.packed, weight.scale_NG, None, weight.group_size)
    zero_NG = torch.full_like(weight.scale_NG, SYMMETRIC_ZERO)
    return dequantize(unpack(weight.packed, num_in), weight.scale_NG, zero_NG, weight.group_size)


Call = Callable[[Tensor, Weight], Tensor]


def libraries(case: Case) -> dict[str, Call]:
    """What PyTorch has."""

    def scaled(x: Tensor, weight: Weight, is_fast: bool = True) -> Tensor:
        scales = weight.x_scale_MG.t().contiguous().t(), weight.scale_NG.t().contiguous()
        return torch._scaled_mm(x, weight.packed.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=is_fast)

    def tensorwise(x: Tensor, weight: Weight) -> Tensor:  # one scale for all: a time, not a result
        scales = weight.x_scale_MG.view(-1)[0], weight.scale_NG.view(-1)[0]
        return torch._scaled_mm(x, weight.packed.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True)

    if case.kind == "bf16":
        return {"cublas": lambda x, weight: functional.linear(x, weight.packed)}
    if case.kind == "fp8":
        exact = {"scaled_mm exact": lambda x, weight: scaled(x, weight, False)} if case.rows > 64 else {}
        return {"scaled_mm row": scaled, "scaled_mm tensor": tensorwise} | exact
    if case.kind == "fp8x128":
        return {"scaled_mm 128": lambda x, weight: scaled(x, weight, False)}
    return {"dense+cublas": lambda x, weight: product(x, weight, None, x.dtype)} if case.rows > 64 else {}


def describe(tiles: Tiles) -> str:
    how = "row" if tiles.splits == 0 else "swap" if tiles.is_swapped else "dot"
    split = f"/{tiles.splits}" if tiles.splits > 1 else ""
    return f"{how} {tiles.rows}x{tiles.columns}{split} w{tiles.warps} s{tiles.stages}"


def seconds(call: Call, x_MK: Tensor, weights: list[Weight]) -> float:
    for weight in weights[:2]:
        call(x_MK, weight)
    torch.cuda.synchronize()
    calls = math.ceil(CALLS / len(weights)) * len(weights)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            call(x_MK, weights[index % len(weights)])
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / calls)
    return statistics.median(times)


def error(call: Call, x_MK: Tensor, weight: Weight, expected_MN: Tensor) -> float:
    poison = torch.full(expected_MN.shape, math.nan, dtype=torch.bfloat16, device="cuda")
    del poison  # the allocator gives its memory to the result
    y_MN = call(x_MK, weight).float()
    return float((y_MN - expected_MN).norm() / expected_MN.norm())


def measure(case: Case) -> str:
    one = case.num_out * case.num_in * {"bf16": 2, "w4a16": 0.5}.get(case.kind, 1)
    copies = max(2, min(12, math.ceil(COLD_BYTES / one)))
    x_MK, weights = make(case, case.num_out, copies if case.rows <= 64 else 2)
    expected_MN = reference(x_MK, weights[0])
    floor = sum(part.nbytes for part in weights[0] if isinstance(part, Tensor))
    floor += x_MK.nbytes + 2 * case.rows * case.num_out
    ways = libraries(case) | {describe(tiles): of_tiles(tiles) for tiles in case.tiles}
    found: dict[str, float] = {}
    for name, call in ways.items():
        label = f"{case.kind:8}{case.name:10}{case.rows:5} {name:24}"
        try:
            wrong = error(call, x_MK, weights[0], expected_MN)
            found[name] = seconds(call, x_MK, weights)
        except Exception as caught:
            print(f"{label} {type(caught).__name__}: {' '.join(str(caught).split())[:120]}")
            continue
        rate = floor / found[name]
        flops = 2 * case.rows * case.num_out * case.num_in / found[name] / 1e12
        numbers = f"{found[name] * 1e6:9.1f} us {rate / 1e9:7.0f} GB/s {100 * rate / BANDWIDTH:6.1f} %"
        print(f"{label}{numbers} {flops:6.0f} TFLOP/s  error {wrong:.1e}", flush=True)
        if not wrong < 1e-2:  # also the one whose scales are others
            del found[name]
    if not found:
        return f"{case.kind:8}{case.name:10}{case.rows:5} nothing ran"
    best = min(found, key=found.__getitem__)
    percent = 100 * floor / found[best] / BANDWIDTH
    return f"{case.kind:8}{case.name:10}{case.rows:5} {best:24}{found[best] * 1e6:9.1f} us {percent:6.1f} %"


def of_tiles(tiles: Tiles) -> Call:
    return lambda x, weight: product(x, weight, None, torch.bfloat16, tiles)


def compile_ahead(case: Case) -> None:
    """Fills Triton's cache: what is compiled depends on the number of columns and rows of x, not on those of W."""
    x_MK, (weight,) = make(case, 512, 1)
    for tiles in case.tiles:
        try:
            of_tiles(tiles)(x_MK, weight)
        except Exception:
            continue


def main() -> None:
    parts = sys.argv[1:] or ["bf16", "fp8", "a16", "70b", "many"]
    start = time.perf_counter()
    todo = list(cases(parts))
    one_each = {(case.kind, case.num_in, case.rows): case for case in todo}
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        pool.map(compile_ahead, one_each.values(), chunksize=1)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, compiled in {time.perf_counter() - start:.0f} s")
    best = [measure(case) for case in todo]
    print("\nThe best of each:", *best, f"{time.perf_counter() - start:.0f} s in all", sep="\n")


if __name__ == "__main__":
    main()
