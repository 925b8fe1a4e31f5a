"""A StepPlan becomes the tensors the graph reads: one array on the host, one copy to the device, a view for each."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from slipstream.runtime.worker.groups import group_input
from slipstream.schema.step import StepPlan

NO_SLOT = -1  # as an index: one beyond all slots


@dataclass(frozen=True)
class StepSizes:
    """How large a step's tensors are. A recorded step has fixed ones, which a plan fills in part."""

    num_tokens: int
    num_sequences: int
    num_rows: int  # of logits
    table_width: int  # KV blocks a sequence, in one group
    num_groups: int  # of KV layers

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By the graph's names: the fields of StepTensors, slots and block_tables once a group.

        And of each token and row of logits the sequence's slot in the worker; NO_SLOT where nothing is sampled.
        """
        shapes: dict[str, tuple[int, ...]] = {
            "step.token_ids": (self.num_tokens,),
            "step.positions": (self.num_tokens,),
            "step.query_starts": (self.num_sequences + 1,),
            "step.kv_lens": (self.num_sequences,),
            "step.logit_rows": (self.num_rows,),
            "token_slots": (self.num_tokens,),
            "row_slots": (self.num_rows,),
        }
        for group in range(self.num_groups):
            shapes[group_input("step.slots", group)] = (self.num_tokens,)
            shapes[group_input("step.block_tables", group)] = (self.num_sequences, self.table_width)
        return shapes

    @property
    def num_numbers(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes().values())

    def views(self, numbers: Tensor) -> dict[str, Tensor]:
        """The step's tensors, one after the other in `numbers`."""
        found, start = {}, 0
        for name, shape in self.shapes().items():
            end = start + math.prod(shape)
            found[name] = numbers[start:end].view(shape)
            start = end
        return found


def rows_wanted(plan: StepPlan, wants_all_rows: Sequence[bool]) -> list[int]:
    """Rows of logits of each sequence: 0, 1 (the last token) or its whole chunk."""
    return [
        len(sequence.token_ids) if all_rows else int(sequence.sample)
        for sequence, all_rows in zip(plan.sequences, wants_all_rows, strict=True)
    ]


def sizes_of(plan: StepPlan, logit_counts: Iterable[int]) -> StepSizes:
    """Exactly what the plan needs."""
    tables = plan.sequences[0].block_tables
    width = max(len(block_ids) for sequence in plan.sequences for block_ids in sequence.block_tables)
    return StepSizes(plan.num_tokens, len(plan.sequences), sum(logit_counts), width, len(tables))


def fill_inputs(plan: StepPlan, logit_counts: Sequence[int], block_size: int, sizes: StepSizes, out: Tensor) -> None:
    """Write the plan into `out`, int64 [sizes.num_numbers] on the host.

    Where sizes are larger than the plan: tokens beyond its own belong to no sequence and are written to the null
    block, sequences beyond its own have no tokens, rows of logits beyond its own are of token 0.
    """
    out.zero_()
    columns = {name: view.numpy() for name, view in sizes.views(out).items()}
    num_tokens, num_sequences = plan.num_tokens, len(plan.sequences)
    lengths = np.array([len(sequence.token_ids) for sequence in plan.sequences])
    starts = np.array([sequence.start for sequence in plan.sequences])
    ends = lengths.cumsum()  # in the step
    columns["step.token_ids"][:num_tokens] = list(chain.from_iterable(each.token_ids for each in plan.sequences))
    positions = columns["step.positions"][:num_tokens]
    positions[:] = np.arange(num_tokens) + (starts + lengths - ends).repeat(lengths)
    columns["step.query_starts"][1 : num_sequences + 1] = ends
    columns["step.query_starts"][num_sequences + 1 :] = num_tokens
    columns["step.kv_lens"][:num_sequences] = starts + lengths
    counts = np.array(logit_counts)
    rows = np.arange(counts.sum()) + (ends - counts.cumsum()).repeat(counts)
    columns["step.logit_rows"][: len(rows)] = rows
    worker_slots = np.array([sequence.slot for sequence in plan.sequences])
    columns["token_slots"][:num_tokens] = worker_slots.repeat(lengths)
    columns["row_slots"][:] = NO_SLOT
    samples = np.array([sequence.sample for sequence in plan.sequences])
    columns["row_slots"][counts.cumsum()[samples] - 1] = worker_slots[samples]
    sequence_of_token = np.arange(num_sequences).repeat(lengths)
    for group in range(sizes.num_groups):
        table = columns[group_input("step.block_tables", group)]
        for index, sequence in enumerate(plan.sequences):
            block_ids = sequence.block_tables[group]
            table[index, : len(block_ids)] = block_ids
        block_of_token = table[sequence_of_token, positions // block_size]
        slots = columns[group_input("step.slots", group)]
        slots[:num_tokens] = block_of_token * block_size + positions % block_size


def make_inputs(
    plan: StepPlan, logit_counts: Sequence[int], block_size: int, device: torch.device
) -> dict[str, Tensor]:
    """The step's tensors on the device, exactly as large as the plan."""
    sizes = sizes_of(plan, logit_counts)
    numbers = torch.empty(sizes.num_numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    fill_inputs(plan, logit_counts, block_size, sizes, numbers)
    return sizes.views(numbers.to(device, non_blocking=True))
