"""Compiles the kernels that some calls need for a GPU that need not be there: python -m tests.gpu.ahead_of_time 90

The interpreter takes what the compiler refuses (a name that changes its shape in a loop, say), so this is run too.
Prints the shared memory of each kernel, which must fit the GPU's.
"""

import sys
from collections.abc import Callable, Set
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from slipstream.kernels.collectives import ShownRows
from slipstream.kernels.sampling import SlotTable
from slipstream.kernels.triton import attention, experts, largest, linear, ngrams, rope, router, rows, sampling, trees

MEASURED = 90  # benchmarks/; for other GPUs fewer calls show which instructions they lack
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


class Absent:
    """A driver of a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(capability: int) -> None:
    driver.set_active(Absent(capability))
    run: Callable[..., Any] = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        print(f"{self.__name__}: {kernel.metadata.shared} bytes")
        assert kernel.metadata.shared <= SHARED_BYTES[capability], self.__name__

    JITFunction.run = compile_only
    for module in (attention, experts, linear, rope, router, rows):
        module.starts_early = lambda device: capability >= 90
    attention.num_processors = lambda device: 132
    for call in (attend, attend_with_everything, place, sample, norm, draft):
        call()
    numbers = {torch.bfloat16, torch.int8, torch.uint8, torch.float8_e4m3fn}
    if capability != MEASURED:
        fewer = numbers - ({torch.float8_e4m3fn} if capability < 89 else {torch.int8})
        multiply(fewer, (1, 300))
        mix(fewer - {torch.uint8})
        return
    for call in (attend_latent, attend_streaming, attend_tree, route):
        call()
    keep_in_8_bits(torch.int8)
    keep_in_8_bits(torch.float8_e4m3fn)
    multiply(numbers, (1, 8, 64, 300))
    mix(numbers | {torch.float32})


def attend() -> None:
    """A generation step, in splits; a prompt."""
    for num_tokens in (1, 2048):
        _attend(num_tokens, 1)


def attend_with_everything() -> None:
    _attend(
        200, 20, head_dim=80, window=100, soft_cap=30.0, alibi_slopes_H=torch.ones(32), sinks_H=torch.ones(32),
        block_size=64,
    )  # fmt: skip


def attend_streaming() -> None:
    for num_tokens in (1, 2048):
        sink_q_TX = torch.empty(num_tokens, 32 * 128, dtype=torch.bfloat16)
        _attend(num_tokens, 1, window=1024, sink_q_TX=sink_q_TX, sink_tokens=4)


def attend_tree() -> None:
    for num_tokens, num_sequences in ((26, 1), (2048, 32)):
        places = torch.zeros(num_tokens, dtype=torch.int64)
        tree = places, places[:num_sequences], torch.zeros(num_tokens, 1, dtype=torch.int64)
        _attend(num_tokens, num_sequences, window=4096, alibi_slopes_H=torch.ones(32), tree=tree)


def draft() -> None:
    """Trees of a word of nodes, of two, and chains."""
    for num_drafts, can_branch in ((8, True), (80, True), (8, False)):
        shape = (5, num_drafts), (5, num_drafts), (5, 1 + num_drafts), (5, 1 + num_drafts, 1 + num_drafts // 64)
        tables = trees.TreeTables(*(torch.zeros(each, dtype=torch.int64) for each in shape), can_branch)
        slots_S, drafts_SN = torch.zeros(4, dtype=torch.int64), torch.zeros(4, num_drafts, dtype=torch.int64)
        trees.keep(slots_S, drafts_SN, drafts_SN, tables, 100)
        trees.fill(drafts_SN.flatten(), drafts_SN.flatten(), drafts_SN.flatten(), tables, -2)
        trees.accept(drafts_SN.flatten(), slots_S, slots_S, slots_S, 1 + num_drafts, tables, slots_S, slots_S)
    for dtype in (torch.bfloat16, torch.int8):
        kv = [torch.empty(2, 4, 32, 8, 128, dtype=dtype)] * 3
        trees.move(kv, slots_S, drafts_SN, slots_S, slots_S, drafts_SN)
    texts_XL = ngrams.new_texts(4, 3000, torch.device("cpu"))
    ngrams.write(texts_XL, slots_S, slots_S, slots_S)
    ngrams.find(texts_XL, slots_S, slots_S, slots_S, 2, 8)
    for dtype, size, count in ((torch.bfloat16, 8192, 10), (torch.float32, 128256, 50), (torch.float32, 64, 8)):
        largest.largest(torch.empty(4, size, dtype=dtype), count)


def attend_latent() -> None:
    _attend(64, 64, head_dim=576, value_dim=512, num_planes=1, num_kv_heads=1)


def _attend(
    num_tokens: int, num_sequences: int, *, head_dim: int = 128, num_planes: int = 2, num_kv_heads: int = 8,
    block_size: int = 32, kv_dtype: torch.dtype = torch.bfloat16, **options: Any,
) -> None:  # fmt: skip
    q_TX = torch.empty(num_tokens, 32 * head_dim, dtype=torch.bfloat16)
    kv = torch.empty(num_planes, 4, block_size, num_kv_heads, head_dim, dtype=kv_dtype)
    starts, lens = torch.zeros(num_sequences + 1, dtype=torch.int64), torch.zeros(num_sequences, dtype=torch.int64)
    tables = torch.zeros(num_sequences, 100, dtype=torch.int64)
    given = {
        "alibi_slopes_H": None,
        "sinks_H": None,
        "kv_scales_PK": None,
        "scale": 0.1,
        "window": 0,
        "soft_cap": 0.0,
        "value_dim": head_dim,
    }
    attention.attention(q_TX, kv, starts, lens, tables, **(given | options))


def keep_in_8_bits(dtype: torch.dtype) -> None:
    for num_tokens in (1, 2048):
        _attend(num_tokens, 1, kv_dtype=dtype, kv_scales_PK=torch.ones(2, 8))
    _attend(64, 64, head_dim=576, value_dim=512, num_planes=1, num_kv_heads=1, kv_dtype=dtype,
            kv_scales_PK=torch.ones(1, 1))  # fmt: skip
    _place(dtype, torch.ones(2, 8))


def place() -> None:
    _place(torch.bfloat16, None)
    angles = torch.empty(3, 64)
    rope.rope(torch.empty(3, 6144, dtype=torch.bfloat16)[:, :4096], angles, angles, 128)
    rope.rope_pairs(torch.empty(3, 4096, dtype=torch.bfloat16), angles, angles)


def _place(kv_dtype: torch.dtype, kv_scales: torch.Tensor | None) -> None:
    q, k, v = torch.empty(3, 6144, dtype=torch.bfloat16).split([4096, 1024, 1024], 1)
    kv, angles = torch.empty(2, 4, 32, 8, 128, dtype=kv_dtype), torch.empty(3, 64)
    slots = torch.zeros(3, dtype=torch.int64)
    rope.rope_kv_write(q, k, v, angles, angles, kv, slots, kv_scales)
    rope.kv_write(k, v, kv, slots, kv_scales)


def sample() -> None:
    """One row of the step's logits; many rows of edited ones."""
    table = SlotTable(4, torch.device("cpu"))
    for num_rows, dtype in ((1, torch.bfloat16), (64, torch.float32)):
        slots = positions = torch.zeros(num_rows, dtype=torch.int64)
        logits = torch.empty(num_rows, 128256, dtype=dtype)
        sampling.choose(logits, slots, positions, table.numbers, table.last_token)
    sampling.fill_pending(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), table.last_token)


def norm() -> None:
    x_TH, weight_H = torch.empty(3, 4096, dtype=torch.bfloat16), torch.empty(4096, dtype=torch.bfloat16)
    rows.norm(x_TH, x_TH, weight_H, None, 1e-5)
    shown = ShownRows((1 << 40, 1 << 41), torch.empty(128, dtype=torch.int32), 0, 32 << 10)
    rows.norm(x_TH, x_TH, weight_H, None, 1e-5, shown=shown)
    rows.activate(x_TH, "silu", is_gated=True, how=rows.Quantized(0.0, 0, "int8"))


def multiply(numbers: Set[torch.dtype], rows: tuple[int, ...]) -> None:
    """Weights of these numbers; one row, few, and a prompt."""
    wide, e4m3 = torch.bfloat16, torch.float8_e4m3fn
    kinds = [(wide, wide, 0), (torch.int8, wide, 0), (torch.uint8, wide, 128), (torch.int8, torch.int8, 0)]
    for packed, x, group in [*kinds, (e4m3, e4m3, 128)]:
        if packed not in numbers:
            continue
        weight_NK = torch.empty(6144, 2048 if packed == torch.uint8 else 4096, dtype=packed)
        scale_NG = None if packed == wide else torch.empty(6144, 32 if group else 1)
        for num_rows in rows:
            x_scale_MG = torch.empty(num_rows, 32 if group else 1) if x != wide else None
            weight = linear.Weight(weight_NK, scale_NG, None, group, x_scale_MG, group if x != wide else 0)
            linear.product(torch.empty(num_rows, 4096, dtype=x), weight, None, wide)
    if torch.uint8 in numbers:  # a row of fewer words than are fetched at once
        short = linear.Weight(torch.empty(640, 256, dtype=torch.uint8), torch.empty(640, 4), None, 128)
        linear.product(torch.empty(9, 512, dtype=wide), short, None, wide)
        for num_in in (2048, 3072):  # a row, in parts that end with it
            row = linear.Weight(
                torch.empty(16384, num_in // 2, dtype=torch.uint8), torch.empty(16384, num_in // 128), None, 128
            )
            linear.product(torch.empty(1, num_in, dtype=wide), row, None, wide)
    for num_out, num_in in ((576, 576), (3072, 576), (576, 1536), (8192, 576)):
        little = linear.Weight(torch.empty(num_out, num_in, dtype=wide))
        linear.product(torch.empty(9, num_in, dtype=wide), little, None, wide)
    exact = linear.Weight(torch.empty(6144, 4096))
    linear.product(torch.empty(3, 4096), exact, None, torch.float32, is_batch_invariant=True)


def route() -> None:
    x_TH, weight_EH = torch.empty(3, 2048, dtype=torch.bfloat16), torch.empty(256, 2048, dtype=torch.bfloat16)
    router.softmax(x_TH, weight_EH, None, 8, True)
    router.sigmoid(x_TH, weight_EH, torch.empty(256), 8, 8, 4, True, 2.5)


def mix(numbers: Set[torch.dtype]) -> None:
    """Experts of these numbers; one token and a prompt."""
    wide, e4m3 = torch.bfloat16, torch.float8_e4m3fn
    kinds = [(wide, wide, 0), (torch.int8, wide, 0), (torch.uint8, wide, 128), (torch.int8, torch.int8, 0)]
    for packed, x, group in [*kinds, (torch.float32, torch.float32, 0), (e4m3, e4m3, 128)]:
        if packed in numbers:
            _mix(packed, x, group)


def _mix(packed: torch.dtype, x: torch.dtype, group: int) -> None:
    def weight(num_out: int, num_in: int) -> experts.Weight:
        words_ENK = torch.empty(8, num_out, num_in // 2 if packed == torch.uint8 else num_in, dtype=packed)
        scale_ENG = None if packed.itemsize > 1 else torch.empty(8, num_out, num_in // group if group else 1)
        return experts.Weight(words_ENK, scale_ENG, None, group, None, group if x == packed else 0)

    def quantize(x_MK: Tensor) -> tuple[Tensor, Tensor | None]:
        num_groups = x_MK.shape[1] // group if group else 1
        return x_MK.to(x), None if x.itemsize > 1 else torch.empty(len(x_MK), num_groups)

    weights = weight(768, 2048), weight(768, 2048), weight(2048, 768)
    for num_tokens in (1, 1024):
        x_TH = torch.empty(num_tokens, 2048, dtype=x if x.itemsize == 4 else torch.bfloat16)
        shares_TK, ids_TK = torch.empty(num_tokens, 4), torch.zeros(num_tokens, 4, dtype=torch.int64)
        activation = experts.Activation(1.0, 7.0, 0.0)
        experts.experts(x_TH, shares_TK, ids_TK, weights, (None,) * 3, activation, quantize)


if __name__ == "__main__":
    main(int(sys.argv[1]))
