"""Drafts of a smaller model: its own engine, KV pool and block tables, on the target's device.

    target     … the  cat │ sat  on   the  rug          said by a step that took "sat on the" and rejected "mat"
    draft's KV … the  cat │ sat  on   the  mat          "mat" was drafted last or its KV is overwritten
    next                                   [rug]        computed now; then one token a step, as many as are drafted

Drafts are drawn as the request draws: with its temperature, filters and seed, at the same positions, so with the same
noise (accept.py). What it edits (penalties, bans, grammars) the draft model does not know of. Where all drafts were
accepted, the last of them was never computed: then two tokens are. A prompt is computed when its first token is there.

Steps of the draft model are the worker's, as any model's; each is launched before the one before it has ended.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from slipstream.errors import CapacityError
from slipstream.runtime.kv import BlockTable, KVCacheManager
from slipstream.runtime.worker.memory import count_blocks, free_memory, left_by_plan
from slipstream.runtime.worker.worker import Flight, Worker
from slipstream.schema.request import GenerateRequest
from slipstream.schema.sampling import SamplingParams
from slipstream.schema.speculative import Speculation
from slipstream.schema.step import PENDING, SequenceStep, StepPlan
from slipstream.speculative.drafter import Draft, Target, Verified, read_options
from slipstream.speculative.drafter import Drafter as Base


@dataclass(frozen=True)
class Options:
    model: str  # as slipstream run has it: a folder, an engine, a Hub id


@dataclass(eq=False, slots=True)
class _Text:
    """A sequence as the draft model knows it."""

    request: GenerateRequest
    token_ids: list[int]
    table: BlockTable
    drafts: list[int] = field(default_factory=list)  # after token_ids
    num_computed: int = 0  # tokens in the KV cache, drafts among them; of these those that were rejected do not count
    is_new: bool = True  # the worker does not know it yet
    is_lost: bool = False  # it has a token that the draft model has not

    def extend(self, token_ids: Sequence[int]) -> None:
        """The target's own next tokens, of which the first may be drafts."""
        num_right = 0
        for draft, token_id in zip(self.drafts, token_ids, strict=False):
            if draft != token_id:
                break
            num_right += 1
        num_right += len(self.token_ids)
        self.token_ids += token_ids
        # What follows the last token is asked for again, also where a draft was that token and more came after it.
        self.num_computed = min(self.num_computed, num_right, len(self.token_ids) - 1)
        self.drafts = []


class Drafter(Base):
    default_draft_len = 5

    def __init__(self, speculation: Speculation, target: Target) -> None:
        super().__init__(speculation, target)
        read_options(Options, speculation)
        assert target.draft_engine is not None, "api/drafting.py opens it"
        engine, choices = target.draft_engine
        self._manifest = manifest = engine.manifest
        self._vocab_size = target.manifest.vocab_size
        if manifest.max_batch_size < target.max_batch_size:
            raise CapacityError(
                f"The draft model's engine takes {manifest.max_batch_size} sequences and the target's "
                f"{target.max_batch_size}; lower --max_batch_size to {manifest.max_batch_size}, or build it for more."
            )
        groups, device = manifest.kv_groups, target.device
        self._worker = Worker(engine, choices, groups, target.max_batch_size, device)
        left = self._worker.memory_left(manifest.max_num_tokens)
        left -= free_memory(device) - left_by_plan(target.manifest, device)  # what the target will take
        share = manifest.kv_bytes_per_token / (manifest.kv_bytes_per_token + target.manifest.kv_bytes_per_token)
        num_blocks = count_blocks(
            manifest, groups, device, max(0, left), fraction=target.memory_fraction * share,
            max_seq_len=min(manifest.max_seq_len, target.max_seq_len),
        )  # fmt: skip
        self._worker.allocate_kv(num_blocks)
        self._worker.record(manifest.max_num_tokens)
        self._kv = KVCacheManager(num_blocks, manifest.tokens_per_block, True, groups)
        self._texts: dict[int, _Text] = {}
        self._freed_slots: list[int] = []
        self._num_steps = 0

    def start(self, slot: int, token_ids: Sequence[int], request: GenerateRequest) -> None:
        table = BlockTable(salt=request.cache_salt)
        self._texts[slot] = _Text(_without_edits(request), list(token_ids), table)

    def stop(self, slot: int) -> None:
        text = self._texts.pop(slot, None)
        if text is not None:
            self._kv.release(text.table, text.token_ids, min(text.num_computed, len(text.token_ids)))
            if not text.is_new:
                self._freed_slots.append(slot)

    def draft(self, verified: Verified) -> list[Draft]:
        for slot, token_ids in zip(verified.slots, verified.lists(), strict=True):
            text = self._texts[slot]
            text.extend(token_ids)
            text.is_lost |= max(token_ids, default=0) >= self._manifest.vocab_size
            self._kv.commit(text.table, text.token_ids, text.num_computed)
        asked = zip(verified.slots, verified.max_drafts, strict=True)
        lengths = {slot: length for slot, most in asked if (length := self._make_room(slot, most))}
        flights = self._catch_up(list(lengths))
        for place in range(1, max(verified.max_drafts)):
            steps = [
                SequenceStep(slot, len(self._texts[slot].token_ids) + place - 1, (PENDING,), sample=True)
                for slot, length in lengths.items()
                if place < length
            ]
            if steps:
                flights.append(self._launch(steps))
        for flight in flights:
            self._collect(flight)
        return [Draft(self._texts[slot].drafts) for slot in verified.slots]

    def _make_room(self, slot: int, most: int) -> int:
        """How many tokens can be drafted, none where the pool or the draft model's positions come to an end."""
        text = self._texts[slot]
        length = min(most, self._manifest.max_seq_len - len(text.token_ids))
        if text.is_lost or length < 1:
            return 0
        if not len(text.table):
            return length if self._admit(text, length) else 0
        num_tokens = len(text.token_ids) + length - 1
        if not self._kv.can_extend(text.table, num_tokens):
            return 0
        self._kv.extend(text.table, num_tokens)
        return length

    def _admit(self, text: _Text, length: int) -> bool:
        """What another text began with is not computed again."""
        num_tokens = len(text.token_ids) + length - 1
        match = self._kv.match(text.table.salt, text.token_ids).without_copy()
        if not self._kv.can_admit(match, num_tokens):
            return False
        self._kv.admit(text.table, match)
        self._kv.extend(text.table, num_tokens)
        text.num_computed = match.num_tokens
        return True

    def _catch_up(self, slots: list[int]) -> list[Flight]:
        """Compute all known tokens, in as many steps as it takes; each text's last one draws its first draft."""
        flights, waiting = [], slots
        while waiting:
            budget, steps = self._manifest.max_num_tokens, []
            for slot in waiting:
                text = self._texts[slot]
                start = text.num_computed
                token_ids = tuple(text.token_ids[start : start + budget])
                if token_ids:
                    text.num_computed += len(token_ids)
                    budget -= len(token_ids)
                    steps.append(SequenceStep(slot, start, token_ids, sample=self._is_at_its_end(slot)))
            waiting = [slot for slot in waiting if not self._is_at_its_end(slot)]
            flights.append(self._launch(steps))
        return flights

    def _is_at_its_end(self, slot: int) -> bool:
        text = self._texts[slot]
        return text.num_computed == len(text.token_ids)

    def _launch(self, steps: list[SequenceStep]) -> Flight:
        told = []
        for step in steps:
            text = self._texts[step.slot]
            new, text.is_new = text.request if text.is_new else None, False
            told.append(step._replace(table_changes=text.table.take_changes(), new=new))
        freed, self._freed_slots = tuple(self._freed_slots), []
        self._num_steps += 1
        return self._worker.launch(self._worker.begin(StepPlan(self._num_steps, tuple(told), (), freed)))

    def _collect(self, flight: Flight) -> None:
        for step, result in zip(flight.plan.sequences, self._worker.collect(flight).sequences, strict=True):
            text = self._texts[step.slot]
            text.num_computed = max(text.num_computed, step.start + len(step.token_ids))
            text.is_lost |= result.error is not None or max(result.token_ids, default=0) >= self._vocab_size
            if not text.is_lost:
                text.drafts += result.token_ids


def _without_edits(request: GenerateRequest) -> GenerateRequest:
    """How it draws, and no more."""
    asked = request.sampling
    sampling = SamplingParams(
        temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p, min_p=asked.min_p,
        typical_p=asked.typical_p,
    )  # fmt: skip
    return replace(request, sampling=sampling)
