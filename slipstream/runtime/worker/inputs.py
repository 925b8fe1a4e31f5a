"""A StepPlan becomes the tensors the graph reads: one array on the host, one copy to the device, a view for each."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from itertools import accumulate, chain
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from slipstream.runtime.worker.groups import group_input
from slipstream.runtime.worker.tables import BlockTables, Numbers
from slipstream.schema.step import PENDING, SequenceStep, StepPlan

Places = TypeVar("Places", int, Tensor)
Many = TypeVar("Many", Tensor, Numbers)

NO_SLOT = -1  # as an index: one beyond all slots
NO_TEXT = -1  # where no token follows, or none that the host knows
_FIRST_DRAFT = PENDING - 1

KnownText = Callable[[int], Sequence[int]]


def draft_name(place: Places) -> Places:
    """In token_ids: the slot's draft at this place, which the worker knows (drafts.py). And back."""
    return _FIRST_DRAFT - place


@dataclass(frozen=True)
class StepSizes:
    """How large a step's tensors are. A recorded step has fixed ones, which a plan fills in part."""

    num_tokens: int
    num_sequences: int
    num_rows: int  # of logits
    table_width: int  # KV blocks a sequence, in one group
    num_groups: int  # of KV layers
    num_nodes: int = 0  # of the trees that end it, their roots among them; 0 where nothing is drafted (ending.py)
    is_followed: bool = False  # by a drafter's own layer, which is told what follows each row

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By the graph's names: the fields of StepTensors, slots and block_tables once a group; where drafts begin.

        And of each token its sequence's slot in the worker; of each row of logits the slot that the step chooses a
        token for, or NO_SLOT, and where in its text that token will be. Drafts are named as draft_name says.

        Of each sequence whose step is late, its slot, or NO_SLOT: places are those of a step that is not (late.py).

        Where trees end it, of each sequence that samples its slot, the row of its tree's root among the step's and
        among those of logits, and its nodes (NO_SLOT and 0 of others); and what is known to follow each row.
        """
        shapes: dict[str, tuple[int, ...]] = {
            "step.token_ids": (self.num_tokens,),
            "step.positions": (self.num_tokens,),
            "step.query_starts": (self.num_sequences + 1,),
            "step.kv_lens": (self.num_sequences,),
            "step.tree_starts": (self.num_sequences,),
            "step.logit_rows": (self.num_rows,),
            "late_slots": (self.num_sequences,),
            "token_slots": (self.num_tokens,),
            "row_slots": (self.num_rows,),
            "row_positions": (self.num_rows,),
        }
        for group in range(self.num_groups):
            shapes[group_input("step.slots", group)] = (self.num_tokens,)
            shapes[group_input("step.block_tables", group)] = (self.num_sequences, self.table_width)
        if self.num_nodes:
            shapes |= dict.fromkeys(("trees.slots", "trees.roots", "trees.rows", "trees.sizes"), (self.num_sequences,))
        if self.is_followed:
            shapes["trees.next_ids"] = (self.num_tokens,)
        return shapes

    def with_trees(self, num_nodes: int, is_followed: bool) -> "StepSizes":
        return replace(self, num_nodes=num_nodes, is_followed=is_followed)

    def fit_into(self, others: "StepSizes") -> bool:
        return all(mine <= theirs for mine, theirs in zip(astuple(self), astuple(others), strict=True))

    @property
    def num_numbers(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes().values())

    def views(self, numbers: Many) -> dict[str, Many]:
        """The step's tensors, one after the other in `numbers`."""
        return {
            name: numbers[part] if len(shape) == 1 else numbers[part].reshape(shape)
            for name, part, shape in _layout(self)
        }


@lru_cache(maxsize=256)
def _layout(sizes: StepSizes) -> list[tuple[str, slice, tuple[int, ...]]]:
    """Of each tensor where in the numbers it lies."""
    shapes = sizes.shapes()
    ends = accumulate(math.prod(shape) for shape in shapes.values())
    return [
        (name, slice(end - math.prod(shape), end), shape)
        for (name, shape), end in zip(shapes.items(), ends, strict=True)
    ]


def rows_wanted(plan: StepPlan, wants_all_rows: Sequence[bool]) -> list[int]:
    """Rows of logits of each sequence: 0, those of the last token and its drafts, or its whole chunk."""
    return [
        sequence.num_tokens if all_rows else sequence.num_drafts + 1 if sequence.sample else 0
        for sequence, all_rows in zip(plan.sequences, wants_all_rows, strict=True)
    ]


def sizes_of(plan: StepPlan, logit_counts: Iterable[int], tables: BlockTables) -> StepSizes:
    """Exactly what the plan needs, without trees that end it."""
    longest = max(sequence.start + sequence.num_tokens + sequence.late_by for sequence in plan.sequences)
    width, num_rows = -(-(longest + tables.tokens_ahead) // tables.tokens_per_block), sum(logit_counts)
    return StepSizes(plan.num_tokens, len(plan.sequences), num_rows, width, tables.num_groups)


def fill_inputs(
    plan: StepPlan, logit_counts: Sequence[int], is_chosen: Sequence[bool], tables: BlockTables, sizes: StepSizes,
    out: Tensor, known: KnownText | None = None,
) -> None:  # fmt: skip
    """Write the plan, which `tables` have taken in, into `out`, int64 [sizes.num_numbers] on the host.

    is_chosen: of each sequence, whether the step chooses what follows its last token, and each of its drafts. known: of
    each slot the tokens that its text had when it came, where the step is followed.

    Where sizes are larger than the plan: tokens beyond its own belong to no sequence and are written to the null
    block, sequences beyond its own have no tokens, rows of logits beyond its own are of token 0.
    """
    numbers: Numbers = out.numpy()
    numbers.fill(0)
    columns = sizes.views(numbers)
    sequences, num_sequences, size = plan.sequences, len(plan.sequences), tables.tokens_per_block
    slots = _column((each.slot for each in sequences), num_sequences)
    starts = _column((each.start for each in sequences), num_sequences)
    lengths = _column((each.num_tokens for each in sequences), num_sequences)
    counts = np.array(logit_counts)
    ends, kv_lens = lengths.cumsum(), starts + lengths
    num_tokens = ends[-1]
    token_ids = chain.from_iterable((*each.token_ids, *map(draft_name, range(each.num_drafts))) for each in sequences)
    columns["step.token_ids"][:num_tokens] = _column(token_ids, num_tokens)
    positions = columns["step.positions"][:num_tokens]
    positions[:] = np.arange(num_tokens) + (kv_lens - ends).repeat(lengths)
    columns["step.query_starts"][1 : num_sequences + 1] = ends
    columns["step.query_starts"][num_sequences + 1 :] = num_tokens
    columns["step.kv_lens"][:num_sequences] = kv_lens
    num_nodes = _column((each.num_drafts + 1 for each in sequences), num_sequences)
    columns["step.tree_starts"][:num_sequences] = kv_lens - num_nodes
    row_ends = counts.cumsum()
    columns["step.logit_rows"][: row_ends[-1]] = np.arange(row_ends[-1]) + (ends - row_ends).repeat(counts)
    columns["late_slots"][:] = NO_SLOT
    if any(each.late_by for each in sequences):
        late = (each.slot if each.late_by else NO_SLOT for each in sequences)
        columns["late_slots"][:num_sequences] = _column(late, num_sequences)
    slot_of_token = columns["token_slots"][:num_tokens]
    slot_of_token[:] = slots.repeat(lengths)
    columns["token_slots"][num_tokens:] = NO_SLOT
    columns["row_slots"][:] = NO_SLOT
    chosen = num_nodes * np.array(is_chosen)
    chosen_ends = chosen.cumsum()
    rows = np.arange(chosen_ends[-1])
    last_rows = rows + (row_ends - chosen_ends).repeat(chosen)
    columns["row_slots"][last_rows] = slots.repeat(chosen)
    columns["row_positions"][last_rows] = rows + (kv_lens + 1 - chosen_ends).repeat(chosen)
    places, offsets = np.divmod(positions, size)
    for group in range(sizes.num_groups):
        columns[group_input("step.block_tables", group)][:num_sequences] = tables.of(group, slots, sizes.table_width)
        block_of_token = tables.block_of(group, slot_of_token, places)
        columns[group_input("step.slots", group)][:num_tokens] = block_of_token * size + offsets
    if sizes.num_nodes:
        samples = _column((each.sample for each in sequences), num_sequences).astype(bool)
        columns["trees.slots"][:] = NO_SLOT
        columns["trees.slots"][:num_sequences] = np.where(samples, slots, NO_SLOT)
        columns["trees.roots"][:num_sequences] = ends - num_nodes
        columns["trees.rows"][:num_sequences] = np.where(samples, row_ends - num_nodes, 0)
        columns["trees.sizes"][:num_sequences] = np.where(samples, num_nodes, 0)
    if sizes.is_followed:
        assert known is not None
        columns["trees.next_ids"][:] = NO_TEXT
        next_ids = chain.from_iterable(_following(each, known) for each in sequences)
        columns["trees.next_ids"][:num_tokens] = _column(next_ids, num_tokens)


def _following(step: SequenceStep, known: KnownText) -> Sequence[int]:
    """What follows each of a sequence's rows, as far as the host knows."""
    if step.sample:
        return [*step.token_ids[1:], *[NO_TEXT] * (1 + step.num_drafts)]
    end = step.start + len(step.token_ids)
    return [*step.token_ids[1:], *(known(step.slot)[end : end + 1] or [NO_TEXT])]  # a text that is pooled ends


def _column(values: Iterable[int], count: int) -> Numbers:
    return np.fromiter(values, np.int64, count)


def make_inputs(
    plan: StepPlan, logit_counts: Sequence[int], is_chosen: Sequence[bool], tables: BlockTables, device: torch.device,
    num_nodes: int = 0, known: KnownText | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The step's tensors on the device, exactly as large as the plan. known: where trees end it, as in fill_inputs."""
    sizes = sizes_of(plan, logit_counts, tables)
    if num_nodes:
        sizes = sizes.with_trees(num_nodes, known is not None)
    numbers = torch.empty(sizes.num_numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    fill_inputs(plan, logit_counts, is_chosen, tables, sizes, numbers, known)
    return sizes.views(numbers.to(device, non_blocking=True))
