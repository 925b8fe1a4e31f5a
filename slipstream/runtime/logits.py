"""The edits before the distribution: logit_bias, bans, penalties and the user's own processors.

    logit_bias → bad words, n-gram ban, min_tokens (-inf) → repetition, presence, frequency penalty → logits_processors
    → what a grammar does not allow (-inf; runtime/guidance.py)

Bans are -inf, which no penalty changes, so their place among the penalties does not matter. A SequenceState holds what
one sequence's edits need on the host; a PenaltyTable holds token counts, a row of the vocabulary each, on the device.
Everything but the processors is one indexed write over all rows together, and waits for no device.

Shape suffixes: R rows (one sequence each), V vocabulary, S slots, P rows with a penalty, E edited places.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slipstream.runtime.transfer import on_device
from slipstream.schema.request import GenerateRequest
from slipstream.schema.sampling import LogitsProcessor

if TYPE_CHECKING:
    from llguidance import LLMatcher


class SequenceState:
    """The tokens of one sequence and what may not follow them."""

    def __init__(
        self, request: GenerateRequest, output_token_ids: tuple[int, ...], matcher: "LLMatcher | None" = None
    ) -> None:
        """matcher: of a guided request, after its output tokens."""
        sampling = request.sampling
        self.matcher = matcher
        self.request = request
        self.sampling = sampling
        self.token_ids = [*request.prompt_token_ids, *output_token_ids]
        self.num_ahead = 0  # of these, drafts: tokens that only may come
        self.has_penalty = (
            sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
        )
        self._early_stops = request.eos_token_ids.union(sampling.stop_token_ids) if sampling.min_tokens else frozenset()
        self._always_edited = bool(
            self.has_penalty
            or sampling.logit_bias
            or request.bad_words_ids
            or sampling.no_repeat_ngram_size
            or sampling.logits_processors
            or matcher is not None
        )
        self._followers: dict[tuple[int, ...], list[int]] = {}  # of each n-gram's first n - 1 tokens, the last ones
        if sampling.no_repeat_ngram_size:
            for end in range(sampling.no_repeat_ngram_size, len(self.token_ids) + 1):
                self._index_ngram(end)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[len(self.request.prompt_token_ids) :]

    @property
    def ahead(self) -> list[int]:
        return self.token_ids[len(self.token_ids) - self.num_ahead :]

    @property
    def has_output(self) -> bool:
        return len(self.token_ids) > len(self.request.prompt_token_ids)

    @property
    def is_edited(self) -> bool:
        """Whether the next token's logits need anything done to them."""
        return self._always_edited or self._may_not_stop

    @property
    def _may_not_stop(self) -> bool:
        num_output = len(self.token_ids) - len(self.request.prompt_token_ids)
        return bool(self._early_stops) and num_output < self.sampling.min_tokens

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        size = self.sampling.no_repeat_ngram_size
        if size and len(self.token_ids) >= size:
            self._index_ngram(len(self.token_ids))

    def after(self, draft: int) -> "SequenceState | None":
        """As it will be if this token comes; None where its grammar does not take it, or ends with it."""
        state = copy(self)
        if self.matcher is not None:
            state.matcher = self.matcher.deep_copy()
            if draft in self.request.eos_token_ids or not state.matcher.try_consume_tokens([draft]):
                return None
        state.token_ids = list(self.token_ids)
        state._followers = {prefix: list(ids) for prefix, ids in self._followers.items()}
        state.append(draft)
        state.num_ahead += 1
        return state

    def banned(self) -> Iterator[int]:
        """The tokens that may not come next; some may be named twice."""
        for *prefix, last in self.request.bad_words_ids:
            if not prefix or self.token_ids[-len(prefix) :] == prefix:
                yield last
        if self.sampling.no_repeat_ngram_size:
            yield from self._followers.get(self._ngram_prefix(len(self.token_ids) + 1), ())
        if self._may_not_stop:
            yield from self._early_stops

    def _index_ngram(self, end: int) -> None:
        self._followers.setdefault(self._ngram_prefix(end), []).append(self.token_ids[end - 1])

    def _ngram_prefix(self, end: int) -> tuple[int, ...]:
        """All but the last token of the n-gram that ends before position `end`."""
        return tuple(self.token_ids[max(0, end - self.sampling.no_repeat_ngram_size) : end - 1])


class PenaltyTable:
    """Which tokens each penalised sequence holds: a row a slot, grown to the highest slot that ever needed one."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._in_prompt_SV = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._output_counts_SV = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)

    def add(self, slot: int, state: SequenceState) -> None:
        num_slots = len(self._in_prompt_SV)
        if slot >= num_slots:
            num_new = max(slot + 1, 2 * num_slots) - num_slots
            self._in_prompt_SV = torch.nn.functional.pad(self._in_prompt_SV, (0, 0, 0, num_new))
            self._output_counts_SV = torch.nn.functional.pad(self._output_counts_SV, (0, 0, 0, num_new))
        in_prompt_V, output_counts_V = self._in_prompt_SV[slot], self._output_counts_SV[slot]
        in_prompt_V.zero_().index_fill_(0, self._indices(state.request.prompt_token_ids), True)
        outputs = self._indices(state.output_token_ids)
        output_counts_V.zero_().index_add_(0, outputs, torch.ones_like(outputs, dtype=torch.int32))

    def count(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """Record one more output token for each of these slots; a slot may come several times."""
        _add_one(self._output_counts_SV, self._indices(slots), self._indices(token_ids))

    def apply(
        self, logits_RV: Tensor, rows: Sequence[int], slots: Sequence[int], states: Sequence[SequenceState]
    ) -> None:
        """Penalise, in place, the rows of logits_RV that belong to these slots.

        Repetition as in transformers (prompt and output; arXiv:1909.05858), presence and frequency as OpenAI defines
        them (output only).
        """

        def column(values: list[float]) -> Tensor:
            return on_device(values, torch.float32, logits_RV.device)[:, None]

        repetition_P1 = column([state.sampling.repetition_penalty for state in states])
        presence_P1 = column([state.sampling.presence_penalty for state in states])
        frequency_P1 = column([state.sampling.frequency_penalty for state in states])
        rows_P, slots_P = self._indices(rows), self._indices(slots)
        counts_PV = self._output_counts_SV[slots_P]
        ahead = [(row, token_id) for row, state in enumerate(states) for token_id in state.ahead]
        if ahead:
            rows_E, token_ids_E = self._indices(ahead).unbind(1)
            _add_one(counts_PV, rows_E, token_ids_E)
        seen_PV = self._in_prompt_SV[slots_P] | (counts_PV > 0)

        logits_PV = logits_RV[rows_P]
        repeated_PV = torch.where(logits_PV < 0, logits_PV * repetition_P1, logits_PV / repetition_P1)
        logits_PV = repeated_PV.where(seen_PV, logits_PV)
        logits_PV = logits_PV - frequency_P1 * counts_PV - presence_P1 * (counts_PV > 0)
        logits_RV[rows_P] = logits_PV

    def _indices(self, values: Sequence[Any]) -> Tensor:
        return on_device(values, torch.int64, self._in_prompt_SV.device)


def _add_one(counts_SV: Tensor, rows_E: Tensor, token_ids_E: Tensor) -> None:
    """For each time that a place is named."""
    counts_SV.index_put_((rows_E, token_ids_E), torch.ones_like(rows_E, dtype=torch.int32), accumulate=True)


def edit_logits(
    logits_RV: Tensor, slots: Sequence[int], states: Sequence[SequenceState], penalties: PenaltyTable
) -> Mapping[int, str]:
    """Edit float32 logits in place. -> by row, what a user's processor did wrong."""
    _add_biases(logits_RV, states)
    _ban(logits_RV, states)
    penalised = [row for row, state in enumerate(states) if state.has_penalty]
    if penalised:
        penalties.apply(logits_RV, penalised, [slots[row] for row in penalised], [states[row] for row in penalised])
    return _run_processors(logits_RV, states)


def _add_biases(logits_RV: Tensor, states: Sequence[SequenceState]) -> None:
    edits = [
        (row, token_id, bias)
        for row, state in enumerate(states)
        for token_id, bias in (state.sampling.logit_bias or {}).items()
    ]
    if edits:
        rows, token_ids, biases = zip(*edits, strict=True)
        places_E = _places(rows, token_ids, logits_RV)
        logits_RV[places_E] += on_device(biases, torch.float32, logits_RV.device)  # a row names a token once


def _ban(logits_RV: Tensor, states: Sequence[SequenceState]) -> None:
    edits = [(row, token_id) for row, state in enumerate(states) for token_id in state.banned()]
    if edits:
        rows, token_ids = zip(*edits, strict=True)
        logits_RV[_places(rows, token_ids, logits_RV)] = -torch.inf


def _places(rows: Sequence[int], token_ids: Sequence[int], logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    rows_E, token_ids_E = (on_device(each, torch.int64, logits_RV.device) for each in (rows, token_ids))
    return rows_E, token_ids_E


def _run_processors(logits_RV: Tensor, states: Sequence[SequenceState]) -> dict[int, str]:
    errors = {}
    for row, state in enumerate(states):
        for processor in state.sampling.logits_processors:
            try:
                logits_RV[row] = _run_processor(processor, list(state.token_ids), logits_RV[row].clone())
            except Exception as error:  # a user's code: whatever it raises fails its own request and no other
                errors[row] = f"logits processor {processor!r} failed: {type(error).__name__}: {error}"
                break
    return errors


def _run_processor(processor: LogitsProcessor, token_ids: list[int], logits_V: Tensor) -> Tensor:
    shape = logits_V.shape
    result_V = processor(token_ids, logits_V)
    if not isinstance(result_V, Tensor):
        raise TypeError(f"it returned {type(result_V).__name__}, not a tensor")
    if result_V.shape != shape:
        raise ValueError(f"it returned shape {tuple(result_V.shape)}, not {tuple(shape)}")
    return result_V
