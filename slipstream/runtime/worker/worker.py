"""Worker: runs StepPlans on one device. Owns the weights, the KV tensors and the sampling slots."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from slipstream.engine.choices import Choices
from slipstream.engine.folder import Engine
from slipstream.errors import CapacityError
from slipstream.kernels.collectives import ALONE, Ranks
from slipstream.runtime.guidance import Guidance
from slipstream.runtime.transfer import on_device
from slipstream.runtime.worker.drafts import Drafts
from slipstream.runtime.worker.ending import CATCHING_UP, Ending, EndingPlan, Inputs
from slipstream.runtime.worker.ends import embedding_of, head_of
from slipstream.runtime.worker.followed import Followed
from slipstream.runtime.worker.graphs import compile_graph
from slipstream.runtime.worker.groups import with_groups, with_trees
from slipstream.runtime.worker.handover import HandedKV, Saving
from slipstream.runtime.worker.hidden import with_hidden
from slipstream.runtime.worker.inputs import make_inputs, rows_wanted
from slipstream.runtime.worker.late import move_on
from slipstream.runtime.worker.memory import allocate_kv, free_memory, keep_freed_memory, left_by_plan, peak_memory
from slipstream.runtime.worker.pool import Pooler, Vectors
from slipstream.runtime.worker.recorded import RecordedSteps, StepOutputs
from slipstream.runtime.worker.sample import Draw, Sampler, with_greedy
from slipstream.runtime.worker.tables import BlockTables
from slipstream.runtime.worker.weights import load_weights
from slipstream.schema.build import MAX_RECORDED_TOKENS
from slipstream.schema.kv import KVGroup
from slipstream.schema.step import BlockCopy, SequenceResult, SequenceStep, StepPlan, StepResult, packed
from slipstream.speculative.accept import Accepted
from slipstream.speculative.drafter import AnyDrafter, DeviceDrafter, ModelDrafter, Running

CUBLAS_WORKSPACES = 64 << 20  # cuBLAS and cuBLASLt, 32 MiB each on an H100: once more for the stream of recordings

Announce = Callable[[StepPlan, Sequence[int]], None]  # a step, and how many rows of logits each sequence has in it


@dataclass(frozen=True)
class Begun:
    """A step of which the other ranks know."""

    plan: StepPlan
    logit_counts: list[int]
    wants_all_rows: list[bool]


@dataclass(frozen=True)
class Flight:
    """A step that was launched. Its logits are overwritten by the next one."""

    plan: StepPlan
    logit_counts: list[int]
    wants_all_rows: list[bool]
    logits_RV: Tensor  # noqa: N815 - a tensor's name carries its shape
    draw: Draw
    vectors: Vectors | None
    num_drafts: list[int]  # of each sequence that samples, for its next step; of those made on the device, at most
    saving: list[Saving]  # the plan's saves


class Worker:
    def __init__(
        self,
        engine: Engine,
        choices: Choices,
        groups: Sequence[KVGroup],
        max_batch_size: int,
        device: torch.device,
        *,
        guidance: Guidance | None = None,
        drafter: AnyDrafter | None = None,
        max_draft_len: int = 0,
        tokens_ahead: int = 0,
        drafts_branch: bool = False,
        reads_hidden: Sequence[int] = (),
        is_deterministic: bool = False,
        ranks: Ranks = ALONE,
        announce: Announce | None = None,
    ) -> None:
        """Weights are loaded; before the first step comes allocate_kv.

        max_draft_len, drafts_branch, reads_hidden: of the drafter, which only the first rank has. tokens_ahead: as
        RuntimeConfig has it. announce: tells the other ranks of a step.
        """
        manifest = engine.manifest
        self._device, self._manifest, self._groups = device, manifest, groups
        self._max_batch_size, self._ranks, self._announce = max_batch_size, ranks, announce
        self._sampler = Sampler(
            manifest.vocab_size, max_batch_size, device, guidance=guidance, is_batch_invariant=is_deterministic
        )
        self._drafts = Drafts(
            drafter, manifest.vocab_size, max_batch_size, device, self._sampler.token_ids,
            self._sampler.slots.last_token, max_len=max_draft_len, can_branch=drafts_branch,
        )  # fmt: skip
        graph = with_groups(engine.graph, groups)  # may refuse: before anything is loaded
        if drafts_branch:
            graph = with_trees(graph, self._drafts.num_mask_words)
        if reads_hidden and not manifest.mapping.place(engine.rank):  # the first rank, or on the way to it
            graph = with_hidden(graph, reads_hidden, engine)
        # In the call that computes the logits; on a GPU choosing is two kernels anyway.
        self._gives_greedy = device.type == "cpu" and engine.is_last_stage and manifest.logits == "selected"
        if self._gives_greedy:
            graph = with_greedy(graph)
        if device.type == "cpu":
            keep_freed_memory()  # before the engine's thread first allocates
        weights = load_weights(engine.weights, list(engine.graph.weights), device)
        self._kv: list[Tensor] = []
        self._kv_inputs: dict[str, Tensor] = {}
        compiled = compile_graph(graph, weights, choices, device, is_batch_invariant=is_deterministic, ranks=ranks)
        self._graph, self._is_last_stage = compiled.run, engine.is_last_stage
        self._tables = BlockTables(len(groups), max_batch_size, manifest.tokens_per_block, tokens_ahead)
        self._drafts.lend(groups)
        followed = None
        if isinstance(drafter, ModelDrafter):
            followed = Followed(self._tables, self._drafts.group, max_batch_size, self._sampler.token_ids)
        device_drafter = drafter if isinstance(drafter, DeviceDrafter) else None
        self._ending = Ending(self._drafts, device_drafter, groups, manifest.tokens_per_block, device, ranks, followed)
        # What a recording has to have room for. With several ranks endings are by themselves (_run_and_draw).
        self._full_ending = self._ending.in_full() if ranks.size == 1 else None
        # With several stages the plan knows all tokens but drafts, and nobody waits for the first rank.
        self._copies_tokens = ranks.size > 1 and (manifest.pp_size == 1 or max_draft_len > 0)
        self._copies_trees = ranks.size > 1 and drafts_branch
        if self._drafts.reads_ends:
            embed, head = (part(engine, weights, choices, device) for part in (embedding_of, head_of))
            self._drafts.attach(Running(embed, head))
        self._drafter_kv: list[Tensor] = []
        self._pooler = Pooler()
        self._most_rows = max_batch_size * (1 + max_draft_len)  # of logits in most steps
        self._recorded: RecordedSteps | None = None
        can_be_recorded = compiled.can_be_recorded and self._drafts.can_be_recorded
        if device.type == "cuda" and ranks.least(can_be_recorded):  # stages may differ
            self._recorded = RecordedSteps(
                self._run, self._tables, max_batch_size, self._most_rows, device, self._ending.known
            )

    @property
    def drafter_bytes_per_token(self) -> int:
        """Of a block, for a drafter's own layer."""
        return self._drafts.bytes_per_token

    def memory_left(self, max_num_tokens: int) -> int:
        """Bytes that a KV cache could have, beside the weights and the steps that run and that are recorded.

        Planned for a CPU. On a GPU what the largest step takes is measured, and a part set aside for recordings.
        """
        if self._device.type == "cpu":
            return left_by_plan(self._manifest, self._device)
        self.allocate_kv(1)  # the null block alone
        peak = self._largest_step(max_num_tokens, max_num_tokens)
        if self._recorded is not None:
            # A quarter more, for what an allocator loses between steps of several sizes.
            largest = self._largest_step(min(max_num_tokens, MAX_RECORDED_TOKENS), self._most_rows) * 5 // 4
            self._recorded.reserve(largest + CUBLAS_WORKSPACES)
        self._kv, self._kv_inputs, self._drafter_kv = [], {}, []
        torch.cuda.empty_cache()
        return max(0, free_memory(self._device) - peak)

    def allocate_kv(self, num_blocks: int) -> None:
        """Zeroed KV blocks, of which the null block is the first."""
        self._kv = allocate_kv(self._manifest, self._groups, num_blocks, self._device)
        self._kv_inputs = {
            f"kv.{layer}": self._kv[place] for group in self._groups for place, layer in enumerate(group.layers)
        }
        self._drafter_kv = self._drafts.allocate_kv(num_blocks, self._manifest.tokens_per_block)

    @torch.inference_mode()
    def record(self, max_num_tokens: int) -> None:
        """On a GPU, the steps that most requests will meet. The KV cache is there."""
        if self._recorded is not None:
            plain = self._ending.of_plain() if self._ranks.size == 1 else None
            endings = [] if self._full_ending is None else [self._full_ending]
            if self._ending.can_catch_up:
                endings.append(CATCHING_UP)
            self._recorded.record_short(len(self._groups), max_num_tokens, plain, endings)

    @property
    def num_recordings(self) -> int:
        """Of steps, so far."""
        return 0 if self._recorded is None else self._recorded.num_recordings

    def close(self) -> None:
        """No step comes any more."""
        if self._recorded is not None:
            self._recorded.drop()

    def _largest_step(self, max_num_tokens: int, max_rows: int) -> int:
        """Bytes that the largest step of up to so many tokens and rows of logits takes."""
        longest, ending = self._manifest.max_seq_len, self._full_ending
        num_tokens = min(max_num_tokens, longest * self._max_batch_size)
        prompts = [min(longest, num_tokens - start) for start in range(0, num_tokens, longest)]
        largest = self._measure(prompts, max_rows)
        if ending is not None:
            num_sequences = min(self._max_batch_size, max_num_tokens // ending.num_nodes)
            largest = max(largest, self._measure([ending.num_nodes] * num_sequences, max_rows, ending))
        return largest

    @torch.inference_mode()
    def _measure(self, lengths: Sequence[int], num_rows: int, ending: EndingPlan | None = None) -> int:
        """Bytes that a step of such sequences takes, with at most so many rows of logits."""
        if not lengths:
            return 0
        num_tokens = sum(lengths)
        starts = accumulate(lengths[:-1], initial=0)
        counts = [max(0, min(length, num_rows - start)) for start, length in zip(starts, lengths, strict=True)]
        steps = [SequenceStep(slot, 0, (0,) * length, sample=False) for slot, length in enumerate(lengths)]
        plan, free = StepPlan(0, tuple(steps)), free_memory(self._device)
        inputs = self._inputs(plan, counts, [False] * len(steps), ending)
        try:
            return peak_memory(lambda: self._run(inputs, ending), self._device)
        except torch.OutOfMemoryError:
            planned = self._manifest.memory.get("activations", 0) / self._manifest.max_num_tokens
            fits = min(num_tokens // 2, int(0.7 * free / max(1, planned)))
            raise CapacityError(
                f"A step of {num_tokens} tokens does not fit into the {free / 2**30:.1f} GiB that the weights leave of "
                f"{self._device}; lower --max_num_tokens to {max(1, fits)}."
            ) from None

    @torch.inference_mode()
    def begin(self, plan: StepPlan) -> Begun:
        """Take in who comes and goes, and tell the other ranks, so that the stages before this one begin to compute."""
        self._change_slots(plan)
        # A prompt whose logprobs were asked for needs the logits of every token; the others only of their last.
        wants_all_rows = [self._sampler.asks_prompt_logprobs(sequence.slot) for sequence in plan.sequences]
        counts = rows_wanted(plan, wants_all_rows)
        if self._announce is not None:
            self._announce(plan, counts)
        return Begun(plan, counts, wants_all_rows)

    @torch.inference_mode()
    def launch(self, begun: Begun) -> Flight:
        """Start this rank's part: copies first, then the graph, then sampling and pooling. A GPU is not waited for.

        Steps are launched in the order in which they were begun.
        """
        plan, counts = begun.plan, begun.logit_counts
        self._tables.update(plan)
        if plan.copies:
            self._copy(plan.copies)
        for load in plan.loads:
            load.kv.fill(load, self._caches())
        self._catch_up(self._ending.missed(plan))
        steps = [each for each in plan.sequences if each.sample]
        outputs, draw = self._run_and_draw(plan, counts, steps)
        vectors = self._pooler.pool(plan, outputs.hidden)
        saving = [Saving(save, self._caches()) for save in plan.saves]  # the drafter's KV is there now, too
        hidden_SF = None
        if outputs.drafted_from is not None and self._drafts.are_made_on_host and steps:
            hidden_SF = self._where_chosen(plan, outputs.drafted_from, draw.accepted)
        num_drafts = self._drafts.propose(steps, draw.accepted, hidden_SF)
        return Flight(plan, counts, begun.wants_all_rows, outputs.logits, draw, vectors, num_drafts, saving)

    def _catch_up(self, missed: Sequence[SequenceStep]) -> None:
        """Have a draft model read these tokens, of all sequences together, in as few steps as they fit into."""
        for pieces in packed([len(step.token_ids) for step in missed], self._manifest.max_num_tokens):
            steps = []
            for index, first, end in pieces:
                step = missed[index]
                steps.append(step._replace(start=step.start + first, token_ids=step.token_ids[first:end]))
            counts, is_chosen = [0] * len(steps), [False] * len(steps)
            self._run_sized(StepPlan(0, tuple(steps)), counts, is_chosen, CATCHING_UP)

    def _run_and_draw(
        self, plan: StepPlan, counts: list[int], steps: Sequence[SequenceStep]
    ) -> tuple[StepOutputs, Draw]:
        """steps: those of the plan that sample."""
        # What the host has to do with a row's logits comes after the step, and only then its ending. With several ranks
        # the ending is by itself, too: they have to record the same steps, and only one knows what is drafted. Of one
        # without drafts the host need not know.
        is_chosen = [each.sample and not self._sampler.is_edited(each.slot) for each in plan.sequences]
        has_edits = sum(is_chosen) < len(steps)
        is_whole = not has_edits and self._ranks.size == 1
        ending = self._ending.plan(plan)
        drafted = self._drafts.verified_by(steps) if has_edits else None
        outputs = self._run_sized(plan, counts, is_chosen, ending if is_whole else None)
        logits_RV, token_ids_R, _, hidden_TF, ended_SX, read_ids_T = outputs

        def end(chosen_R: Tensor) -> Tensor:
            assert ending is not None
            ended = ended_SX
            if ended is None:
                inputs = self._inputs(plan, counts, is_chosen, ending)
                self._move_on(inputs)
                assert read_ids_T is not None
                inputs["step.token_ids"] = read_ids_T[: plan.num_tokens]
                ended = self._ending.run(ending, inputs, chosen_R, hidden_TF, self._kv_rows())
            if len(steps) == len(plan.sequences):
                return ended[: len(steps)]  # a recorded step has more
            sampling = [index for index, each in enumerate(plan.sequences) if each.sample]
            return ended[on_device(sampling, torch.int64, self._device)]

        slots, positions = [each.slot for each in steps], [each.start + len(each.token_ids) for each in steps]
        ends = zip(accumulate(counts), plan.sequences, strict=True)
        first_rows = [end - 1 - each.num_drafts for end, each in ends if each.sample]
        verify = None if ending is None or (is_whole and ending == self._ending.of_plain()) else end
        draw = self._sampler.draw(slots, positions, logits_RV, token_ids_R, first_rows, drafted, verify)
        return outputs, draw

    def receive(self, path: str, num_tokens: int) -> HandedKV | None:
        """For a plan to load: what another engine has saved of a prompt's first tokens, if that is there."""
        return HandedKV.receive(path, num_tokens, self._caches())

    def _caches(self) -> list[Tensor]:
        return [_indexable(kv_PNBKD) for kv_PNBKD in (*self._kv, *self._drafter_kv)]

    def _where_chosen(self, plan: StepPlan, hidden_TF: Tensor, accepted: Accepted) -> Tensor:
        """Of each sequence that samples, the row of its last token's choice."""
        ends = accumulate(each.num_tokens for each in plan.sequences)
        roots = [end - 1 - each.num_drafts for end, each in zip(ends, plan.sequences, strict=True) if each.sample]
        return hidden_TF[on_device(roots, torch.int64, self._device) + accepted.last_nodes()]

    @torch.inference_mode()
    def hidden_states(self, plan: StepPlan) -> Tensor:
        """[T, F] of all tokens of a step that samples nothing, for a graph made with_hidden. The next step overwrites
        them."""
        self._tables.update(plan)
        hidden_TF = self._run_sized(plan, [0] * len(plan.sequences), [False] * len(plan.sequences)).drafted_from
        assert hidden_TF is not None, "asked of a graph that gives none"
        return hidden_TF[: plan.num_tokens]  # a recorded step has more rows

    @torch.inference_mode()
    def follow(self, plan: StepPlan, logit_counts: list[int]) -> None:
        """This rank's part of a step that the first rank has launched; what comes of it is for that one to know."""
        self._tables.update(plan)
        if plan.copies:
            self._copy(plan.copies)
        is_chosen = [False] * len(plan.sequences)
        self._run_sized(plan, logit_counts, is_chosen)
        ending = self._ending.plan(plan) if self._copies_trees else None
        if ending is not None:
            self._ending.run_beside(ending, self._inputs(plan, logit_counts, is_chosen, ending), self._kv_rows())

    def _change_slots(self, plan: StepPlan) -> None:
        for slot in plan.freed_slots:
            self._sampler.remove(slot)
            self._pooler.remove(slot)
            self._drafts.remove(slot)
        for sequence in plan.sequences:
            if sequence.new is not None:
                self._sampler.add(sequence.slot, sequence.new, sequence.output_token_ids)
                self._pooler.add(sequence.slot, sequence.new)
                self._drafts.add(sequence.slot, sequence.new, sequence.output_token_ids)

    @torch.inference_mode()
    def collect(self, flight: Flight) -> StepResult:
        """What a step has sampled and pooled, and the prompt logprobs asked for. Steps are collected in their order."""
        num_drafts = flight.num_drafts
        if not self._drafts.are_made_on_host:
            num_drafts = list(map(min, num_drafts, flight.draw.drafts_made()))
        finished = zip(self._sampler.finish(flight.draw), num_drafts, strict=True)
        drawn = (result._replace(num_drafts=count) if count else result for result, count in finished)
        sequences = flight.plan.sequences
        results = [next(drawn) if sequence.sample else SequenceResult() for sequence in sequences]
        ends = list(accumulate(flight.logit_counts))
        for index in [index for index, is_asked in enumerate(flight.wants_all_rows) if is_asked]:
            chunk_TV = flight.logits_RV[ends[index] - flight.logit_counts[index] : ends[index]]
            found = self._sampler.prompt_logprobs(sequences[index].slot, sequences[index].start, chunk_TV)
            results[index] = results[index]._replace(prompt_logprobs=found)
        if flight.vectors is not None:
            for index, result in flight.vectors.results():
                results[index] = result
        for save, saving in zip(flight.plan.saves, flight.saving, strict=True):
            if (why := saving.write()) is not None:
                results[save.place] = SequenceResult(error=why)
        return StepResult(tuple(results))

    @property
    def computes_by_itself(self) -> bool:
        """While the host does other things. Stages have several steps under way already."""
        return self._device.type == "cuda" and self._manifest.pp_size == 1

    @property
    def takes_late_steps(self) -> bool:
        """Whether a step may be launched before it is known how far the drafts of the one before get."""
        return self.computes_by_itself and self._drafts.can_be_late and self._ranks.size == 1

    def can_run_ahead(self, flight: Flight) -> bool:
        """Whether the step after this one may be launched before it is collected."""
        if not self.computes_by_itself:
            return False
        if any(step.max_drafts for step in flight.plan.sequences) and not self.takes_late_steps:
            return False  # how far drafts get decides where it begins
        if not self._ending.knows_after(flight.plan):
            return False
        return not any(flight.wants_all_rows) and flight.draw.is_plain

    def _inputs(
        self, plan: StepPlan, counts: list[int], is_chosen: Sequence[bool], ending: EndingPlan | None
    ) -> dict[str, Tensor]:
        """Exactly as large as the plan."""
        num_nodes = 0 if ending is None else ending.num_nodes
        return make_inputs(plan, counts, is_chosen, self._tables, self._device, num_nodes, self._ending.known)

    def _run_sized(
        self, plan: StepPlan, logit_counts: list[int], is_chosen: Sequence[bool], ending: EndingPlan | None = None
    ) -> StepOutputs:
        if self._recorded is not None:
            found = self._recorded.run(plan, logit_counts, is_chosen, ending)
            if found is not None:
                return found
        try:
            return self._run(self._inputs(plan, logit_counts, is_chosen, ending), ending)
        except torch.OutOfMemoryError:
            raise CapacityError(
                f"A step of {plan.num_tokens} tokens found no memory on {self._device}; lower "
                f"--kv_cache_free_memory_fraction or set --kv_cache_max_bytes to "
                f"{sum(kv.nbytes for kv in self._kv) * 3 // 4}."
            ) from None

    def _run(self, inputs: Inputs, ending: EndingPlan | None = None) -> StepOutputs:
        if ending == CATCHING_UP:
            self._ending.catch_up(inputs)
            return StepOutputs(inputs["row_slots"][:0], inputs["row_slots"][:0])
        slots = self._sampler.slots
        slots.fill_pending(inputs["step.token_ids"], inputs["token_slots"])
        self._move_on(inputs)
        tree = self._drafts.fill(inputs)
        if self._copies_tokens:
            self._ranks.copy_first(inputs["step.token_ids"])  # which knows them
        if self._copies_trees:
            self._ranks.copy_first(inputs["step.positions"])
            self._ranks.copy_first(tree["step.tree_masks"])
        logits_RV, *hidden_TH = self._graph({**inputs, **tree, **self._kv_inputs})
        greedy_R = hidden_TH.pop() if self._gives_greedy else None
        if not self._is_last_stage:  # it has sent what it made
            return StepOutputs(logits_RV.new_empty(0, self._manifest.vocab_size), inputs["row_slots"][:0])
        asked = hidden_TH[1:]
        drafted_from_TF = None if not asked else torch.cat(asked, 1) if len(asked) > 1 else asked[0]
        if self._manifest.logits != "selected":
            logits_RV = logits_RV[inputs["step.logit_rows"]]
        token_ids_R = slots.choose(logits_RV, inputs["row_slots"], inputs["row_positions"], greedy_R)
        ended_SX = None
        if ending is not None:
            ended_SX = self._ending.run(ending, inputs, token_ids_R, drafted_from_TF, self._kv_rows())
        hidden = hidden_TH[0] if hidden_TH else None
        return StepOutputs(logits_RV, token_ids_R, hidden, drafted_from_TF, ended_SX, inputs["step.token_ids"])

    def _move_on(self, inputs: Inputs) -> None:
        if self.takes_late_steps:
            places = len(self._groups), self._tables.tokens_per_block
            move_on(inputs, self._drafts.num_accepted_X, *places, can_branch=self._drafts.can_branch)

    def _kv_rows(self) -> list[Tensor]:
        return [_indexable(kv_PNBKD) for kv_PNBKD in self._kv]

    def _copy(self, copies: Sequence[BlockCopy]) -> None:
        """Whole blocks, all at once: what is beyond a copy's tokens is overwritten before anything sees it."""
        sources_C = on_device([copy.source for copy in copies], torch.int64, self._device)
        targets_C = on_device([copy.target for copy in copies], torch.int64, self._device)
        for pages_PNBKD in self._caches():
            pages_PNBKD[:, targets_C] = pages_PNBKD[:, sources_C]


def _indexable(kv_PNBKD: Tensor) -> Tensor:
    """FP8 cannot be indexed; its bytes can."""
    return kv_PNBKD.view(torch.int8) if kv_PNBKD.itemsize == 1 else kv_PNBKD
