"""What an op must move and multiply at least, whatever kernel computes it: the floor under a measurement.

Every input is read once and every output written once; the families below read or write less, or multiply. Sums and
functions of single numbers are not counted: they hide behind the bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slipstream.kernels.registry import known_ops

Given = Mapping[str, Tensor | None]  # inputs by the names of their schema
Attributes = Mapping[str, Any]


class Work(NamedTuple):
    num_bytes: int
    flops: int = 0
    dtype: torch.dtype | None = None  # of what is multiplied


def work_of(op: str, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor], attributes: Attributes) -> Work:
    """Of one call. Lengths of texts and ids of experts are read from the inputs; of outputs only shapes and dtypes."""
    arguments = known_ops()[op].tensor_arguments
    if any(argument.kind == "Tensor[]" for argument in arguments):
        return Work(_bytes_of(*inputs, *outputs))
    given = {argument.name: tensor for argument, tensor in zip(arguments, inputs, strict=False)}
    family = next((work for pattern, work in FAMILIES.items() if fnmatchcase(op, pattern)), _read_and_write)
    return family(given, outputs, attributes)


def _bytes_of(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _bytes_but(given: Given, *names: str) -> int:
    return _bytes_of(*(tensor for name, tensor in given.items() if name not in names))


def _need(given: Given, name: str) -> Tensor:
    tensor = given[name]
    assert tensor is not None
    return tensor


def _read_and_write(given: Given, outputs: Sequence[Tensor], attributes: Attributes) -> Work:
    return Work(_bytes_of(*given.values(), *outputs))


def _views(given: Given, outputs: Sequence[Tensor], attributes: Attributes) -> Work:
    return Work(0)


def _rows_of_a_table(given: Given, outputs: Sequence[Tensor], attributes: Attributes) -> Work:
    _, indices = given.values()
    return Work(_bytes_of(indices) + 2 * _bytes_of(*outputs))


def _kv_write(given: Given, outputs: Sequence[Tensor], attributes: Attributes) -> Work:
    kv_PNBKD = _need(given, "kv")
    written = len(_need(given, "slots")) * _bytes_of_token(kv_PNBKD)
    return Work(_bytes_but(given, "kv") + _bytes_of(*outputs) + written)


def _bytes_of_token(kv_PNBKD: Tensor) -> int:
    num_planes, _, _, num_kv_heads, head_dim = kv_PNBKD.shape
    return num_planes * num_kv_heads * head_dim * kv_PNBKD.itemsize


def _attention(given: Given, outputs: Sequence[Tensor], attributes: Attributes) -> Work:
    """Keys and values that some row sees are read once a sequence; each row multiplies those that it sees."""
    kv_PNBKD, window, sinks = _need(given, "kv"), attributes["window"], attributes.get("sink_tokens", 0)
    rows_S, kv_lens = _need(given, "query_starts").diff().tolist(), _need(given, "kv_lens").tolist()
    num_pairs = num_keys = 0
    for rows, kv_len in zip(rows_S, kv_lens, strict=True):
        past = kv_len - rows
        num_pairs += sum(min(place + 1, window or place + 1) for place in range(past, kv_len))
        first = max(0, past + 1 - (window - sinks)) if window else 0
        num_keys += (kv_len - first + min(sinks, first)) if rows else 0
    q_TX, head_dim = _need(given, "q"), kv_PNBKD.shape[4]
    num_bytes = _bytes_but(given, "kv") + _bytes_of(*outputs) + num_keys * _bytes_of_token(kv_PNBKD)
    flops = 2 * num_pairs * (q_TX.shape[1] // head_dim) * (head_dim + attributes["value_dim"])
    return Work(num_bytes, flops, q_TX.dtype)


def _linear(given: Given, outputs: Sequence[Tensor], attributes: Attributes) -> Work:
    x_MK = _need(given, "x")
    return Work(_bytes_of(*given.values(), *outputs), 2 * x_MK.numel() * outputs[0].shape[1], x_MK.dtype)


def _dense_product(given: Given, outputs: Sequence[Tensor], attributes: Attributes) -> Work:
    """Each number of the weight meets each row once: a router's, and a linear for each head."""
    x_TH = _need(given, "x")
    return Work(_bytes_of(*given.values(), *outputs), 2 * len(x_TH) * _need(given, "weight").numel(), x_TH.dtype)


def _experts(given: Given, outputs: Sequence[Tensor], attributes: Attributes) -> Work:
    """Of the weights only those of the experts that some token has chosen."""
    x_TH, ids_TK = _need(given, "x"), _need(given, "expert_ids")
    weights = [name for name in given if name.startswith(("gate", "up", "down"))]
    num_experts, width = _need(given, weights[0]).shape[:2]
    read = _bytes_of(*(given[name] for name in weights)) * len(ids_TK[ids_TK >= 0].unique()) // num_experts
    flops = 3 * 2 * ids_TK.numel() * width * x_TH.shape[1]
    return Work(_bytes_but(given, *weights) + _bytes_of(*outputs) + read, flops, x_TH.dtype)


def _experts_in_8_bits(given: Given, outputs: Sequence[Tensor], attributes: Attributes) -> Work:
    """Their activations are rounded to what their weights are."""
    return _experts(given, outputs, attributes)._replace(dtype=_need(given, "gate_packed").dtype)


# Ops by pattern; the first that fits counts.
FAMILIES: dict[str, Callable[[Given, Sequence[Tensor], Attributes], Work]] = {
    "split": _views,
    "embedding*": _rows_of_a_table,
    "select_rows": _rows_of_a_table,
    "*kv_write": _kv_write,
    "*attention": _attention,
    "linear*": _linear,
    "head_linear": _dense_product,
    "route_*": _dense_product,
    "experts_fp8": _experts_in_8_bits,
    "experts_w8a8": _experts_in_8_bits,
    "experts*": _experts,
}
