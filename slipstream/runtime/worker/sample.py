"""The Sampler: from a step's last logits to one token a sequence, with each slot's state between steps.

    logits_RV → edits (runtime/logits.py) → greedy rows: argmax                            → token_ids_R
                                          → other rows: filters → Gumbel-max draw          → token_ids_R
    logits_RV, before the edits           → logprobs, in the rows that ask for them

A batch of greedy rows without edits or logprobs is one argmax.

Shape suffixes: R rows (one sequence each), V vocabulary, N a subset of the rows, T tokens of a prompt, K alternatives.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from slipstream.kernels.sampling import (
    NOTHING_TO_SAMPLE,
    Filters,
    apply_filters,
    gather_logprobs,
    greedy,
    sample,
)
from slipstream.runtime.logits import PenaltyTable, SequenceState, edit_logits
from slipstream.schema.request import GenerateRequest, TokenLogprobs
from slipstream.schema.step import SequenceResult

# Logprobs over a vocabulary of 128k take 0.5 MB a row, several times over: a whole prompt at once would be gigabytes.
_PROMPT_ROWS_AT_ONCE = 128


class Sampler:
    """Chooses tokens for the sequences added to its slots. Not thread-safe; the worker owns it."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self._states: dict[int, SequenceState] = {}
        self._penalties = PenaltyTable(vocab_size, torch.device(device))

    def add(self, slot: int, request: GenerateRequest, output_token_ids: tuple[int, ...] = ()) -> None:
        """Start (or, after a preemption, resume) a sequence; a slot in use is taken over."""
        state = self._states[slot] = SequenceState(request, output_token_ids)
        if state.has_penalty:
            self._penalties.add(slot, state)

    def remove(self, slot: int) -> None:
        self._states.pop(slot, None)  # absent where the step that would have added it failed

    def asks_prompt_logprobs(self, slot: int) -> bool:
        """Whether this sequence's prefill needs the logits of every position; one come back from a preemption has had
        its prompt logprobs."""
        state = self._states[slot]
        return state.sampling.prompt_logprobs is not None and not state.has_output

    def draw(self, slots: Sequence[int], positions: Sequence[int], logits_RV: Tensor, most_likely_R: Tensor) -> "Draw":
        """Choose the next token of each slot, at these places of their texts; no slot comes twice.

        Row i of logits_RV, and its most likely token, belong to slots[i].
        """
        states = [self._states[slot] for slot in slots]
        is_plain = not any(state.is_edited or state.sampling.logprobs is not None for state in states)
        if is_plain and all(state.sampling.is_greedy for state in states):
            return Draw(slots, states, is_plain, most_likely_R, None, {})
        model_logits_RV = logits_RV.float()
        edited_RV, errors = edit_logits(model_logits_RV, slots, states, self._penalties)
        token_ids_R = _choose(edited_RV, states, positions)
        return Draw(slots, states, is_plain, token_ids_R, None if is_plain else model_logits_RV, errors)

    def finish(self, draw: "Draw") -> list[SequenceResult]:
        """The tokens drawn, recorded as known.

        A row that cannot be sampled (NaN, everything banned, a user's processor failed) reports an error and records
        nothing; the other rows are not affected.
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
            part = torch.tensor(token_ids[start : start + _PROMPT_ROWS_AT_ONCE], device=logits_TV.device)
            result += _describe(logits_TV[start : start + len(part)].float(), part, num_top)
        return tuple(result)

    def _record(self, draw: "Draw", token_ids: Sequence[int], failures: Mapping[int, str]) -> None:
        counted_slots, counted_ids = [], []
        for row, (slot, state, token_id) in enumerate(zip(draw.slots, draw.states, token_ids, strict=True)):
            if row in failures:
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

        model_logits_RV: in float32, where rows are not plain. errors: by row, what a user's processor did wrong.
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


def _choose(logits_RV: Tensor, states: Sequence[SequenceState], positions: Sequence[int]) -> Tensor:
    """-> token_ids_R."""
    random = [row for row, state in enumerate(states) if not state.sampling.is_greedy]
    if not random:
        return greedy(logits_RV)
    if len(random) == len(states):
        return _draw(logits_RV, states, positions)
    rows_N = torch.tensor(random, device=logits_RV.device)
    drawn_N = _draw(logits_RV[rows_N], [states[row] for row in random], [positions[row] for row in random])
    return greedy(logits_RV).index_copy(0, rows_N, drawn_N)


def _draw(logits_RV: Tensor, states: Sequence[SequenceState], positions: Sequence[int]) -> Tensor:
    samplings = [state.sampling for state in states]
    vocab_size = logits_RV.shape[1]
    filters = Filters(
        temperature=torch.tensor([sampling.temperature for sampling in samplings], dtype=torch.float64),
        top_k=torch.tensor([min(sampling.top_k, vocab_size) for sampling in samplings]),
        typical_p=torch.tensor([sampling.typical_p for sampling in samplings], dtype=torch.float64),
        top_p=torch.tensor([sampling.top_p for sampling in samplings], dtype=torch.float64),
        min_p=torch.tensor([sampling.min_p for sampling in samplings], dtype=torch.float64),
    )
    seeds_R = torch.tensor([state.request.seed for state in states])
    positions_R = torch.tensor(positions)
    return sample(apply_filters(logits_RV, filters), seeds_R, positions_R)


def _why_nothing(model_logits_RV: Tensor | None, row: int) -> str:
    """Of a plain row, which nothing was banned from, the model's logits are to blame."""
    if model_logits_RV is not None and bool(model_logits_RV[row].max().isfinite()):
        return "no token can be sampled: bad words, bans or a logits processor left none with a finite logit"
    return "the model's logits hold NaN or infinity, or are all -infinity"


def _logprobs(logits_RV: Tensor, token_ids_R: Tensor, states: Sequence[SequenceState]) -> dict[int, TokenLogprobs]:
    """By row, for the rows that ask."""
    asked = {row: state.sampling.logprobs for row, state in enumerate(states) if state.sampling.logprobs is not None}
    if not asked:
        return {}
    rows_N = torch.tensor(list(asked), device=logits_RV.device)
    described = _describe(logits_RV[rows_N], token_ids_R[rows_N].clamp(min=0), max(asked.values()))
    return {
        row: TokenLogprobs(all_top.token_id, all_top.logprob, all_top.rank, all_top.top[:num_top])
        for (row, num_top), all_top in zip(asked.items(), described, strict=True)
    }


def _describe(logits_RV: Tensor, token_ids_R: Tensor, num_top: int) -> list[TokenLogprobs]:
    logprob_R, rank_R, top_RK, top_logprobs_RK = gather_logprobs(logits_RV, token_ids_R, num_top)
    columns = (token_ids_R, logprob_R, rank_R, top_RK, top_logprobs_RK)
    return [
        TokenLogprobs(token_id, logprob, rank, tuple(zip(top, top_logprobs, strict=True)))
        for token_id, logprob, rank, top, top_logprobs in zip(*(column.tolist() for column in columns), strict=True)
    ]
