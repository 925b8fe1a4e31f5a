"""Every op against a float64 computation written naively here: the reference, and each candidate that runs on a CPU.

The runner walks the registry, so an op or kernel that is added is tested; an op without an entry in CASES fails.
The seed of the random numbers (tests/seed.py) is in the id.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import slipstream.kernels  # noqa: F401 - registers the ops
from slipstream.kernels.linear import w4a16
from slipstream.kernels.registry import Op, known_ops
from slipstream.schema.format import INTEGERS_OF_4_BITS, PACKED_DTYPES, QUANTIZES_ACTIVATIONS
from tests.seed import SEED

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
# Activations computed in float32 are rounded to 8 bits inside these: near a tie, the other way than in float64.
ONE_STEP = {"experts_w8a8": 3e-2, "experts_fp8": 1e-1}
NUM_TOKENS = (0, 1, 2, 7, 33)
BLOCK_SIZE = 4


@dataclass(frozen=True)
class Case:
    inputs: Callable[[torch.Generator, int], tuple[Any, ...]]  # random arguments for T tokens, in float32
    expected: Callable[..., Any]  # the same arguments in float64 → the outputs; it mutates what the op mutates


def numbers(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def whole(generator: torch.Generator, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=generator)


# ----- attention metadata


def chunks_of(num_tokens: int) -> list[tuple[int, int]]:
    """(query rows, tokens already in the cache) of sequences that make up T tokens, of all kinds."""
    kinds, chunks = [(1, 5), (3, 0), (1, 0), (4, 6), (1, 16), (0, 3), (5, 0)], []
    while num_tokens:
        rows, past = kinds[len(chunks) % len(kinds)]
        chunks.append((min(rows, num_tokens), past))
        num_tokens -= min(rows, num_tokens)
    return chunks


def paged(
    generator: torch.Generator,
    chunks: list[tuple[int, int]],
    num_kv_heads: int,
    head_dim: int,
    poison: float = math.nan,
) -> dict[str, Tensor]:
    """A cache in which everything that no sequence owns is poison, and the metadata to attend to the rest.

    Blocks are in random order and tables are padded with block 0, which holds poison alone.
    """
    kv_lens = [rows + past for rows, past in chunks]
    counts = [-(-length // BLOCK_SIZE) for length in kv_lens]
    order = (torch.randperm(sum(counts) + 3, generator=generator) + 1).tolist()
    kv = torch.full((2, len(order) + 1, BLOCK_SIZE, num_kv_heads, head_dim), poison)
    tables = torch.zeros(len(chunks), max(counts, default=0) + 2, dtype=torch.int64)
    slots: list[int] = []
    for sequence, ((_, past), length, count) in enumerate(zip(chunks, kv_lens, counts, strict=True)):
        blocks = [order.pop() for _ in range(count)]
        tables[sequence, :count] = torch.tensor(blocks, dtype=torch.int64)
        owned = [blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(length)]
        kv.flatten(1, 2)[:, owned] = numbers(generator, 2, length, num_kv_heads, head_dim)
        slots += owned[past:]
    starts = torch.tensor([0, *(rows for rows, _ in chunks)]).cumsum(0)
    return {
        "kv": kv,
        "slots": torch.tensor(slots, dtype=torch.int64),
        "query_starts": starts,
        "kv_lens": torch.tensor(kv_lens, dtype=torch.int64),
        "block_tables": tables,
    }


def attention_inputs(
    generator: torch.Generator,
    chunks: list[tuple[int, int]],
    heads: tuple[int, int] = (4, 2),
    poison: float = math.nan,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
    is_latent: bool = False,
    has_slopes: bool = False,
    has_sinks: bool = False,
    head_dim: int = 8,
) -> tuple[Any, ...]:
    num_heads, num_kv_heads = heads
    step = paged(generator, chunks, num_kv_heads, head_dim, poison)
    if window:
        forget_unseen(step, chunks, window, poison)
    q = numbers(generator, sum(rows for rows, _ in chunks), num_heads * head_dim)
    slopes = torch.rand(num_heads, generator=generator) if has_slopes else None
    sinks = numbers(generator, num_heads) if has_sinks else None
    kv = step["kv"][:1].clone() if is_latent else step["kv"]
    value_dim = 5 if is_latent else head_dim
    scale = head_dim**-0.5
    metadata = step["query_starts"], step["kv_lens"], step["block_tables"]
    return q, kv, *metadata, slopes, sinks, None, scale, window, soft_cap, value_dim


def forget_unseen(step: dict[str, Tensor], chunks: list[tuple[int, int]], window: int, poison: float) -> None:
    """Blocks before every row's window belong to others now: poison them, and point their table entries at block 0."""
    for sequence, (_, past) in enumerate(chunks):
        for index in range(max(0, past + 1 - window) // BLOCK_SIZE):
            step["kv"][:, step["block_tables"][sequence, index]] = poison
            step["block_tables"][sequence, index] = 0


def naive_attention(
    q_TX: Tensor,
    kv: Tensor,
    query_starts: Tensor,
    kv_lens: Tensor,
    tables: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    kv_scales: None,  # tests/kernels/test_kv_cache.py
    scale: float,
    window: int,
    soft_cap: float,
    value_dim: int,
) -> Tensor:
    num_kv_heads, head_dim = kv.shape[3:]
    num_heads = q_TX.shape[1] // head_dim
    out = torch.zeros(len(q_TX), num_heads * value_dim, dtype=q_TX.dtype)
    for sequence, kv_len in enumerate(kv_lens.tolist()):
        first, end = query_starts[sequence : sequence + 2].tolist()
        for row in range(first, end):
            visible = kv_len - (end - row) + 1
            seen = range(max(0, visible - window) if window else 0, visible)
            places = [(int(tables[sequence, p // BLOCK_SIZE]), p % BLOCK_SIZE) for p in seen]
            for head in range(num_heads):
                kv_head = head * num_kv_heads // num_heads
                column = slice(head * head_dim, (head + 1) * head_dim)
                keys = torch.stack([kv[0, block, offset, kv_head] for block, offset in places])
                values = torch.stack([kv[-1, block, offset, kv_head, :value_dim] for block, offset in places])
                scores = keys @ q_TX[row, column] * scale
                if soft_cap:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                if slopes is not None:
                    scores = scores + slopes[head] * (torch.tensor(list(seen)) - (visible - 1))
                weights = scores.exp()
                total = weights.sum() + (0 if sinks is None else sinks[head].exp())
                out[row, head * value_dim : (head + 1) * value_dim] = weights / total @ values
    return out


def tree_inputs(generator: torch.Generator, chunks: list[tuple[int, int]], **options: Any) -> tuple[Any, ...]:
    """As attention's; the last rows of each chunk are a tree, of one node or more, of any shape."""
    q, kv, *metadata, slopes, sinks, scales, scale, window, soft_cap, value_dim = attention_inputs(
        generator, chunks, **options
    )
    positions: list[int] = []
    masks: list[list[int]] = []
    roots = []
    num_words = -(-max([rows for rows, _ in chunks], default=1) // 64) or 1
    for rows, past in chunks:
        num_nodes = int(whole(generator, rows, 1)) + 1 if rows else 0
        root = past + rows - num_nodes
        roots.append(root)
        positions += range(past, root)
        masks += [[-1] * num_words] * (root - past)
        above: list[set[int]] = []
        for node in range(num_nodes):
            above.append({node} if not node else above[int(whole(generator, node, 1))] | {node})
            positions.append(root + len(above[-1]) - 1)
            bits = [[64 * word + bit in above[-1] for bit in range(64)] for word in range(num_words)]
            masks.append([sum(1 << bit for bit in range(63) if word[bit]) - (word[63] << 63) for word in bits])
    tree = torch.tensor(positions, dtype=torch.int64), torch.tensor(roots, dtype=torch.int64)
    masks_TW = torch.tensor(masks, dtype=torch.int64).view(-1, num_words)
    return q, kv, *metadata, *tree, masks_TW, slopes, sinks, scales, scale, window, soft_cap, value_dim


def naive_tree_attention(
    q_TX: Tensor,
    kv: Tensor,
    query_starts: Tensor,
    kv_lens: Tensor,
    tables: Tensor,
    positions: Tensor,
    tree_starts: Tensor,
    tree_masks: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    kv_scales: None,
    scale: float,
    window: int,
    soft_cap: float,
    value_dim: int,
) -> Tensor:
    """Each row alone, as the last one of the text on its way down: in blocks of its own."""
    head_dim, out = kv.shape[4], []
    for sequence, kv_len in enumerate(kv_lens.tolist()):
        first, end = query_starts[sequence : sequence + 2].tolist()
        root = int(tree_starts[sequence])
        for row in range(first, end):
            place = kv_len - (end - row)
            nodes = [n for n in range(place - root + 1) if int(tree_masks[row, n // 64]) >> n % 64 & 1]
            way = [*range(min(root, place + 1)), *(root + node for node in nodes)]
            assert len(way) == positions[row] + 1
            cells = torch.stack([kv[:, int(tables[sequence, p // BLOCK_SIZE]), p % BLOCK_SIZE] for p in way], 1)
            own = cells.new_zeros(len(kv), -(-len(way) // BLOCK_SIZE), BLOCK_SIZE, *kv.shape[3:])
            own.flatten(1, 2)[:, : len(way)] = cells
            step = torch.tensor([0, 1]), torch.tensor([len(way)]), torch.arange(own.shape[1])[None]
            rest = (slopes, sinks, kv_scales, scale, window, soft_cap, value_dim)
            out.append(naive_attention(q_TX[row : row + 1], own, *step, *rest))
    return torch.cat(out) if out else q_TX.new_zeros(0, q_TX.shape[1] // head_dim * value_dim)


def streaming_inputs(
    generator: torch.Generator, chunks: list[tuple[int, int]], *, window: int = 6, sinks: int = 2, soft_cap: float = 0.0
) -> tuple[Any, ...]:
    """As attention's; blocks between the sinks and the newest tokens belong to others now."""
    step, num_heads, head_dim = paged(generator, chunks, 2, 8), 4, 8
    for sequence, (_, past) in enumerate(chunks):
        for index in range(-(-sinks // BLOCK_SIZE), max(0, past + 1 - (window - sinks)) // BLOCK_SIZE):
            step["kv"][:, step["block_tables"][sequence, index]] = math.nan
            step["block_tables"][sequence, index] = 0
    q, sink_q = (numbers(generator, sum(rows for rows, _ in chunks), num_heads * head_dim) for _ in range(2))
    metadata = step["query_starts"], step["kv_lens"], step["block_tables"]
    return q, sink_q, step["kv"], *metadata, None, head_dim**-0.5, window, soft_cap, head_dim, sinks


def naive_streaming_attention(
    q_TX: Tensor,
    sink_q_TX: Tensor,
    kv: Tensor,
    query_starts: Tensor,
    kv_lens: Tensor,
    tables: Tensor,
    kv_scales: None,
    scale: float,
    window: int,
    soft_cap: float,
    value_dim: int,
    sink_tokens: int,
) -> Tensor:
    num_kv_heads, head_dim = kv.shape[3:]
    num_heads = q_TX.shape[1] // head_dim
    out = torch.zeros(len(q_TX), num_heads * value_dim, dtype=q_TX.dtype)
    for sequence, kv_len in enumerate(kv_lens.tolist()):
        first, end = query_starts[sequence : sequence + 2].tolist()
        for row in range(first, end):
            visible = kv_len - (end - row) + 1
            seen = [p for p in range(visible) if p < sink_tokens or p >= visible - (window - sink_tokens)]
            for head in range(num_heads):
                kv_head = head * num_kv_heads // num_heads
                column = slice(head * head_dim, (head + 1) * head_dim)
                cells = [kv[:, int(tables[sequence, p // BLOCK_SIZE]), p % BLOCK_SIZE, kv_head] for p in seen]
                queries = [(sink_q_TX if p < sink_tokens else q_TX)[row, column] for p in seen]
                scores = torch.stack([q @ cell[0] for q, cell in zip(queries, cells, strict=True)]) * scale
                if soft_cap:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                values = torch.stack([cell[-1, :value_dim] for cell in cells])
                out[row, head * value_dim : (head + 1) * value_dim] = scores.softmax(0) @ values
    return out


def rope_inputs(generator: torch.Generator, num_tokens: int) -> tuple[Any, ...]:
    angles = numbers(generator, num_tokens, 4)
    return angles.cos(), angles.sin()


def naive_rope(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """Each pair (i, i + half) of a head as a complex number, turned; what is beyond the pairs stays."""
    half = cos.shape[1]
    out = x.clone()
    for start in range(0, x.shape[1], head_dim):
        pairs = torch.complex(
            x[:, start : start + half].contiguous(), x[:, start + half : start + 2 * half].contiguous()
        )
        turned = pairs * torch.complex(cos, sin)
        out[:, start : start + half], out[:, start + half : start + 2 * half] = turned.real, turned.imag
    return out


def naive_kv_write(k: Tensor, v: Tensor, kv: Tensor, slots: Tensor, kv_scales: None) -> None:
    for token, slot in enumerate(slots.tolist()):
        for part, x in enumerate((k, v)):
            kv[part, slot // BLOCK_SIZE, slot % BLOCK_SIZE] = x[token].view(kv.shape[3:])


def naive_rope_kv_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv: Tensor, slots: Tensor, kv_scales: None
) -> Tensor:
    naive_kv_write(naive_rope(k, cos, sin, 8), v, kv, slots, kv_scales)
    return naive_rope(q, cos, sin, 8)


def kv_write_inputs(generator: torch.Generator, num_tokens: int) -> tuple[Any, ...]:
    step = paged(generator, chunks_of(num_tokens), 2, 8, poison=7.0)
    return numbers(generator, num_tokens, 16), numbers(generator, num_tokens, 16), step["kv"], step["slots"], None


def rope_kv_write_inputs(generator: torch.Generator, num_tokens: int) -> tuple[Any, ...]:
    k, v, *cache = kv_write_inputs(generator, num_tokens)
    return numbers(generator, num_tokens, 32), k, v, *rope_inputs(generator, num_tokens), *cache


def naive_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    normed = centred / torch.sqrt((centred**2).mean(1, keepdim=True) + eps) * weight
    return normed if bias is None else normed + bias


def naive_gelu(x: Tensor, approximate: bool) -> Tensor:
    if approximate:
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def naive_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    groups = [part / torch.sqrt((part**2).sum(1, keepdim=True) / len(weight) + eps) for part in x.split(len(weight), 1)]
    return torch.cat([group * (weight + offset) for group in groups], 1)


def naive_greedy(logits: Tensor) -> Tensor:
    return torch.tensor([row.index(max(row)) for row in logits.tolist()], dtype=torch.int64)


def naive_silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def naive_rope_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (2i, 2i + 1) of a head as a complex number, turned."""
    pairs = torch.complex(x[:, ::2].contiguous(), x[:, 1::2].contiguous())
    turned = pairs * torch.complex(cos, sin).repeat(1, pairs.shape[1] // cos.shape[1])
    return torch.stack([turned.real, turned.imag], 2).flatten(1)


def naive_head_linear(x: Tensor, weight: Tensor, num_heads: int, is_transposed: bool) -> Tensor:
    parts = zip(x.chunk(num_heads, 1), weight.chunk(num_heads, 0), strict=True)
    return torch.cat([part @ (rows if is_transposed else rows.t()) for part, rows in parts], 1)


def naive_join_heads(x: Tensor, y: Tensor, num_heads: int) -> Tensor:
    parts = zip(x.chunk(num_heads, 1), y.chunk(num_heads, 1), strict=True)
    return torch.cat([part for pair in parts for part in pair], 1)


# ----- mixture of experts


def router_inputs(
    generator: torch.Generator, num_tokens: int, squash: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, weight and offsets of 8 experts in 4 groups, exact in bfloat16.

    The rows are those whose scores are furthest apart: every way to sum picks the same experts.
    """
    weight, offsets = numbers(generator, 8, 24) / 4, numbers(generator, 8) / 4
    x = numbers(generator, 20 * num_tokens + 1, 24)
    x, weight, offsets = (each.bfloat16().float() for each in (x, weight, offsets))
    choice = squash(x.double() @ weight.double().t()) + offsets
    groups = choice.unflatten(1, (4, 2)).sum(2)
    margins = torch.cat([each.sort(1).values.diff(dim=1) for each in (choice, groups)], 1).min(1).values
    return x[margins.topk(num_tokens).indices], weight, offsets


def naive_route_softmax(
    x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, is_normalized: bool
) -> list[Tensor]:
    """One row after the other, the best expert first."""
    shares, ids = torch.zeros(len(x), top_k, dtype=torch.float64), torch.zeros(len(x), top_k, dtype=torch.int64)
    for row in range(len(x)):
        scores = (weight @ x[row] + (0 if bias is None else bias)).exp()
        best = sorted(range(len(weight)), key=lambda expert: -scores[expert])[:top_k]
        ids[row] = torch.tensor(best)
        shares[row] = scores[best] / (scores[best].sum() if is_normalized else scores.sum())
    return [shares, ids]


def naive_route_sigmoid(
    x: Tensor, weight: Tensor, correction: Tensor, top_k: int, num_groups: int, top_groups: int, is_normalized: bool,
    factor: float,
) -> list[Tensor]:  # fmt: skip
    shares, ids = torch.zeros(len(x), top_k, dtype=torch.float64), torch.zeros(len(x), top_k, dtype=torch.int64)
    size = len(weight) // num_groups
    for row in range(len(x)):
        scores = 1 / (1 + (-(weight @ x[row])).exp())
        choice = scores + correction
        worth = [sum(sorted(choice[group * size : (group + 1) * size].tolist())[-2:]) for group in range(num_groups)]
        groups = sorted(range(num_groups), key=lambda group: -worth[group])[:top_groups]
        allowed = [expert for expert in range(len(weight)) if expert // size in groups]
        best = sorted(allowed, key=lambda expert: -choice[expert])[:top_k]
        ids[row] = torch.tensor(best)
        shares[row] = scores[best] / (scores[best].sum() if is_normalized else 1) * factor
    return [shares, ids]


def experts_inputs(
    generator: torch.Generator, num_tokens: int, *, is_plain: bool = False, top_k: int = 3
) -> tuple[Any, ...]:
    """Five experts of which no token takes the last; plain: SwiGLU without biases, else gpt-oss's form."""
    shares = torch.rand(num_tokens, top_k, generator=generator)
    ids = torch.rand(num_tokens, 4, generator=generator).argsort(1)[:, :top_k]
    gate, up, down = (numbers(generator, 5, *shape) / 3 for shape in ((10, 12), (10, 12), (12, 10)))
    if is_plain:
        return numbers(generator, num_tokens, 12), shares, ids, gate, up, down, None, None, None, 1.0, 0.0, 0.0
    biases = (numbers(generator, 5, size) for size in (10, 10, 12))
    return numbers(generator, num_tokens, 12), shares, ids, gate, up, down, *biases, 1.702, 1.5, 1.0


def naive_experts(
    x: Tensor, shares: Tensor, ids: Tensor, gate: Tensor, up: Tensor, down: Tensor, gate_bias: Tensor | None,
    up_bias: Tensor | None, down_bias: Tensor | None, alpha: float, limit: float, up_offset: float,
    rounded: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:  # fmt: skip
    """Token by token, expert by expert."""
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for share, expert in zip(shares[token], ids[token].tolist(), strict=True):
            if expert < 0:  # another rank's
                continue
            g = gate[expert] @ rounded(x[token]) + (0 if gate_bias is None else gate_bias[expert])
            u = up[expert] @ rounded(x[token]) + (0 if up_bias is None else up_bias[expert])
            if limit:
                g, u = g.clamp(max=limit), u.clamp(min=-limit, max=limit)
            y = down[expert] @ rounded(g / (1 + (-alpha * g).exp()) * (u + up_offset))
            out[token] += share * (y + (0 if down_bias is None else down_bias[expert]))
    return out


# ----- quantized linears


def eight_bits(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def naive_quantized(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, order: Tensor | None, bias: Tensor, group_size: int
) -> Tensor:
    """One number of the weight after the other; 4-bit values come as bytes of two."""
    num_in, num_out = x.shape[1], packed.shape[0]
    weight = torch.zeros(num_out, num_in, dtype=torch.float64)
    for n in range(num_out):
        for j in range(num_in):
            group, column = j // (group_size or num_in), j if order is None else int(order[j])
            if packed.dtype == torch.uint8:
                value = (int(packed[n, j // 2]) >> (4 * (j % 2))) % 16 - (8 if zero is None else int(zero[n, group]))
            else:
                value = float(packed[n, j]) - (0 if zero is None else int(zero[n, group]))
            weight[n, column] = value * scale[n, group]
    return x @ weight.t() + bias


def naive_quantized_activations(
    x: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor, bias: Tensor, group: int, x_group: int, _dtype: str
) -> Tensor:
    return naive_quantized(naive_widened(x, x_scale, x_group), packed, scale, None, None, bias, group)


def naive_widened(x: Tensor, x_scale: Tensor, group: int) -> Tensor:
    x = x.double().clone()
    for row in range(len(x)):
        for j in range(x.shape[1]):
            x[row, j] *= x_scale[row, j // (group or x.shape[1])]
    return x


def naive_w8a8(
    x: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor, shift: Tensor | None, bias: Tensor, group: int,
    x_group: int, dtype: str,
) -> Tensor:  # fmt: skip
    y = naive_quantized_activations(x, x_scale, packed, scale, bias, group, x_group, dtype)
    if shift is not None:
        y -= naive_quantized_activations(x, x_scale, torch.ones_like(packed), shift, 0 * bias, group, x_group, dtype)
    return y


def naive_w4a8(
    x: Tensor, x_scale: Tensor, packed: Tensor, scale: Tensor, shift: Tensor | None, bias: Tensor, group: int,
    x_group: int, _dtype: str,
) -> Tensor:  # fmt: skip
    weight = torch.zeros(packed.shape[0], x.shape[1], dtype=torch.float64)
    for n in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            value, by = (int(packed[n, j // 2]) >> (4 * (j % 2))) % 16, scale[n, j // group]
            weight[n, j] = (value - 8) * by if shift is None else value * by - shift[n, j // group]
    return naive_widened(x, x_scale, x_group) @ weight.t() + bias


def naive_panels(packed: Tensor, bits: int) -> Tensor:
    """Number by number: columns four at a time, 4-bit values with those four columns further on in the high halves."""
    num_out, num_bytes = packed.shape
    steps, per_step = -(-num_bytes // 4), 32 // bits
    panels = torch.zeros(-(-num_out // 16), steps * 64, dtype=torch.uint8)
    for n in range(16 * len(panels)):
        for k in range(steps * per_step):
            value = 0
            if n < num_out and k < num_bytes * 8 // bits:
                number = int(packed[n, k * bits // 8])
                value = number + 128 if bits == 8 else number >> 4 * (k % 2) & 15
            place = k // per_step * 64 + n % 16 * 4 + k % 4
            panels[n // 16, place] += value << (4 if k % per_step >= 4 else 0)
    return panels


def naive_panel_scales(scale: Tensor, zero: Tensor | None) -> Tensor:
    num_out, groups = scale.shape
    found = torch.zeros(-(-num_out // 16), groups * 16, dtype=torch.float64)
    for n in range(num_out):
        for group in range(groups):
            found[n // 16, group * 16 + n % 16] = scale[n, group] * (1 if zero is None else float(zero[n, group]))
    return found


def linear_panels_inputs(generator: torch.Generator, num_tokens: int) -> tuple[Any, ...]:
    """8 bits with a scale a row, then with groups; 4 and 8 bits with groups, without and with shifts."""
    kinds = ((8, 0, 8, False), (8, 16, 0, False), (4, 8, 16, False), (4, 16, 8, True), (8, 16, 32, True))
    bits, group_size, x_group_size, has_shift = kinds[NUM_TOKENS.index(num_tokens)]
    groups = -(-40 // group_size) if group_size else 1
    packed = eight_bits(generator, 19, 40) if bits == 8 else whole(generator, 256, 19, 20).to(torch.uint8)
    scale = (numbers(generator, 19, groups) / 900).to(torch.float16 if num_tokens % 3 and groups > 1 else torch.float32)
    shift = numbers(generator, 19, groups) / 90 if has_shift else None
    scales, shifts = (
        None if each is None else naive_panel_scales(each, None).to(each.dtype) for each in (scale, shift)
    )
    x, x_scale = eight_bits(generator, num_tokens, 40), numbers(generator, num_tokens, -(-40 // (x_group_size or 40)))
    rest = scales, shifts, numbers(generator, 19), bits, group_size, x_group_size, 19
    return x, x_scale.abs() / 90, naive_panels(packed, bits), *rest


def naive_linear_panels(
    x: Tensor, x_scale: Tensor, panels: Tensor, scale: Tensor, shift: Tensor | None, bias: Tensor, bits: int,
    group_size: int, x_group_size: int, num_out: int,
) -> Tensor:  # fmt: skip
    weight = torch.zeros(num_out, x.shape[1], dtype=torch.float64)
    for n in range(num_out):
        for k in range(x.shape[1]):
            per_step = 32 // bits
            byte = int(panels[n // 16, k // per_step * 64 + n % 16 * 4 + k % 4])
            number = byte if bits == 8 else byte >> (4 if k % per_step >= 4 else 0) & 15
            place = (k // group_size if group_size else 0) * 16 + n % 16
            zero = 0 if bits == 4 and shift is not None else 2 ** (bits - 1)
            weight[n, k] = (number - zero) * scale[n // 16, place] - (0 if shift is None else shift[n // 16, place])
    x = x.double()
    for k in range(x.shape[1]):
        x[:, k] *= x_scale[:, k // x_group_size if x_group_size else 0]
    return x @ weight.t() + bias


def embedding_panels_inputs(generator: torch.Generator, num_tokens: int) -> tuple[Any, ...]:
    """As linear_panels has them."""
    _, _, panels, scale, shift, _, bits, group_size, _, num_out = linear_panels_inputs(generator, num_tokens)
    return panels, scale, shift, whole(generator, num_out, num_tokens), bits, group_size, 40


def naive_embedding_panels(
    panels: Tensor, scale: Tensor, shift: Tensor | None, ids: Tensor, bits: int, group_size: int, num_in: int
) -> Tensor:
    """Products of the weight with each column alone."""
    eye, ones, bias = torch.eye(num_in), torch.ones(num_in, 1), torch.zeros(16 * len(panels))
    weight = naive_linear_panels(eye, ones, panels, scale, shift, bias, bits, group_size, 0, len(bias)).t()
    return weight[ids]


def naive_nvfp4(x: Tensor, packed: Tensor, scale: Tensor, row_scale: Tensor, bias: Tensor) -> Tensor:
    """Each number of four bits: a sign, two bits of exponent of bias 1, one of fraction."""
    weight = torch.zeros(packed.shape[0], x.shape[1], dtype=torch.float64)
    for n in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            bits = (int(packed[n, j // 2]) >> (4 * (j % 2))) % 16
            exponent, fraction = bits // 2 % 4, bits % 2 / 2
            magnitude = (1 + fraction) * 2.0 ** (exponent - 1) if exponent else fraction
            number = -magnitude if bits >= 8 else magnitude
            weight[n, j] = number * float(scale[n, j // 16]) * row_scale[n, 0]
    return x @ weight.t() + bias


def packed_experts_inputs(generator: torch.Generator, num_tokens: int, kind: str) -> tuple[Any, ...]:
    """experts_inputs with the three weights packed, in groups of 8 columns; 4 bits have zero points."""
    x, shares, ids, *_, gate_bias, up_bias, down_bias, alpha, limit, offset = experts_inputs(generator, num_tokens)
    parts: list[Tensor | None] = []
    for num_out, num_in in ((10, 12), (10, 12), (12, 10)):
        if kind in INTEGERS_OF_4_BITS:
            zero = whole(generator, 16, 5, num_out, 2).to(torch.uint8)
            parts += [whole(generator, 256, 5, num_out, num_in // 2).to(torch.uint8)]
            parts += [numbers(generator, 5, num_out, 2) / 60, zero if kind == "w4a16" else None]
        elif kind.startswith("w8"):
            parts += [eight_bits(generator, 5, num_out, num_in), numbers(generator, 5, num_out, 2) / 100, None]
        else:
            packed = numbers(generator, 5, num_out, num_in).to(torch.float8_e4m3fn)
            parts += [packed, numbers(generator, 5, num_out, 2) / 3, None]
    return x, shares, ids, *parts, gate_bias, up_bias, down_bias, alpha, limit, offset, 8, 0.0, 0


def naive_packed_experts(kind: str, x: Tensor, shares: Tensor, ids: Tensor, *rest: Any) -> Tensor:
    """naive_experts of the dequantized weights; activations are rounded by the op that has a test of its own."""
    *parts, gate_bias, up_bias, down_bias, alpha, limit, offset, group, _, _ = rest
    weights = []
    for packed, scale, zero in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        eye = torch.eye(packed.shape[2] * (2 if kind in INTEGERS_OF_4_BITS else 1), dtype=torch.float64)
        stack = [
            naive_quantized(eye, packed[e], scale[e], None if zero is None else zero[e], None, 0, group).t()
            for e in range(len(packed))
        ]
        weights.append(torch.stack(stack))
    if kind.endswith("a16"):
        return naive_experts(x, shares, ids, *weights, gate_bias, up_bias, down_bias, alpha, limit, offset)
    return naive_experts(
        x,
        shares,
        ids,
        *weights,
        gate_bias,
        up_bias,
        down_bias,
        alpha,
        limit,
        offset,
        partial(naive_rounded, QUANTIZES_ACTIVATIONS[kind]),
    )


def naive_rounded(kind: str, x: Tensor) -> Tensor:
    values, scale = known_ops()[f"quantize_{kind}"].reference(x[None].float(), 0.0, 0)
    return values[0].double() * scale[0].double()


E4M3_VALUES = torch.tensor(
    [
        (-1) ** sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
        for sign in (0, 1)
        for exponent in range(16)
        for mantissa in range(8)
        if (exponent, mantissa) != (15, 7)
    ],
    dtype=torch.float64,
)
INT8_VALUES = torch.arange(-128, 128, dtype=torch.float64)


def activations_to_quantize(generator: torch.Generator, num_tokens: int, values: Tensor) -> Tensor:
    """24 columns whose every 8 have a power of two as their scale, all away from the middle between two values."""
    picked = values[whole(generator, len(values), num_tokens, 3, 8)]
    picked = picked.clamp(-values.max(), values.max()) * 0.999
    picked[:, :, 3] = values.max()
    return (picked * 2.0 ** whole(generator, 6, num_tokens, 3, 1)).flatten(1).float()


def naive_quantize(values: Tensor) -> Callable[..., list[Tensor]]:
    def quantize(x: Tensor, input_scale: float, group_size: int) -> list[Tensor]:
        size = group_size or x.shape[1]
        scales = torch.full((len(x), x.shape[1] // size), input_scale, dtype=torch.float64)
        result = torch.zeros_like(x)
        for row in range(len(x)):
            for group in range(x.shape[1] // size):
                part = x[row, group * size : (group + 1) * size]
                scales[row, group] = input_scale or part.abs().max() / values.max()
                for column, number in enumerate(part):
                    nearest = (values - number / scales[row, group]).abs().argmin()
                    result[row, group * size + column] = values[nearest]
        return [result, scales]

    return quantize


# Norms and activations that quantize: what they quantize is chosen first, away from the middle between two values.


def to_quantize(generator: torch.Generator, num_tokens: int) -> tuple[Tensor, tuple[float, int, str]]:
    """24 columns, and how: int8 or E4M3, a scale for every 8 of them or one found before."""
    dtype, values = (("int8", INT8_VALUES), ("float8_e4m3fn", E4M3_VALUES))[num_tokens % 3 == 1]
    return activations_to_quantize(generator, num_tokens, values), (0.0, 8, dtype)


def naive_quantize_to(x: Tensor, input_scale: float, group_size: int, dtype: str) -> list[Tensor]:
    return naive_quantize({"int8": INT8_VALUES, "float8_e4m3fn": E4M3_VALUES}[dtype])(x, input_scale, group_size)


def powers_of_two(generator: torch.Generator, *shape: int) -> Tensor:
    return 2.0 ** (whole(generator, 5, *shape) - 2)


def rms_norm_quantize_inputs(generator: torch.Generator, num_tokens: int) -> tuple[Any, ...]:
    """x times the weight is what to_quantize gives; the norm's factor, one for a row, goes into the scales."""
    x, how = to_quantize(generator, num_tokens)
    weight, offset = powers_of_two(generator, 24), float(num_tokens % 2)
    return x / weight, weight - offset, 1e-5, offset, *how


def layer_norm_quantize_inputs(generator: torch.Generator, num_tokens: int) -> tuple[Any, ...]:
    """The same, with a mean of zero: each row is followed by its negative."""
    x, how = to_quantize(generator, num_tokens)
    weight = powers_of_two(generator, 24)
    return torch.cat([x / weight, -x / weight], 1), weight.repeat(2), None, 1e-5, *how


def residual_of(generator: torch.Generator, x: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers for each whose sum it is."""
    residual = numbers(generator, *x.shape)
    return x - residual, residual


def gated_quantize_inputs(
    generator: torch.Generator, num_tokens: int, activation: Callable[[Tensor], Tensor]
) -> tuple[Any, ...]:
    x, how = to_quantize(generator, num_tokens)
    gate = (1 + torch.rand(x.shape, generator=generator)).double()
    return torch.cat([gate, x / activation(gate)], 1).float(), how


def panels_silu_inputs(generator: torch.Generator, num_tokens: int) -> tuple[Any, ...]:
    """Up is a column of x, and the gate so large that its SiLU is the gate: whole numbers, of which one is 127."""
    x = torch.randint(-127, 128, (num_tokens, 40), generator=generator, dtype=torch.int8)
    x[:, [0, 16]] = 127
    bits = 4 if num_tokens % 2 else 8
    up = torch.eye(32, 40, dtype=torch.int64) + 2 ** (bits - 1)
    weight = torch.cat([torch.full((32, 40), 2 ** (bits - 1)), up])
    packed = w4a16.pack(weight.to(torch.uint8)) if bits == 4 else (weight - 128).to(torch.int8)
    scales = naive_panel_scales(powers_of_two(generator, 1, 1).expand(64, 5), None)
    bias = torch.cat([torch.full((32,), 64.0), torch.zeros(32)])
    rest = naive_panels(packed, bits), scales.float(), None, bias, bits, 8, 0, 64, 16
    return x, powers_of_two(generator, num_tokens, 1), *rest


def naive_panels_silu(*arguments: Any) -> list[Tensor]:
    product = naive_linear_panels(*arguments[:-1])
    return naive_quantize_to(naive_silu(product[:, :32]) * product[:, 32:], 0.0, arguments[-1], "int8")


def gelu_quantize_inputs(generator: torch.Generator, num_tokens: int) -> tuple[Any, ...]:
    """A scale found before, and x where GELU of it, found by bisection, is a value to quantize: 0 and more."""
    _, (_, _, dtype) = to_quantize(generator, num_tokens)
    values = {"int8": INT8_VALUES, "float8_e4m3fn": E4M3_VALUES}[dtype]
    values = values[(values >= 0) & (values <= 100)]
    target = values[whole(generator, len(values), num_tokens, 24)] * 0.999 / 16
    low, high = torch.zeros_like(target), torch.full_like(target, 7.0)
    for _ in range(60):
        middle = (low + high) / 2
        too_low = naive_gelu(middle, num_tokens % 2 == 0) < target
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return low.float(), num_tokens % 2 == 0, 1 / 16, 0, dtype


CASES: dict[str, Case] = {
    "add": Case(lambda g, t: (numbers(g, t, 24), numbers(g, t, 24)), lambda x, y: x + y),
    "mul": Case(lambda g, t: (numbers(g, t, 24), numbers(g, t, 24)), lambda x, y: x * y),
    "concat": Case(
        lambda g, t: ([numbers(g, t, 6), numbers(g, 3, 6), numbers(g, t, 6)],),
        lambda parts: torch.tensor([row for part in parts for row in part.tolist()]).double().view(-1, 6),
    ),
    "split": Case(
        lambda g, t: (numbers(g, t, 12), [6, 2, 0, 4]),
        lambda x, sizes: [x[:, :6], x[:, 6:8], x[:, 8:8], x[:, 8:]],
    ),
    "select_rows": Case(
        lambda g, t: (numbers(g, t, 6), whole(g, max(t, 1), t // 2)),
        lambda x, rows: torch.stack([x[row] for row in rows.tolist()]) if len(rows) else x[:0],
    ),
    "silu": Case(lambda g, t: (numbers(g, t, 12) * 4,), naive_silu),
    "silu_and_mul": Case(lambda g, t: (numbers(g, t, 24) * 2,), lambda x: naive_silu(x[:, :12]) * x[:, 12:]),
    "greedy": Case(lambda g, t: (whole(g, 9, t, 37).float(),), naive_greedy),
    "embedding": Case(
        lambda g, t: (numbers(g, 11, 6), whole(g, 11, t)),
        lambda weight, ids: torch.nn.functional.one_hot(ids, 11).double() @ weight,
    ),
    "embedding_part": Case(
        lambda g, t: (numbers(g, 4, 6), whole(g, 11, t), 3),
        lambda weight, ids, first: torch.nn.functional.one_hot(ids, 11).double()[:, first : first + 4] @ weight,
    ),
    # What ranks do together is in tests/build/test_shard.py and tests/runtime/test_ranks.py; these have one.
    "all_reduce": Case(lambda g, t: (numbers(g, t, 6),), lambda x: x),
    "all_gather": Case(lambda g, t: (numbers(g, t, 6), [6]), lambda x, sizes: x),
    "send": Case(lambda g, t: (numbers(g, t, 6),), lambda x: x),
    "receive": Case(
        lambda g, t: (whole(g, 20, t), 6, "float32"), lambda positions, columns, _: torch.zeros(len(positions), columns)
    ),
    "reduce_add_rms_norm": Case(
        lambda g, t: (numbers(g, t, 24), numbers(g, t, 24), numbers(g, 24), 1e-5, float(t % 2)),
        lambda x, residual, weight, eps, offset: [naive_rms_norm(x + residual, weight, eps, offset), x + residual],
    ),
    "reduce_add_rms_norm_quantize": Case(
        lambda g, t: (lambda x, *rest: (*residual_of(g, x), *rest))(*rms_norm_quantize_inputs(g, t)),
        lambda x, residual, weight, eps, offset, *how: [
            *naive_quantize_to(naive_rms_norm(x + residual, weight, eps, offset), *how),
            x + residual,
        ],
    ),
    "linear": Case(
        lambda g, t: (numbers(g, t, 24), numbers(g, 10, 24) / 5, numbers(g, 10)),
        lambda x, weight, bias: (x[:, None] * weight).sum(2) + bias,
    ),
    "linear_w4a16": Case(
        lambda g, t: (
            numbers(g, t, 24),
            whole(g, 256, 10, 12).to(torch.uint8),
            numbers(g, 10, 3) / 60,
            whole(g, 16, 10, 3).to(torch.uint8),
            torch.randperm(24, generator=g).int(),
            numbers(g, 10),
            8,
        ),
        naive_quantized,
    ),
    "linear_w8a16": Case(
        lambda g, t: (
            numbers(g, t, 24),
            eight_bits(g, 10, 24),
            numbers(g, 10, 3) / 900,
            eight_bits(g, 10, 3),
            torch.randperm(24, generator=g).int(),
            numbers(g, 10),
            8,
        ),
        naive_quantized,
    ),
    "linear_fp8a16": Case(
        lambda g, t: (
            numbers(g, t, 24),
            (numbers(g, 10, 24) * 90).to(torch.float8_e4m3fn),
            numbers(g, 10, 2) / 900,
            numbers(g, 10),
            16,
        ),
        lambda x, packed, scale, bias, group: naive_quantized(x, packed, scale, None, None, bias, group),
    ),
    "linear_nvfp4a16": Case(
        lambda g, t: (
            numbers(g, t, 24),
            whole(g, 256, 10, 12).to(torch.uint8),
            (numbers(g, 10, 2) * 9).to(torch.float8_e4m3fn),
            numbers(g, 10, 1) / 90,
            numbers(g, 10),
        ),
        naive_nvfp4,
    ),
    "linear_w4afp8": Case(
        lambda g, t: (
            (numbers(g, t, 24) * 90).to(torch.float8_e4m3fn),
            numbers(g, t, 2).abs() / 200,
            whole(g, 256, 10, 12).to(torch.uint8),
            numbers(g, 10, 3) / 60,
            numbers(g, 10),
            8,
            16,
            "float32",
        ),
        naive_quantized_activations,
    ),
    "linear_w4a8": Case(
        lambda g, t: (
            eight_bits(g, t, 24),
            numbers(g, t, 2).abs() / 90,
            whole(g, 256, 10, 12).to(torch.uint8),
            numbers(g, 10, 3) / 60,
            numbers(g, 10, 3) / 9 if t % 2 else None,
            numbers(g, 10),
            8,
            16,
            "float32",
        ),
        naive_w4a8,
    ),
    "linear_w8a8": Case(
        lambda g, t: (
            eight_bits(g, t, 24),
            numbers(g, t, 2).abs() / 90,
            eight_bits(g, 10, 24),
            numbers(g, 10, 3) / 900,
            numbers(g, 10, 3) / 9 if t % 2 else None,
            numbers(g, 10),
            8,
            16,
            "float32",
        ),
        naive_w8a8,
    ),
    "to_panels": Case(
        lambda g, t: (eight_bits(g, t + 1, 10), 8) if t % 2 else (whole(g, 256, t + 1, 10).to(torch.uint8), 4),
        naive_panels,
    ),
    "to_panel_scales": Case(
        lambda g, t: (numbers(g, t + 1, 3), whole(g, 16, t + 1, 3).to(torch.uint8) if t % 2 else None),
        naive_panel_scales,
    ),
    "linear_panels": Case(linear_panels_inputs, naive_linear_panels),
    "embedding_panels": Case(embedding_panels_inputs, naive_embedding_panels),
    "linear_fp8": Case(
        lambda g, t: (
            (numbers(g, t, 24) * 90).to(torch.float8_e4m3fn),
            numbers(g, t, 2).abs() / 200,
            (numbers(g, 10, 24) * 90).to(torch.float8_e4m3fn),
            numbers(g, 10, 2) / 900,
            numbers(g, 10),
            16,
            16,
            "float32",
        ),
        naive_quantized_activations,
    ),
    "quantize_w8a8": Case(
        lambda g, t: (activations_to_quantize(g, t, INT8_VALUES), 0.0, 8), naive_quantize(INT8_VALUES)
    ),
    "quantize_fp8": Case(
        lambda g, t: (activations_to_quantize(g, t, E4M3_VALUES), 0.0, 8), naive_quantize(E4M3_VALUES)
    ),
    "scale": Case(lambda g, t: (numbers(g, t, 24), 0.125), lambda x, factor: x * factor),
    "soft_cap": Case(lambda g, t: (numbers(g, t, 24) * 9, 4.0), lambda x, cap: cap * torch.tanh(x / cap)),
    "gelu": Case(lambda g, t: (numbers(g, t, 12) * 4, t % 2 == 0), naive_gelu),
    "gelu_and_mul": Case(
        lambda g, t: (numbers(g, t, 24) * 2, t % 2 == 0),
        lambda x, approximate: naive_gelu(x[:, :12], approximate) * x[:, 12:],
    ),
    "normalize_rows": Case(lambda g, t: (numbers(g, t, 24),), lambda w: w / torch.sqrt((w**2).sum(1, keepdim=True))),
    "rms_norm": Case(lambda g, t: (numbers(g, t, 24), numbers(g, 24), 1e-5, float(t % 2)), naive_rms_norm),
    "add_rms_norm": Case(
        lambda g, t: (numbers(g, t, 24), numbers(g, t, 24), numbers(g, 24), 1e-5, float(t % 2)),
        lambda x, residual, weight, eps, offset: [naive_rms_norm(x + residual, weight, eps, offset), x + residual],
    ),
    "layer_norm": Case(
        lambda g, t: (numbers(g, t, 24), numbers(g, 24), numbers(g, 24) if t % 2 else None, 1e-5), naive_layer_norm
    ),
    "add_layer_norm": Case(
        lambda g, t: (numbers(g, t, 24), numbers(g, t, 24), numbers(g, 24), numbers(g, 24), 1e-5),
        lambda x, residual, weight, bias, eps: [naive_layer_norm(x + residual, weight, bias, eps), x + residual],
    ),
    "rms_norm_quantize": Case(
        rms_norm_quantize_inputs,
        lambda x, weight, eps, offset, *how: naive_quantize_to(naive_rms_norm(x, weight, eps, offset), *how),
    ),
    "add_rms_norm_quantize": Case(
        lambda g, t: (lambda x, *rest: (*residual_of(g, x), *rest))(*rms_norm_quantize_inputs(g, t)),
        lambda x, residual, weight, eps, offset, *how: [
            *naive_quantize_to(naive_rms_norm(x + residual, weight, eps, offset), *how),
            x + residual,
        ],
    ),
    "layer_norm_quantize": Case(
        layer_norm_quantize_inputs,
        lambda x, weight, bias, eps, *how: naive_quantize_to(naive_layer_norm(x, weight, bias, eps), *how),
    ),
    "add_layer_norm_quantize": Case(
        lambda g, t: (lambda x, *rest: (*residual_of(g, x), *rest))(*layer_norm_quantize_inputs(g, t)),
        lambda x, residual, weight, bias, eps, *how: [
            *naive_quantize_to(naive_layer_norm(x + residual, weight, bias, eps), *how),
            x + residual,
        ],
    ),
    "silu_and_mul_quantize": Case(
        lambda g, t: (lambda x, how: (x, *how))(*gated_quantize_inputs(g, t, naive_silu)),
        lambda x, *how: naive_quantize_to(naive_silu(x[:, :24]) * x[:, 24:], *how),
    ),
    "gelu_and_mul_quantize": Case(
        lambda g, t: (lambda x, how: (x, t % 2 == 0, *how))(
            *gated_quantize_inputs(g, t, lambda gate: naive_gelu(gate, t % 2 == 0))
        ),
        lambda x, approximate, *how: naive_quantize_to(naive_gelu(x[:, :24], approximate) * x[:, 24:], *how),
    ),
    "linear_panels_silu_and_mul_quantize": Case(panels_silu_inputs, naive_panels_silu),
    "gelu_quantize": Case(
        gelu_quantize_inputs, lambda x, approximate, *how: naive_quantize_to(naive_gelu(x, approximate), *how)
    ),
    "rope_cos_sin": Case(
        lambda g, t: (whole(g, 4096, t), torch.rand(4, generator=g) / 100, 1.25),
        lambda positions, frequencies, scale: [
            f(positions.double()[:, None] * frequencies) * scale for f in (torch.cos, torch.sin)
        ],
    ),
    "far_cos_sin": Case(
        lambda g, t: (whole(g, 1 << 31, t), torch.rand(4, generator=g), 1.25),
        lambda positions, frequencies, scale: [
            torch.tensor([[f(p * w) * scale for w in frequencies.tolist()] for p in positions.tolist()]).view(-1, 4)
            for f in (math.cos, math.sin)
        ],
    ),
    "rope": Case(lambda g, t: (numbers(g, t, 24), *rope_inputs(g, t), 12 if t % 2 else 8), naive_rope),
    "rope_pairs": Case(lambda g, t: (numbers(g, t, 24), *rope_inputs(g, t)), naive_rope_pairs),
    "kv_write": Case(kv_write_inputs, naive_kv_write),
    "rope_kv_write": Case(rope_kv_write_inputs, naive_rope_kv_write),
    "head_linear": Case(
        lambda g, t: (numbers(g, t, 24), numbers(g, *((12, 6) if t % 2 else (24, 5))) / 3, 4, t % 2 == 0),
        naive_head_linear,
    ),
    "join_heads": Case(lambda g, t: (numbers(g, t, 24), numbers(g, t, 8), 4), naive_join_heads),
    "route_softmax": Case(
        lambda g, t: (*router_inputs(g, t, lambda scores: scores), 3, t % 2 == 0), naive_route_softmax
    ),
    "route_sigmoid": Case(
        lambda g, t: (*router_inputs(g, t, torch.sigmoid), 3, 4, 2, t % 2 == 0, 2.5), naive_route_sigmoid
    ),
    "local_experts": Case(
        lambda g, t: (whole(g, 8, t, 3), 2, 4),
        lambda ids, first, count: torch.tensor(
            [id - first if first <= id < first + count else -1 for id in ids.flatten().tolist()]
        ).view(ids.shape),
    ),
    "experts": Case(experts_inputs, naive_experts),
    **{
        f"experts_{kind}": Case(partial(packed_experts_inputs, kind=kind), partial(naive_packed_experts, kind))
        for kind in PACKED_DTYPES
        if kind not in ("nvfp4a16", "w4a8")
    },
    "attention": Case(lambda g, t: attention_inputs(g, chunks_of(t)), naive_attention),
    "tree_attention": Case(lambda g, t: tree_inputs(g, chunks_of(t)), naive_tree_attention),
    "streaming_attention": Case(lambda g, t: streaming_inputs(g, chunks_of(t)), naive_streaming_attention),
    "place_in_window": Case(
        lambda g, t: (whole(g, 20, t), 8),
        lambda positions, window: torch.tensor([min(p, window - 1) for p in positions.tolist()]),
    ),
}
# Angles and scales are float32 whatever the engine's dtype; a product of 8-bit numbers is in the dtype it is asked for.
QUANTIZING = {name for name in known_ops() if name.endswith("_quantize")}
ANGLES = {"rope_cos_sin", "far_cos_sin", "place_in_window"}
EIGHT_BITS = {f"{what}_{kind}" for what in ("linear", "quantize", "experts") for kind in QUANTIZES_ACTIVATIONS}
PANELS = {"to_panels", "to_panel_scales", "linear_panels", "embedding_panels"}
FLOAT32_ONLY = EIGHT_BITS | ANGLES | QUANTIZING | PANELS | {"local_experts", "receive"}
OTHER_DTYPES = {
    "quantize_w8a8": (torch.int8, torch.float32),
    "quantize_fp8": (torch.float8_e4m3fn, torch.float32),
    "route_softmax": (torch.float32, torch.int64),
    "route_sigmoid": (torch.float32, torch.int64),
    "local_experts": (torch.int64,),
    "place_in_window": (torch.int64,),
    "to_panels": (torch.uint8,),
    "greedy": (torch.int64,),
} | dict.fromkeys(QUANTIZING, (torch.int8, torch.float8_e4m3fn, torch.float32))


# ----- the runner


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Arguments with floats in another dtype; always a copy."""
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [cast(each, dtype) for each in value]
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True) if value.is_floating_point() else value.clone()
    return value


def as_list(result: Any) -> list[Tensor]:
    return [] if result is None else [result] if isinstance(result, Tensor) else list(result)


def mutated(op: Op, arguments: Iterable[Any]) -> list[Tensor]:
    return [value for argument, value in zip(op.arguments, arguments, strict=False) if argument.is_mutated]


def check(op: Op, function: Callable[..., Any], arguments: tuple[Any, ...], dtype: torch.dtype) -> None:
    """The function's outputs, and what it mutates, are the naive ones."""
    actual_arguments = [cast(value, dtype) for value in arguments]
    naive_arguments = [cast(value, torch.float64) for value in (cast(value, dtype) for value in arguments)]
    actual = as_list(function(*actual_arguments)) + mutated(op, actual_arguments)
    expected = as_list(CASES[op.name].expected(*naive_arguments)) + mutated(op, naive_arguments)
    assert len(actual) == len(expected)
    for ours, naive in zip(actual, expected, strict=True):
        assert ours.dtype in OTHER_DTYPES.get(op.name, (dtype,))
        tolerance = ONE_STEP.get(op.name, TOLERANCE[dtype])
        torch.testing.assert_close(ours.double(), naive.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def inputs_of(op: Op, num_tokens: int) -> tuple[Any, ...]:
    assert op.name in CASES, f"the op {op.name} has no entry in CASES: write its inputs and its naive computation"
    return CASES[op.name].inputs(torch.Generator().manual_seed(SEED + num_tokens), num_tokens)


def every_kernel() -> list[Any]:
    found = []
    for op in known_ops().values():
        for dtype in (torch.float32,) if op.name in FLOAT32_ONLY else TOLERANCE:
            for name, kernel in op.candidates(CPU, dtype).items():
                label = f"{op.name}-{name}-{str(dtype).removeprefix('torch.')}-seed{SEED}"
                found.append(pytest.param(op, kernel.function, dtype, id=label))
    return found


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize(("op", "function", "dtype"), every_kernel())
def test_a_kernel_computes_what_its_op_means(
    op: Op, function: Callable[..., Any], dtype: torch.dtype, num_tokens: int
) -> None:
    check(op, function, inputs_of(op, num_tokens), dtype)


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize(("op", "function", "dtype"), every_kernel())
def test_a_kernel_reads_strided_views_as_it_reads_their_copies(
    op: Op, function: Callable[..., Any], dtype: torch.dtype, num_tokens: int
) -> None:
    """Columns of a wider row, as `split` makes them, and columns first, as linear's weight_first makes them."""
    arguments = [cast(value, dtype) for value in inputs_of(op, num_tokens)]

    def columns_of_wider(x: Tensor) -> Tensor:
        return torch.cat([x.new_full((len(x), 3), math.nan), x, x.new_full((len(x), 2), math.nan)], 1)[:, 3:-2]

    def columns_first(x: Tensor) -> Tensor:
        return x.t().contiguous().t()

    expected_arguments = [cast(value, dtype) for value in arguments]
    expected = as_list(function(*expected_arguments)) + mutated(op, expected_arguments)
    for layout in (columns_of_wider, columns_first):
        viewed = [
            layout(value) if isinstance(value, Tensor) and value.dim() == 2 and value.is_floating_point() else value
            for value in (cast(value, dtype) for value in arguments)
        ]
        actual = as_list(function(*viewed)) + mutated(op, viewed)
        for ours, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(
                ours.float(), theirs.float(), rtol=1e-6, atol=5e-6 if dtype == torch.float32 else 1e-2, equal_nan=True
            )


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("op", known_ops().values(), ids=lambda op: op.name)
def test_shapes_are_those_of_the_real_outputs(op: Op, num_tokens: int) -> None:
    arguments = inputs_of(op, num_tokens)
    real = as_list(op(*(cast(value, torch.float32) for value in arguments)))

    def to_meta(value: Any) -> Any:
        if isinstance(value, list):
            return [to_meta(each) for each in value]
        return value.to("meta") if isinstance(value, Tensor) else value

    for function in (op.shapes, op):
        on_meta = as_list(function(*map(to_meta, arguments)))
        assert [(each.shape, each.dtype) for each in on_meta] == [(each.shape, each.dtype) for each in real]
        assert all(each.is_meta for each in on_meta)


AT_BUILD = {"concat", "normalize_rows", "to_panels", "to_panel_scales"}
INDICES = {
    "positions",
    "slots",
    "query_starts",
    "kv_lens",
    "block_tables",
    "rows",
    "token_ids",
    "tree_starts",
    "tree_masks",
}  # the step's own
# Of what indices count the rows or the blocks of, only the other axes: engine/check.py sees to those.
SHORTENED = {("", "kv"): (0, 3, 4), ("embedding", "weight"): (1,), ("select_rows", "x"): (1,)}
SIZES = (0, -1, 1, 2, 3, 5, 7, 1000, 2**40)


def misfits(op: Op, arguments: list[Any]) -> Iterable[tuple[str, list[Any]]]:
    """The arguments with one changed: shorter, longer, of another rank or dtype, absent, another number."""
    for place, (argument, value) in enumerate(zip(op.arguments, arguments, strict=True)):
        others: list[Any] = []
        if isinstance(value, Tensor) and argument.name not in INDICES:
            axes = SHORTENED.get((op.name, argument.name)) or SHORTENED.get(("", argument.name)) or range(value.dim())
            others += [value.narrow(axis, 0, value.shape[axis] - 1).clone() for axis in axes]
            others += [torch.cat([value, value.narrow(axis, 0, 1)], axis) for axis in range(value.dim())]
            others += [value[None], value[..., None], value[0]]
            others += [value.to(dtype) for dtype in (torch.float16, torch.float64, torch.int64, torch.uint8)]
            others += [None] if argument.kind == "Tensor?" else []
        elif argument.kind == "int":
            others += [size for size in SIZES if size != value]
        elif argument.kind == "int[]":
            others += [value[1:], [*value, 1], [-1, *value[1:]]]
        for other in others:
            what = list(other.shape) if isinstance(other, Tensor) else other
            yield f"{argument.name} {what}", [*arguments[:place], other, *arguments[place + 1 :]]


@pytest.mark.parametrize("name", [name for name in CASES if name not in AT_BUILD])
def test_arguments_that_do_not_fit_are_refused_by_the_shapes(name: str) -> None:
    """What shapes are told of can be computed and comes out like that: an engine's graph may come from anyone."""
    op, num_refused = known_ops()[name], 0
    arguments = [cast(value, torch.float32) for value in inputs_of(op, 7)]
    for what, changed in misfits(op, arguments):
        if op.is_collective and what.startswith("sizes"):
            continue  # what fits the ranks is known when an engine is opened (engine/check.py)
        try:
            told = as_list(op.shapes(*(value.to("meta") if isinstance(value, Tensor) else value for value in changed)))
        except (ValueError, IndexError, RuntimeError, TypeError):
            num_refused += 1
            continue
        try:
            real = as_list(op.reference(*changed))
        except Exception as error:
            raise AssertionError(f"{name} was told shapes with {what}, but raises {error}") from error
        assert [(each.shape, each.dtype) for each in told] == [(each.shape, each.dtype) for each in real], what
    assert num_refused


def test_every_case_belongs_to_an_op() -> None:
    ours = {name for name, op in known_ops().items() if op.reference.__module__.startswith("slipstream.")}
    assert set(CASES) == ours  # other tests, run before, may have declared ops of their own


# ----- attention in particular

ATTENTION = known_ops()["attention"]
BATCHES = {
    "one generation row": [(1, 9)],
    "generation rows of one length": [(1, 6), (1, 6), (1, 6)],
    "generation rows of many lengths": [(1, 0), (1, 21), (1, 3), (1, 4)],
    "context rows": [(3, 0), (8, 0), (1, 0)],
    "a chunk in the middle": [(4, 5), (3, 8)],
    "all kinds": [(5, 0), (1, 12), (4, 5), (1, 0), (1, 3)],
    "a sequence without rows": [(0, 5), (1, 2), (0, 0), (2, 2)],
}


def attention_kernels() -> list[Any]:
    return [each for each in every_kernel() if each.values[0] is ATTENTION]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("chunks", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(("op", "function", "dtype"), attention_kernels())
def test_attention_reads_nothing_that_a_sequence_does_not_own(
    op: Op, function: Callable[..., Any], dtype: torch.dtype, chunks: list[tuple[int, int]], poison: float
) -> None:
    arguments = attention_inputs(torch.Generator().manual_seed(SEED), chunks, poison=poison)
    assert function(*(cast(value, dtype) for value in arguments)).isfinite().all()
    check(op, function, arguments, dtype)


@pytest.mark.parametrize(("op", "function", "dtype"), attention_kernels())
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 3},
        {"window": 6, "has_sinks": True},
        {"soft_cap": 2.0},
        {"has_slopes": True},
        {"has_sinks": True},
        {"is_latent": True, "heads": (4, 1)},
        {"window": 5, "soft_cap": 3.0, "has_slopes": True, "has_sinks": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_attention_takes_its_options(
    op: Op, function: Callable[..., Any], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    for chunks in BATCHES.values():
        check(op, function, attention_inputs(torch.Generator().manual_seed(SEED), chunks, **options), dtype)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1), (1, 1)], ids=["MHA", "GQA", "MQA", "one"])
@pytest.mark.parametrize(("op", "function", "dtype"), attention_kernels())
def test_attention_shares_kv_heads(
    op: Op, function: Callable[..., Any], dtype: torch.dtype, heads: tuple[int, int]
) -> None:
    check(op, function, attention_inputs(torch.Generator().manual_seed(SEED), BATCHES["all kinds"], heads), dtype)


@pytest.mark.parametrize("chunks", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(
    "options",
    [{"window": 6, "sinks": 1}, {"window": 13, "sinks": 5}, {"window": 3, "sinks": 2, "soft_cap": 2.0}],
    ids=lambda options: "-".join(f"{name}{value}" for name, value in options.items()),
)
def test_streaming_attention_reads_sinks_and_newest_tokens_only(
    options: dict[str, Any], chunks: list[tuple[int, int]]
) -> None:
    op = known_ops()["streaming_attention"]
    arguments = streaming_inputs(torch.Generator().manual_seed(SEED), chunks, **options)
    assert op.reference(*arguments).isfinite().all()
    check(op, op.reference, arguments, torch.float32)


@pytest.mark.parametrize("chunks", [*BATCHES.values(), [(70, 9), (1, 20), (67, 0)]], ids=[*BATCHES, "wide"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"heads": (5, 1)},
        {"window": 6, "has_sinks": True},
        {"is_latent": True, "heads": (4, 1)},
        {"window": 3, "soft_cap": 3.0, "has_slopes": True, "has_sinks": True},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize(
    "kernel", known_ops()["tree_attention"].candidates(CPU, torch.float32).values(), ids=lambda kernel: kernel.name
)
def test_tree_attention_takes_its_options(kernel: Any, options: dict[str, Any], chunks: list[tuple[int, int]]) -> None:
    arguments = tree_inputs(torch.Generator().manual_seed(SEED), chunks, **options)
    check(known_ops()["tree_attention"], kernel.function, arguments, torch.float32)


def test_a_tree_whose_bits_are_all_set_is_a_chain() -> None:
    q, kv, *step, _, roots, masks, slopes, sinks, scales, scale, window, cap, dim = tree_inputs(
        torch.Generator().manual_seed(SEED), BATCHES["all kinds"], window=5
    )
    places = [p for rows, past in BATCHES["all kinds"] for p in range(past, past + rows)]
    rest = (slopes, sinks, scales, scale, window, cap, dim)
    for kernel in known_ops()["tree_attention"].candidates(CPU, torch.float32).values():
        found = kernel.function(q, kv, *step, torch.tensor(places), roots, torch.full_like(masks, -1), *rest)
        torch.testing.assert_close(found, ATTENTION.reference(q, kv, *step, *rest))


# ----- mixture of experts in particular

EXPERTS = known_ops()["experts"]


@pytest.mark.parametrize("top_k", [1, 4])
@pytest.mark.parametrize("is_plain", [True, False], ids=["plain", "clamped"])
def test_experts_take_any_routing(is_plain: bool, top_k: int) -> None:
    for num_tokens in NUM_TOKENS:
        generator = torch.Generator().manual_seed(SEED)
        x, shares, ids, *rest = experts_inputs(generator, num_tokens, is_plain=is_plain, top_k=top_k)
        elsewhere = ids.where(ids % 2 == 0, -1), torch.full_like(ids, -1)
        # The same one twice counts twice.
        for chosen in (ids, torch.full_like(ids, 3), torch.full_like(ids, 0), *elsewhere):
            check(EXPERTS, EXPERTS.reference, (x, shares, chosen, *rest), torch.float32)


def test_a_router_without_a_bias() -> None:
    x, weight, offsets = router_inputs(torch.Generator().manual_seed(SEED), 7, lambda scores: scores)
    route = known_ops()["route_softmax"].reference
    for ours, theirs in zip(route(x, weight, None, 3, True), route(x, weight, 0 * offsets, 3, True), strict=True):
        assert torch.equal(ours, theirs)


def test_one_group_of_experts_is_none() -> None:
    x, weight, offsets = router_inputs(torch.Generator().manual_seed(SEED), 7, torch.sigmoid)
    check(known_ops()["route_sigmoid"], known_ops()["route_sigmoid"].reference,
          (x, weight, offsets, 8, 1, 1, True, 1.0), torch.float32)  # fmt: skip


@pytest.mark.parametrize("name", ["kv_write", "rope_kv_write"])
def test_a_write_leaves_the_other_slots_alone(name: str) -> None:
    for kernel in known_ops()[name].candidates(CPU, torch.float32).values():
        arguments = inputs_of(known_ops()[name], 7)
        kv, slots = arguments[-3:-1]
        before = kv.flatten(1, 2).clone()
        others = sorted(set(range(before.shape[1])) - set(slots.tolist()))
        kernel.function(*arguments)
        assert torch.equal(kv.flatten(1, 2)[:, others], before[:, others])
        assert not torch.equal(kv.flatten(1, 2)[:, slots], before[:, slots])


def test_a_write_to_a_cache_that_is_no_whole_tensor_is_refused_rather_than_lost() -> None:
    kv = torch.zeros(2, 3, BLOCK_SIZE, 2, 8)[:, :, :3]
    with pytest.raises(RuntimeError):
        known_ops()["kv_write"].reference(torch.ones(1, 16), torch.ones(1, 16), kv, torch.tensor([1]))


def test_rms_norm_of_each_head() -> None:
    generator = torch.Generator().manual_seed(SEED)
    for num_tokens in NUM_TOKENS:
        check(known_ops()["rms_norm"], known_ops()["rms_norm"].reference,
              (numbers(generator, num_tokens, 24), numbers(generator, 8), 1e-5, 0.0), torch.float32)  # fmt: skip


def test_linear_without_a_bias() -> None:
    for kernel in known_ops()["linear"].candidates(CPU, torch.float32).values():
        x, weight, _ = inputs_of(known_ops()["linear"], 7)
        torch.testing.assert_close(kernel.function(x, weight, None), x @ weight.t())


@pytest.mark.parametrize(("name", "largest"), [("quantize_w8a8", 127.0), ("quantize_fp8", 448.0)])
def test_activations_are_quantized_by_row_or_by_a_given_scale(name: str, largest: float) -> None:
    quantize = known_ops()[name].reference
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 4.0], [-largest, 1e9, -1e9]])
    values, scales = quantize(x, 0.0, 0)
    torch.testing.assert_close(scales[1:, 0], torch.tensor([4 / largest, 1e9 / largest]))
    assert values[0].float().tolist() == [0, 0, 0]
    assert values[1, 2] == largest
    values, scales = quantize(x, 0.5, 0)
    assert scales.tolist() == [[0.5]] * 3
    assert values[1].float().tolist() == [2, -4, 8]
    assert values[2, 1] == largest
    assert values[2, 2] in (-largest, -largest - 1)
    values, scales = quantize(torch.ones(2, 5), 0.0, 4)  # the last group is shorter
    assert scales.shape == (2, 2)
    assert (values.float() == largest).all()


@pytest.mark.parametrize("num_in", [1, 2, 7, 8])
def test_four_bits_are_unpacked_as_they_were_packed(num_in: int) -> None:
    values = torch.randint(16, (3, num_in), generator=torch.Generator().manual_seed(SEED), dtype=torch.uint8)
    packed = w4a16.pack(values)
    assert packed.shape == (3, -(-num_in // 2))
    assert torch.equal(w4a16.unpack(packed, num_in), values)


@pytest.mark.parametrize("name", ["linear_w4a16", "linear_w8a16"])
def test_weights_without_zeros_order_or_groups(name: str) -> None:
    op = known_ops()[name]
    x, packed, scale, _, _, bias, _ = inputs_of(op, 7)
    for arguments in ((x, packed, scale, None, None, bias, 8), (x, packed, scale[:, :1], None, None, bias, 0)):
        torch.testing.assert_close(
            op.reference(*arguments).double(),
            naive_quantized(*(cast(value, torch.float64) for value in arguments)),
            atol=2e-5,
            rtol=2e-5,
        )
