"""Outline: the plan of a step in the making."""

from dataclasses import dataclass, field

from slipstream.runtime.sequence import Sequence
from slipstream.schema.step import PENDING, BlockCopy, BlockLoad, BlockSave, SequenceStep


@dataclass(slots=True)
class Outline:
    budget: int  # tokens that may still be added
    sequences: list[Sequence] = field(default_factory=list)
    steps: list[SequenceStep] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    loads: list[BlockLoad] = field(default_factory=list)
    saves: list[BlockSave] = field(default_factory=list)

    def add(self, sequence: Sequence, end: int, num_drafts: int = 0, *, late_by: int = 0, is_new: bool = False) -> None:
        """Compute the sequence's tokens from num_planned to `end`, and verify drafts of what comes then."""
        assert sequence.slot is not None
        start, sample = sequence.num_planned, end == sequence.num_expected and sequence.request.pooling is None
        token_ids = tuple(sequence.token_ids[start:end])
        if len(token_ids) < end - start:
            token_ids += (PENDING,)
        changes = sequence.table.take_changes()
        step = SequenceStep(sequence.slot, start, token_ids, sample, changes, num_drafts=num_drafts, late_by=late_by)
        if is_new:
            generated = tuple(sequence.token_ids[sequence.num_prompt :])
            step = step._replace(new=sequence.request, output_token_ids=generated)
        path = sequence.request.kv_to
        if path is not None and sample and end == sequence.num_prompt:
            rows = tuple(map(tuple, sequence.table.rows))
            self.saves.append(BlockSave(len(self.steps), path, end, rows))
        self.sequences.append(sequence)
        self.steps.append(step)
        self.budget -= step.num_tokens
        sequence.num_planned = end
        sequence.num_drafts, sequence.num_verifying = 0, num_drafts
        sequence.num_pending += sample
        sequence.num_in_flight += 1
