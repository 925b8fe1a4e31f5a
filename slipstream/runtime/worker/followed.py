"""How far a draft model has read each text: it reads along while drafts are asked for, and catches up when they are.

    tokens       0 … 15 | 16 … 31 | 32 … 40 | 41          a step that asks for drafts, with token 41 as its row
    it has read  ──────────────────────┤                  until drafts were asked for no longer
    to catch up                          33 … 40          the host knows them: computed before the step
    in the step                                   41      and what it drafts from there, which is read for good

Blocks are found again by other texts, and may hold only what the target has computed: those are remembered by number.
"""

from collections.abc import Callable, Iterable, Sequence

from slipstream.runtime.worker.tables import BlockTables
from slipstream.schema.step import SequenceStep, StepPlan

_ALL = 1 << 60  # with the last token that is there after a step, and so the root of the next, wherever it is


class Followed:
    """Of all slots. group: whose blocks the draft model's KV is in."""

    def __init__(self, tables: BlockTables, group: int, num_slots: int, texts: Callable[[int], Sequence[int]]) -> None:
        """texts: of each slot the tokens that are known."""
        self._tables, self._group, self._texts = tables, group, texts
        self._read = [0] * num_slots  # tokens of each
        self._blocks = {0}  # all of whose tokens are read; nobody sees those of the null block

    def enter(self, plan: StepPlan) -> None:
        """Take in what begins with a plan, which the tables have."""
        for copy in plan.copies:
            (self._blocks.add if copy.source in self._blocks else self._blocks.discard)(copy.target)
        for load in plan.loads:  # of an engine that drafts, too
            self._blocks.update(row[self._group] for row in load.rows)
        for step in plan.sequences:
            if step.new is not None:
                self._read[step.slot] = self._read_in_blocks(step.slot, step.start)
                continue
            for place, block_ids in step.table_changes:  # another text's block of the same tokens may have come instead
                start = place * self._tables.tokens_per_block
                if start < step.start and block_ids[self._group] not in self._blocks:
                    self._read[step.slot] = min(self._read[step.slot], start)

    def missed(self, steps: Iterable[SequenceStep]) -> list[SequenceStep]:
        """What comes before these steps and is not read."""
        return [
            SequenceStep(step.slot, read, tuple(self._texts(step.slot)[read : step.start]), sample=False)
            for step in steps
            if (read := self._read[step.slot]) < step.start
        ]

    def has_read(self, step: SequenceStep) -> bool:
        """All its rows but drafts."""
        return self._read_until(step) >= step.start + len(step.token_ids)

    def knows_after(self, plan: StepPlan) -> bool:
        """Whether it is known what is read after a step, however far its drafts get."""
        return all(self._read[step.slot] == _ALL for step in plan.sequences if step.num_drafts)

    def note(self, step: SequenceStep, *, is_followed: bool, is_asked: bool) -> None:
        """After a step whose rows are read, or not, and that drafts come after, or not.

        Of a late one it is known where it begins at least, and where it ends at most (late.py).
        """
        before, end = self._read_until(step), step.start + step.late_by + step.num_tokens
        read = before
        if is_asked:
            read = end  # with the drafts of its rows, the last of which is read again before the next ones
        elif is_followed and before >= step.start:
            read = step.start + len(step.token_ids)
        self._mark(step.slot, min(before, step.start), end, read)
        self._read[step.slot] = _ALL if is_asked else read

    def _read_until(self, step: SequenceStep) -> int:
        """Of what is known before a step."""
        return min(self._read[step.slot], step.start + 1)

    def _read_in_blocks(self, slot: int, num_tokens: int) -> int:
        size = self._tables.tokens_per_block
        for place, block_id in enumerate(self._ids(slot, 0, num_tokens)):
            if block_id not in self._blocks:
                return min(num_tokens, place * size)
        return num_tokens

    def _mark(self, slot: int, start: int, end: int, read: int) -> None:
        """Of the tokens from start to end those before `read` are read."""
        size = self._tables.tokens_per_block
        for place, block_id in enumerate(self._ids(slot, start, end), start // size):
            is_read = read >= min(end, (place + 1) * size)
            (self._blocks.add if is_read or not block_id else self._blocks.discard)(block_id)

    def _ids(self, slot: int, start: int, end: int) -> list[int]:
        """The blocks with tokens from start to end."""
        size = self._tables.tokens_per_block
        return self._tables.ids(self._group, slot, start // size, -(-end // size))
