"""Times slipstream/kernels/triton/attention.py on this GPU: python benchmarks/gpu_attention.py [section ...] [--all]

Sections: check rope decode prefill mixed latent; all if none is named. Each call is recorded into a CUDA graph and
replayed over inputs that no cache holds. A line has the floor (KV bytes at copy bandwidth, or the product at PEAK),
what the plan takes, and the best three of the variants; --all adds a line for each of them. `128x64 w8 s3 /4` is a
tile of 128 rows and 64 keys, 8 warps, 3 stages, 4 splits.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from slipstream.kernels import rope
from slipstream.kernels.attention import paged
from slipstream.kernels.triton import attention as tiles
from slipstream.kernels.triton.attention import Launch, Tile

PEAK = 798e12
DEVICE = torch.device("cuda")
COLD_BYTES = 160 << 20
MAX_KEYS = 8192  # as wide as the tables of a recorded step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", default=list(SECTIONS))
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    bandwidth = copy_bandwidth()
    tiny = torch.zeros(1, device=DEVICE)
    print(f"copy {bandwidth / 1e12:.2f} TB/s; the smallest kernel {time_us([tiny.zero_] * 32):.2f} µs", flush=True)
    for section in options.sections:
        start = time.perf_counter()
        SECTIONS[section](bandwidth, options.all)
        print(f"({section} took {time.perf_counter() - start:.0f} s)", flush=True)


def time_us(calls: list[Callable[[], Any]], replays: int = 7) -> float:
    """Median microseconds of one of the calls, recorded together."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(replays + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[1:])


def copy_bandwidth() -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_us([lambda: target.copy_(source)] * 4) * 1e6


class Shape:
    """Sequences of (query rows, tokens before them), and as many copies of their pages as the L2 cache cannot hold."""

    def __init__(
        self, chunks: list[tuple[int, int]], num_heads: int, num_kv_heads: int, *, head_dim: int = 128,
        value_dim: int | None = None, num_planes: int = 2, block_size: int = 32, window: int = 0,
        dtype: torch.dtype = torch.bfloat16, poison: bool = False,
    ) -> None:  # fmt: skip
        self.window, self.scale, self.value_dim = window, head_dim**-0.5, value_dim or head_dim
        lens = [rows + past for rows, past in chunks]
        counts = [-(-length // block_size) for length in lens]
        block_bytes = num_planes * block_size * num_kv_heads * head_dim * dtype.itemsize
        self.copies = max(1, min(64, -(-COLD_BYTES // (sum(counts) * block_bytes))))
        order = torch.randperm(sum(counts) * self.copies, device=DEVICE) + 1
        self.tables = torch.zeros(
            self.copies, len(chunks), max(MAX_KEYS, *lens) // block_size, dtype=torch.int64, device=DEVICE
        )
        for copy, (sequence, count) in itertools.product(range(self.copies), enumerate(counts)):
            self.tables[copy, sequence, :count], order = order[:count], order[count:]
        self.kv = torch.empty(
            num_planes, sum(counts) * self.copies + 1, block_size, num_kv_heads, head_dim, dtype=dtype, device=DEVICE
        ).normal_()
        if poison:  # of copy 0: the null block, and what lies beyond each sequence's end
            self.kv[:, 0] = float("nan")
            for sequence, length in enumerate(lens):
                if length % block_size:
                    self.kv[:, self.tables[0, sequence, length // block_size], length % block_size :] = float("nan")
        self.num_tokens = sum(rows for rows, _ in chunks)
        self.q = torch.empty(self.copies, self.num_tokens, num_heads * head_dim, dtype=dtype, device=DEVICE).normal_()
        starts = list(itertools.accumulate((rows for rows, _ in chunks), initial=0))
        self.starts, self.lens = (torch.tensor(values, device=DEVICE) for values in (starts, lens))
        far = window or max(lens)
        num_scores = sum(min(far, past + row + 1) for rows, past in chunks for row in range(rows))
        self.flops = 2 * num_scores * num_heads * (head_dim + self.value_dim)
        self.bytes = sum(min(past, far) + rows for rows, past in chunks) * block_bytes // block_size

    def arguments(self, copy: int, slopes: Any = None, sinks: Any = None, soft_cap: float = 0.0) -> tuple[Any, ...]:
        return (
            self.q[copy], self.kv, self.starts, self.lens, self.tables[copy], slopes, sinks,
            self.scale, self.window, soft_cap, self.value_dim,
        )  # fmt: skip

    def plan(self) -> tuple[Launch, ...]:
        num_kv_heads, head_dim = self.kv.shape[3:]
        return tiles.plan(
            self.num_tokens, len(self.lens), num_kv_heads, self.q.shape[2] // head_dim // num_kv_heads,
            self.tables.shape[2] * self.kv.shape[2], head_dim, self.kv.itemsize, tiles.num_processors(DEVICE),
        )  # fmt: skip

    def time(self, launches: tuple[Launch, ...], floor_us: float) -> float:
        count = max(2, min(32, int(1500 / floor_us)))
        every = [self.arguments(copy) for copy in range(self.copies)]
        calls = [partial(tiles.attention, *every[i % self.copies], launches=launches) for i in range(count)]
        return time_us(calls)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"


def label(launches: tuple[Launch, ...]) -> str:
    return " + ".join(
        f"{it.tile.rows}x{it.tile.keys} w{it.tile.num_warps} s{it.tile.num_stages} /{it.num_splits}" for it in launches
    )


def race(
    name: str, shape: Shape, variants: list[tuple[Launch, ...]], bandwidth: float, show_all: bool, extra: str = ""
) -> None:
    """One line: floor, the plan's time and what it reaches, the best three."""
    memory_us, product_us = shape.bytes / bandwidth * 1e6, shape.flops / PEAK * 1e6
    floor_us = max(memory_us, product_us)

    def reach(us: float) -> str:
        rate = f"{shape.flops / us / 1e6:4.0f}TF" if product_us > memory_us else f"{shape.bytes / us / 1e3:5.0f}GB/s"
        return f"{us:8.1f}µs {rate} {floor_us / us:4.0%}"

    expected = None
    found: list[tuple[float, str]] = []
    planned = shape.plan()
    for launches in [planned, *[variant for variant in variants if variant != planned]]:
        try:
            actual = tiles.attention(*shape.arguments(0), launches=launches).float()
            expected = actual if expected is None else expected  # the plan itself is checked by `check`
            error = ((actual - expected).norm() / expected.norm()).item()
            us = shape.time(launches, floor_us)
            found.append((us, label(launches) + (f" WRONG {error:.1e}" if not error < 2e-2 else "")))
            if show_all:
                print(f"    {name:28s} {reach(us)}  {found[-1][1]}", flush=True)
        except Exception as error:
            print(f"    {name} {label(launches)}: {first_line(error)}", flush=True)
    if found:
        best = "; ".join(f"{us:.1f} {what}" for us, what in sorted(found)[:3])
        plan = f"{reach(found[0][0])} {found[0][1]}"
        print(f"{name:28s} floor {floor_us:7.1f} | plan {plan} | best {best}{extra}", flush=True)


def check(_bandwidth: float, _show_all: bool) -> None:
    """The plan and forced splits against the op's reference in float32."""
    mixed = [(1, 5000), (300, 100), (1, 0), (64, 0), (1, 2500), (0, 7), (5, 900), *[(1, 331 * i) for i in range(20)]]
    generation = [(1, 997 * i % 6000) for i in range(40)]
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("plain", {}, {}),
        ("fp16", {"dtype": torch.float16}, {}),
        ("fp32", {"dtype": torch.float32}, {}),
        ("page 16", {"block_size": 16}, {}),
        ("page 64", {"block_size": 64}, {}),
        ("page 128", {"block_size": 128}, {}),
        ("head 64", {"head_dim": 64}, {}),
        ("head 80", {"head_dim": 80}, {}),
        ("head 96", {"head_dim": 96}, {}),
        ("head 256", {"head_dim": 256}, {}),
        ("MHA", {"heads": (8, 8)}, {}),
        ("71 to 1", {"heads": (71, 1), "head_dim": 64}, {}),
        ("window", {"window": 500}, {}),
        ("all options", {"window": 700}, {"slopes": True, "sinks": True, "soft_cap": 20.0}),
        ("latent 16", {"heads": (16, 1), "head_dim": 576, "value_dim": 512, "num_planes": 1}, {}),
        ("latent 128", {"heads": (128, 1), "head_dim": 576, "value_dim": 512, "num_planes": 1}, {}),
    ]
    for name, kinds, options in cases:
        errors = []
        for chunks in (mixed, generation, [(1111, 0)], [(1, 3000)]):
            try:
                heads = kinds.get("heads", (8, 2))
                shape = Shape(chunks, *heads, **{k: v for k, v in kinds.items() if k != "heads"}, poison=True)
                slopes = torch.rand(heads[0], device=DEVICE) / 50 if options.get("slopes") else None
                sinks = torch.randn(heads[0], device=DEVICE, dtype=shape.q.dtype) if options.get("sinks") else None
                arguments = list(shape.arguments(0, slopes, sinks, options.get("soft_cap", 0.0)))
                exact = [x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments]
                exact[1] = shape.kv.float()
                expected = paged.attention.reference(*exact)
                for splits in (None, 5):
                    launches = shape.plan()
                    if splits:
                        launches = tuple(replace(it, num_splits=splits) for it in launches)
                    poisoned = torch.full_like(expected, float("nan"), dtype=shape.q.dtype)
                    del poisoned
                    actual = tiles.attention(*arguments, launches=launches).float()
                    errors.append(((actual - expected).norm() / expected.norm()).item())
            except Exception as error:
                print(f"  {name}: {first_line(error)}", flush=True)
                errors.append(float("nan"))
        limit = 1e-5 if kinds.get("dtype") == torch.float32 else 1e-2
        verdict = "ok" if all(error < limit for error in errors) else "WRONG"
        print(f"check {name:12s} {verdict}  " + " ".join(f"{error:.1e}" for error in errors), flush=True)


def decode(bandwidth: float, show_all: bool) -> None:
    kinds = [Tile(16, 64, 4, 3), Tile(16, 64, 4, 4), Tile(16, 32, 4, 4), Tile(16, 128, 4, 2), Tile(16, 128, 8, 3)]
    for num_kv_heads, keys, batch in itertools.product((8, 32), (128, 512, 2048, 8192), (1, 8, 64)):
        shape = Shape([(1, keys - 1)] * batch, 32, num_kv_heads)
        planned = shape.plan()[0].num_splits
        splits = sorted({1, max(1, planned // 2), planned, min(64, planned * 2)})
        variants = [(Launch(tile, n),) for tile in kinds for n in splits if n < 2 * keys // tile.keys or n == 1]
        race(f"decode {batch} x {keys}, 32/{num_kv_heads}", shape, variants, bandwidth, show_all)
        del shape
    for block_size in (16, 64, 128):
        shape = Shape([(1, 2047)] * 16, 32, 8, block_size=block_size)
        race(f"decode 16 x 2048 page {block_size}", shape, [], bandwidth, show_all)
    shape = Shape([(1, 8000)] * 16, 64, 8, head_dim=64, window=128)
    race("decode window 128, head 64", shape, [], bandwidth, show_all)


def prefill(bandwidth: float, show_all: bool) -> None:
    kinds = [
        Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 4), Tile(128, 128, 8, 2), Tile(128, 128, 8, 3),
        Tile(64, 64, 4, 3), Tile(64, 128, 4, 2), Tile(128, 64, 4, 3), Tile(128, 32, 8, 4),
    ]  # fmt: skip
    for name, chunks, num_kv_heads in (
        ("prompt 2048, 32/8", [(2048, 0)], 8),
        ("prompt 2048, 32/32", [(2048, 0)], 32),
        ("prompt 8192, 32/8", [(8192, 0)], 8),
        ("chunk 512 after 7680, 32/8", [(512, 7680)], 8),
        ("chunk 128 after 1024, 32/8", [(128, 1024)], 8),
        ("16 prompts of 128, 32/8", [(128, 0)] * 16, 8),
    ):
        shape = Shape(chunks, 32, num_kv_heads)
        *few, many = shape.plan()
        variants = [(*few, replace(many, tile=tile)) for tile in kinds]
        race(name, shape, variants, bandwidth, show_all, extra=dense(chunks, num_kv_heads))
        del shape
    shape = Shape([(4096, 0)], 32, 8, window=1024)
    race("prompt 4096, window 1024", shape, [], bandwidth, show_all)
    for head_dim in (64, 80, 96, 256):
        shape = Shape([(2048, 0)], 32, 8, head_dim=head_dim)
        variants = [(Launch(Tile(128, 128 if head_dim < 128 else 32, 8, 2), 1),), (Launch(Tile(64, 64, 4, 2), 1),)]
        race(f"prompt 2048, head {head_dim}", shape, variants, bandwidth, show_all)


def dense(chunks: list[tuple[int, int]], num_kv_heads: int) -> str:
    """What torch's flash attention and cuDNN's take, without pages, where they can compute the same."""
    if any(past for _, past in chunks):
        return ""
    rows = chunks[0][0]
    q = torch.randn(len(chunks), 32, rows, 128, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(len(chunks), num_kv_heads, rows, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    found = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                call = lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
                found.append(f"{backend.name.split('_')[0].lower()} {time_us([call] * 8):.1f}")
        except Exception as error:
            found.append(f"{backend.name}: {type(error).__name__}")
    return " | torch " + ", ".join(found)


def mixed(bandwidth: float, show_all: bool) -> None:
    for name, chunks in (
        ("32 x 2048 and 512 after 0", [(1, 2047)] * 32 + [(512, 0)]),
        ("64 x 1024 and 192 after 1000", [(1, 1023)] * 64 + [(192, 1000)]),
        ("8 verify 5 at 2048", [(5, 2043)] * 8),
        ("1 verifies 8 at 2048", [(8, 2040)]),
    ):
        shape = Shape(chunks, 32, 8)
        variants = [
            (Launch(Tile(rows, 64, 4, 3), splits),) for rows, splits in itertools.product((16, 32, 64), (1, 4, 16))
        ]
        if len(chunks) > 1:
            few, many = Tile(16, 64, 4, 3), Tile(64, 64, 4, 3)
            variants += [
                (Launch(few, a, max_rows=16), Launch(many, b, min_rows=17)) for a in (2, 4, 8) for b in (1, 2, 4)
            ]
        race(name, shape, variants, bandwidth, show_all)
        del shape


def latent(bandwidth: float, show_all: bool) -> None:
    for num_heads, batch, keys in ((16, 1, 2048), (16, 64, 2048), (128, 1, 2048), (128, 64, 2048)):
        shape = Shape([(1, keys - 1)] * batch, num_heads, 1, head_dim=576, value_dim=512, num_planes=1, block_size=64)
        rows = min(num_heads, 64)
        kinds = [
            Tile(rows, 32, 4, 2), Tile(rows, 32, 8, 2), Tile(rows, 64, 8, 2), Tile(rows, 32, 8, 3),
            Tile(rows, 16, 4, 3),
        ]  # fmt: skip
        planned = shape.plan()[0].num_splits
        splits = sorted({1, planned, max(1, planned // 2), planned * 2})
        variants = [(Launch(tile, n),) for tile in kinds for n in splits]
        race(f"latent {batch} x {keys}, {num_heads} heads", shape, variants, bandwidth, show_all)
        del shape


def rope_kv_write(bandwidth: float, _show_all: bool) -> None:
    """The fused op against its reference, which is a dozen launches; both kinds of heads of the 8B shape."""
    op, num_blocks = rope.rope_kv_write, 2048
    functions = (op.reference, op.kernels["triton"].function)
    kv = torch.zeros(2, num_blocks, 32, 8, 128, dtype=torch.bfloat16, device=DEVICE)
    for num_tokens in (1, 8, 64, 512, 2048, 8192):
        copies = max(1, min(64, COLD_BYTES // (num_tokens * 6144 * 2)))
        x = torch.empty(copies, num_tokens, 6144, dtype=torch.bfloat16, device=DEVICE).normal_()
        angles = torch.rand(num_tokens, 64, device=DEVICE) * 6
        slots = torch.randperm(num_blocks * 32, device=DEVICE)[:num_tokens]
        every = [(*each.split([4096, 1024, 1024], 1), angles.cos(), angles.sin(), kv, slots) for each in x]
        results = []
        for function in functions:
            kv.fill_(float("nan"))
            out = function(*every[0])
            results.append(torch.cat([out.flatten(), kv.flatten(1, 2)[:, slots].flatten()]).float())
        error = ((results[1] - results[0]).norm() / results[0].norm()).item()
        torch_us, us = (time_us([partial(f, *every[i % copies]) for i in range(32)]) for f in functions)
        floor_us = 2 * x[0].nbytes / bandwidth * 1e6
        ours = f"triton {us:6.1f}µs {floor_us / us:4.0%} | torch {torch_us:6.1f} | difference {error:.1e}"
        print(f"rope_kv_write {num_tokens:5d} tokens: floor {floor_us:5.1f} | {ours}", flush=True)


SECTIONS = {
    "check": check,
    "rope": rope_kv_write,
    "decode": decode,
    "prefill": prefill,
    "mixed": mixed,
    "latent": latent,
}

if __name__ == "__main__":
    main()
