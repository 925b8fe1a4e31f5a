"""What a GGUF file says of its model: every value checked, and a hyperparameter that nobody takes refused."""

import math
from typing import Any, TypeVar

from slipstream.checkpoint.gguf.file import GGUFFile
from slipstream.errors import CorruptFile, UnsupportedModel

T = TypeVar("T")

# Hyperparameters that say how the file was made, or again what its tensors say.
SILENT = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")


class Header:
    """Metadata by whole keys (`optional`, `required`, `values`), hyperparameters by names under the architecture's."""

    def __init__(self, file: GGUFFile) -> None:
        self.path = file.path
        self._file = file
        self._taken: set[str] = set()
        self.architecture = self.required("general.architecture", str)
        self.skip(*SILENT)

    def optional(self, key: str, kind: type[T]) -> T | None:
        self._taken.add(key)
        value = self._file.metadata.get(key)
        if value is not None and type(value) is not kind:
            raise CorruptFile(f"{self.path}: {key} is {str(value)[:40]!r}; it must be of type {kind.__name__}.")
        return value

    def required(self, key: str, kind: type[T], default: T | None = None) -> T:
        value = self.optional(key, kind)
        if value is None:
            value = default
        if value is None:
            raise CorruptFile(f"{self.path} has no {key}.")
        return value

    def values(self, key: str, kind: type[T]) -> list[T] | None:
        values = self.optional(key, list)
        if values is not None and not all(type(value) is kind for value in values):
            raise CorruptFile(f"{self.path}: {key} must be a list of {kind.__name__}.")
        return values

    def positive(self, name: str, default: int | None = None) -> int:
        return self.integer(name, default, low=1)

    def integer(self, name: str, default: int | None = None, *, low: int = 0) -> int:
        value = self.required(self._key(name), int, default)
        if value < low:
            raise CorruptFile(f"{self.path}: {self._key(name)} is {value}; it must be at least {low}.")
        return value

    def real(self, name: str, default: float | None = None) -> float:
        value = self.required(self._key(name), float, default)
        if not math.isfinite(value):
            raise CorruptFile(f"{self.path}: {self._key(name)} is {value}; it must be finite.")
        return value

    def boolean(self, name: str, default: bool) -> bool:
        return self.required(self._key(name), bool, default)

    def text(self, name: str, default: str) -> str:
        return self.required(self._key(name), str, default)

    def has(self, name: str) -> bool:
        return self._key(name) in self._file.metadata

    def only(self, name: str, known: Any) -> None:
        """Refuse any other value of what may be left out."""
        value = self.optional(self._key(name), type(known))
        if value not in (None, known):
            raise UnsupportedModel(f"{self.path}: {self._key(name)} is {value}; only {known} is known.")

    def skip(self, *names: str) -> None:
        """Known, and said better elsewhere."""
        self._taken.update(map(self._key, names))

    def finish(self) -> None:
        """Refuse hyperparameters that were not asked for, but for those that are 0 or false."""
        prefix = self._key("")
        for key, value in self._file.metadata.items():
            if key.startswith(prefix) and key not in self._taken and value:
                raise UnsupportedModel(
                    f"{self.path}: the reader of {self.architecture} does not know {key} ({str(value)[:40]})."
                )

    def has_tensor(self, name: str) -> bool:
        return name in self._file.tensors

    def num_layers(self) -> int:
        num_layers, num_tensors = self.positive("block_count"), len(self._file.tensors)
        if num_layers > num_tensors:
            raise CorruptFile(f"{self.path} claims {num_layers} layers and holds {num_tensors} tensors.")
        return num_layers

    def factors(self, name: str, count: int) -> list[float]:
        """A tensor of divisors, read now."""
        factors = self._file.read(name).flatten().tolist()
        if len(factors) != count or not all(math.isfinite(factor) and factor > 0 for factor in factors):
            raise CorruptFile(f"{self.path}: {name} must hold {count} divisors above 0.")
        return factors

    def _key(self, name: str) -> str:
        return f"{self.architecture}.{name}"
