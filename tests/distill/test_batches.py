"""Batches of an epoch: each text once, beside others of about its length, by chance, and of equal seeds the same."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from slipstream.distill.texts import Text
from slipstream.distill.train import Data, Loop, Settings

LENGTHS = [20 + index * 37 % 180 for index in range(2500)]


def loop_of(lengths: list[int], batch_size: int, seed: int = 0) -> tuple[Loop, Data]:
    data = Data([Text([1] * 8, [2] * (length - 8)) for length in lengths], None, torch.device("cpu"))
    settings = Settings(method="", options={}, num_epochs=3, learning_rate=0.1, batch_size=batch_size, seed=seed)
    return Loop(nn.Linear(1, 1), data, settings, Path(), ""), data  # type: ignore[arg-type]


def epochs_of(loop: Loop) -> list[list[list[int]]]:
    steps = [loop._indices(step).tolist() for step in range(loop._total)]
    return [steps[first : first + loop._per_epoch] for first in range(0, loop._total, loop._per_epoch)]


def padded(lengths: list[int], batches: list[list[int]]) -> int:
    return sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)


@pytest.mark.parametrize(("num_texts", "batch_size"), [(2, 4), (64, 12), (341, 20), (343, 20), (2500, 1), (2500, 32)])
def test_each_text_is_in_one_batch_of_an_epoch(num_texts: int, batch_size: int) -> None:
    loop, data = loop_of(LENGTHS[:num_texts], batch_size)
    trained = data.trained.tolist()
    for batches in epochs_of(loop):
        assert sorted(index for batch in batches for index in batch) == trained
        assert sorted(map(len, batches), reverse=True)[:-1] == [batch_size] * (len(batches) - 1)


def test_texts_of_a_batch_are_about_as_long_as_each_other() -> None:
    loop, data = loop_of(LENGTHS, 32)
    at_random = [batch.tolist() for batch in data.trained[torch.randperm(len(data.trained))].split(32)]
    tokens = sum(LENGTHS[index] for index in data.trained.tolist())
    for batches in epochs_of(loop):
        assert padded(LENGTHS, at_random) > 1.6 * tokens and padded(LENGTHS, batches) < 1.08 * tokens
    assert data.held_out.tolist() == sorted(range(0, 2500, 16), key=lambda index: LENGTHS[index])


def test_order_and_company_are_chance_of_seed_and_epoch() -> None:
    first, second, third = epochs_of(loop_of(LENGTHS, 32)[0])
    assert not {*map(frozenset, first)} & {*map(frozenset, second)} and second != third
    longest = torch.tensor([max(LENGTHS[index] for index in batch) for batch in first])
    assert abs(rank_correlation(longest, torch.arange(len(longest)))) < 0.3
    assert epochs_of(loop_of(LENGTHS, 32)[0]) == [first, second, third]
    assert epochs_of(loop_of(LENGTHS, 32, seed=1)[0])[0] != first

    again, _ = loop_of(LENGTHS, 32)
    for step in (again._per_epoch + 3, 2, again._total - 1, again._per_epoch + 3):  # as runs that go on ask for them
        epoch, place = divmod(step, again._per_epoch)
        assert again._indices(step).tolist() == [first, second, third][epoch][place]


def rank_correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.argsort().argsort(), other]).double())[0, 1])
