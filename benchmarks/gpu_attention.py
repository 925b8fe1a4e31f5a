"""Times slipstream/kernels/triton/attention.py on this GPU: python benchmarks/gpu_attention.py [section ...] [--all]

Sections: check rope decode prefill mixed latent eight_bits; all if none is named. Kernels are compiled in parallel
first, then each call is recorded into a CUDA graph and replayed over inputs that no cache holds. A line has the floor
(KV bytes at copy bandwidth, or the product at PEAK), what the plan takes, and the best three of the variants; --all
adds a line for each of them. `128x64 w8 s3 /4` is a tile of 128 rows and 64 keys, 8 warps, 3 stages, 4 splits.
"""

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
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
PROCESSES = 12

Launches = tuple[Launch, ...]


@dataclass(frozen=True)
class Case:
    """Sequences of (query rows, tokens before them), and launches to compare with the plan's."""

    name: str
    chunks: tuple[tuple[int, int], ...]
    heads: tuple[int, int] = (32, 8)
    variants: tuple[Launches, ...] = ()
    head_dim: int = 128
    value_dim: int = 0  # 0: head_dim
    num_planes: int = 2
    block_size: int = 32
    window: int = 0
    dtype: torch.dtype = torch.bfloat16
    soft_cap: float = 0.0
    has_slopes_and_sinks: bool = False
    kv_dtype: torch.dtype | None = None  # of a cache in 8 bits

    @property
    def num_tokens(self) -> int:
        return sum(rows for rows, _ in self.chunks)

    @property
    def table_width(self) -> int:
        """A power of two, as in a recorded step."""
        longest = max(rows + past for rows, past in self.chunks)
        return 1 << (-(-longest // self.block_size) - 1).bit_length()

    def plan(self) -> Launches:
        num_heads, num_kv_heads = self.heads
        return tiles.plan(
            self.num_tokens, len(self.chunks), num_kv_heads, num_heads // num_kv_heads,
            self.table_width * self.block_size, self.head_dim, self.dtype.itemsize, tiles.num_processors(DEVICE),
            tiles.shared_memory(DEVICE),
        )  # fmt: skip

    def with_tiles(self, kinds: Iterable[Tile], *, splits: bool = False) -> "Case":
        """The plan with other last tiles, and, if asked, half and twice its splits and none."""
        *before, last = self.plan()
        counts = (
            {1, max(1, last.num_splits // 2), last.num_splits, last.num_splits * 2} if splits else {last.num_splits}
        )
        found = [(*before, replace(last, tile=tile, num_splits=n)) for tile in kinds for n in sorted(counts)]
        return replace(self, variants=tuple(found))


class Inputs:
    """As many copies of the sequences' pages as the L2 cache cannot hold."""

    def __init__(self, case: Case, poison: bool = False) -> None:
        self.case, dtype, block_size = case, case.dtype, case.block_size
        num_heads, num_kv_heads = case.heads
        lens = [rows + past for rows, past in case.chunks]
        counts = [-(-length // block_size) for length in lens]
        token_bytes = case.num_planes * num_kv_heads * case.head_dim * (case.kv_dtype or dtype).itemsize
        self.copies = max(1, min(64, -(-COLD_BYTES // (sum(lens) * token_bytes))))
        if poison:
            self.copies = 1
        order = torch.randperm(sum(counts) * self.copies, device=DEVICE) + 1
        self.tables = torch.zeros(self.copies, len(lens), case.table_width, dtype=torch.int64, device=DEVICE)
        for copy, (sequence, count) in itertools.product(range(self.copies), enumerate(counts)):
            self.tables[copy, sequence, :count], order = order[:count], order[count:]
        shape = (case.num_planes, sum(counts) * self.copies + 1, block_size, num_kv_heads, case.head_dim)
        self.kv = torch.empty(shape, dtype=dtype, device=DEVICE).normal_()
        if poison:  # the null block, and what lies beyond each sequence's end
            self.kv[:, 0] = float("nan")
            for sequence, length in enumerate(lens):
                if length % block_size:
                    self.kv[:, self.tables[0, sequence, length // block_size], length % block_size :] = float("nan")
        self.scales = None
        if case.kv_dtype is not None:
            self.kv = self.kv.mul_(40).clamp_(-127, 127).round_().nan_to_num_(nan=127).to(case.kv_dtype)
            self.scales = torch.rand(case.num_planes, num_kv_heads, device=DEVICE) / 50 + 0.02
        q_shape = (self.copies, case.num_tokens, num_heads * case.head_dim)
        self.q = torch.empty(q_shape, dtype=dtype, device=DEVICE).normal_()
        starts = list(itertools.accumulate((rows for rows, _ in case.chunks), initial=0))
        self.starts, self.lens = (torch.tensor(values, device=DEVICE) for values in (starts, lens))
        self.slopes = self.sinks = None
        if case.has_slopes_and_sinks:
            self.slopes = torch.rand(num_heads, device=DEVICE) / 50
            self.sinks = torch.randn(num_heads, device=DEVICE, dtype=dtype)
        far = case.window or max(lens)
        num_scores = sum(min(far, past + row + 1) for rows, past in case.chunks for row in range(rows))
        self.flops = 2 * num_scores * num_heads * (case.head_dim + (case.value_dim or case.head_dim))
        self.bytes = sum(min(past, far) + rows for rows, past in case.chunks) * token_bytes

    def arguments(self, copy: int) -> tuple[Any, ...]:
        case = self.case
        return (
            self.q[copy], self.kv, self.starts, self.lens, self.tables[copy], self.slopes, self.sinks, self.scales,
            case.head_dim**-0.5, case.window, case.soft_cap, case.value_dim or case.head_dim,
        )  # fmt: skip

    def time(self, launches: Launches, floor_us: float) -> float:
        count = max(2, min(32, int(1500 / floor_us)))
        every = [self.arguments(copy) for copy in range(self.copies)]
        calls = [partial(tiles.attention, *every[i % self.copies], launches=launches) for i in range(count)]
        return time_us(calls)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", default=["check", "rope", *SECTIONS])
    parser.add_argument("--all", action="store_true")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    cases = [case for name in options.sections if name in SECTIONS for case in SECTIONS[name]()]
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        start = time.perf_counter()
        if "check" in options.sections:
            for line in pool.imap(check, checks()):
                print(line, flush=True)
        for line in pool.imap(compile_kernels, kernels_of(cases)):
            if line:
                print(line, flush=True)
        print(f"(checked and compiled in {time.perf_counter() - start:.0f} s)", flush=True)
    start = time.perf_counter()
    bandwidth = copy_bandwidth()
    tiny = torch.zeros(1, device=DEVICE)
    print(f"copy {bandwidth / 1e12:.2f} TB/s; the smallest kernel {time_us([tiny.zero_] * 32):.2f} µs", flush=True)
    if "rope" in options.sections:
        rope_kv_write(bandwidth)
    for case in cases:
        race(case, bandwidth, options.all)
    print(f"(timed in {time.perf_counter() - start:.0f} s)", flush=True)


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


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"


def label(launches: Launches) -> str:
    return " + ".join(
        f"{it.tile.rows}x{it.tile.keys} w{it.tile.num_warps} s{it.tile.num_stages} /{it.num_splits}" for it in launches
    )


def kernels_of(cases: Iterable[Case]) -> list[Case]:
    """Small cases, one for each kernel that these need: what differs in shapes alone is the same kernel."""
    found = {}
    for case in cases:
        for launches in (case.plan(), *case.variants):
            for launch in launches:
                small = replace(launch, num_splits=min(2, launch.num_splits))
                found[replace(case, name="", chunks=((1, 40), (20, 0)), variants=((small,),))] = None
    return list(found)


def compile_kernels(case: Case) -> str:
    try:
        tiles.attention(*Inputs(case, poison=True).arguments(0), launches=case.variants[0])
        torch.cuda.synchronize()
    except Exception as error:
        return f"    {case.heads} {case.head_dim} {label(case.variants[0])}: {first_line(error)}"
    return ""


def race(case: Case, bandwidth: float, show_all: bool) -> None:
    """One line: floor, the plan's time and what it reaches, the best three."""
    inputs = Inputs(case)
    memory_us, product_us = inputs.bytes / bandwidth * 1e6, inputs.flops / PEAK * 1e6
    floor_us = max(memory_us, product_us)

    def reach(us: float) -> str:
        rate = f"{inputs.flops / us / 1e6:4.0f}TF" if product_us > memory_us else f"{inputs.bytes / us / 1e3:5.0f}GB/s"
        return f"{us:8.1f}µs {rate} {floor_us / us:4.0%}"

    expected = None
    found: list[tuple[float, str]] = []
    for launches in dict.fromkeys((case.plan(), *case.variants)):
        try:
            actual = tiles.attention(*inputs.arguments(0), launches=launches).float()
            expected = actual if expected is None else expected  # the plan itself is checked by `check`
            error = ((actual - expected).norm() / expected.norm()).item()
            us = inputs.time(launches, floor_us)
            found.append((us, label(launches) + (f" WRONG {error:.1e}" if not error < 2e-2 else "")))
            if show_all:
                print(f"    {case.name:28s} {reach(us)}  {found[-1][1]}", flush=True)
        except Exception as error:
            print(f"    {case.name} {label(launches)}: {first_line(error)}", flush=True)
    if found:
        best = "; ".join(f"{us:.1f} {what}" for us, what in sorted(found)[:3])
        plan = f"{reach(found[0][0])} {found[0][1]}"
        print(f"{case.name:28s} floor {floor_us:7.1f} | plan {plan} | best {best}{dense(case)}", flush=True)


def dense(case: Case) -> str:
    """What torch's flash attention and cuDNN's take for a prompt, without pages, where they can compute the same."""
    (rows, past), *others = set(case.chunks)
    if others or past or rows == 1 or case.window:
        return ""
    size, (num_heads, num_kv_heads), found = len(case.chunks), case.heads, []
    q = torch.randn(size, num_heads, rows, case.head_dim, device=DEVICE, dtype=case.dtype)
    k, v = (torch.randn(size, num_kv_heads, rows, case.head_dim, device=DEVICE, dtype=case.dtype) for _ in range(2))
    call = partial(functional.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        name = backend.name.split("_")[0].lower()
        try:
            with sdpa_kernel(backend):
                found.append(f"{name} {time_us([call] * 8):.1f}")
        except Exception as error:
            found.append(f"{name} {type(error).__name__}")
    return " | torch " + ", ".join(found)


def checks() -> list[Case]:
    return [
        Case("plain", (), (8, 2)),
        Case("fp16", (), (8, 2), dtype=torch.float16),
        Case("fp32", (), (8, 2), dtype=torch.float32),
        Case("page 16", (), (8, 2), block_size=16),
        Case("page 64", (), (8, 2), block_size=64),
        Case("page 128", (), (8, 2), block_size=128),
        Case("head 64", (), (8, 2), head_dim=64),
        Case("head 80", (), (8, 2), head_dim=80),
        Case("head 96", (), (8, 2), head_dim=96),
        Case("head 256", (), (8, 2), head_dim=256),
        Case("MHA", (), (8, 8)),
        Case("71 to 1", (), (71, 1), head_dim=64),
        Case("window", (), (8, 2), window=500),
        Case("all options", (), (8, 2), window=700, soft_cap=20.0, has_slopes_and_sinks=True),
        Case("latent 16", (), (16, 1), head_dim=576, value_dim=512, num_planes=1),
        Case("latent 128", (), (128, 1), head_dim=576, value_dim=512, num_planes=1),
        Case("fp8", (), (8, 2), kv_dtype=torch.float8_e4m3fn),
        Case("int8", (), (8, 2), kv_dtype=torch.int8),
        Case("fp8, fp32", (), (8, 2), dtype=torch.float32, kv_dtype=torch.float8_e4m3fn),
        Case("fp8, page 64", (), (8, 2), block_size=64, kv_dtype=torch.float8_e4m3fn),
        Case("fp8 latent", (), (16, 1), head_dim=576, value_dim=512, num_planes=1, kv_dtype=torch.float8_e4m3fn),
    ]


def check(case: Case) -> str:
    """The plan and forced splits against the op's reference in float32."""
    mixed = [(1, 5000), (300, 100), (1, 0), (64, 0), (1, 2500), (0, 7), (5, 900), *[(1, 331 * i) for i in range(20)]]
    generation = [(1, 997 * i % 6000) for i in range(40)]
    errors = []
    for chunks in (mixed, generation, [(1111, 0)], [(1, 3000)]):
        try:
            inputs = Inputs(replace(case, chunks=tuple(chunks)), poison=True)
            arguments = inputs.arguments(0)
            exact = [x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments]
            exact[1] = arguments[1].float()
            expected = paged.attention.reference(*exact)
            for num_splits in (0, 5):
                launches = inputs.case.plan()
                if num_splits:
                    launches = tuple(replace(it, num_splits=num_splits) for it in launches)
                poisoned = torch.full_like(expected, float("nan"), dtype=case.dtype)
                del poisoned  # what torch.empty may give next
                actual = tiles.attention(*arguments, launches=launches).float()
                errors.append(((actual - expected).norm() / expected.norm()).item())
        except Exception as error:
            return f"check {case.name:12s} {first_line(error)}"
    limit = 1e-5 if case.dtype == torch.float32 else 1e-2
    verdict = "ok   " if all(error < limit for error in errors) else "WRONG"
    return f"check {case.name:12s} {verdict} " + " ".join(f"{error:.1e}" for error in errors)


def decode() -> list[Case]:
    kinds = [Tile(16, 64, 4, 3), Tile(16, 64, 4, 4), Tile(16, 32, 4, 4), Tile(16, 128, 4, 2), Tile(16, 64, 8, 3)]
    found = []
    for num_kv_heads, keys, batch in itertools.product((8, 32), (128, 512, 2048, 8192), (1, 8, 64)):
        case = Case(f"decode {batch} x {keys}, 32/{num_kv_heads}", ((1, keys - 1),) * batch, (32, num_kv_heads))
        found.append(case.with_tiles(kinds, splits=True))
    for block_size in (16, 64, 128):
        found.append(Case(f"decode 16 x 2048 page {block_size}", ((1, 2047),) * 16, block_size=block_size))
    found.append(Case("decode window 128, head 64", ((1, 8000),) * 16, (64, 8), head_dim=64, window=128))
    return found


def prefill() -> list[Case]:
    kinds = [
        Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 4), Tile(128, 128, 8, 2), Tile(128, 128, 8, 3),
        Tile(64, 64, 4, 3), Tile(64, 128, 4, 2),
    ]  # fmt: skip
    found = [
        Case("prompt 2048, 32/8", ((2048, 0),)).with_tiles(kinds),
        Case("prompt 2048, 32/32", ((2048, 0),), (32, 32)).with_tiles(kinds),
        Case("prompt 8192, 32/8", ((8192, 0),)).with_tiles(kinds),
        Case("chunk 512 after 7680, 32/8", ((512, 7680),)).with_tiles(kinds[:1] + kinds[5:7], splits=True),
        Case("chunk 128 after 1024, 32/8", ((128, 1024),)).with_tiles(kinds[:1] + kinds[5:7], splits=True),
        Case("16 prompts of 128, 32/8", ((128, 0),) * 16).with_tiles(kinds[:1] + kinds[5:7]),
        Case("prompt 4096, window 1024", ((4096, 0),), window=1024),
    ]
    for head_dim in (64, 80, 96, 256):
        others = [Tile(128, 128 if head_dim < 128 else 32, 8, 2), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)]
        found.append(Case(f"prompt 2048, head {head_dim}", ((2048, 0),), head_dim=head_dim).with_tiles(others))
    return found


def mixed() -> list[Case]:
    few, many = Tile(16, 64, 4, 3), Tile(64, 64, 4, 3)
    single = tuple(
        (Launch(Tile(rows, 64, 4, 3), splits),) for rows, splits in itertools.product((16, 32, 64), (1, 4, 16))
    )
    both = tuple(
        (Launch(few, a, max_rows=16), Launch(many, b, min_rows=17)) for a, b in itertools.product((2, 4, 8), (1, 2, 4))
    )
    return [
        Case("32 x 2048 and 512 after 0", ((1, 2047),) * 32 + ((512, 0),), variants=single + both),
        Case("64 x 1024 and 192 after 1000", ((1, 1023),) * 64 + ((192, 1000),), variants=single + both),
        Case("recorded: 400 of 512 after 0", ((400, 0),) + ((0, 0),) * 511, variants=single),
        Case("recorded: 100 x 1024 of 128", ((1, 1023),) * 100 + ((0, 0),) * 28, variants=single),
        Case("recorded: 60 after 4000 of 64", ((60, 4000),) + ((0, 0),) * 63, variants=single + both),
        Case("8 verify 5 at 2048", ((5, 2043),) * 8, variants=single),
        Case("1 verifies 8 at 2048", ((8, 2040),), variants=single),
    ]


def latent() -> list[Case]:
    found = []
    for num_heads, batch in ((16, 1), (16, 64), (128, 1), (128, 64)):
        name = f"latent {batch} x 2048, {num_heads} heads"
        case = Case(
            name, ((1, 2047),) * batch, (num_heads, 1), head_dim=576, value_dim=512, num_planes=1, block_size=64
        )
        rows = min(num_heads, 64)
        kinds = [Tile(rows, 32, 4, 2), Tile(rows, 32, 8, 2), Tile(rows, 64, 8, 2), Tile(min(rows, 32), 32, 8, 2)]
        found.append(case.with_tiles([*kinds, Tile(rows, 16, 8, 3)], splits=True))
    return found


def eight_bits() -> list[Case]:
    """Half the bytes: a tile of 128 keys has as many on their way as one of 64 in 16 bits."""
    few = [Tile(16, 64, 4, 4), Tile(16, 128, 4, 2), Tile(16, 128, 4, 3), Tile(16, 128, 8, 2), Tile(16, 32, 4, 4)]
    many = [Tile(128, 128, 8, 2), Tile(64, 64, 4, 3), Tile(64, 128, 4, 2)]
    found = []
    for name, kv_dtype in (("fp8", torch.float8_e4m3fn), ("int8", torch.int8)):
        case = Case(name, (), kv_dtype=kv_dtype)
        for batch, length, heads in ((1, 384, (64, 8)), (1, 4096, (32, 8)), (8, 4096, (32, 8)), (64, 1024, (64, 8))):
            one = replace(case, name=f"{name} {batch} x {length}, {heads[0]}/{heads[1]}", heads=heads)
            found.append(replace(one, chunks=((1, length - 1),) * batch).with_tiles(few, splits=batch == 1))
        prompt = replace(case, name=f"{name} prompt 2048, 32/8", chunks=((2048, 0),))
        found.append(prompt.with_tiles(many))
    return found


def rope_kv_write(bandwidth: float) -> None:
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


SECTIONS = {"decode": decode, "prefill": prefill, "mixed": mixed, "latent": latent, "eight_bits": eight_bits}

if __name__ == "__main__":
    main()
