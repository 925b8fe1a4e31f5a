"""Our Philox against Triton's: a fused sampling kernel that calls tl.randint4x draws what kernels/sampling.py draws.

Runs on a GPU, or in Triton's interpreter.
"""

import pytest
import torch

from slipstream.kernels.sampling import philox

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")


@triton.jit
def write_words(words_4R, seed, positions_R, num_rows: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.arange(0, num_rows)
    w0, w1, w2, w3 = tl.randint4x(seed, tl.load(positions_R + rows))
    tl.store(words_4R + rows, w0)
    tl.store(words_4R + num_rows + rows, w1)
    tl.store(words_4R + 2 * num_rows + rows, w2)
    tl.store(words_4R + 3 * num_rows + rows, w3)


def test_the_words_are_tritons() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    seed, num_rows = 0x1234_5678_9ABC_DEF0, 64
    positions_R = torch.arange(num_rows, dtype=torch.int32, device=device)
    words_4R = torch.empty((4, num_rows), dtype=torch.int32, device=device)
    write_words[(1,)](words_4R, seed, positions_R, num_rows)

    counter_4R = torch.stack([positions_R.cpu().long(), *[torch.zeros(num_rows, dtype=torch.int64)] * 3])
    key_2R = torch.tensor([[seed & 0xFFFFFFFF], [seed >> 32]]).expand(2, num_rows)
    assert torch.equal(philox(counter_4R, key_2R), words_4R.cpu().long() & 0xFFFFFFFF)
