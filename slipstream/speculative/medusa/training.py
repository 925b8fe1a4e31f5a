"""Medusa's heads, trained: residual layers of their own over the model's head, which they share, and its likely tokens.

    head n at token t   hidden_t ── layers of n ── rows of the model's head ── token t + 2 + n

The rows are those of the tokens that the target says most often: what is left out cannot be drafted, and is mostly not
said either. Layers begin at zero, so that each head begins as the model's own.

Shape suffixes: S texts, L tokens of the longest, H hidden size, V vocabulary, D tokens that can be drafted, N heads,
P places of a batch, K ranks.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slipstream.speculative.head_file import DRAFT_TOKENS
from slipstream.speculative.medusa.head import CHOICES_FILE, WEIGHTS_FILE
from slipstream.speculative.training import Batch, SharedHead, Teacher, begins, later, write_head
from slipstream.speculative.training import Student as Base

MAX_NODES = 63  # of the tree
MAX_RANK = 10  # of a token in its head that a choice may name
WORTH_A_NODE = 0.002  # of the steps, in which a node must be accepted to have a place in the tree


@dataclass(frozen=True)
class Options:
    num_heads: int = 4
    num_layers: int = 1  # of each head
    draft_vocab_size: int = 8192  # tokens that can be drafted


class Student(Base):
    options_type = Options

    def __init__(self, teacher: Teacher, options: Options) -> None:
        super().__init__(teacher, options)
        self._options, hidden_size = options, teacher.engine.manifest.hidden_size
        self._shared = SharedHead(teacher, options.draft_vocab_size)
        count, layers = options.num_heads, options.num_layers
        self.weight = nn.Parameter(torch.zeros(count, layers, hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.zeros(count, layers, hidden_size))
        self._choices: list[tuple[int, ...]] = []

    def _logits(self, head: int, x_PH: Tensor) -> Tensor:
        for weight_HH, bias_H in zip(self.weight[head], self.bias[head], strict=True):
            x_PH = x_PH + functional.silu(functional.linear(x_PH, weight_HH, bias_H))
        return self._shared(x_PH)

    def _examples(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each head, at the places where a draft may be made: hidden states [P, H] and labels [P].

        A label is a place in the shared head; -1 where the token cannot be drafted, or the text has ended.
        """
        assert batch.hidden is not None
        is_place_SL, labels_SL = begins(batch), self._shared.labels(batch)
        x_PH = batch.hidden[is_place_SL]
        for head in range(self._options.num_heads):
            yield x_PH, later(labels_SL, 2 + head, fill=-1)[is_place_SL]

    def loss(self, batch: Batch) -> Tensor:
        losses = []
        for head, (x_PH, labels_P) in enumerate(self._examples(batch)):
            is_known_P = labels_P >= 0
            logits_PD = self._logits(head, x_PH[is_known_P])
            losses.append(functional.cross_entropy(logits_PD, labels_P[is_known_P]))
        return torch.stack(losses).sum()

    def evaluate(self, batches: Iterable[Batch]) -> list[float]:
        """What is found where, which is also the tree: the ways down that were right most often."""
        ways: Counter[tuple[int, ...]] = Counter()
        num_places = 0
        for batch in batches:
            ranks_PN = torch.stack([self._ranks(head, *each) for head, each in enumerate(self._examples(batch))], dim=1)
            ranks_PN = ranks_PN[begins(batch, self._options.num_heads)[begins(batch)]]  # as long as a draft may be
            num_places += len(ranks_PN)
            for ranks in ranks_PN.tolist():
                found = ranks[: ranks.index(-1)] if -1 in ranks else ranks
                ways.update(tuple(found[:depth]) for depth in range(1, len(found) + 1))
        likeliest = sorted(ways.items(), key=lambda item: (-item[1], len(item[0]), item[0]))[:MAX_NODES]
        tree = [item for item in likeliest if item[1] >= WORTH_A_NODE * num_places] or [((0,), 0)]
        self._choices = [choice for choice, _ in tree]
        depths = range(1, 1 + max(map(len, self._choices)))
        return [sum(count for choice, count in tree if len(choice) == depth) / num_places for depth in depths]

    def _ranks(self, head: int, x_PH: Tensor, labels_P: Tensor) -> Tensor:
        """[P] the place of the right token among a head's, or -1."""
        likely_PK = self._logits(head, x_PH).topk(min(MAX_RANK, len(self._shared.weight_DH))).indices
        is_right_PK = likely_PK == labels_P[:, None]
        return is_right_PK.int().argmax(dim=1).where(is_right_PK.any(dim=1), -1)

    def save(self, folder: Path, facts: Mapping[str, Any]) -> None:
        tensors = {DRAFT_TOKENS: self._shared.token_ids_D}
        for head in range(self._options.num_heads):
            for layer in range(self._options.num_layers):
                tensors[f"{head}.{layer}.linear.weight"] = self.weight[head, layer]
                tensors[f"{head}.{layer}.linear.bias"] = self.bias[head, layer]
        (folder / CHOICES_FILE).write_text(json.dumps(self._choices) + "\n")
        config = {"medusa_num_heads": self._options.num_heads, "medusa_num_layers": self._options.num_layers, **facts}
        write_head(folder, WEIGHTS_FILE, tensors, config)
