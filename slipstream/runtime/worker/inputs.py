"""A StepPlan becomes the tensors the graph reads."""

from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.runtime.worker.groups import group_input
from slipstream.schema.step import SequenceStep, StepPlan


@dataclass(frozen=True)
class StepInputs:
    tensors: dict[str, Tensor]  # by the graph's names: the fields of StepTensors, slots and block_tables once a group
    logit_counts: tuple[int, ...]  # rows of logits wanted for each sequence: 0, 1 (the last token) or its whole chunk


def make_inputs(plan: StepPlan, wants_all_rows: list[bool], block_size: int, device: torch.device) -> StepInputs:
    """wants_all_rows[i]: sequence i needs the logits of all its chunk (prompt logprobs), not only of the last token."""
    token_ids: list[int] = []
    positions: list[int] = []
    query_starts, logit_rows, logit_counts = [0], list[int](), list[int]()
    for sequence, all_rows in zip(plan.sequences, wants_all_rows, strict=True):
        first_row = len(token_ids)
        token_ids += sequence.token_ids
        positions += range(sequence.start, _end(sequence))
        query_starts.append(len(token_ids))
        rows = range(first_row if all_rows else len(token_ids) - sequence.sample, len(token_ids))
        logit_rows += rows
        logit_counts.append(len(rows))
    columns: dict[str, list[int] | list[list[int]]] = {
        "step.token_ids": token_ids,
        "step.positions": positions,
        "step.query_starts": query_starts,
        "step.kv_lens": [_end(sequence) for sequence in plan.sequences],
        "step.logit_rows": logit_rows,
    }
    for group in range(len(plan.sequences[0].block_tables)):
        columns[group_input("step.slots", group)] = _slots(plan, group, block_size)
        columns[group_input("step.block_tables", group)] = _padded_tables(plan, group)
    tensors = {name: torch.tensor(column, dtype=torch.int64, device=device) for name, column in columns.items()}
    return StepInputs(tensors, tuple(logit_counts))


def _end(sequence: SequenceStep) -> int:
    return sequence.start + len(sequence.token_ids)


def _slots(plan: StepPlan, group: int, block_size: int) -> list[int]:
    return [
        block_ids[position // block_size] * block_size + position % block_size
        for sequence in plan.sequences
        for block_ids in (sequence.block_tables[group],)
        for position in range(sequence.start, _end(sequence))
    ]


def _padded_tables(plan: StepPlan, group: int) -> list[list[int]]:
    tables = [sequence.block_tables[group] for sequence in plan.sequences]
    widest = max(map(len, tables))
    return [[*block_ids, *[0] * (widest - len(block_ids))] for block_ids in tables]
