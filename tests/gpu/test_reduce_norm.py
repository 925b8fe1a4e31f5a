"""What ranks add up while they norm it: in memory that they show each other, which here is one device's."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from slipstream.kernels.collectives import Alone, ShownRows
from slipstream.kernels.registry import known_ops

PLACES, ROW_BYTES, WIDTH = 4, 512, 96
CALLS: dict[str, tuple[Any, ...]] = {
    "reduce_add_rms_norm": (1e-5, 0.0),
    "reduce_add_rms_norm_quantize": (1e-5, 1.0, 0.02, 0, "int8"),
}


class Shared:
    """The memory of all ranks."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._size = size
        self._first_told = 2 * PLACES * ROW_BYTES
        self._memory = torch.zeros(size, self._first_told + 4 * size * PLACES, dtype=torch.uint8, device=device)
        addresses = tuple(each.data_ptr() for each in self._memory)
        self.ranks = [
            Rank(ShownRows(addresses, torch.zeros(PLACES, dtype=torch.int32, device=device), rank, ROW_BYTES))
            for rank in range(size)
        ]

    def told(self, rank: int) -> Tensor:
        """int32 [size, PLACES]: to this rank, by each."""
        return self._memory[rank, self._first_told :].view(torch.int32).view(self._size, PLACES)

    def rows(self, rank: int, call: int, x: Tensor) -> Tensor:
        """Where a rank shows rows such as x in its call-th call."""
        places = self._memory[rank, : self._first_told].view(2, PLACES, ROW_BYTES)[call % 2, : len(x)]
        return places.view(x.dtype)[:, : x.shape[1]]


class Rank(Alone):
    def __init__(self, shown: ShownRows) -> None:
        self.shown = shown

    def shown_rows(self, x: Tensor) -> ShownRows:  # type: ignore[override]
        return self.shown


def expected_of(name: str, parts: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    total = sum(part.float() for part in parts).to(parts[0].dtype)  # type: ignore[union-attr]
    found: tuple[Tensor, ...] = known_ops()[name].reference(total, *arguments)
    return found


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours.float(), theirs.float(), atol=1.01 if ours.itemsize == 1 else 2e-2, rtol=1e-2)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", CALLS)
def test_a_rank_shows_its_part_and_reads_those_of_others(name: str, size: int, device: torch.device) -> None:
    """The others have told of their calls already, so that nobody waits."""
    generator = torch.Generator().manual_seed(3)
    shared, rank = Shared(size, device), size - 1
    weight, call = torch.rand(WIDTH, generator=generator).to(device), known_ops()[name].kernels["triton"].function
    for number, num_rows in enumerate((3, 1, 4), start=1):
        parts = [torch.randn(num_rows, WIDTH, generator=generator).to(device) for _ in range(size)]
        residual = torch.randn(num_rows, WIDTH, generator=generator).to(device)
        calls = shared.ranks[rank].shown.calls[:num_rows].clone() + 1  # of each row: some were not in every call
        for other in range(size - 1):
            for row in range(num_rows):
                shared.rows(other, int(calls[row]), parts[other])[row] = parts[other][row]
            shared.told(rank)[other, :num_rows] = calls
        found = call(parts[rank], residual, weight, *CALLS[name], ranks=shared.ranks[rank])
        assert_same(found, expected_of(name, parts, residual, weight, *CALLS[name]))
        assert torch.equal(shared.ranks[rank].shown.calls[:num_rows], calls)
        for other in range(size - 1):
            assert torch.equal(shared.told(other)[rank, :num_rows], calls), f"call {number}"
        for row in range(num_rows):
            assert torch.equal(shared.rows(rank, int(calls[row]), parts[rank])[row], parts[rank][row])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ranks_wait_for_each_other(dtype: torch.dtype) -> None:
    """As many streams of one GPU, which run at the same time; one of them is late, now this one, now that one."""
    device, size, num_calls = torch.device("cuda"), 2, 50
    streams = [torch.cuda.Stream() for _ in range(size)]
    rows = [1 + number % PLACES for number in range(num_calls)]
    parts = [[torch.randn(count, WIDTH, device=device).to(dtype) for count in rows] for _ in range(size)]
    residuals = [torch.randn(count, WIDTH, device=device).to(dtype) for count in rows]
    weight = torch.rand(WIDTH, device=device).to(dtype)
    call = known_ops()["reduce_add_rms_norm"].kernels["triton"].function

    def run(shared: Shared, *, is_late: bool) -> list[list[tuple[Tensor, ...]]]:
        found: list[list[tuple[Tensor, ...]]] = [[], []]
        torch.cuda.synchronize()
        for number in range(num_calls):
            for rank, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    if is_late and number % 3 == rank:
                        torch.cuda._sleep(100_000)
                    given = (parts[rank][number], residuals[number], weight, 1e-5, 0.0)
                    found[rank].append(call(*given, ranks=shared.ranks[rank]))
        torch.cuda.synchronize()
        return found

    # Kernels are loaded and memory is taken before anyone waits: either may wait for what runs on the GPU.
    everyone_told = Shared(size, device)
    for rank in range(size):
        everyone_told.told(rank).fill_(num_calls)
    run(everyone_told, is_late=False)
    found = run(Shared(size, device), is_late=True)
    for number, residual in enumerate(residuals):
        expected = expected_of("reduce_add_rms_norm", [part[number] for part in parts], residual, weight, 1e-5, 0.0)
        for each in found:
            assert_same(each[number], expected)
        assert torch.equal(found[0][number][0], found[1][number][0]), "to the last bit"
