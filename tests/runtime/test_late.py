"""Late steps: moved on by what the steps before have accepted, they are those that begin there."""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from slipstream.runtime.worker.inputs import fill_inputs, sizes_of
from slipstream.runtime.worker.late import move_on
from slipstream.runtime.worker.tables import BlockTables
from slipstream.schema.step import PENDING, SequenceStep, StepPlan
from tests.runtime.fake_worker import make_request

NUM_SLOTS, SIZE = 6, 4
MoveOn = Callable[[Mapping[str, Tensor], Tensor, int, int], None]


def check(seed: int, num_groups: int, move: MoveOn, device: torch.device) -> None:
    """Some steps of a plan are late; others have a chunk of a prompt, and rows and sequences are to spare."""
    rng = random.Random(seed)
    tables = BlockTables(num_groups, NUM_SLOTS, SIZE)
    accepted = [rng.randrange(4) for _ in range(NUM_SLOTS + 1)]
    late, on_time = [], []
    for slot in rng.sample(range(NUM_SLOTS), rng.randint(1, NUM_SLOTS)):
        start, late_by, num_drafts = rng.randrange(20), rng.choice((0, 3)), rng.randrange(4)
        token_ids = (PENDING,) if late_by else tuple(range(rng.randint(1, 5)))
        blocks = tuple((place, tuple(rng.randrange(1, 99) for _ in range(num_groups))) for place in range(9))
        step = SequenceStep(
            slot, start, token_ids, sample=True, table_changes=blocks, new=make_request("a"), num_drafts=num_drafts,
            late_by=late_by,
        )  # fmt: skip
        late.append(step)
        on_time.append(step._replace(start=start + (accepted[slot] if late_by else 0), late_by=0))
    plans = StepPlan(0, tuple(late)), StepPlan(0, tuple(on_time))
    tables.update(plans[0])
    counts, is_chosen = [1 + step.num_drafts for step in late], [rng.random() < 0.8 for _ in late]
    exact = sizes_of(plans[0], counts, tables)
    spare = rng.choice((0, 3))
    sizes = replace(
        exact, num_tokens=exact.num_tokens + spare, num_sequences=len(late) + spare, num_rows=sum(counts) + spare
    )
    found, expected = (torch.empty(sizes.num_numbers, dtype=torch.int64) for _ in plans)
    for plan, numbers in zip(plans, (found, expected), strict=True):
        fill_inputs(plan, counts, is_chosen, tables, sizes, numbers)
    moved = found.to(device)
    move(sizes.views(moved), torch.tensor(accepted, device=device), num_groups, SIZE)
    right = sizes.views(expected)
    for name, view in sizes.views(moved.cpu()).items():
        if name == "row_positions":
            is_mine = right["row_slots"] >= 0
            assert torch.equal(view[is_mine], right[name][is_mine])
        elif name != "late_slots":
            assert torch.equal(view, right[name]), name


@pytest.mark.parametrize("seed", range(40))
def test_they_are_moved_on(seed: int) -> None:
    check(seed, 1 + seed % 3, partial(move_on, can_branch=seed % 2 == 0), torch.device("cpu"))
