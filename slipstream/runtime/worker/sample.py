"""The Sampler: one token a sequence, with each slot's state between steps.

    rows without edits   the step itself has chosen, by the SlotTable (kernels/sampling.py)      → token_ids_R
    edited rows          logits → edits (runtime/logits.py) → chosen after it, by the same table → token_ids_R
    logprobs             of the model's logits, in the rows that ask for them

Shape suffixes: R rows (one sequence each), V vocabulary, N a subset of the rows, T tokens of a prompt, K alternatives.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from slipstream.kernels.sampling import NOTHING_TO_SAMPLE, SlotTable, gather_logprobs
from slipstream.runtime.guidance import Guidance, why_stopped
from slipstream.runtime.logits import PenaltyTable, SequenceState, edit_logits
from slipstream.runtime.transfer import on_device
from slipstream.schema.request import GenerateRequest, TokenLogprobs
from slipstream.schema.step import SequenceResult

# Logprobs over a vocabulary of 128k take 0.5 MB a row, several times over: a whole prompt at once would be gigabytes.
_PROMPT_ROWS_AT_ONCE = 128


class Sampler:
    """Chooses tokens for the sequences added to its slots. Not thread-safe; the worker owns it."""

    def __init__(
        self,
        vocab_size: int,
        num_slots: int,
        device: torch.device | str,
        *,
        guidance: Guidance | None = None,
        is_batch_invariant: bool = False,
    ) -> None:
        """guidance: has prepared the grammar of each guided request."""
        self._device, self._guidance = torch.device(device), guidance
        self._states: dict[int, SequenceState] = {}
        self._penalties = PenaltyTable(vocab_size, self._device)
        self.slots = SlotTable(num_slots, self._device, is_batch_invariant=is_batch_invariant)

    def add(self, slot: int, request: GenerateRequest, output_token_ids: tuple[int, ...] = ()) -> None:
        """Start (or, after a preemption, resume) a sequence; a slot in use is taken over."""
        matcher, guided = None, request.sampling.guided
        if guided is not None:
            assert self._guidance is not None
            matcher = self._guidance.start(guided, output_token_ids)
        state = self._states[slot] = SequenceState(request, output_token_ids, matcher)
        self.slots.write(slot, request.sampling, request.seed)
        if state.has_penalty:
            self._penalties.add(slot, state)

    def remove(self, slot: int) -> None:
        self._states.pop(slot, None)  # absent where the step that would have added it failed

    def asks_prompt_logprobs(self, slot: int) -> bool:
        """Whether this sequence's prefill needs the logits of every position; one come back from a preemption has had
        its prompt logprobs."""
        state = self._states[slot]
        return state.sampling.prompt_logprobs is not None and not state.has_output

    def is_edited(self, slot: int) -> bool:
        """Whether the next token is chosen from other logits than the model's; the step leaves that to `draw`."""
        return self._states[slot].is_edited

    def draw(self, slots: Sequence[int], positions: Sequence[int], logits_RV: Tensor, chosen_R: Tensor) -> "Draw":
        """The next token of each slot, at these places of their texts; no slot comes twice.

        Row i of logits_RV belongs to slots[i], and so does the token that the step chose, unless the row is edited.
        """
        states = [self._states[slot] for slot in slots]
        edited = [(row, slots[row], position) for row, position in enumerate(positions) if states[row].is_edited]
        errors: dict[int, str] = {}
        if edited:
            rows_N, slots_N, positions_N = on_device(edited, torch.int64, self._device).unbind(1)
            rows, edited_slots, _ = zip(*edited, strict=True)
            edited_NV = logits_RV[rows_N].float()
            edited_states = [states[row] for row in rows]
            failed = edit_logits(edited_NV, edited_slots, edited_states, self._penalties)
            self._keep_allowed(edited_NV, edited_states)
            errors = {rows[place]: error for place, error in failed.items()}
            chosen_N = self.slots.choose(edited_NV, slots_N.contiguous(), positions_N.contiguous())
            chosen_R = chosen_R.index_copy(0, rows_N, chosen_N)
        is_plain = not edited and all(state.sampling.logprobs is None for state in states)
        return Draw(slots, states, is_plain, chosen_R, None if is_plain else logits_RV, errors)

    def finish(self, draw: "Draw") -> list[SequenceResult]:
        """The tokens drawn, recorded as known.

        A row that cannot be sampled (NaN, everything banned, a user's processor failed, a grammar came to a dead end)
        reports an error and records nothing; the other rows are not affected.
        """
        token_ids = draw.on_host()
        failures = {
            row: _why_nothing(draw.model_logits, row) for row, id in enumerate(token_ids) if id == NOTHING_TO_SAMPLE
        }
        failures.update(draw.errors)
        logprobs = {} if draw.model_logits is None else _logprobs(draw.model_logits, draw.token_ids, draw.states)
        self._record(draw, token_ids, failures)
        return [
            SequenceResult(error=failures[row])
            if row in failures
            else SequenceResult(token_id=token_ids[row], logprobs=logprobs.get(row))
            for row in range(len(draw.slots))
        ]

    def prompt_logprobs(self, slot: int, first_position: int, logits_TV: Tensor) -> tuple[TokenLogprobs, ...]:
        """Logprobs of prompt tokens first_position + 1, +2, ...: row i of logits_TV predicts the token after position
        first_position + i. Rows that predict past the prompt are skipped."""
        state = self._states[slot]
        num_top = state.sampling.prompt_logprobs
        assert num_top is not None
        token_ids = state.request.prompt_token_ids[first_position + 1 : first_position + 1 + len(logits_TV)]
        result: list[TokenLogprobs] = []
        for start in range(0, len(token_ids), _PROMPT_ROWS_AT_ONCE):
            part = on_device(token_ids[start : start + _PROMPT_ROWS_AT_ONCE], torch.int64, self._device)
            result += _describe(logits_TV[start : start + len(part)].float(), part, num_top)
        return tuple(result)

    def _keep_allowed(self, logits_RV: Tensor, states: Sequence[SequenceState]) -> None:
        matchers = {row: state.matcher for row, state in enumerate(states) if state.matcher is not None}
        if matchers:
            assert self._guidance is not None
            self._guidance.keep_allowed(logits_RV, matchers)

    def _record(self, draw: "Draw", token_ids: Sequence[int], failures: dict[int, str]) -> None:
        """Adds to failures where a grammar does not take its token: a matcher at its wits' end allows any last one."""
        counted_slots, counted_ids = [], []
        for row, (slot, state, token_id) in enumerate(zip(draw.slots, draw.states, token_ids, strict=True)):
            if row in failures:
                continue
            if state.matcher is not None and not state.matcher.consume_token(token_id):
                failures[row] = why_stopped(state.matcher)
                continue
            state.append(token_id)
            if state.has_penalty:
                counted_slots.append(slot)
                counted_ids.append(token_id)
        if counted_slots:
            self._penalties.count(counted_slots, counted_ids)


class Draw:
    """Tokens that were chosen, on their way from the device; the copy to the host starts here."""

    def __init__(
        self,
        slots: Sequence[int],
        states: Sequence[SequenceState],
        is_plain: bool,
        token_ids_R: Tensor,
        model_logits_RV: Tensor | None,
        errors: Mapping[int, str],
    ) -> None:
        """is_plain: no row was edited or asked for logprobs, so what follows does not depend on the host.

        model_logits_RV: where rows are not plain. errors: by row, what a user's processor did wrong.
        """
        self.slots, self.states, self.is_plain, self.errors = slots, states, is_plain, errors
        self.token_ids, self.model_logits = token_ids_R, model_logits_RV
        self._host, self._is_there = token_ids_R, None
        if token_ids_R.is_cuda:
            self._host = torch.empty(token_ids_R.shape, dtype=token_ids_R.dtype, pin_memory=True)
            self._host.copy_(token_ids_R, non_blocking=True)
            self._is_there = torch.cuda.Event()
            self._is_there.record()

    def on_host(self) -> list[int]:
        if self._is_there is not None:
            self._is_there.synchronize()
        return self._host.tolist()


def _why_nothing(model_logits_RV: Tensor | None, row: int) -> str:
    """Of a plain row, which nothing was banned from, the model's logits are to blame."""
    if model_logits_RV is not None and bool(model_logits_RV[row].max().isfinite()):
        return "no token can be sampled: bad words, bans, guided or a logits processor left none with a finite logit"
    return "the model's logits hold NaN or infinity, or are all -infinity"


def _logprobs(logits_RV: Tensor, token_ids_R: Tensor, states: Sequence[SequenceState]) -> dict[int, TokenLogprobs]:
    """By row, for the rows that ask."""
    asked = {row: state.sampling.logprobs for row, state in enumerate(states) if state.sampling.logprobs is not None}
    if not asked:
        return {}
    rows_N = on_device(list(asked), torch.int64, logits_RV.device)
    described = _describe(logits_RV[rows_N].float(), token_ids_R[rows_N].clamp(min=0), max(asked.values()))
    return {
        row: TokenLogprobs(all_top.token_id, all_top.logprob, all_top.rank, all_top.top[:num_top])
        for (row, num_top), all_top in zip(asked.items(), described, strict=True)
    }


def _describe(logits_RV: Tensor, token_ids_R: Tensor, num_top: int) -> list[TokenLogprobs]:
    logprob_R, rank_R, top_RK, top_logprobs_RK = gather_logprobs(logits_RV, token_ids_R, num_top)
    columns = (torch.stack((token_ids_R, rank_R), dim=1), top_RK, logprob_R[:, None], top_logprobs_RK)
    rows = torch.cat([column.double() for column in columns], dim=1).tolist()  # one wait for the device
    num_top = top_RK.shape[1]
    described = []
    for row in rows:
        token_id, rank, *top = map(int, row[: 2 + num_top])
        logprob, *top_logprobs = row[2 + num_top :]
        described.append(TokenLogprobs(token_id, logprob, rank, tuple(zip(top, top_logprobs, strict=True))))
    return described
