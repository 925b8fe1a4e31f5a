"""Worker: executes StepPlans on one device. Owns the weights, the KV tensors and the sampling slots."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slipstream.engine.choices import Choices
from slipstream.engine.folder import Engine
from slipstream.runtime.worker.graphs import compile_graph
from slipstream.runtime.worker.groups import with_groups
from slipstream.runtime.worker.inputs import make_inputs, rows_wanted
from slipstream.runtime.worker.memory import allocate_kv, keep_freed_memory
from slipstream.runtime.worker.recorded import RecordedSteps
from slipstream.runtime.worker.sample import Sampler
from slipstream.schema.kv import KVGroup
from slipstream.schema.step import BlockCopy, SequenceResult, StepPlan, StepResult


class Worker:
    def __init__(
        self,
        engine: Engine,
        choices: Choices,
        num_blocks: int,
        groups: Sequence[KVGroup],
        max_batch_size: int,
        device: torch.device,
    ) -> None:
        manifest = engine.manifest
        self._device, self._manifest = device, manifest
        graph = with_groups(engine.graph, groups)  # may refuse: before anything is loaded
        if device.type == "cpu":
            keep_freed_memory()  # before the engine's thread first allocates
        weights = {name: engine.weights.read(name).to(device) for name in engine.graph.weights}
        # A tensor serves the layers of one place in each group: a block belongs to one group at a time.
        self._kv = allocate_kv(manifest, max(len(group.layers) for group in groups), num_blocks, device)
        self._kv_inputs = {
            f"kv.{layer}": self._kv[place] for group in groups for place, layer in enumerate(group.layers)
        }
        compiled = compile_graph(graph, weights, choices, device)
        self._graph = compiled.run
        self._recorded: RecordedSteps | None = None
        if device.type == "cuda" and compiled.can_be_recorded:
            block_size = manifest.tokens_per_block
            self._recorded = RecordedSteps(self._logits_of, block_size, max_batch_size, device)
        self._sampler = Sampler(manifest.vocab_size, device)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step: slots and copies first, then the graph, then sampling."""
        for slot in plan.freed_slots:
            self._sampler.remove(slot)
        for sequence in plan.sequences:
            if sequence.new is not None:
                self._sampler.add(sequence.slot, sequence.new, sequence.output_token_ids)
        for copy in plan.copies:
            self._copy(copy)
        # A prompt whose logprobs were asked for needs the logits of every token; the others only of their last.
        wants_all_rows = [self._sampler.asks_prompt_logprobs(sequence.slot) for sequence in plan.sequences]
        logit_counts = rows_wanted(plan, wants_all_rows)
        return self._finish(plan, logit_counts, wants_all_rows, self._run(plan, logit_counts))

    def _run(self, plan: StepPlan, logit_counts: list[int]) -> Tensor:
        """Logits of the wanted rows, [R, vocab_size]."""
        if self._recorded is not None:
            logits_RV = self._recorded.run(plan, logit_counts)
            if logits_RV is not None:
                return logits_RV
        return self._logits_of(make_inputs(plan, logit_counts, self._manifest.tokens_per_block, self._device))

    def _logits_of(self, inputs: dict[str, Tensor]) -> Tensor:
        (logits_RV,) = self._graph(inputs | self._kv_inputs)
        return logits_RV if self._manifest.logits == "selected" else logits_RV[inputs["step.logit_rows"]]

    def _finish(
        self, plan: StepPlan, logit_counts: list[int], wants_all_rows: list[bool], logits_RV: Tensor
    ) -> StepResult:
        """Sample the last row of each sequence that is at its last known token; add the prompt logprobs asked for."""
        chunks = logits_RV.split(logit_counts)
        sampled = [index for index, sequence in enumerate(plan.sequences) if sequence.sample]
        rows_RV = logits_RV
        if len(sampled) != len(logits_RV):
            rows_RV = torch.stack([chunks[index][-1] for index in sampled]) if sampled else logits_RV[:0]
        slots = [plan.sequences[index].slot for index in sampled]
        drawn = iter(self._sampler.sample(slots, rows_RV) if sampled else ())
        results = []
        for sequence, chunk, is_asked in zip(plan.sequences, chunks, wants_all_rows, strict=True):
            result = next(drawn) if sequence.sample else SequenceResult()
            if is_asked:
                prompt_logprobs = self._sampler.prompt_logprobs(sequence.slot, sequence.start, chunk)
                result = replace(result, prompt_logprobs=prompt_logprobs)
            results.append(result)
        return StepResult(tuple(results))

    def _copy(self, copy: BlockCopy) -> None:
        for kv_2NBKD in self._kv:
            kv_2NBKD[:, copy.target, : copy.num_tokens] = kv_2NBKD[:, copy.source, : copy.num_tokens]
