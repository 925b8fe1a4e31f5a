"""Drafting: how many drafts the sequences of a step are asked for, and what became of those that were verified."""

from collections.abc import Sequence

from slipstream.runtime.draft_control import DraftControl, Observed
from slipstream.schema.build import RuntimeConfig
from slipstream.schema.step import SequenceResult, SequenceStep, StepPlan, StepResult

_NOBODY = -1  # a slot of nobody's


class Drafting:
    """One for a scheduler. Each sequence is asked for the most there may be, or for as many as pay (is_adaptive)."""

    def __init__(self, config: RuntimeConfig) -> None:
        self._max_draft_len, self._takes_late_steps = config.max_draft_len, config.takes_late_steps
        self._control: DraftControl | None = None
        if config.is_adaptive and config.max_draft_len:
            self._control = DraftControl(
                config.max_draft_len, config.max_batch_size, config.draft_shape, pays_for_asked=config.takes_late_steps
            )
        self._made = [config.max_draft_len] * config.max_batch_size  # drafts of each slot, by its last step
        self.num_verifications = 0
        self.num_draft_tokens = 0
        self.num_accepted = [0] * config.max_draft_len  # by place in the draft

    @property
    def can_plan_ahead(self) -> bool:
        """Drafts begin with a step whose start is known, unless the worker finds out by itself."""
        return self._takes_late_steps or self._control is None or self._control.is_idle

    def start(self, slot: int) -> None:
        """A sequence enters."""
        if self._control is not None:
            self._control.start(slot)

    def stop(self, slot: int) -> None:
        if self._control is not None:
            self._control.stop(slot)

    def asked_of(self, steps: list[SequenceStep]) -> tuple[SequenceStep, ...]:
        """The steps, each with the drafts that its sequence is asked for."""
        if not self._max_draft_len:
            return tuple(steps)
        slots = [step.slot for step in steps if step.sample]
        asked = [self._max_draft_len] * len(slots) if self._control is None else self._control.ask(slots)
        if not any(asked):
            return tuple(steps)
        of_each = iter(asked)
        return tuple(step._replace(max_drafts=next(of_each)) if step.sample else step for step in steps)

    def observe(self, plan: StepPlan, result: StepResult, seconds: float | None, is_live: Sequence[bool]) -> list[int]:
        """A step is over, and took so long: how many drafts of each sequence it verified. is_live: of each; of others
        it was for nothing."""
        verified, drafts = [0] * len(plan.sequences), list[Observed]()
        if not self._max_draft_len:
            return verified
        for index, step in enumerate(plan.sequences):
            if not (step.num_drafts or step.max_drafts):
                continue
            outcome = result.sequences[index]
            verified[index] = count = min(step.num_drafts, self._take_made(step.slot, outcome))
            drafts.append(
                Observed(
                    step.slot if is_live[index] else _NOBODY,
                    count,
                    [node for node in outcome.accepted if node <= count],
                    step.max_drafts,
                    outcome.num_drafts,
                    step.num_drafts - count,
                )
            )
        if self._control is not None:
            is_decoding = all(step.sample and len(step.token_ids) == 1 for step in plan.sequences)
            self._control.observe(drafts, len(plan.sequences), seconds if is_decoding else None)
        return verified

    def _take_made(self, slot: int, outcome: SequenceResult) -> int:
        """How many drafts a slot's last step made for this one. A late step has rows for as many as were asked for."""
        made, self._made[slot] = self._made[slot], outcome.num_drafts
        return made

    def count(self, num_drafts: int, num_accepted: int) -> None:
        """A sequence's drafts were verified."""
        self.num_verifications += 1
        self.num_draft_tokens += num_drafts
        for place in range(min(num_accepted, num_drafts)):
            self.num_accepted[place] += 1

    def num_asked(self, num_running: int) -> int:
        """Drafts that the running sequences are asked for."""
        if self._control is None:
            return num_running * self._max_draft_len
        return sum(self._control.draft_lens)
