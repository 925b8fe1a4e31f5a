"""Student: what `slipstream train-drafter` trains. Each method that can be trained has one in its training.py.

    loss(batch)         of texts of the target, with its hidden states; what is trained are the module's parameters
    evaluate(batches)   of texts that were held out: how often the draft at each place would be accepted
    save(folder, facts) what the method's head.py loads; config.json, which holds the facts too, comes last

The loop, the texts and the hidden states are the same for all (slipstream/distill).

Shape suffixes: S texts, L tokens of the longest, H hidden size, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from slipstream.engine.folder import Engine
from slipstream.errors import UsageError


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
    hidden: Tensor | None  # [S, L, H] what the target's head read at each token, in float32; for who reads it


class Student(nn.Module, ABC):
    """Randomness at its making comes from torch's global generator, which the loop seeds."""

    options_type: ClassVar[type[Any]]  # a frozen dataclass of whole numbers, given as flags of the same names
    reads_hidden: ClassVar[bool] = True  # whether it learns from the target's hidden states
    reads_embedding: ClassVar[bool] = False  # whether it reads the target's embedding

    def __init__(self, teacher: Teacher, options: Any) -> None:
        """Raises UsageError for options that do not suit the target."""
        super().__init__()

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor: ...

    @abstractmethod
    def evaluate(self, batches: Iterable[Batch]) -> list[float]:
        """Of the steps of a greedy request, the share in which so many drafts are accepted at least: 1, 2, …"""

    @abstractmethod
    def save(self, folder: Path, facts: Mapping[str, Any]) -> None: ...


def trainable() -> list[str]:
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/training.py"))


def student_of(method: str) -> type[Student]:
    """Raises UsageError for a method that is not trained here."""
    if method not in trainable():
        raise UsageError(f"--method is {method!r}, which is not trained here; it must be {' or '.join(trainable())}.")
    kind: type[Student] = import_module(f"slipstream.speculative.{method}.training").Student
    return kind
