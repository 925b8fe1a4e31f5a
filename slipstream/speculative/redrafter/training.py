"""ReDrafter's head, trained: a recurrent network of its own, and the rows of the model's head for its likely tokens.

    at token t        h_t of the model; s takes in token t + 1, which the model has chosen
    says              token t + 2; then s takes that one in, and the head says token t + 3, and so on

At first the head says what the model's own does at h_t. It learns the model's distribution over its likely tokens,
in the model's own texts, so each token that s takes in is the right one.

Shape suffixes: S texts, L tokens of the longest, H hidden size, D tokens that can be drafted, P places of a batch, B
beams, N tokens of each.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slipstream.speculative.head_file import DRAFT_TOKENS, torch_product
from slipstream.speculative.redrafter.beams import beam_search
from slipstream.speculative.redrafter.head import MODEL_TYPE, WEIGHTS_FILE, Head
from slipstream.speculative.training import Batch, SharedHead, Taught, Teacher, begins, later, write_head
from slipstream.speculative.training import Student as Base

PLACES_AT_ONCE = 256  # of a beam search: logits of each beam are in memory


@dataclass(frozen=True)
class Options:
    num_layers: int = 2
    draft_vocab_size: int = 8192  # tokens that can be drafted


class Student(Base):
    options_type = Options
    reads_embedding = True

    def __init__(self, teacher: Teacher, options: Options) -> None:
        super().__init__(teacher, options)
        assert teacher.embed is not None
        self._embed, size = teacher.embed, teacher.engine.manifest.hidden_size
        self._shared = SharedHead(teacher, options.draft_vocab_size)
        self.input_proj = nn.Linear(2 * size, size)
        with torch.no_grad():
            self.input_proj.weight[:, :size] = torch.eye(size)
            self.input_proj.bias.zero_()
        self.weight = nn.Parameter(torch.zeros(options.num_layers, size, size))
        self.bias = nn.Parameter(torch.zeros(options.num_layers, size))
        self.rnn_w, self.rnn_u = nn.Linear(size, size, bias=False), nn.Linear(size, size)

    def _head(self) -> Head:
        return Head(
            self.input_proj,
            list(map(torch_product, self.weight, self.bias)),
            self._shared,
            self.rnn_w,
            self.rnn_u,
            self._shared.token_ids_D,
        )

    def loss(self, batch: Batch) -> Tensor:
        assert batch.hidden is not None
        head, is_place_SL, taught = self._head(), begins(batch), Taught(self._shared, batch)
        h_PH = batch.hidden[is_place_SL]
        state_PH, losses = torch.zeros_like(h_PH), []
        for ahead in range(1, 1 + Head.length):
            with torch.no_grad():
                e_PH = self._embed(later(batch.token_ids, ahead, fill=0)[is_place_SL]).float()
            state_PH, is_known_SL = head.state(e_PH, state_PH), taught.is_known(1 + ahead)
            is_known_P = is_known_SL[is_place_SL]
            logits_PD = head.logits(h_PH[is_known_P], state_PH[is_known_P])
            losses.append(taught.loss(logits_PD, 1 + ahead, is_place_SL & is_known_SL))
        return torch.stack(losses).sum()

    def evaluate(self, batches: Iterable[Batch]) -> list[float]:
        """How far one of the beams says what the text says."""
        num_accepted, num_places = torch.zeros(Head.length), 0
        for batch in batches:
            assert batch.hidden is not None
            farthest, is_place_SL = 1 + Head.length, begins(batch, Head.length)
            after_SLN = functional.pad(batch.token_ids, (0, farthest)).unfold(1, 1 + farthest, 1)[..., 1:]
            rows = zip(
                batch.hidden[is_place_SL].split(PLACES_AT_ONCE),
                after_SLN[:, : is_place_SL.shape[1]][is_place_SL].split(PLACES_AT_ONCE),
                strict=True,
            )
            for h_PH, after_PN in rows:
                beams_PBN = beam_search(
                    self._head(), lambda token_ids: self._embed(token_ids).float(), h_PH, after_PN[:, 0],
                    Head.width, Head.length,
                )  # fmt: skip
                is_right_PN = (beams_PBN == after_PN[:, None, 1:]).int().cumprod(2).amax(1)
                num_accepted += is_right_PN.sum(0).cpu()
                num_places += len(h_PH)
        return (num_accepted / max(1, num_places)).tolist()

    def save(self, folder: Path, facts: Mapping[str, Any]) -> None:
        tensors: dict[str, Tensor] = {name: each for name, each in self.named_parameters() if "." in name}
        for layer, (weight, bias) in enumerate(zip(self.weight, self.bias, strict=True)):
            tensors[f"lm_head.{layer}.linear.weight"] = weight
            tensors[f"lm_head.{layer}.linear.bias"] = bias
        tensors[DRAFT_TOKENS] = self._shared.token_ids_D
        config = {"model_type": MODEL_TYPE, "exit_dim": self.bias.shape[1], "rnn": True}
        config |= {"num_draft_layers": len(self.weight), "num_lookback_tokens": Head.length, **facts}
        write_head(folder, WEIGHTS_FILE, tensors, config)
