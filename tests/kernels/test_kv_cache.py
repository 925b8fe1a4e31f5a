"""KV caches in fewer bits: what is written is the nearest number of the format, and what is read is what was written.

Attention over such a cache is held against attention over a cache of the same numbers in float64, which test_ops.py
holds against softmax written out.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.kernels.registry import known_ops
from tests.seed import SEED

CPU = torch.device("cpu")
FORMATS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
every_format = pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
KV_HEADS, HEAD_DIM, BLOCK_SIZE, NUM_BLOCKS = 2, 8, 4, 9
CHUNKS = [(5, 0), (1, 12), (4, 5), (0, 3), (1, 3)]  # query rows, tokens before them
ONE_EACH = [(1, 6), (1, 0), (1, 3)]


def all_numbers(dtype: torch.dtype) -> Tensor:
    """Every finite number of a format, in order."""
    if dtype == torch.int8:
        return torch.arange(-127, 128).double()
    bits = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return bits[bits.isfinite()].sort().values


def nearest(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """By trying all: the number of the format, times scale, that is nearest."""
    grid = all_numbers(dtype)
    return grid[(x.double()[..., None] / scale.double()[..., None] - grid).abs().argmin(-1)] * scale.double()


def write(name: str, function: Any, num_planes: int, dtype: torch.dtype, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """(what the cache holds at the slots written [P, T, K, D], what it was given), in float64."""
    generator = torch.Generator().manual_seed(SEED)
    k, v = torch.randn(2, 7, KV_HEADS * HEAD_DIM, generator=generator).to(kind)
    k[0, 0], v[1, 1] = 6e4, -6e4  # beyond what any format holds
    kv = torch.full((num_planes, NUM_BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM), 7).to(dtype)
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=generator)[:7]
    scales = torch.rand(num_planes, KV_HEADS, generator=generator) / 50 + 0.01
    if name == "kv_write":
        function(k, v if num_planes == 2 else None, kv, slots, scales)
    else:
        cos, sin = torch.ones(7, HEAD_DIM // 2), torch.zeros(7, HEAD_DIM // 2)
        function(torch.randn(7, 32).to(kind), k, v, cos, sin, kv, slots, scales)
    others = [slot for slot in range(NUM_BLOCKS * BLOCK_SIZE) if slot not in slots.tolist()]
    stored = kv.flatten(1, 2).double()
    assert (stored[:, others] == 7).all(), "a slot that nobody wrote to was changed"
    found = stored[:, slots] * scales.double()[:, None, :, None]
    given = torch.stack([k, v])[:num_planes].unflatten(2, (KV_HEADS, HEAD_DIM))
    return found, nearest(given, scales[:, None, :, None].expand(given.shape), dtype)


@every_format
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "num_planes"), [("kv_write", 2), ("kv_write", 1), ("rope_kv_write", 2)])
def test_the_nearest_number_is_stored(name: str, num_planes: int, dtype: torch.dtype, kind: torch.dtype) -> None:
    for kernel in known_ops()[name].candidates(CPU, kind).values():
        found, expected = write(name, kernel.function, num_planes, dtype, kind)
        # Where two are as near, in float32 either may be: they differ by one step.
        is_close = (found - expected).abs() <= expected.abs() / 8 + 0.03
        assert is_close.all()
        assert (found == expected).double().mean() > 0.97


def paged(dtype: torch.dtype, chunks: list[tuple[int, int]], num_planes: int = 2) -> tuple[Any, ...]:
    """(kv, its step tensors, scales); blocks that nobody has hold NaN, or the largest number."""
    generator = torch.Generator().manual_seed(SEED)
    lens = [rows + past for rows, past in chunks]
    counts = [-(-length // BLOCK_SIZE) for length in lens]
    order = (torch.randperm(sum(counts) + 2, generator=generator) + 1).tolist()
    kv = torch.full((num_planes, len(order) + 1, BLOCK_SIZE, KV_HEADS, HEAD_DIM), math.nan)
    tables = torch.zeros(len(chunks), max(counts) + 1, dtype=torch.int64)
    for sequence, count in enumerate(counts):
        for index in range(count):
            tables[sequence, index] = block = order.pop()
            used = min(BLOCK_SIZE, lens[sequence] - index * BLOCK_SIZE)
            kv[:, block, :used] = torch.randn(kv[:, block, :used].shape, generator=generator) * 60
    stored = kv.nan_to_num(nan=127).round().to(dtype) if dtype == torch.int8 else kv.to(dtype)
    starts = torch.tensor([0, *torch.tensor([rows for rows, _ in chunks]).cumsum(0).tolist()])
    scales = torch.rand(num_planes, KV_HEADS, generator=generator) / 50 + 0.01
    return stored, starts, torch.tensor(lens), tables, scales


@every_format
@pytest.mark.parametrize("chunks", [CHUNKS, ONE_EACH], ids=["all kinds", "generation"])
@pytest.mark.parametrize(
    ("options", "num_planes"),
    [({}, 2), ({"window": 5}, 2), ({"soft_cap": 2.0, "slopes": True, "sinks": True}, 2), ({"value_dim": 5}, 1)],
    ids=["plain", "window", "everything", "latent"],
)
def test_attention_reads_what_the_numbers_mean(
    options: dict[str, Any], num_planes: int, chunks: list[tuple[int, int]], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(SEED)
    kv, starts, lens, tables, scales = paged(dtype, chunks, num_planes)
    q = torch.randn(int(starts[-1]), 4 * HEAD_DIM, generator=generator)
    slopes, sinks = (torch.rand(4) if options.get(name) else None for name in ("slopes", "sinks"))
    numbers = (0.3, options.get("window", 0), options.get("soft_cap", 0.0), options.get("value_dim", HEAD_DIM))
    exact = kv.double() * scales.double()[:, None, None, :, None]
    op = known_ops()["attention"]
    expected = op.reference(q.double(), exact, starts, lens, tables, slopes, sinks, None, *numbers)
    for kernel in op.candidates(CPU, torch.float32).values():
        actual = kernel.function(q, kv, starts, lens, tables, slopes, sinks, scales, *numbers)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@every_format
def test_streaming_attention_reads_what_the_numbers_mean(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(SEED)
    kv, starts, lens, tables, scales = paged(dtype, CHUNKS)
    q, sink_q = torch.randn(2, int(starts[-1]), 4 * HEAD_DIM, generator=generator)
    exact, numbers = kv.double() * scales.double()[:, None, None, :, None], (0.3, 6, 0.0, HEAD_DIM, 2)
    op = known_ops()["streaming_attention"]
    expected = op.reference(q.double(), sink_q.double(), exact, starts, lens, tables, None, *numbers)
    actual = op.reference(q, sink_q, kv, starts, lens, tables, scales, *numbers)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["kv_write", "rope_kv_write"])
def test_float32_is_stored_as_the_nearest_bfloat16(name: str) -> None:
    """NaN and infinity stay, and ties go to even: where a number is written is test_ops.py's."""
    bits = torch.randint(-(2**31), 2**31, (64, KV_HEADS * HEAD_DIM), generator=torch.Generator().manual_seed(SEED))
    ties = bits[:8] & ~0xFFFF | 0x8000
    x = torch.cat([bits, ties]).to(torch.int32).view(torch.float32)
    x[0, :4] = torch.tensor([math.inf, -math.inf, math.nan, -0.0])
    unturned = torch.ones(len(x), HEAD_DIM // 2), torch.zeros(len(x), HEAD_DIM // 2)
    numbers = x.where(x.isfinite() | (torch.tensor(name == "kv_write")), 1.0)  # 0 · inf is NaN when it is turned
    for kernel in known_ops()[name].candidates(CPU, torch.float32).values():
        kv = torch.zeros(2, 20, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
        query = (torch.ones(len(x), 32),) if name == "rope_kv_write" else ()
        angles = unturned if name == "rope_kv_write" else ()
        kernel.function(*query, numbers, numbers, *angles, kv, torch.arange(len(x)), None)
        stored = kv.flatten(1, 2)[:, : len(x)].flatten(2)
        torch.testing.assert_close(stored, numbers.bfloat16().expand(2, -1, -1), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["kv_write", "rope_kv_write"])
def test_float32_is_stored_as_the_nearest_float16(name: str) -> None:
    """NaN stays, and what is larger than any float16 is stored as the largest."""
    x = (
        torch.randn(64, KV_HEADS * HEAD_DIM, generator=torch.Generator().manual_seed(SEED))
        * 10.0 ** torch.arange(-9, 7).repeat(KV_HEADS * HEAD_DIM // 16 + 1)[: KV_HEADS * HEAD_DIM]
    )
    x[0, :4] = torch.tensor([1e30, -1e30, 65519.9, -0.0])
    x[1] = 1 + 2.0**-11 * torch.arange(x.shape[1])  # ties
    if name == "kv_write":
        x[0, 4] = math.nan
    unturned = torch.ones(len(x), HEAD_DIM // 2), torch.zeros(len(x), HEAD_DIM // 2)
    for kernel in known_ops()[name].candidates(CPU, torch.float32).values():
        kv = torch.zeros(2, 20, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=torch.float16)
        query = (torch.ones(len(x), 32),) if name == "rope_kv_write" else ()
        angles = unturned if name == "rope_kv_write" else ()
        kernel.function(*query, x, x, *angles, kv, torch.arange(len(x)), None)
        stored = kv.flatten(1, 2)[:, : len(x)].flatten(2)
        expected = x.clamp(-65504, 65504).half().expand(2, -1, -1)
        torch.testing.assert_close(stored, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["attention", "streaming_attention"])
@pytest.mark.parametrize("chunks", [CHUNKS, ONE_EACH], ids=["all kinds", "generation"])
def test_float32_queries_meet_a_cache_in_16_bits(op: str, chunks: list[tuple[int, int]], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(SEED)
    wide, starts, lens, tables, _ = paged(torch.float32, chunks)
    kv = (wide / 60).to(dtype)
    q, sink_q = torch.randn(2, int(starts[-1]), 4 * HEAD_DIM, generator=generator)
    rest = (starts, lens, tables)
    exact: tuple[Any, ...]
    if op == "attention":
        given = q, kv, *rest, torch.rand(4), torch.rand(4), None, 0.3, 5, 2.0, HEAD_DIM
    else:
        given = q, sink_q, kv, *rest, None, 0.3, 6, 0.0, HEAD_DIM, 2
    exact = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given)
    expected = known_ops()[op].reference(*exact)
    for kernel in known_ops()[op].candidates(CPU, torch.float32).values():
        torch.testing.assert_close(kernel.function(*given).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_cache_wider_than_its_queries_is_refused() -> None:
    kv, starts, lens, tables, _ = paged(torch.float32, ONE_EACH)
    q = torch.ones(3, 4 * HEAD_DIM, dtype=torch.bfloat16)
    for each in (kv, kv.half()):
        with pytest.raises(ValueError, match=r"kv must be torch.bfloat16, or a narrower"):
            known_ops()["attention"].shapes(q, each, starts, lens, tables, None, None, None, 1.0, 0, 0.0, HEAD_DIM)


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        (torch.int8, None),
        (torch.float8_e4m3fn, None),
        (torch.float32, torch.ones(2, KV_HEADS)),
        (torch.int8, torch.ones(2, KV_HEADS + 1)),
        (torch.int8, torch.ones(1, KV_HEADS)),
        (torch.int8, torch.ones(2, KV_HEADS, dtype=torch.float16)),
    ],
)
def test_scales_that_do_not_fit_the_cache_are_refused(dtype: torch.dtype, scales: Tensor | None) -> None:
    kv, starts, lens, tables, _ = paged(torch.float8_e4m3fn, ONE_EACH)
    kv, rows = kv.float().to(dtype), torch.ones(3, KV_HEADS * HEAD_DIM)
    with pytest.raises(ValueError, match=r"kv_scales must be|must have kv_scales"):
        known_ops()["kv_write"].shapes(rows, rows, kv, lens, scales)
    with pytest.raises(ValueError, match=r"kv_scales must be|must have kv_scales"):
        known_ops()["attention"].shapes(rows, kv, starts, lens, tables, None, None, scales, 1.0, 0, 0.0, HEAD_DIM)
