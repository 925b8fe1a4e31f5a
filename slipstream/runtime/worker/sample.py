"""The Sampler: what each sequence says next, with each slot's state between steps.

    rows without edits   the step itself has chosen, by the SlotTable (kernels/sampling.py)      → token_ids_R
    edited rows          logits → edits (runtime/logits.py) → chosen after it, by the same table → token_ids_R
    drafts               the rows of a sequence are those of a tree, and the tokens chosen walk down it (speculative/)
    logprobs             of the model's logits, in the rows that ask for them

Shape suffixes: R rows (a sequence's last token, then its drafts), V vocabulary, N a subset of the rows, S sequences,
M nodes of a tree, T tokens of a prompt, K alternatives.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from slipstream.engine.graph import Graph, Node, TensorType
from slipstream.kernels.sampling import NOTHING_TO_SAMPLE, SlotTable, gather_logprobs
from slipstream.runtime.guidance import Guidance, num_taken, why_stopped
from slipstream.runtime.logits import PenaltyTable, SequenceState, edit_logits
from slipstream.runtime.transfer import ToHost, on_device
from slipstream.runtime.worker.drafts import Drafted
from slipstream.runtime.worker.ending import Ended
from slipstream.schema.request import GenerateRequest, TokenLogprobs
from slipstream.schema.step import SequenceResult
from slipstream.speculative.accept import Accepted

# Logprobs over a vocabulary of 128k take 0.5 MB a row, several times over: a whole prompt at once would be gigabytes.
_PROMPT_ROWS_AT_ONCE = 128


def with_greedy(graph: Graph) -> Graph:
    """The graph that gives the most likely token of each row of logits, too, after its other outputs."""
    logits = graph.outputs[0]
    node = Node("greedy", (logits,), (f"{logits}.greedy",), {})
    types = graph.types | {node.outputs[0]: TensorType(graph.types[logits].shape[:1], "int64")}
    return replace(graph, nodes=[*graph.nodes, node], types=types, outputs=(*graph.outputs, *node.outputs))


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

    def draw(
        self,
        slots: Sequence[int],
        positions: Sequence[int],
        logits_RV: Tensor,
        chosen_R: Tensor,
        rows: Sequence[int] | None = None,
        drafted: Drafted | None = None,
        end: Callable[[Tensor], Tensor] | None = None,
    ) -> "Draw":
        """What each slot says next, at these places of their texts; no slot comes twice.

        rows: of each slot its first row, after which come those of the other nodes of its tree; by default there is one
        each. The step has chosen all rows' tokens, but for slots that are edited. end: what comes of them all, packed,
        where drafts are verified or made.
        """
        states, rows = [self._states[slot] for slot in slots], range(len(slots)) if rows is None else rows
        errors: dict[int, str] = {}
        edited = [index for index, state in enumerate(states) if state.is_edited]
        if edited:
            edits = _edited_rows(edited, states, positions, rows, drafted)
            rows_N, slots_N, positions_N = on_device(
                [(each.place, slots[each.sequence], each.position) for each in edits], torch.int64, self._device
            ).unbind(1)
            edited_NV = logits_RV[rows_N].float()
            edited_slots = [slots[each.sequence] for each in edits]
            edited_states = [each.state for each in edits]
            failed = edit_logits(edited_NV, edited_slots, edited_states, self._penalties)
            self._keep_allowed(edited_NV, edited_states)
            errors = {edits[place].sequence: error for place, error in failed.items()}
            chosen_N = self.slots.choose(edited_NV, slots_N.contiguous(), positions_N.contiguous())
            chosen_R = chosen_R.index_copy(0, rows_N, chosen_N)
        is_plain = not edited and all(state.sampling.logprobs is None for state in states)
        ended_SX = None if end is None else end(chosen_R)
        if ended_SX is None and list(rows) != list(range(len(chosen_R))):
            chosen_R = chosen_R[on_device(rows, torch.int64, self._device)]
        return Draw(slots, states, is_plain, chosen_R, None if is_plain else logits_RV, errors, rows, ended_SX)

    def finish(self, draw: "Draw") -> list[SequenceResult]:
        """The tokens drawn, recorded as known.

        A row that cannot be sampled (NaN, everything banned, a user's processor failed, a grammar came to a dead end)
        reports an error and records nothing; the other rows are not affected.
        """
        taken, rows = draw.on_host()
        failures = {
            index: _why_nothing(draw.model_logits, rows[index][0])
            for index, token_ids in enumerate(taken)
            if token_ids == [NOTHING_TO_SAMPLE]
        }
        failures.update(draw.errors)
        self._record(draw, taken, failures)
        logprobs = {} if draw.model_logits is None else _logprobs(draw.model_logits, draw.states, taken, rows)
        return [
            SequenceResult(error=failures[index])
            if index in failures
            else SequenceResult(
                tuple(token_ids), logprobs.get(index, ()), accepted=tuple(row - path[0] for row in path[1:])
            )
            for index, (token_ids, path) in enumerate(zip(taken, rows, strict=True))
        ]

    def token_ids(self, slot: int) -> list[int]:
        """All that is recorded: the prompt, and what was said."""
        return self._states[slot].token_ids

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

    def _record(self, draw: "Draw", taken: Sequence[list[int]], failures: dict[int, str]) -> None:
        """Adds to failures where a grammar does not take its token: a matcher at its wits' end allows any last one.

        Of accepted drafts, tokens before that one are kept, and the next step tells.
        """
        counted_slots, counted_ids = [], []
        for index, (slot, state, token_ids) in enumerate(zip(draw.slots, draw.states, taken, strict=True)):
            if index in failures:
                continue
            if state.matcher is not None:
                if len(token_ids) > 1:
                    del token_ids[max(1, num_taken(state.matcher, token_ids)) :]
                if not all(map(state.matcher.consume_token, token_ids)):
                    failures[index] = why_stopped(state.matcher)
                    continue
            for token_id in token_ids:
                state.append(token_id)
                if state.has_penalty:
                    counted_slots.append(slot)
                    counted_ids.append(token_id)
        if counted_slots:
            self._penalties.count(counted_slots, counted_ids)


class _Row(NamedTuple):
    """A row whose logits are edited."""

    place: int  # among the rows
    sequence: int
    position: int  # of the token that is chosen
    state: SequenceState  # after the drafts before it


def _edited_rows(
    edited: Sequence[int], states: Sequence[SequenceState], positions: Sequence[int], starts: Sequence[int],
    drafted: Drafted | None,
) -> list[_Row]:  # fmt: skip
    """All rows of these sequences, but for those that their grammar does not come to. starts: each one's first."""
    if drafted is None:
        return [_Row(starts[index], index, positions[index], states[index]) for index in edited]
    token_ids, parents = drafted.token_ids.tolist(), drafted.parents.tolist()
    rows = []
    for index in edited:
        reached: list[SequenceState | None] = [states[index]]
        for node in range(drafted.num_nodes[index]):
            if node:
                before = reached[parents[index][node]]
                reached.append(None if before is None else before.after(token_ids[index][node]))
            state = reached[node]
            if state is not None:
                rows.append(_Row(starts[index] + node, index, positions[index] + state.num_ahead, state))
    return rows


class Draw:
    """Tokens that were chosen, on their way from the device; the copy to the host starts here."""

    def __init__(
        self,
        slots: Sequence[int],
        states: Sequence[SequenceState],
        is_plain: bool,
        chosen_R: Tensor,
        model_logits_RV: Tensor | None,
        errors: Mapping[int, str],
        starts: Sequence[int],
        ended_SX: Tensor | None,
    ) -> None:
        """is_plain: no row was edited or asked for logprobs, so what follows does not depend on the host.

        model_logits_RV: where rows are not plain. errors: by sequence, what a user's processor did wrong. starts: each
        sequence's first row. ended: what each has gained, packed; where it is None, chosen has one row for each.
        """
        self.slots, self.states, self.is_plain, self.errors = slots, states, is_plain, errors
        self.model_logits, self._chosen = model_logits_RV, chosen_R
        self._starts, self._ended = starts, ended_SX
        self._to_host = ToHost(chosen_R if ended_SX is None else ended_SX)

    @property
    def accepted(self) -> Accepted:
        """What each sequence gains, where the model is."""
        if self._ended is not None:
            return Ended.unpacked(self._ended).accepted
        roots_S1 = torch.zeros_like(self._chosen)[:, None]
        chosen_S1 = self._chosen[:, None]
        return Accepted(torch.ones_like(self._chosen), chosen_S1, roots_S1, chosen_S1)

    def on_host(self) -> tuple[list[list[int]], list[list[int]]]:
        """Of each sequence the tokens that it gains, and the rows that they were chosen in."""
        numbers = self._to_host.wait()
        if self._ended is None:
            return [[token_id] for token_id in numbers.tolist()], [[row] for row in self._starts]
        counts, token_ids, paths = (x.tolist() for x in Ended.unpacked(numbers).accepted[:3])
        taken = [each[:count] for count, each in zip(counts, token_ids, strict=True)]
        rows = [
            [start + node for node in path[:count]]
            for start, count, path in zip(self._starts, counts, paths, strict=True)
        ]
        return taken, rows

    def drafts_made(self) -> list[int]:
        """For each sequence, where the model is."""
        if self._ended is None:
            return [0] * len(self.slots)
        num_drafts: list[int] = Ended.unpacked(self._to_host.wait()).num_drafts.tolist()
        return num_drafts


def _why_nothing(model_logits_RV: Tensor | None, row: int) -> str:
    """Of a plain row, which nothing was banned from, the model's logits are to blame."""
    if model_logits_RV is not None and bool(model_logits_RV[row].max().isfinite()):
        return "no token can be sampled: bad words, bans, guided or a logits processor left none with a finite logit"
    return "the model's logits hold NaN or infinity, or are all -infinity"


def _logprobs(
    logits_RV: Tensor, states: Sequence[SequenceState], taken: Sequence[list[int]], rows: Sequence[list[int]]
) -> dict[int, tuple[TokenLogprobs, ...]]:
    """By sequence, for those that ask: of each of its tokens."""
    asked = {index: each.sampling.logprobs for index, each in enumerate(states) if each.sampling.logprobs is not None}
    if not asked:
        return {}
    pairs = [pair for index in asked for pair in zip(rows[index], taken[index], strict=False)]
    rows_N, token_ids_N = on_device(pairs, torch.int64, logits_RV.device).unbind(1)
    described = iter(_describe(logits_RV[rows_N].float(), token_ids_N.clamp(min=0), max(asked.values())))
    return {
        index: tuple(replace(each, top=each.top[:num_top]) for each in islice(described, len(taken[index])))
        for index, num_top in asked.items()
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
