"""The block tables of all slots, kept from step to step: a plan says only what has changed."""

import numpy as np

from slipstream.schema.step import StepPlan

Numbers = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class BlockTables:
    """For each KV group and slot the ids of its KV blocks; NULL_BLOCK (0) where it has none."""

    def __init__(self, num_groups: int, num_slots: int, tokens_per_block: int, tokens_ahead: int = 0) -> None:
        """tokens_ahead: of each text, beyond a step's rows, that a drafter computes."""
        self.tokens_per_block, self.tokens_ahead = tokens_per_block, tokens_ahead
        self._ids = np.zeros((num_groups, num_slots, 1), dtype=np.int64)

    @property
    def num_groups(self) -> int:
        return len(self._ids)

    def update(self, plan: StepPlan) -> None:
        """Take in a plan, before its step or a later one is computed; plans come in their order."""
        slots, places, rows = [], [], []
        for sequence in plan.sequences:
            if sequence.new is not None:
                self._ids[:, sequence.slot] = 0
            for place, block_ids in sequence.table_changes:
                slots.append(sequence.slot)
                places.append(place)
                rows.append(block_ids)
        if rows:
            self._widen(max(places) + 1)
            self._ids[:, slots, places] = np.array(rows).T

    def of(self, group: int, slots: Numbers, width: int) -> Numbers:
        """The first `width` blocks of each of these slots, [S, width]."""
        self._widen(width)
        return self._ids[group, slots, :width]

    def ids(self, group: int, slot: int, first: int, end: int) -> list[int]:
        """The blocks of a slot at these places of its table."""
        self._widen(end)
        found: list[int] = self._ids[group, slot, first:end].tolist()
        return found

    def block_of(self, group: int, slots: Numbers, places: Numbers) -> Numbers:
        """The block at a place of a slot's table, for each pair."""
        return self._ids[group, slots, places]

    def _widen(self, width: int) -> None:
        num_groups, num_slots, old_width = self._ids.shape
        if width > old_width:
            wider = np.zeros((num_groups, num_slots, 1 << (width - 1).bit_length()), dtype=np.int64)
            wider[:, :, :old_width] = self._ids
            self._ids = wider
