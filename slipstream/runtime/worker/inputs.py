"""A StepPlan becomes the tensors the graph reads."""

from dataclasses import dataclass

import torch

from slipstream.kernels.attention.metadata import StepTensors
from slipstream.schema.step import SequenceStep, StepPlan


@dataclass(frozen=True)
class StepInputs:
    tensors: StepTensors
    logit_counts: tuple[int, ...]  # rows of logits wanted for each sequence: 0, 1 (the last token) or its whole chunk


def make_inputs(plan: StepPlan, wants_all_rows: list[bool], block_size: int, device: torch.device) -> StepInputs:
    """wants_all_rows[i]: sequence i needs the logits of all its chunk (prompt logprobs), not only of the last token."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    query_starts, logit_rows, logit_counts = [0], list[int](), list[int]()
    for sequence, all_rows in zip(plan.sequences, wants_all_rows, strict=True):
        first_row, end = len(token_ids), sequence.start + len(sequence.token_ids)
        token_ids += sequence.token_ids
        positions += range(sequence.start, end)
        slots += _slots(sequence, end, block_size)
        query_starts.append(len(token_ids))
        rows = range(first_row if all_rows else len(token_ids) - sequence.sample, len(token_ids))
        logit_rows += rows
        logit_counts.append(len(rows))
    widest = max(len(sequence.block_ids) for sequence in plan.sequences)
    tables = [[*sequence.block_ids, *[0] * (widest - len(sequence.block_ids))] for sequence in plan.sequences]
    kv_lens = [sequence.start + len(sequence.token_ids) for sequence in plan.sequences]
    columns = (token_ids, positions, slots, query_starts, kv_lens, tables, logit_rows)
    tensors = StepTensors(*(torch.tensor(column, dtype=torch.int64, device=device) for column in columns))
    return StepInputs(tensors, tuple(logit_counts))


def _slots(sequence: SequenceStep, end: int, block_size: int) -> list[int]:
    block_ids = sequence.block_ids
    return [block_ids[p // block_size] * block_size + p % block_size for p in range(sequence.start, end)]
