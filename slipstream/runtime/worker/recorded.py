"""Recorded steps: a CUDA graph for each size of step and kind of ending, replayed with one launch.

Sizes come from short lists, and a plan fills the next larger one in part (inputs.py: fill_inputs). Those of short texts
are recorded when an engine starts (some hundredths of a second each), since a step that has to be recorded first is one
that all requests wait for; where drafts are made, also those in which sequences verify some. Others are recorded when
they have been needed often, and run in a larger recording until then. Steps beyond the lists are long enough for their
launches to hide behind the work; they run from Python.
"""

import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from slipstream.runtime.worker.ending import CATCHING_UP, EndingPlan, Inputs
from slipstream.runtime.worker.inputs import NO_SLOT, NO_TEXT, KnownText, StepSizes, fill_inputs, sizes_of
from slipstream.runtime.worker.memory import is_out_of_memory
from slipstream.runtime.worker.tables import BlockTables
from slipstream.schema.build import MAX_RECORDED_TOKENS
from slipstream.schema.step import StepPlan

NUM_TOKENS = (
    *(1, 2, 4, 8), *range(16, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, 512, 64),
    *range(512, 1024, 128), *range(1024, MAX_RECORDED_TOKENS + 1, 256),
)  # fmt: skip

_OWN_THREAD = "thread_local"  # what others do meanwhile, as NCCL's watchdog does, is no part of a recording

FEW_ROWS = 64  # that take a step hardly longer than one does
WORTH_RECORDING = 256  # times that a size is needed: a recording takes as long as tens of steps, and saves part of one
FEW_TOKENS = 128  # a larger recording serves in the meantime that has no more, or a quarter more than there are
FEWEST_TOKENS = 1024  # a sequence: tables of recorded steps have room for so many at least


class StepOutputs(NamedTuple):
    """What a step leaves on the device."""

    logits: Tensor  # [R, vocab_size], of the wanted rows
    token_ids: Tensor  # [R], chosen for each of them
    hidden: Tensor | None = None  # [T, hidden_size], which logits are made of; None of engines that do not give them
    drafted_from: Tensor | None = None  # [T, F], the hidden states that a drafter asks for
    ended: Tensor | None = None  # of a step with its ending, what that gives
    read_ids: Tensor | None = None  # [T] the tokens of its rows, drafts and what was pending among them


@dataclass(frozen=True)
class Recording:
    graph: torch.cuda.CUDAGraph
    host: Tensor  # pinned; fill_inputs writes here
    device: Tensor  # what the graph reads
    outputs: StepOutputs  # where it leaves them, in memory that other recordings use too
    is_copied: torch.cuda.Event  # host to device, the last time


class _Kind(NamedTuple):
    sizes: StepSizes
    ending: EndingPlan | None = None  # that is recorded with it


class RecordedSteps:
    """run: a step with that ending, from its inputs by name."""

    def __init__(
        self,
        run: Callable[[Inputs, EndingPlan | None], StepOutputs],
        tables: BlockTables,
        max_batch_size: int,
        most_rows: int,
        device: torch.device,
        known: KnownText | None,
    ) -> None:
        """most_rows: of logits, unless prompt logprobs are asked for. known: as fill_inputs has it."""
        self._run, self._tables, self._device, self._known = run, tables, device, known
        self._max_batch_size, self._most_rows = max_batch_size, most_rows
        self._recordings: dict[_Kind, Recording | None] = {}  # None where memory was short
        self._num_needed = Counter[_Kind]()  # of kinds that were not recorded so far
        self._memory = torch.cuda.graph_pool_handle()  # one for all: they never run at the same time
        self._reserve: torch.cuda.CUDAGraph | None = None  # holds on to that memory

    def reserve(self, num_bytes: int) -> None:
        """Set memory aside that no recording so far has filled: the largest step's, which smaller ones share."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode=_OWN_THREAD):
            torch.empty(num_bytes, dtype=torch.uint8, device=self._device).zero_()
        self._reserve = graph

    @property
    def num_recordings(self) -> int:
        return len(self._recordings)

    def drop(self) -> None:
        """All of them: a communicator is not destroyed before the graphs that recorded what it does (NCCL 2.26)."""
        for recording in self._recordings.values():
            if recording is not None:
                recording.graph.reset()
        self._recordings.clear()

    def record_short(
        self, num_groups: int, max_num_tokens: int, plain: EndingPlan | None, endings: Sequence[EndingPlan]
    ) -> None:
        """All sizes of short texts, the largest first: the others find room in what it leaves of the pool.

        plain: of steps that have nothing to do with drafts. endings: of others. These are recorded for 1, 2, 4 and more
        sequences, each with a whole tree; and in all sizes up to that for the most sequences.
        """
        most = self._max_batch_size
        for ending in endings:
            num_nodes = ending.num_nodes or max_num_tokens // most
            sizes = [(count * num_nodes, count) for count in reversed(_batch_sizes(most)) if ending.num_nodes]
            fewest = most if ending.num_nodes else 0
            sizes += [
                (num_tokens, min(num_tokens, most))
                for num_tokens in NUM_TOKENS[::-1] if fewest < num_tokens <= most * num_nodes
            ]  # fmt: skip
            for num_tokens, num_sequences in sizes:
                if num_tokens <= max_num_tokens:
                    self._record_size(StepSizes(num_tokens, num_sequences, num_sequences, 1, num_groups), ending)
        for num_tokens in reversed([size for size in NUM_TOKENS if size // 2 < max_num_tokens]):
            num_sequences = min(num_tokens, self._max_batch_size)
            self._record_size(StepSizes(num_tokens, num_sequences, num_sequences, 1, num_groups), plain)

    def _record_size(self, exact: StepSizes, ending: EndingPlan | None) -> None:
        kind = self._kind(exact, ending)
        if kind is not None and kind not in self._recordings:
            self._recordings[kind] = self._record(kind)

    def run(
        self, plan: StepPlan, logit_counts: Sequence[int], is_chosen: Sequence[bool], ending: EndingPlan | None = None
    ) -> StepOutputs | None:
        """What `run` gives, valid until the next step; None where no recording is of this size. Waits for nothing.

        Hidden states may have more rows than the plan has tokens, and the ending more sequences.
        """
        wanted = self._kind(sizes_of(plan, logit_counts, self._tables), ending)
        kind = None if wanted is None else self._serving(wanted)
        recording = None if kind is None else self._recordings[kind]
        if kind is None or recording is None:
            return None
        recording.is_copied.synchronize()
        fill_inputs(plan, logit_counts, is_chosen, self._tables, kind.sizes, recording.host, self._known)
        recording.device.copy_(recording.host, non_blocking=True)
        recording.is_copied.record()
        recording.graph.replay()
        num_rows, (logits, token_ids, *others) = sum(logit_counts), recording.outputs
        return StepOutputs(logits[:num_rows], token_ids[:num_rows], *others)

    def _kind(self, exact: StepSizes, ending: EndingPlan | None) -> _Kind | None:
        """That serves steps of these sizes, their ending aside; None of those that are not recorded."""
        num_tokens = exact.num_tokens
        if ending is not None and exact.num_sequences * ending.num_nodes <= FEW_ROWS:
            num_tokens = max(num_tokens, exact.num_sequences * ending.num_nodes)  # those of fewer drafts take it, too
        if num_tokens > MAX_RECORDED_TOKENS:
            return None
        sizes = self._sizes(num_tokens, exact.table_width, exact.num_groups)
        if exact.num_rows > sizes.num_rows:  # where prompt logprobs are asked for
            return None
        if ending is not None:  # which is work for each sequence
            num_sequences = min(1 << (exact.num_sequences - 1).bit_length(), sizes.num_sequences)
            sizes = replace(sizes, num_sequences=num_sequences)
            sizes = sizes.with_trees(ending.num_nodes, self._known is not None)
        return _Kind(sizes, ending)

    def _serving(self, wanted: _Kind) -> _Kind | None:
        """The kind itself, recorded, or until that is worth it a larger one that was; None: neither, so far."""
        if wanted in self._recordings:
            return wanted
        self._num_needed[wanted] += 1
        larger = self._larger(wanted) if self._num_needed[wanted] < WORTH_RECORDING else None
        if larger is not None:
            return larger
        if wanted.ending == CATCHING_UP and self._num_needed[wanted] < WORTH_RECORDING:
            return None  # of any size, and seldom twice the same
        self._recordings[wanted] = self._record(wanted)
        return wanted

    def _larger(self, wanted: _Kind) -> _Kind | None:
        whole = 0 if wanted.ending is None else wanted.ending.num_nodes * wanted.sizes.num_sequences
        most = max(FEW_TOKENS, wanted.sizes.num_tokens * 5 // 4, _recorded_size(whole))
        kinds = (
            kind for kind, recording in self._recordings.items()
            if recording is not None and kind.ending == wanted.ending and kind.sizes.num_tokens <= most
        )  # fmt: skip
        fitting = (kind for kind in kinds if wanted.sizes.fit_into(kind.sizes))
        return min(fitting, key=lambda kind: kind.sizes.num_numbers, default=None)

    def _sizes(self, num_tokens: int, table_width: int, num_groups: int) -> StepSizes:
        """The recorded size that serves steps of so many tokens and tables so wide."""
        num_tokens = NUM_TOKENS[bisect_left(NUM_TOKENS, num_tokens)]
        num_sequences = min(num_tokens, self._max_batch_size)
        # Short texts share a width, so that a request does not wait for a recording each time its text doubles.
        width = 1 << (max(table_width, -(-FEWEST_TOKENS // self._tables.tokens_per_block)) - 1).bit_length()
        return StepSizes(num_tokens, num_sequences, min(num_tokens, self._most_rows), width, num_groups)

    def _record(self, kind: _Kind) -> Recording | None:
        """A step without sequences is run once, for what kernels do at their first call, and then recorded.

        None where the memory does not suffice: such steps run from Python.
        """
        try:
            return self._record_now(kind)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        torch.cuda.empty_cache()
        warnings.warn(
            f"No memory is left to record steps of {kind.sizes.num_tokens} tokens, which makes them slower; lower "
            "--kv_cache_free_memory_fraction.",
            stacklevel=2,
        )
        return None

    def _record_now(self, kind: _Kind) -> Recording:
        sizes, ending = kind
        host = torch.zeros(sizes.num_numbers, dtype=torch.int64, pin_memory=True)
        numbers = host.to(self._device)
        inputs = sizes.views(numbers)
        for name in ("token_slots", "row_slots"):
            inputs[name].fill_(NO_SLOT)
        inputs["late_slots"].fill_(NO_SLOT)
        if sizes.num_nodes:
            inputs["trees.slots"].fill_(NO_SLOT)
        if sizes.is_followed:
            inputs["trees.next_ids"].fill_(NO_TEXT)
        self._run(inputs, ending)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode=_OWN_THREAD):
            made = self._run(inputs, ending)
        others = (None if tensor is None else _borrowed(tensor) for tensor in made[2:])
        outputs = StepOutputs(_borrowed(made.logits), _borrowed(made.token_ids), *others)
        return Recording(graph, host, numbers, outputs, torch.cuda.Event())


class _Bytes:
    """Memory of a GPU, as others may look at it: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html"""

    def __init__(self, tensor: Tensor) -> None:
        address = (tensor.data_ptr(), False)  # not read-only
        self.__cuda_array_interface__ = {"shape": (tensor.nbytes,), "typestr": "|u1", "data": address, "version": 3}


def _borrowed(tensor: Tensor) -> Tensor:
    """The same memory, without keeping it: the next recording may use it for its own."""
    if not tensor.numel():
        return tensor
    assert tensor.is_contiguous()
    return torch.as_tensor(_Bytes(tensor), device=tensor.device).view(tensor.dtype).view(tensor.shape)


def _recorded_size(num_tokens: int) -> int:
    return next((size for size in NUM_TOKENS if size >= num_tokens), NUM_TOKENS[-1])


def _batch_sizes(most: int) -> list[int]:
    """1, 2, 4 and so on, and the most that there may be."""
    return [*(1 << power for power in range((most - 1).bit_length())), most]
