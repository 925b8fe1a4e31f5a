"""A worker without a model, which knows what is in every KV cell and refuses to read a wrong one.

The pool is a dict: (block id, offset) -> the history of the token written there, that is (salt, tokens up to and
including it) as a chain of hashes. KV of a token depends on exactly that, so a cell is right for a sequence if and only
if it holds the hash of the sequence's own history at that position. Prefix sharing, copies, eviction and preemption can
put a wrong cell into a block table; none can do so unseen. Each KV group has cells of its own; a window reads only what
is in its sight, and all else must have been given up.

The "model" is a hash of the history too: the next token is a fixed function of it, so a request's output can be
computed alone (`expected_output`) and must be the same in any company. Drafts are what comes, with mistakes; a rejected
one leaves its history in the cells, where nobody may read it.
"""

import zlib
from dataclasses import dataclass, field, replace

from slipstream.runtime.kv.blocks import NULL_BLOCK
from slipstream.schema.build import RuntimeConfig
from slipstream.schema.kv import KVGroup
from slipstream.schema.request import GenerateRequest, Pooling, TokenLogprobs
from slipstream.schema.sampling import SamplingParams
from slipstream.schema.step import PENDING, SequenceResult, SequenceStep, StepPlan, StepResult


def make_request(
    request_id: str, prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 4, **fields
) -> GenerateRequest:
    fields.setdefault("sampling", SamplingParams())
    fields.setdefault("seed", 0)
    return GenerateRequest(request_id=request_id, prompt_token_ids=tuple(prompt), max_tokens=max_tokens, **fields)


def fold(history_hash: int, token_id: int) -> int:
    return hash((history_hash, token_id))


def fold_all(request: GenerateRequest, token_ids: list[int]) -> list[int]:
    """The history hash at each position."""
    current, hashes = zlib.crc32(request.cache_salt.encode()), []  # hash() of a string differs from run to run
    for token_id in token_ids:
        current = fold(current, token_id)
        hashes.append(current)
    return hashes


def next_token(history_hash: int, seed: int, num_tokens: int) -> int:
    return hash((history_hash, seed)) % num_tokens


def expected_output(request: GenerateRequest, num_tokens: int) -> tuple[int, ...]:
    """What the request generates when nobody else is there."""
    current = fold_all(request, list(request.prompt_token_ids))[-1]
    output: list[int] = []
    while len(output) < request.max_tokens:
        output.append(next_token(current, request.seed, num_tokens))
        if output[-1] in request.eos_token_ids or output[-1] in request.sampling.stop_token_ids:
            break
        current = fold(current, output[-1])
    return tuple(output)


def expected_vector(request: GenerateRequest) -> bytes:
    """What a request that pools ends with: of the mean all tokens must have been computed, and each once."""
    hashes = fold_all(request, list(request.prompt_token_ids))
    return str(sum(hashes) if request.pooling is Pooling.MEAN else hashes[-1]).encode()


def prompt_logprob(request: GenerateRequest, position: int) -> TokenLogprobs:
    return TokenLogprobs(request.prompt_token_ids[position], -float(position), rank=position)


def in_sight(group: KVGroup, position: int) -> list[int]:
    """The tokens that the one at `position` sees: the definition of a window, without a word of blocks."""
    newest = group.window - group.sink_tokens
    return [p for p in range(position + 1) if not group.window or p < group.sink_tokens or position - p < newest]


@dataclass
class Row:
    """What a worker keeps for a slot: enough to know the sequence's whole history."""

    request: GenerateRequest
    token_ids: list[int]
    hashes: list[int]
    tables: list[list[int]]  # the block table of each KV group
    starts: list[int] = field(default_factory=list)  # of its steps
    sum: int = 0  # of the hashes computed since it began
    most_places: int = 0  # that its steps have needed
    drafts: list[int] = field(default_factory=list)
    has_failed: bool = False  # what it goes on to compute, until that is known, is rubbish


@dataclass
class FakeWorker:
    config: RuntimeConfig
    num_tokens: int = 3  # size of the alphabet
    script: dict[str, tuple[int, ...]] = field(default_factory=dict)  # request id -> its outputs, instead of hashes
    cells: dict[tuple[int, int], int | None] = field(default_factory=dict)
    rows: dict[int, Row] = field(default_factory=dict)
    num_computed: int = 0  # tokens, over all steps
    num_loads: int = 0

    def execute(self, plan: StepPlan, failing: frozenset[int] = frozenset()) -> StepResult:
        """Run a step. The sequences at the indexes `failing` report an error and leave rubbish in their blocks."""
        plan = self._enter(plan)
        for copy in plan.copies:
            for offset in range(copy.num_tokens):
                self.cells[copy.target, offset] = self.cells[copy.source, offset]
        self._load(plan)
        for step in plan.sequences:  # all writes before all reads: two sequences must not write to one cell
            self._write(step, self.rows[step.slot].hashes)
        for step in plan.sequences:
            self._read(step)
        self._check_saves(plan)
        for index in failing:
            self._write(plan.sequences[index], None)
            self.rows[plan.sequences[index].slot].has_failed = True
        self.num_computed += plan.num_tokens
        return StepResult(tuple(self._result(step, i in failing) for i, step in enumerate(plan.sequences)))

    def _load(self, plan: StepPlan) -> None:
        """What a load brings is the history hash at each position (handed_kv)."""
        for load in plan.loads:
            self.num_loads += 1
            for place, row in enumerate(load.rows, load.first):
                for block_id in filter(None, row):
                    for offset in range(self.config.tokens_per_block):
                        position = place * self.config.tokens_per_block + offset
                        self.cells[block_id, offset] = load.kv[position] if position < len(load.kv) else None

    def _check_saves(self, plan: StepPlan) -> None:
        """Whoever goes on after these tokens finds all that the next one sees."""
        for save in plan.saves:
            row = self.rows[plan.sequences[save.place].slot]
            assert save.path == row.request.kv_to and save.num_tokens == len(row.request.prompt_token_ids)
            if row.has_failed:
                continue
            for group, block_ids in zip(self.config.kv_groups, zip(*save.rows, strict=True), strict=True):
                for position in filter(lambda position: position < save.num_tokens, in_sight(group, save.num_tokens)):
                    assert self.cells[self._cell(list(block_ids), position)] == row.hashes[position]

    def crash(self, plan: StepPlan) -> None:
        """Run a step that dies midway: whatever it was to write is rubbish now."""
        plan = self._enter(plan)
        for copy in plan.copies:
            for offset in range(self.config.tokens_per_block):
                self.cells[copy.target, offset] = None
        for step in plan.sequences:
            self._write(step, None)
            self.rows[step.slot].has_failed = True

    def _enter(self, plan: StepPlan) -> StepPlan:
        """-> the same, with its late steps where the ones before them have got to."""
        assert 0 < plan.num_tokens <= self.config.max_num_tokens
        assert len({step.slot for step in plan.sequences}) == len(plan.sequences) <= self.config.max_batch_size
        assert {copy.source for copy in plan.copies}.isdisjoint(copy.target for copy in plan.copies)
        for slot in plan.freed_slots:
            del self.rows[slot]
        sequences = []
        for step in plan.sequences:
            if step.new is not None:
                assert step.slot not in self.rows, f"slot {step.slot} was not freed"
                token_ids = [*step.new.prompt_token_ids, *step.output_token_ids]
                tables: list[list[int]] = [[] for _ in self.config.kv_groups]
                self.rows[step.slot] = Row(step.new, token_ids, fold_all(step.new, token_ids), tables)
            self._change_tables(step, self.rows[step.slot].tables)
            sequences.append(self._begun(step, self.rows[step.slot]))
            self._check_step(sequences[-1], self.rows[step.slot])
        return replace(plan, sequences=tuple(sequences))

    def _begun(self, step: SequenceStep, row: Row) -> SequenceStep:
        """Where the step before has got to, with no more drafts than that has made."""
        assert self.config.takes_late_steps or (not step.late_by and step.num_drafts <= len(row.drafts))
        num_places = step.start + step.num_tokens + step.late_by
        most = len(row.request.prompt_token_ids) + row.request.max_tokens - 1
        reach = min(num_places + self.config.tokens_ahead * step.sample, most)  # where blocks are left
        row.most_places = max(row.most_places, num_places, reach)
        start = len(row.token_ids) - 1 if step.late_by and not row.has_failed else step.start
        assert step.start <= start <= step.start + step.late_by
        return step._replace(start=start, num_drafts=min(step.num_drafts, len(row.drafts)), late_by=0)

    def _change_tables(self, step: SequenceStep, tables: list[list[int]]) -> None:
        assert len({place for place, _ in step.table_changes}) == len(step.table_changes)
        for place, block_ids in step.table_changes:
            assert max(block_ids) < self.config.num_blocks
            for table, block_id in zip(tables, block_ids, strict=True):
                assert place <= len(table)
                table[place : place + 1] = [block_id]

    def _check_step(self, step: SequenceStep, row: Row) -> None:
        end, size = step.start + len(step.token_ids), self.config.tokens_per_block
        assert 0 <= step.num_drafts <= len(row.drafts) and (step.sample or not step.num_drafts)
        num_places, num_steps = end + step.num_drafts, max(2, self.config.num_stages)
        if not row.has_failed:
            own = tuple(row.token_ids[step.start : end])
            assert len(own) == len(step.token_ids) > 0
            assert step.token_ids == own or (num_steps == 2 and step.token_ids == (*own[:-1], PENDING))
            assert step.sample == (end == len(row.token_ids) and row.request.pooling is None)
        for group, block_ids in zip(self.config.kv_groups, row.tables, strict=True):
            assert -(-num_places // size) <= len(block_ids) <= -(-row.most_places // size)
            given_up = {place for place, block_id in enumerate(block_ids) if block_id == NULL_BLOCK}
            # A step that was planned ahead may still hold what those under way were the last to see.
            before = ([*row.starts, step.start][-num_steps:])[0]
            assert set(group.hidden(before, size)) <= given_up <= set(group.hidden(step.start, size))
        row.starts.append(step.start)
        held = [block_id for block_ids in row.tables for block_id in block_ids if block_id != NULL_BLOCK]
        assert len(set(held)) == len(held)

    def _write(self, step: SequenceStep, hashes: list[int] | None) -> None:
        if hashes is not None:
            hashes = self._with_drafts(step)
        for block_ids in self.rows[step.slot].tables:
            for position in range(step.start, step.start + step.num_tokens):
                is_known = hashes is not None and position < len(hashes)
                self.cells[self._cell(block_ids, position)] = hashes[position] if is_known else None

    def _with_drafts(self, step: SequenceStep) -> list[int]:
        """The history hash at each position, the step's drafts included."""
        row = self.rows[step.slot]
        hashes = list(row.hashes)
        for token_id in row.drafts[: step.num_drafts]:
            hashes.append(fold(hashes[-1], token_id))
        return hashes

    def _read(self, step: SequenceStep) -> None:
        row, end = self.rows[step.slot], step.start + step.num_tokens
        if row.has_failed:
            return
        hashes = self._with_drafts(step)
        for group, block_ids in zip(self.config.kv_groups, row.tables, strict=True):
            for query in range(step.start, end):
                for position in in_sight(group, query):
                    cell = self.cells.get(self._cell(block_ids, position))
                    assert cell == hashes[position], f"{row.request} reads rubbish at {position}: {step}"

    def _cell(self, block_ids: list[int], position: int) -> tuple[int, int]:
        size = self.config.tokens_per_block
        assert block_ids[position // size] != NULL_BLOCK
        return block_ids[position // size], position % size

    def _result(self, step: SequenceStep, fails: bool) -> SequenceResult:
        row = self.rows[step.slot]
        if fails:
            return SequenceResult(error="broken logits processor")
        request, end = row.request, step.start + len(step.token_ids)
        row.sum += sum(row.hashes[step.start : end])
        if request.pooling is not None:
            if end < len(request.prompt_token_ids):
                return SequenceResult()
            pooled = row.sum if request.pooling is Pooling.MEAN else row.hashes[-1]
            return SequenceResult(vector=str(pooled).encode())
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        if request.sampling.prompt_logprobs is not None:
            rows = range(step.start, min(end, len(request.prompt_token_ids) - 1))
            prompt_logprobs = tuple(prompt_logprob(request, position + 1) for position in rows)
        if not step.sample:
            return SequenceResult(prompt_logprobs=prompt_logprobs)
        token_ids = [self._take_next(row)]
        for draft in row.drafts[: step.num_drafts]:
            if draft != token_ids[-1]:
                break
            token_ids.append(self._take_next(row))
        wants_logprobs = request.sampling.logprobs is not None
        logprobs = tuple(TokenLogprobs(token_id, -1.0, rank=1) for token_id in token_ids if wants_logprobs)
        row.drafts = self._draft(row)[: step.max_drafts]
        accepted = tuple(range(1, len(token_ids)))
        return SequenceResult(
            tuple(token_ids), logprobs, prompt_logprobs, num_drafts=len(row.drafts), accepted=accepted
        )

    def _take_next(self, row: Row) -> int:
        token_id = self._sample(row)
        row.token_ids.append(token_id)
        row.hashes.append(fold(row.hashes[-1], token_id))
        return token_id

    def _draft(self, row: Row) -> list[int]:
        """Up to max_draft_len tokens, of which three in four are right."""
        current, drafts = row.hashes[-1], list[int]()
        for place in range(abs(current) % (self.config.max_draft_len + 1)):
            drafts.append(next_token(current, row.request.seed, self.num_tokens))
            if hash((current, place)) % 4 == 0:
                drafts[-1] = (drafts[-1] + 1) % self.num_tokens
            current = fold(current, drafts[-1])
        return drafts

    def _sample(self, row: Row) -> int:
        if row.request.request_id in self.script:
            num_output = len(row.token_ids) - len(row.request.prompt_token_ids)
            if num_output == len(self.script[row.request.request_id]):
                return 0  # it has ended, and a step planned ahead does not know
            return self.script[row.request.request_id][num_output]
        return next_token(row.hashes[-1], row.request.seed, self.num_tokens)
