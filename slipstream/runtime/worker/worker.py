"""Worker: runs StepPlans on one device. Owns the weights, the KV tensors and the sampling slots."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from slipstream.engine.choices import Choices
from slipstream.engine.folder import Engine
from slipstream.errors import CapacityError
from slipstream.runtime.guidance import Guidance
from slipstream.runtime.transfer import on_device
from slipstream.runtime.worker.graphs import compile_graph
from slipstream.runtime.worker.groups import with_groups
from slipstream.runtime.worker.inputs import make_inputs, rows_wanted
from slipstream.runtime.worker.memory import allocate_kv, free_memory, keep_freed_memory, left_by_plan, peak_memory
from slipstream.runtime.worker.recorded import RecordedSteps
from slipstream.runtime.worker.sample import Draw, Sampler
from slipstream.runtime.worker.tables import BlockTables
from slipstream.runtime.worker.weights import load_weights
from slipstream.schema.build import MAX_RECORDED_TOKENS
from slipstream.schema.kv import KVGroup
from slipstream.schema.step import BlockCopy, SequenceResult, SequenceStep, StepPlan, StepResult

CUBLAS_WORKSPACES = 64 << 20  # cuBLAS and cuBLASLt, 32 MiB each on an H100: once more for the stream of recordings


@dataclass(frozen=True)
class Flight:
    """A step that was launched. Its logits are overwritten by the next one."""

    plan: StepPlan
    logit_counts: list[int]
    wants_all_rows: list[bool]
    logits_RV: Tensor  # noqa: N815 - a tensor's name carries its shape
    draw: Draw


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
        is_deterministic: bool = False,
    ) -> None:
        """Weights are loaded; before the first step comes allocate_kv."""
        manifest = engine.manifest
        self._device, self._manifest, self._groups = device, manifest, groups
        self._max_batch_size = max_batch_size
        graph = with_groups(engine.graph, groups)  # may refuse: before anything is loaded
        if device.type == "cpu":
            keep_freed_memory()  # before the engine's thread first allocates
        weights = load_weights(engine.weights, list(engine.graph.weights), device)
        self._kv: list[Tensor] = []
        self._kv_inputs: dict[str, Tensor] = {}
        compiled = compile_graph(graph, weights, choices, device, is_batch_invariant=is_deterministic)
        self._graph = compiled.run
        self._sampler = Sampler(
            manifest.vocab_size, max_batch_size, device, guidance=guidance, is_batch_invariant=is_deterministic
        )
        self._tables = BlockTables(len(groups), max_batch_size, manifest.tokens_per_block)
        self._recorded: RecordedSteps | None = None
        if device.type == "cuda" and compiled.can_be_recorded:
            self._recorded = RecordedSteps(self._run, self._tables, max_batch_size, device)

    def memory_left(self, max_num_tokens: int) -> int:
        """Bytes that a KV cache could have, beside the weights and the steps that run and that are recorded.

        Planned for a CPU. On a GPU what the largest step takes is measured, and a part set aside for recordings.
        """
        if self._device.type == "cpu":
            return left_by_plan(self._manifest, self._device)
        self.allocate_kv(1)  # the null block alone
        peak = self._measure(max_num_tokens, max_num_tokens)
        if self._recorded is not None:
            # A quarter more, for what an allocator loses between steps of several sizes.
            recorded = min(max_num_tokens, MAX_RECORDED_TOKENS)
            largest = self._measure(recorded, min(recorded, self._max_batch_size)) * 5 // 4
            self._recorded.reserve(largest + CUBLAS_WORKSPACES)
        self._kv, self._kv_inputs = [], {}
        torch.cuda.empty_cache()
        return max(0, free_memory(self._device) - peak)

    def allocate_kv(self, num_blocks: int) -> None:
        """Zeroed KV blocks, of which the null block is the first."""
        # A tensor serves the layers of one place in each group: a block belongs to one group at a time.
        num_tensors = max(len(group.layers) for group in self._groups)
        self._kv = allocate_kv(self._manifest, num_tensors, num_blocks, self._device)
        self._kv_inputs = {
            f"kv.{layer}": self._kv[place] for group in self._groups for place, layer in enumerate(group.layers)
        }

    @torch.inference_mode()
    def record(self, max_num_tokens: int) -> None:
        """On a GPU, the steps that most requests will meet. The KV cache is there."""
        if self._recorded is not None:
            self._recorded.record_short(len(self._groups), max_num_tokens)

    @torch.inference_mode()
    def _measure(self, num_tokens: int, num_rows: int) -> int:
        """Bytes that a step of so many tokens and rows of logits takes, its prompts as long as can be."""
        longest = self._manifest.max_seq_len
        num_tokens = min(num_tokens, longest * self._max_batch_size)
        lengths = [min(longest, num_tokens - start) for start in range(0, num_tokens, longest)]
        counts = [
            max(0, min(length, num_rows - start))
            for start, length in zip(range(0, num_tokens, longest), lengths, strict=True)
        ]
        steps = [SequenceStep(slot, 0, (0,) * length, sample=False) for slot, length in enumerate(lengths)]
        plan, free = StepPlan(0, tuple(steps)), free_memory(self._device)
        inputs = make_inputs(plan, counts, [False] * len(steps), self._tables, self._device)
        try:
            return peak_memory(lambda: self._run(inputs), self._device)
        except torch.OutOfMemoryError:
            planned = self._manifest.memory.get("activations", 0) / self._manifest.max_num_tokens
            fits = min(num_tokens // 2, int(0.7 * free / max(1, planned)))
            raise CapacityError(
                f"A step of {num_tokens} tokens does not fit into the {free / 2**30:.1f} GiB that the weights leave of "
                f"{self._device}; lower --max_num_tokens to {max(1, fits)}."
            ) from None

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Flight:
        """Start a step: slots and copies first, then the graph, then sampling. A GPU is not waited for."""
        self._tables.update(plan)
        for slot in plan.freed_slots:
            self._sampler.remove(slot)
        for sequence in plan.sequences:
            if sequence.new is not None:
                self._sampler.add(sequence.slot, sequence.new, sequence.output_token_ids)
        if plan.copies:
            self._copy(plan.copies)
        # A prompt whose logprobs were asked for needs the logits of every token; the others only of their last.
        wants_all_rows = [self._sampler.asks_prompt_logprobs(sequence.slot) for sequence in plan.sequences]
        counts = rows_wanted(plan, wants_all_rows)
        # What the host has to do with a row's logits comes after the step.
        is_chosen = [sequence.sample and not self._sampler.is_edited(sequence.slot) for sequence in plan.sequences]
        logits_RV, token_ids_R = self._run_sized(plan, counts, is_chosen)
        last_rows = [end - 1 for end, each in zip(accumulate(counts), plan.sequences, strict=True) if each.sample]
        if len(last_rows) != len(logits_RV):
            rows_S = on_device(last_rows, torch.int64, self._device)
            sampled_SV, token_ids_S = logits_RV[rows_S], token_ids_R[rows_S]
        else:
            sampled_SV, token_ids_S = logits_RV, token_ids_R
        sampling = [each for each in plan.sequences if each.sample]
        positions = [each.start + len(each.token_ids) for each in sampling]
        draw = self._sampler.draw([each.slot for each in sampling], positions, sampled_SV, token_ids_S)
        return Flight(plan, counts, wants_all_rows, logits_RV, draw)

    @torch.inference_mode()
    def collect(self, flight: Flight) -> StepResult:
        """What a step has sampled, and the prompt logprobs asked for. Steps are collected in their order."""
        drawn, sequences = iter(self._sampler.finish(flight.draw)), flight.plan.sequences
        results = [next(drawn) if sequence.sample else SequenceResult() for sequence in sequences]
        ends = list(accumulate(flight.logit_counts))
        for index in [index for index, is_asked in enumerate(flight.wants_all_rows) if is_asked]:
            chunk_TV = flight.logits_RV[ends[index] - flight.logit_counts[index] : ends[index]]
            found = self._sampler.prompt_logprobs(sequences[index].slot, sequences[index].start, chunk_TV)
            results[index] = results[index]._replace(prompt_logprobs=found)
        return StepResult(tuple(results))

    def can_run_ahead(self, flight: Flight) -> bool:
        """Whether the step after this one may be launched before it is collected."""
        return self._device.type == "cuda" and not any(flight.wants_all_rows) and flight.draw.is_plain

    def _run_sized(self, plan: StepPlan, logit_counts: list[int], is_chosen: Sequence[bool]) -> tuple[Tensor, Tensor]:
        if self._recorded is not None:
            found = self._recorded.run(plan, logit_counts, is_chosen)
            if found is not None:
                return found
        try:
            return self._run(make_inputs(plan, logit_counts, is_chosen, self._tables, self._device))
        except torch.OutOfMemoryError:
            raise CapacityError(
                f"A step of {plan.num_tokens} tokens found no memory on {self._device}; lower "
                f"--kv_cache_free_memory_fraction or set --kv_cache_max_bytes to "
                f"{sum(kv.nbytes for kv in self._kv) * 3 // 4}."
            ) from None

    def _run(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of the wanted rows, [R, vocab_size], and the token chosen for each."""
        slots = self._sampler.slots
        slots.fill_pending(inputs["step.token_ids"], inputs["token_slots"])
        (logits_RV,) = self._graph(inputs | self._kv_inputs)
        if self._manifest.logits != "selected":
            logits_RV = logits_RV[inputs["step.logit_rows"]]
        return logits_RV, slots.choose(logits_RV, inputs["row_slots"], inputs["row_positions"])

    def _copy(self, copies: Sequence[BlockCopy]) -> None:
        """Whole blocks, all at once: what is beyond a copy's tokens is overwritten before anything sees it."""
        sources_C = on_device([copy.source for copy in copies], torch.int64, self._device)
        targets_C = on_device([copy.target for copy in copies], torch.int64, self._device)
        for kv_PNBKD in self._kv:
            pages_PNBKD = kv_PNBKD.view(torch.int8) if kv_PNBKD.itemsize == 1 else kv_PNBKD  # FP8 cannot be indexed
            pages_PNBKD[:, targets_C] = pages_PNBKD[:, sources_C]
