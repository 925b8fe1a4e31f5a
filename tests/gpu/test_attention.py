"""Paged attention in tiles, against softmax written out in float64; what no row may see is NaN."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from slipstream.kernels.triton import attention as tiles  # noqa: E402 - conftest chooses the interpreter first
from tests.seed import SEED  # noqa: E402

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
IS_REAL = torch.cuda.is_available()
HALF = torch.bfloat16 if IS_REAL else torch.float16  # the interpreter multiplies the bits of a bfloat16

# (query rows, tokens in the cache before them) of each sequence
BATCHES = {
    "generation": [(1, 0), (1, 37), (1, 5)],
    "one long": [(1, 150)],
    "context": [(9, 0), (17, 0), (1, 0)],
    "mixed": [(9, 0), (1, 60), (0, 5), (11, 23), (1, 3), (2, 30)],
}
if IS_REAL:
    BATCHES |= {
        "much generation": [(1, 131 * i % 4000) for i in range(64)],
        "long context": [(1500, 0), (700, 3000)],
        "much of both": [(1, 5000), (513, 100), *[(1, 997 * i % 3000) for i in range(30)], (64, 0), (3, 777)],
    }


def make(
    device: torch.device,
    chunks: list[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 32,
    value_dim: int | None = None,
    num_planes: int = 2,
    block_size: int = 16,
    window: int = 0,
    soft_cap: float = 0.0,
    has_slopes: bool = False,
    has_sinks: bool = False,
    padding: int = 0,
    kv_dtype: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """The op's arguments. kv_dtype: of a cache in 8 bits, where what no row may see is 127.
    padding: rows and sequences added as a recorded step adds them; q is NaN there."""
    generator = torch.Generator().manual_seed(SEED)
    num_heads, num_kv_heads = heads
    kv_lens = [rows + past for rows, past in chunks]
    counts = [-(-length // block_size) for length in kv_lens]
    order = (torch.randperm(sum(counts) + 3, generator=generator) + 1).tolist()
    kv = torch.full((num_planes, len(order) + 1, block_size, num_kv_heads, head_dim), math.nan)
    tables = torch.zeros(len(chunks) + padding, max(counts) + 2, dtype=torch.int64)
    for sequence, ((_, past), length) in enumerate(zip(chunks, kv_lens, strict=True)):
        first = max(0, past + 1 - window) // block_size if window else 0
        for index in range(first, counts[sequence]):
            tables[sequence, index] = block = order.pop()
            used = min(block_size, length - index * block_size)
            kv[:, block, :used] = torch.randn(num_planes, used, num_kv_heads, head_dim, generator=generator)
    scales = None
    if kv_dtype is not None:
        kv = (kv * 40).clamp(-127, 127).round().nan_to_num(nan=127).to(device, kv_dtype)
        scales = (torch.rand(num_planes, num_kv_heads, generator=generator) / 50 + 0.02).to(device)
    num_rows = sum(rows for rows, _ in chunks)
    q = torch.randn(num_rows + padding, num_heads * head_dim + 24, generator=generator)
    q[num_rows:] = math.nan
    starts = [0, *torch.tensor([rows for rows, _ in chunks]).cumsum(0).tolist(), *[num_rows] * padding]
    return (
        q.to(device, dtype)[:, 16:-8],  # as a slice of a joined projection
        kv.to(device, kv_dtype or dtype),
        torch.tensor(starts, device=device),
        torch.tensor([*kv_lens, *[0] * padding], device=device),
        tables.to(device),
        torch.rand(num_heads, generator=generator).to(device) if has_slopes else None,
        torch.randn(num_heads, generator=generator).to(device, dtype) if has_sinks else None,
        scales,
        head_dim**-0.5,
        window,
        soft_cap,
        head_dim if value_dim is None else value_dim,
    )


def naive(
    q: Tensor, kv: Tensor, query_starts: Tensor, kv_lens: Tensor, tables: Tensor, slopes: Tensor | None,
    sinks: Tensor | None, kv_scales: Tensor | None, scale: float, window: int, soft_cap: float, value_dim: int,
) -> Tensor:  # fmt: skip
    num_kv_heads, head_dim = kv.shape[3:]
    block_size, num_heads = kv.shape[2], q.shape[1] // head_dim
    q_THD = q.double().unflatten(1, (num_heads, head_dim))
    out = q.new_zeros(len(q), num_heads, value_dim, dtype=torch.float64)
    for sequence, kv_len in enumerate(kv_lens.tolist()):
        rows = slice(*query_starts[sequence : sequence + 2].tolist())
        if rows.start == rows.stop:
            continue
        places = torch.arange(kv_len, device=q.device)
        found = kv[:, tables[sequence, places // block_size], places % block_size].double().nan_to_num()
        if kv_scales is not None:
            found = found * kv_scales.double()[:, None, :, None]
        found = found.repeat_interleave(num_heads // num_kv_heads, 2)
        scores = torch.einsum("qhd,khd->hqk", q_THD[rows], found[0]) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        distance = places[kv_len - (rows.stop - rows.start) :, None] - places
        if slopes is not None:
            scores -= slopes.double()[:, None, None] * distance
        scores.masked_fill_((distance < 0) | ((distance >= window) if window else False), -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, scores.shape[1], 1)], 2)
        probs = scores.softmax(2)[:, :, :kv_len]
        out[rows] = torch.einsum("hqk,khd->qhd", probs, found[-1, ..., :value_dim])
    return out.flatten(1)


def check(arguments: tuple[Any, ...], launches: tuple[tiles.Launch, ...] | None = None) -> None:
    q, starts = arguments[0], arguments[2]
    num_rows = int(starts[-1])
    poisoned = torch.full((len(q), len(q)), math.nan, device=q.device)  # what torch.empty may give next
    del poisoned
    actual = tiles.attention(*arguments, launches=launches)
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(actual[:num_rows].double(), naive(*arguments)[:num_rows], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("chunks", BATCHES.values(), ids=BATCHES)
def test_any_batch(device: torch.device, chunks: list[tuple[int, int]], dtype: torch.dtype) -> None:
    check(make(device, chunks, dtype=dtype))


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 20, "has_sinks": True},
        {"soft_cap": 2.0},
        {"has_slopes": True},
        {"window": 30, "soft_cap": 3.0, "has_slopes": True, "has_sinks": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_options(device: torch.device, options: dict[str, Any], num_splits: int) -> None:
    few = tiles.Launch(tiles.Tile(16, 32, 4, 2), num_splits, max_rows=16)
    many = tiles.Launch(tiles.Tile(64, 16, 4, 2), num_splits, min_rows=17)
    check(make(device, BATCHES["mixed"], **options), (few, many))
    check(make(device, BATCHES["generation"], **options), (tiles.Launch(few.tile, num_splits),))


@pytest.mark.parametrize("head_dim", [8, 48, 64, 80, 96, 128, 192, 256])
def test_head_sizes(device: torch.device, head_dim: int) -> None:
    check(make(device, [(3, 20), (1, 40)], head_dim=head_dim, dtype=HALF))


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1), (5, 1), (71, 1), (1, 1)], ids=str)
def test_groups(device: torch.device, heads: tuple[int, int]) -> None:
    check(make(device, BATCHES["generation"], heads=heads))
    check(make(device, [(5, 10), (1, 3)], heads=heads))


@pytest.mark.parametrize("block_size", [4, 16, 32, 64, 128])
def test_page_sizes(device: torch.device, block_size: int) -> None:
    check(make(device, BATCHES["generation"], block_size=block_size, window=70))
    check(make(device, [(6, 30), (9, 0)], block_size=block_size, dtype=HALF))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(576, 512), (80, 64), (24, 7), (8, 5)])
def test_latent_keys_are_values(device: torch.device, head_dim: int, value_dim: int) -> None:
    options = {"head_dim": head_dim, "value_dim": value_dim, "num_planes": 1, "heads": (16, 1)}
    check(make(device, BATCHES["generation"], **options, dtype=HALF))
    check(make(device, [(9, 20), (1, 3)], **options, dtype=HALF))


@pytest.mark.parametrize("kv_dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunks", BATCHES.values(), ids=BATCHES)
def test_a_cache_of_8_bits(
    device: torch.device, chunks: list[tuple[int, int]], dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    check(make(device, chunks, dtype=dtype, kv_dtype=kv_dtype))


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 30, "soft_cap": 3.0, "has_slopes": True, "has_sinks": True, "head_dim": 80},
        {"head_dim": 576, "value_dim": 512, "num_planes": 1, "heads": (16, 1)},
        {"head_dim": 24, "value_dim": 7, "num_planes": 1, "heads": (4, 1)},
    ],
    ids=["everything", "latent", "narrow latent"],
)
def test_a_cache_of_8_bits_with_options(device: torch.device, options: dict[str, Any], num_splits: int) -> None:
    tile = tiles.Tile(16, 32, 4, 2)
    for kv_dtype in (torch.float8_e4m3fn, torch.int8):
        arguments = make(device, BATCHES["mixed"], dtype=HALF, kv_dtype=kv_dtype, **options)
        check(arguments, (tiles.Launch(tile, num_splits),))


@pytest.mark.parametrize("chunks", BATCHES.values(), ids=BATCHES)
def test_padding_is_neither_read_nor_written(device: torch.device, chunks: list[tuple[int, int]]) -> None:
    check(make(device, chunks, padding=3))


def make_streaming(
    device: torch.device, chunks: list[tuple[int, int]], sink_tokens: int, window: int, **options: Any
) -> tuple[Tensor, int, tuple[Any, ...]]:
    """The query for sinks, how many these are, and attention's arguments; blocks that no row sees belong to others."""
    arguments = list(make(device, chunks, **options))
    arguments[9] = window
    q, kv, tables, block_size = arguments[0], arguments[1], arguments[4], arguments[1].shape[2]
    first = -(-sink_tokens // block_size)
    for sequence, (_, past) in enumerate(chunks):
        for index in range(first, max(first, (past + 1 - (window - sink_tokens)) // block_size)):
            kv[:, tables[sequence, index]] = math.nan if kv.dtype.is_floating_point else 127
            tables[sequence, index] = 0
    return torch.randn(q.shape, device=device).to(q.dtype), sink_tokens, tuple(arguments)


def naive_streaming(sink_q: Tensor, sink_tokens: int, arguments: tuple[Any, ...]) -> Tensor:
    """Row by row."""
    q, kv, query_starts, kv_lens, tables, _, _, kv_scales, scale, window, soft_cap, value_dim = arguments
    (_, _, block_size, num_kv_heads, head_dim), num_heads = kv.shape, q.shape[1] // kv.shape[4]
    out = q.new_zeros(len(q), num_heads, value_dim, dtype=torch.float64)
    for sequence, kv_len in enumerate(kv_lens.tolist()):
        first, end = query_starts[sequence : sequence + 2].tolist()
        for row in range(first, end):
            places = torch.arange(kv_len - (end - row) + 1, device=q.device)
            places = places[(places < sink_tokens) | (places >= len(places) - (window - sink_tokens))]
            found = kv[:, tables[sequence, places // block_size], places % block_size].double()
            found = found if kv_scales is None else found * kv_scales.double()[:, None, :, None]
            k_LHD, v_LHD = found.repeat_interleave(num_heads // num_kv_heads, 2)
            as_it_is, for_sinks = (
                torch.einsum("hd,lhd->lh", each[row].double().view(num_heads, head_dim), k_LHD) for each in (q, sink_q)
            )
            scores = torch.where((places < sink_tokens)[:, None], for_sinks, as_it_is) * scale
            if soft_cap:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            out[row] = torch.einsum("lh,lhd->hd", scores.softmax(0), v_LHD[..., :value_dim])
    return out.flatten(1)


@pytest.mark.parametrize(
    "options",
    [
        {"window": 20, "sink_tokens": 4},
        {"window": 70, "sink_tokens": 37, "soft_cap": 2.0, "head_dim": 48},
        {"window": 5, "sink_tokens": 4, "kv_dtype": torch.int8, "dtype": HALF},
        {"window": 40, "sink_tokens": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("name", "num_splits"), [("mixed", 1), ("mixed", 3), ("one long", 3)])
def test_sinks_and_newest_tokens(device: torch.device, name: str, options: dict[str, Any], num_splits: int) -> None:
    few = tiles.Launch(tiles.Tile(16, 32, 4, 2), num_splits, max_rows=16)
    many = tiles.Launch(tiles.Tile(64, 16, 4, 2), num_splits, min_rows=17)
    sink_q, sink_tokens, arguments = make_streaming(device, BATCHES[name], **options)
    launches = (tiles.Launch(few.tile, num_splits),) if name != "mixed" else (few, many)
    actual = tiles.attention(*arguments, launches=launches, sink_q_TX=sink_q, sink_tokens=sink_tokens)
    expected = naive_streaming(sink_q, sink_tokens, arguments)
    tolerance = TOLERANCE[arguments[0].dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def tree_of(device: torch.device, arguments: tuple[Any, ...], chunks: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    """A random tree at the end of each chunk: positions, roots, masks."""
    generator = torch.Generator().manual_seed(SEED)
    num_words = 1 + max(rows for rows, _ in chunks) // 64
    positions, masks, roots = list[int](), list[list[int]](), list[int]()
    for rows, past in chunks:
        num_nodes = int(torch.randint(1, rows + 1, (), generator=generator)) if rows else 0
        roots.append(past + rows - num_nodes)
        positions += range(past, roots[-1])
        masks += [[-1] * num_words] * (roots[-1] - past)
        above: list[set[int]] = []
        for node in range(num_nodes):
            above.append({node} | (above[int(torch.randint(node, (), generator=generator))] if node else set()))
            positions.append(roots[-1] + len(above[-1]) - 1)
            words = [sum(1 << n % 64 for n in above[-1] if n // 64 == word) for word in range(num_words)]
            masks.append([word - (1 << 64 if word >> 63 else 0) for word in words])
    padding = len(arguments[0]) - len(positions)
    tree = [*positions, *[0] * padding], [*roots, *[0] * padding], [*masks, *[[0] * num_words] * padding]
    return tuple(torch.tensor(each, device=device) for each in tree)


def naive_tree(arguments: tuple[Any, ...], tree: tuple[Tensor, ...]) -> Tensor:
    """Row by row, each as the last one of the text on its way down."""
    q, kv, query_starts, kv_lens, tables, *rest = arguments
    (_, roots, masks), block_size, out = tree, kv.shape[2], []
    for sequence, kv_len in enumerate(kv_lens.tolist()):
        first, end = query_starts[sequence : sequence + 2].tolist()
        root = int(roots[sequence])
        for row in range(first, end):
            place = kv_len - (end - row)
            nodes = [n for n in range(place - root + 1) if int(masks[row, n // 64]) >> n % 64 & 1]
            way = torch.tensor([*range(min(root, place + 1)), *(root + node for node in nodes)], device=q.device)
            cells = kv[:, tables[sequence, way // block_size], way % block_size]
            own = cells.new_zeros(len(kv), -(-len(way) // block_size), block_size, *kv.shape[3:])
            own.flatten(1, 2)[:, : len(way)] = cells
            step = torch.tensor([0, 1]), torch.tensor([len(way)]), torch.arange(own.shape[1], device=q.device)[None]
            out.append(naive(q[row : row + 1], own, *step, *rest))
    return torch.cat(out)


@pytest.mark.parametrize(
    ("options", "num_splits"),
    [
        ({}, 3),
        ({"window": 7, "has_sinks": True}, 1),
        ({"window": 30, "soft_cap": 3.0, "has_slopes": True, "has_sinks": True, "padding": 2}, 3),
        ({"head_dim": 24, "value_dim": 7, "num_planes": 1, "dtype": HALF}, 1),
    ],
    ids=str,
)
def test_rows_of_a_tree_see_their_own_past(device: torch.device, options: dict[str, Any], num_splits: int) -> None:
    few = tiles.Launch(tiles.Tile(16, 32, 4, 2), num_splits, max_rows=16)
    many = tiles.Launch(tiles.Tile(64, 16, 4, 2), num_splits, min_rows=17)
    chunks = [(9, 0), (1, 30), (0, 5), (70, 23)]
    arguments = make(device, chunks, heads=(2, 1), **options)
    tree = tree_of(device, arguments, chunks)
    tolerance, num_rows = TOLERANCE[arguments[0].dtype], int(arguments[2][-1])
    for launches in ((few, many), (tiles.Launch(few.tile, num_splits),)):
        actual = tiles.attention(*arguments, launches=launches, tree=tree)[:num_rows]
        torch.testing.assert_close(actual.double(), naive_tree(arguments, tree), rtol=tolerance, atol=tolerance)


def test_rows_of_very_small_scores(device: torch.device) -> None:
    """A tile whose keys a row does not see leaves no trace of a score of 0 in its softmax."""
    arguments = list(make(device, [(40, 60)], window=3))
    arguments[0] = -20 * torch.ones_like(arguments[0])
    arguments[1] = arguments[1].nan_to_num().abs() + 1
    check(tuple(arguments), (tiles.Launch(tiles.Tile(64, 16, 4, 2), 1),))


@pytest.mark.parametrize("whole_keys", [0, 48, 512])
def test_short_pasts_are_not_split(device: torch.device, whole_keys: int) -> None:
    arguments = make(device, [(3, 20), (1, 47), (1, 48), (2, 150)])
    check(arguments, (tiles.Launch(tiles.Tile(16, 16, 4, 2), 4, whole_keys=whole_keys),))


def test_no_tokens(device: torch.device) -> None:
    arguments = make(device, [(0, 5)])
    assert tiles.attention(*arguments).shape == (0, 128)


def test_a_plan_depends_on_shapes_and_fills_the_device() -> None:
    def plan(
        num_tokens: int,
        num_sequences: int,
        max_keys: int = 8192,
        shared_bytes: int = 227 << 10,
        has_trees: bool = False,
    ) -> tuple[tiles.Launch, ...]:
        return tiles.plan(num_tokens, num_sequences, 8, 4, max_keys, 128, 2, 132, shared_bytes, has_trees)

    (one,) = plan(1, 1)
    assert one.num_splits > 8
    assert plan(1, 1, tiles.WHOLE)[0].num_splits == 1
    assert plan(1, 1, shared_bytes=163 << 10)[0].tile.num_stages < one.tile.num_stages
    assert plan(64, 64)[0].tile.keys < one.tile.keys
    assert plan(512, 512)[0].num_splits == 1
    (prompt,) = plan(2048, 1)
    assert prompt.num_splits == 1
    for verified in (plan(16, 1, 4096), plan(16, 1, 4096, has_trees=True), plan(200, 8, 4096, has_trees=True)):
        assert len(verified) == 1 and verified[0].tile.rows == 16
    few, many = plan(2048, 64)
    assert few.max_rows + 1 == many.min_rows
    assert replace(few, num_splits=1) == replace(plan(256, 64)[0], num_splits=1)


def test_a_recorded_step_has_sequences_to_spare(device: torch.device) -> None:
    """As many as tokens, and more than are looked through at once; a prompt and generation rows among them."""
    arguments = list(make(device, [(1, 9), (30, 0), (0, 3), (1, 2), (40, 5)], padding=0))
    spare = 300 if IS_REAL else 256
    num_sequences = len(arguments[3])
    arguments[2] = torch.cat([arguments[2], arguments[2][-1:].expand(spare)])
    arguments[3] = torch.cat([arguments[3], arguments[3].new_zeros(spare)])
    arguments[4] = torch.cat([arguments[4], arguments[4].new_zeros(spare, arguments[4].shape[1])])
    few, many = tiles.Tile(16, 32, 4, 2), tiles.Tile(64, 32, 4, 2)
    check(tuple(arguments), (tiles.Launch(few, 1, max_rows=16), tiles.Launch(many, 2, min_rows=17)))
    assert len(arguments[3]) == num_sequences + spare


@pytest.mark.skipif(not IS_REAL, reason="needs a GPU")
def test_a_recorded_call_serves_other_lengths(device: torch.device) -> None:
    first = make(device, [(1, 900), (1, 3), (1, 2000)], dtype=HALF)
    second = make(device, [(1, 17), (1, 2000), (0, 0)], dtype=HALF)
    tiles.attention(*first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = tiles.attention(*first)
    q, kv, starts, lens, tables, *_ = second
    first[0][:2], first[2][:], first[3][:] = q[:2], starts, lens
    first[1][:, : kv.shape[1]] = kv
    first[4][:, : tables.shape[1]] = tables
    graph.replay()
    torch.testing.assert_close(out[:2].double(), naive(*second)[:2], rtol=3e-2, atol=3e-2)
