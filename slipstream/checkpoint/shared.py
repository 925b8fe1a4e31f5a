"""What a folder leaves to another model: a small draft model its embedding, output layer and tokenizer to its target.

    config.json    "shares": {"model": "smollm2", "weights": ["embed.weight"]}    by our names of them

The other model is found as any is, by a name. A path is none: a folder may not lead to files beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from slipstream.checkpoint.tensors import TensorSource
from slipstream.errors import CorruptFile

KEY = "shares"
LENT = "shared."  # what a weight of the other model is called among a folder's own


@dataclass(frozen=True)
class Shares:
    model: str
    weights: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "weights": list(self.weights)}


def read_shares(values: Mapping[str, Any], where: str) -> Shares | None:
    """Of a config.json. Raises CorruptFile for what is no such thing."""
    given = values.get(KEY)
    if given is None:
        return None
    model, weights = (given.get("model"), given.get("weights")) if isinstance(given, dict) else (None, None)
    if isinstance(model, str) and isinstance(weights, list) and all(isinstance(name, str) for name in weights):
        return Shares(model, tuple(weights))
    raise CorruptFile(f"{where}: {KEY} is {str(given)[:80]!r}; it must name a model and a list of its weights.")


class Lender(Protocol):
    """A Checkpoint that reads in float32, by our names."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> torch.Tensor: ...

    def close(self) -> None: ...


class WithShared:
    """A TensorSource of a folder's own tensors and, called `shared.…`, those of the model that it shares."""

    def __init__(self, own: TensorSource, lender: Lender) -> None:
        self._own, self._lender = own, lender

    def names(self) -> list[str]:
        return self._own.names()

    def shape(self, name: str) -> tuple[int, ...]:
        lent = self._lent(name)
        return self._own.shape(name) if lent is None else self._lender.shape(lent)

    def dtype(self, name: str) -> torch.dtype:
        return self._own.dtype(name) if self._lent(name) is None else torch.float32

    def read(self, name: str) -> torch.Tensor:
        lent = self._lent(name)
        return self._own.read(name) if lent is None else self._lender.read(lent)

    def close(self) -> None:
        self._own.close()
        self._lender.close()

    def _lent(self, name: str) -> str | None:
        return name.removeprefix(LENT) if name.startswith(LENT) else None
