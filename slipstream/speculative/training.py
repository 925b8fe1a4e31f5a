"""Student: what `slipstream train-drafter` trains. Each method that can be trained has one in its training.py.

    loss(batch)         of texts of the target, with its hidden states; what is trained are the module's parameters
    evaluate(batches)   of texts that were held out: how often the draft at each place would be accepted
    save(folder, facts) what the method's head.py loads; config.json, which holds the facts too, comes last

The loop, the texts and the hidden states are the same for all (slipstream/distill).

Shape suffixes: S texts, L tokens of the longest, H hidden size, V vocabulary, D tokens that can be drafted, T rows,
F numbers of each that are rotated.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from slipstream.engine.folder import Engine
from slipstream.engine.shared import lm_head
from slipstream.engine.tensor_file import write_tensor_file
from slipstream.errors import UsageError
from slipstream.speculative.drafter import LAST
from slipstream.speculative.head_file import CONFIG_FILE


@dataclass(frozen=True)
class Teacher:
    """The target."""

    model: str  # as the user names it
    engine: Engine
    device: torch.device
    counts: Tensor  # [V] how often the target says each token
    embed: Callable[[Tensor], Tensor] | None = None  # token ids [N] -> [N, H], for who reads it


class Batch(NamedTuple):
    """Texts of the target, padded to the longest."""

    token_ids: Tensor  # [S, L]
    is_answer: Tensor  # [S, L] which tokens the target chose; neither prompts nor padding
    hidden: Tensor | None  # [S, L, …] what `reads_hidden` asks for at each token, side by side, in float32


class Student(nn.Module, ABC):
    """Randomness at its making comes from torch's global generator, which the loop seeds."""

    options_type: ClassVar[type[Any]]  # a frozen dataclass of whole numbers, given as flags of the same names
    reads_embedding: ClassVar[bool] = False  # whether it reads the target's embedding

    def __init__(self, teacher: Teacher, options: Any) -> None:
        """Raises UsageError for options that do not suit the target."""
        super().__init__()

    @staticmethod
    def reads_hidden(num_layers: int) -> tuple[int, ...]:
        """The hidden states of a target of so many layers that it learns from, as Drafter.reads_hidden names them."""
        return (LAST,)

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor: ...

    @abstractmethod
    def evaluate(self, batches: Iterable[Batch]) -> list[float]:
        """Of the steps of a greedy request, the share in which so many drafts are accepted at least: 1, 2, …"""

    @abstractmethod
    def save(self, folder: Path, facts: Mapping[str, Any]) -> None: ...


def most_said(counts_V: Tensor, num_tokens: int) -> Tensor:
    """The tokens with the highest counts, all of them where there are no more, in the order of their numbers."""
    return counts_V.argsort(descending=True, stable=True)[:num_tokens].sort().values


class SharedHead(nn.Module):
    """The target's head for the tokens that it says most often. What is left out cannot be drafted, and is mostly not
    said either."""

    token_ids_D: Tensor  # noqa: N815 - a tensor's name carries its shape
    places_V: Tensor  # noqa: N815 - of each token among them, or -1
    weight_DH: Tensor  # noqa: N815 - their rows

    def __init__(self, teacher: Teacher, num_tokens: int) -> None:
        super().__init__()
        token_ids_D = most_said(teacher.counts, num_tokens)
        places_V = torch.full((len(teacher.counts),), -1).index_put((token_ids_D,), torch.arange(len(token_ids_D)))
        weight_DH = lm_head(teacher.engine)[token_ids_D].float()
        for name, tensor in (("token_ids_D", token_ids_D), ("places_V", places_V), ("weight_DH", weight_DH)):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> logits [..., D]"""
        return functional.linear(x, self.weight_DH)

    def labels(self, batch: Batch) -> Tensor:
        """[S, L] of each token of an answer its place here; -1 of others, and where it cannot be drafted."""
        return self.places_V[batch.token_ids].where(batch.is_answer, -1)


class Taught:
    """What the target held likely at each token of an answer that can be drafted: its distribution over these, which
    says more of each place than the token that came of it."""

    def __init__(self, shared: SharedHead, batch: Batch) -> None:
        assert batch.hidden is not None
        self._is_label_SL = shared.labels(batch) >= 0
        self._rows_SL = self._is_label_SL.flatten().cumsum(0).view_as(self._is_label_SL) - 1
        with torch.no_grad():
            hidden_PH = batch.hidden[:, :-1, -shared.weight_DH.shape[1] :][self._is_label_SL[:, 1:]]
            self._likely_PD = shared(hidden_PH).softmax(1)

    def is_known(self, count: int) -> Tensor:
        """[S, L] the tokens so many after which there is one of these."""
        return later(self._is_label_SL, count, fill=False)

    def loss(self, logits_PD: Tensor, count: int, is_asked_SL: Tensor) -> Tensor:
        """The cross entropy of what is said of the token so many after each of the P that are asked."""
        expected_PD = self._likely_PD[later(self._rows_SL, count, fill=0)[is_asked_SL]]
        return -(expected_PD * logits_PD.log_softmax(1)).sum() / max(1, len(logits_PD))


def later(values_SL: Tensor, count: int, *, fill: int | bool) -> Tensor:
    """[S, L] at each token the value of the one so many after it."""
    return functional.pad(values_SL, (0, count), value=fill)[:, count:]


def begins(batch: Batch, num_tokens: int = 0) -> Tensor:
    """[S, L] the tokens after which a draft may begin: the target has chosen the next one, and so many after that."""
    is_place_SL = later(batch.is_answer, 1, fill=False)
    return is_place_SL & later(batch.is_answer, 1 + num_tokens, fill=False) if num_tokens else is_place_SL


def write_head(folder: Path, weights_file: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """In float16, and the numbers of tokens in int32."""
    narrow = {name: each.detach().half() if each.is_floating_point() else each.int() for name, each in tensors.items()}
    entries = [(name, tuple(each.shape), each.dtype, lambda each=each: each) for name, each in narrow.items()]
    write_tensor_file(folder / weights_file, entries, {"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n")


def rotated(x_TX: Tensor, cos_TF: Tensor, sin_TF: Tensor, head_dim: int) -> Tensor:
    """The op rope, whose reference fills a tensor in place, as autograd follows it."""
    count = cos_TF.shape[1]
    first, second, rest = x_TX.unflatten(1, (-1, head_dim)).split([count, count, head_dim - 2 * count], dim=2)
    cos, sin = cos_TF[:, None], sin_TF[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=2).flatten(1)


def trainable() -> list[str]:
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/training.py"))


def student_of(method: str) -> type[Student]:
    """Raises UsageError for a method that is not trained here."""
    if method not in trainable():
        raise UsageError(f"--method is {method!r}, which is not trained here; it must be {' or '.join(trainable())}.")
    kind: type[Student] = import_module(f"slipstream.speculative.{method}.training").Student
    return kind
