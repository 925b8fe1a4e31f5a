"""Recorded steps: a CUDA graph for each size of step, made when one is first needed and replayed with one launch.

Sizes come from short lists, and a plan fills the next larger one in part (inputs.py: fill_inputs). Steps beyond the
lists are long enough for their launches to hide behind the work; they run from Python.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.runtime.worker.inputs import NO_SLOT, StepSizes, fill_inputs, sizes_of
from slipstream.runtime.worker.tables import BlockTables
from slipstream.schema.step import StepPlan

NUM_TOKENS = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)


@dataclass(frozen=True)
class Recording:
    graph: torch.cuda.CUDAGraph
    host: Tensor  # pinned; fill_inputs writes here
    device: Tensor  # what the graph reads
    logits: Tensor  # [R, vocab_size], where it leaves its results
    token_ids: Tensor  # [R]
    is_copied: torch.cuda.Event  # host to device, the last time


class RecordedSteps:
    """run: a step, from its inputs by name to logits [R, vocab_size] and the token chosen for each row."""

    def __init__(
        self,
        run: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]],
        tables: BlockTables,
        max_batch_size: int,
        device: torch.device,
    ) -> None:
        self._run, self._tables, self._device = run, tables, device
        self._max_batch_size = max_batch_size
        self._recordings: dict[StepSizes, Recording] = {}
        self._memory = torch.cuda.graph_pool_handle()  # one for all: they never run at the same time

    def run(
        self, plan: StepPlan, logit_counts: Sequence[int], is_chosen: Sequence[bool]
    ) -> tuple[Tensor, Tensor] | None:
        """What `run` gives, valid until the next step; None where no recording is of this size. Waits for nothing."""
        sizes = self._sizes_for(sizes_of(plan, logit_counts, self._tables))
        if sizes is None:
            return None
        recording = self._recordings.get(sizes) or self._record(sizes)
        recording.is_copied.synchronize()
        fill_inputs(plan, logit_counts, is_chosen, self._tables, sizes, recording.host)
        recording.device.copy_(recording.host, non_blocking=True)
        recording.is_copied.record()
        recording.graph.replay()
        num_rows = sum(logit_counts)
        return recording.logits[:num_rows], recording.token_ids[:num_rows]

    def _sizes_for(self, exact: StepSizes) -> StepSizes | None:
        if exact.num_tokens > NUM_TOKENS[-1]:
            return None
        num_tokens = NUM_TOKENS[bisect_left(NUM_TOKENS, exact.num_tokens)]
        num_sequences = min(num_tokens, self._max_batch_size)
        if exact.num_rows > num_sequences:  # prompt logprobs
            return None
        width = 1 << (exact.table_width - 1).bit_length()
        return StepSizes(num_tokens, num_sequences, num_sequences, width, exact.num_groups)

    def _record(self, sizes: StepSizes) -> Recording:
        """A step without sequences is run once, for what kernels do at their first call, and then recorded."""
        host = torch.zeros(sizes.num_numbers, dtype=torch.int64, pin_memory=True)
        numbers = host.to(self._device)
        inputs = sizes.views(numbers)
        inputs["row_slots"].fill_(NO_SLOT)
        self._run(inputs)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            logits_RV, token_ids_R = self._run(inputs)
        recording = Recording(graph, host, numbers, logits_RV, token_ids_R, torch.cuda.Event())
        self._recordings[sizes] = recording
        return recording
