"""N-gram drafts where the host would be waited for: a GPU keeps the texts, and looks through them in the step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slipstream.kernels.triton import ngrams
from slipstream.schema.request import GenerateRequest
from slipstream.schema.speculative import Speculation
from slipstream.speculative.drafter import DraftTensors, Ends, Target, TextDrafter, read_options
from slipstream.speculative.ngram.drafter import Options


class Drafter(TextDrafter):
    def __init__(self, speculation: Speculation, target: Target) -> None:
        super().__init__(speculation, target)
        self._min_ngram = min(read_options(Options, speculation).min_ngram, ngrams.MOST)  # more are not compared
        self._device = target.device
        self._texts_XL = ngrams.new_texts(target.max_batch_size, target.max_seq_len, target.device)

    def start(self, slot: int, token_ids: Sequence[int], request: GenerateRequest) -> None:
        """All of a text: blocks of its prompt may be found again, which no step computes."""
        known_L = torch.tensor(token_ids[: self._texts_XL.shape[1]], dtype=torch.int32)
        if self._device.type == "cuda":
            known_L = known_L.pin_memory()
        self._texts_XL[slot, : len(known_L)].copy_(known_L, non_blocking=True)

    def read(self, slots_T: Tensor, places_T: Tensor, token_ids_T: Tensor) -> None:
        ngrams.write(self._texts_XL, slots_T, places_T, token_ids_T)

    def draft(self, ends: Ends, most: int) -> DraftTensors:
        token_ids_SN, counts_S = ngrams.find(
            self._texts_XL, ends.slots, ends.token_ids, ends.positions, self._min_ngram, most
        )
        parents_SN = torch.arange(most, device=self._device).expand_as(token_ids_SN)
        return DraftTensors(token_ids_SN, parents_SN, counts_S)
