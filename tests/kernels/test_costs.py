"""Bytes and FLOPs of each family of ops, counted here one row, one key and one number at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.kernels.costs import Work, work_of
from slipstream.kernels.registry import known_ops


def work(name: str, *inputs: Tensor | list[Tensor] | None, **attributes: Any) -> Work:
    """Of a real call, whose outputs the reference makes."""
    result = known_ops()[name].reference(*inputs, **attributes)
    outputs = [] if result is None else [result] if isinstance(result, Tensor) else list(result)
    tensors = inputs[0] if isinstance(inputs[0], list) else inputs
    return work_of(name, tensors, outputs, attributes)  # type: ignore[arg-type]


def floats(*shape: int) -> Tensor:
    return torch.randn(shape)


def test_what_is_read_once_and_written_once() -> None:
    assert work("add", floats(3, 5), floats(3, 5)) == Work(4 * 3 * 15)
    assert work("rms_norm", floats(3, 8), floats(8), eps=1e-5, weight_offset=0.0) == Work(4 * (24 + 8 + 24))
    assert work("concat", [floats(2, 4), floats(3, 4)]) == Work(4 * 2 * 20)
    assert work("split", floats(3, 8), sizes=[2, 6]).num_bytes == 0


def test_rows_of_a_table() -> None:
    ids = torch.tensor([3, 1, 3])
    assert work("embedding", floats(100, 8), ids) == Work(3 * 8 + 2 * 3 * 8 * 4)
    assert work("select_rows", floats(100, 8), ids) == Work(3 * 8 + 2 * 3 * 8 * 4)


def test_products() -> None:
    expected = Work(4 * (3 * 8 + 5 * 8 + 5 + 3 * 5), 2 * 3 * 5 * 8, torch.float32)
    assert work("linear", floats(3, 8), floats(5, 8), floats(5)) == expected
    packed, scale = torch.zeros(5, 32, dtype=torch.uint8), torch.ones(5, 2)
    found = work("linear_w4a16", floats(3, 64), packed, scale, None, None, None, group_size=32)
    assert found == Work(4 * 3 * 64 + 5 * 32 + 4 * 10 + 4 * 3 * 5, 2 * 3 * 5 * 64, torch.float32)
    x = torch.zeros(3, 64, dtype=torch.int8)
    how = {"group_size": 0, "input_group_size": 0, "dtype": "float32"}
    found = work(
        "linear_w8a8", x, torch.ones(3, 1), torch.zeros(5, 64, dtype=torch.int8), torch.ones(5, 1), None, None, **how
    )
    assert found == Work(3 * 64 + 12 + 5 * 64 + 20 + 4 * 3 * 5, 2 * 3 * 5 * 64, torch.int8)
    # Two heads, each from 4 numbers to 3.
    found = work("head_linear", floats(7, 8), floats(6, 4), num_heads=2, is_transposed=False)
    assert found.flops == 2 * 7 * 2 * 4 * 3
    found = work("route_softmax", floats(7, 8), floats(4, 8), None, top_k=2, is_normalized=True)
    assert found == Work(4 * (7 * 8 + 4 * 8 + 7 * 2) + 8 * 7 * 2, 2 * 7 * 4 * 8, torch.float32)


def test_experts_that_nobody_chose_are_not_read() -> None:
    x, shares, ids = floats(3, 8), torch.ones(3, 2), torch.tensor([[0, 2], [2, 0], [0, 2]])
    weights = floats(4, 6, 8), floats(4, 6, 8), floats(4, 8, 6)
    found = work("experts", x, shares, ids, *weights, None, None, None, alpha=1.0, limit=0.0, up_offset=0.0)
    activations = 2 * x.nbytes + shares.nbytes + ids.nbytes
    assert found == Work(activations + 2 * 3 * 6 * 8 * 4, 2 * 6 * 3 * 6 * 8, torch.float32)


def test_experts_of_8_bits_multiply_8_bits() -> None:
    x, shares, ids = floats(1, 8), torch.ones(1, 1), torch.tensor([[1]])
    shapes = ((2, 6, 8), (2, 6, 1)), ((2, 6, 8), (2, 6, 1)), ((2, 8, 6), (2, 8, 1))
    parts = [part for packed, scale in shapes for part in (torch.ones(packed, dtype=torch.int8), floats(*scale), None)]
    how = {"alpha": 1.0, "limit": 0.0, "up_offset": 0.0, "group_size": 0, "input_scale": 0.0, "input_group_size": 0}
    assert work("experts_w8a8", x, shares, ids, *parts, None, None, None, **how).dtype == torch.int8
    assert work("experts_w8a16", x, shares, ids, *parts, None, None, None, **how).dtype == torch.float32


def test_writing_keys_and_values_leaves_the_rest_of_the_cache_alone() -> None:
    kv, slots = torch.zeros(2, 50, 4, 2, 8), torch.tensor([3, 9, 11])
    assert work("kv_write", floats(3, 16), floats(3, 16), kv, slots, None) == Work(4 * 2 * 2 * 3 * 16 + 3 * 8)
    kv = torch.zeros(2, 50, 4, 2, 8, dtype=torch.int8)
    scales = torch.ones(2, 2)
    assert work("kv_write", floats(3, 16), floats(3, 16), kv, slots, scales) == Work(2 * 4 * 48 + 24 + 16 + 2 * 48)


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (5, 0), (1, 0), (6, 2)])
def test_attention_reads_what_some_row_sees_and_multiplies_what_each_row_sees(window: int, sinks: int) -> None:
    chunks = [(1, 9), (3, 0), (0, 4), (4, 6)]  # rows, tokens before them
    heads, kv_heads, head_dim, value_dim = 4, 2, 8, 6
    num_rows = sum(rows for rows, _ in chunks)
    q, kv = floats(num_rows, heads * head_dim), torch.zeros(1, 20, 4, kv_heads, head_dim)
    starts = torch.tensor([0, *(rows for rows, _ in chunks)]).cumsum(0)
    lens = torch.tensor([rows + past for rows, past in chunks])
    tables = torch.arange(16).view(4, 4)
    attributes = {"scale": 1.0, "window": window, "soft_cap": 0.0, "value_dim": value_dim}
    if sinks:
        found = work("streaming_attention", q, q, kv, starts, lens, tables, None, **attributes, sink_tokens=sinks)
    else:
        found = work("attention", q, kv, starts, lens, tables, None, None, None, **attributes)

    pairs, keys = 0, set()
    for sequence, (rows, past) in enumerate(chunks):
        for position in range(past, past + rows):
            for key in range(position + 1):
                if not window or key < sinks or key > position - (window - sinks):
                    pairs += 1
                    keys.add((sequence, key))
    others = sum(each.nbytes for each in (q, starts, lens, tables)) + (q.nbytes if sinks else 0)
    assert found.num_bytes == others + num_rows * heads * value_dim * 4 + len(keys) * kv_heads * head_dim * 4
    assert found.flops == 2 * pairs * heads * (head_dim + value_dim)
