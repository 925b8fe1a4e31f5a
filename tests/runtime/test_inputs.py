"""A plan as tensors, against what each of them is by its definition; block tables that live from step to step."""

import random

import numpy as np
import pytest
import torch

from slipstream.kernels.attention.metadata import STEP_SHAPES
from slipstream.runtime.worker.groups import group_input
from slipstream.runtime.worker.inputs import NO_SLOT, NO_TEXT, StepSizes, fill_inputs, make_inputs, sizes_of
from slipstream.runtime.worker.tables import BlockTables
from slipstream.schema.step import PENDING, SequenceStep, StepPlan
from tests.runtime.fake_worker import make_request

SIZE = 4  # tokens a block


class Slots:
    """Sequences that come, grow and leave, with the block tables that they should have."""

    def __init__(self, rng: random.Random, num_groups: int, num_slots: int) -> None:
        self.rng, self.num_groups, self.num_slots = rng, num_groups, num_slots
        self.lengths: dict[int, int] = {}
        self.rows: dict[int, list[tuple[int, ...]]] = {}

    def next_plan(self) -> StepPlan:
        rng = self.rng
        for slot in [slot for slot in self.lengths if rng.random() < 0.2]:
            del self.lengths[slot], self.rows[slot]
        chosen = rng.sample(range(self.num_slots), rng.randint(1, self.num_slots))
        return StepPlan(0, tuple(self._step(slot) for slot in chosen))

    def _step(self, slot: int) -> SequenceStep:
        rng, is_new = self.rng, slot not in self.lengths
        start = self.lengths.setdefault(slot, 0)
        rows = self.rows.setdefault(slot, [])
        token_ids = tuple(rng.randrange(PENDING, 100) for _ in range(rng.choice((1, 1, 1, 5, 19))))
        end = self.lengths[slot] = start + len(token_ids)
        changed = set(rng.sample(range(len(rows)), rng.randint(0, len(rows)))) if rng.random() < 0.3 else set()
        changed |= set(range(len(rows), -(-end // SIZE)))
        rows += [()] * (-(-end // SIZE) - len(rows))
        for place in changed:
            rows[place] = tuple(rng.randrange(1000) for _ in range(self.num_groups))
        return SequenceStep(
            slot, start, token_ids, sample=rng.random() < 0.7,
            table_changes=tuple((place, rows[place]) for place in sorted(changed)),
            new=make_request(str(slot)) if is_new else None, late_by=rng.choice((0, 0, 0, 3)),
        )  # fmt: skip


def expected(
    plan: StepPlan, counts: list[int], is_chosen: list[bool], slots: Slots, sizes: StepSizes, known: list[int]
) -> dict[str, list]:
    found: dict[str, list] = {name: [] for name in sizes.shapes()}
    found["step.query_starts"] = [0]
    for step, count, is_mine in zip(plan.sequences, counts, is_chosen, strict=True):
        first, end = len(found["step.token_ids"]), step.start + len(step.token_ids)
        if sizes.num_nodes:
            found["trees.slots"].append(step.slot if step.sample else NO_SLOT)
            found["trees.roots"].append(first + len(step.token_ids) - 1)
            found["trees.rows"].append(len(found["step.logit_rows"]) + count - 1 if step.sample else 0)
            found["trees.sizes"].append(int(step.sample))
        if sizes.is_followed:
            found["trees.next_ids"] += [
                *step.token_ids[1:],
                *(([] if step.sample else known[end : end + 1]) or [NO_TEXT]),
            ]
        found["step.token_ids"] += step.token_ids
        found["step.positions"] += range(step.start, end)
        found["token_slots"] += [step.slot] * len(step.token_ids)
        found["step.query_starts"].append(first + len(step.token_ids))
        found["step.kv_lens"].append(end)
        found["late_slots"].append(step.slot if step.late_by else NO_SLOT)
        found["step.tree_starts"].append(end - 1)
        found["step.logit_rows"] += range(first + len(step.token_ids) - count, first + len(step.token_ids))
        found["row_slots"] += [NO_SLOT] * (count - 1) + [step.slot if is_mine else NO_SLOT] if count else []
        found["row_positions"] += [0] * (count - 1) + [end if is_mine else 0] if count else []
        for group in range(slots.num_groups):
            table = [row[group] for row in slots.rows[step.slot]]
            found[group_input("step.block_tables", group)].append(table + [0] * (sizes.table_width - len(table)))
            found[group_input("step.slots", group)] += [
                table[p // SIZE] * SIZE + p % SIZE for p in range(step.start, end)
            ]
    return found


def padded(name: str, values: list, shape: tuple[int, ...], num_tokens: int) -> np.ndarray:
    fill = {
        "step.query_starts": num_tokens, "row_slots": NO_SLOT, "late_slots": NO_SLOT, "trees.slots": NO_SLOT,
        "trees.next_ids": NO_TEXT, "token_slots": NO_SLOT,
    }.get(name, 0)  # fmt: skip
    out = np.full(shape, fill)
    if values:
        out[: len(values)] = values
    return out


@pytest.mark.parametrize("num_groups", [1, 3])
def test_inputs_are_what_the_plans_say(num_groups: int) -> None:
    rng = random.Random(num_groups)
    slots = Slots(rng, num_groups, num_slots=5)
    tables = BlockTables(num_groups, 5, SIZE)
    for _ in range(60):
        plan = slots.next_plan()
        tables.update(plan)
        counts = [rng.choice((int(step.sample), len(step.token_ids))) for step in plan.sequences]
        is_chosen = [step.sample and rng.random() < 0.8 for step in plan.sequences]
        known = [rng.randrange(100) for _ in range(rng.randrange(60))]
        exact = sizes_of(plan, counts, tables).with_trees(*rng.choice(((0, False), (3, False), (3, True))))
        larger = StepSizes(
            *(each + rng.randint(0, 9) for each in list(vars(exact).values())[:-3]),
            num_groups,
            exact.num_nodes,
            exact.is_followed,
        )
        for sizes in (exact, larger):
            numbers = torch.full((sizes.num_numbers,), -77)
            fill_inputs(plan, counts, is_chosen, tables, sizes, numbers, lambda slot, known=known: known)
            wanted = expected(plan, counts, is_chosen, slots, sizes, known)
            for name, view in sizes.views(numbers).items():
                right = padded(name, wanted[name], sizes.shapes()[name], plan.num_tokens)
                assert np.array_equal(view.numpy(), right), name
        made = make_inputs(plan, counts, is_chosen, tables, torch.device("cpu"))
        assert {f"step.{name}" for name in STEP_SHAPES} <= set(made)


def test_a_slot_forgets_the_sequence_before() -> None:
    tables = BlockTables(1, 2, SIZE)
    long = SequenceStep(1, 0, (7,) * 9, True, ((0, (5,)), (1, (6,)), (2, (8,))), make_request("long"))
    short = SequenceStep(1, 0, (7,), True, ((0, (3,)),), make_request("short"))
    for step in (long, short):
        tables.update(StepPlan(0, (step,)))
    assert tables.of(0, np.array([1, 0]), 4).tolist() == [[3, 0, 0, 0], [0, 0, 0, 0]]
