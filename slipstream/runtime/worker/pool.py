"""The Pooler: the vectors of requests that end with one, made of the hidden states of their tokens.

    mean   sums in float32, kept for each slot from chunk to chunk of a text, over its number of tokens
    last   the row of the last token

Shape suffixes: T tokens of a step, C of a chunk, H hidden size, P sequences whose last token is in this step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slipstream.runtime.transfer import ToHost
from slipstream.schema.request import GenerateRequest, Pooling
from slipstream.schema.step import SequenceResult, StepPlan


@dataclass(frozen=True)
class Vectors:
    """Of a step, on their way from the device."""

    indices: Sequence[int]  # of their sequences in the plan
    vectors_PH: ToHost  # noqa: N815 - a tensor's name carries its shape

    def results(self) -> Iterator[tuple[int, SequenceResult]]:
        """By index in the plan."""
        vectors_PH = self.vectors_PH.wait()
        for index, vector_H, is_sound in zip(
            self.indices, vectors_PH, vectors_PH.isfinite().all(dim=1).tolist(), strict=True
        ):
            if is_sound:
                yield index, SequenceResult(vector=vector_H.numpy().astype("<f4", copy=False).tobytes())
            else:
                yield index, SequenceResult(error="the model's hidden states hold NaN or infinity")


class Pooler:
    """Not thread-safe; the worker owns it."""

    def __init__(self) -> None:
        self._requests: dict[int, GenerateRequest] = {}  # those that pool, by slot
        self._sums_H: dict[int, Tensor] = {}  # of texts whose mean is not whole yet

    def add(self, slot: int, request: GenerateRequest) -> None:
        """A sequence begins, perhaps again after a preemption."""
        self.remove(slot)
        if request.pooling is not None:
            self._requests[slot] = request

    def remove(self, slot: int) -> None:
        self._requests.pop(slot, None)
        self._sums_H.pop(slot, None)

    def pool(self, plan: StepPlan, hidden_TH: Tensor | None) -> Vectors | None:
        """Take in a step's rows, those of the plan first. -> the vectors that are whole with it."""
        if not self._requests:
            return None
        assert hidden_TH is not None, "an engine without hidden states was given a request that pools"
        whole: dict[int, Tensor] = {}
        start = 0
        for index, sequence in enumerate(plan.sequences):
            end = start + sequence.num_tokens
            request = self._requests.get(sequence.slot)
            if request is not None:
                is_last = sequence.start + len(sequence.token_ids) == len(request.prompt_token_ids)
                vector_H = self._take(sequence.slot, request, hidden_TH[start:end], is_last)
                if vector_H is not None:
                    whole[index] = vector_H
            start = end
        return Vectors(list(whole), ToHost(torch.stack(list(whole.values())))) if whole else None

    def _take(self, slot: int, request: GenerateRequest, chunk_CH: Tensor, is_last: bool) -> Tensor | None:
        if request.pooling is Pooling.LAST:
            return chunk_CH[-1].float() if is_last else None
        sum_H = chunk_CH.sum(dim=0, dtype=torch.float32)
        if slot in self._sums_H:
            sum_H += self._sums_H.pop(slot)
        if is_last:
            return sum_H / len(request.prompt_token_ids)
        self._sums_H[slot] = sum_H
        return None
