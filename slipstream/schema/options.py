"""A config.json being read: every option is taken once, and what nobody took is an error."""

from typing import Any

from slipstream.errors import CorruptFile, UnsupportedModel

# Options that say nothing about the numbers a decoder computes.
_SILENT_OPTIONS = frozenset(
    """
    architectures attention_dropout auto_map bos_token_id cache_implementation dtype embd_pdrop embedding_dropout
    eos_token_id initializer_range is_llama_config max_length model_type pad_token_id pretraining_tp resid_pdrop
    residual_dropout torch_dtype transformers.js_config transformers_version unk_token_id use_cache
    _name_or_path _attn_implementation
    """.split()  # noqa: SIM905 - a table of words
)


class Options:
    def __init__(self, values: dict[str, Any], source: str) -> None:
        self._values = {name: value for name, value in values.items() if name not in _SILENT_OPTIONS}
        self._source = source

    def has(self, name: str) -> bool:
        """Whether the config says anything but null of it."""
        return self._values.get(name) is not None

    def integer(self, name: str, default: int | None = None, *, low: int = 1, high: int = 2**31) -> int:
        value = self._values.pop(name, None)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise CorruptFile(f"{self._source}: {name} is {value!r}; it must be a whole number from {low} to {high}.")
        return value

    def optional_integer(self, name: str, default: int | None) -> int | None:
        """None where the config says null; the default only where it says nothing."""
        if name not in self._values:
            return default
        return self.integer(name) if self._values[name] is not None else self._values.pop(name)

    def real(self, name: str, default: float | None = None) -> float:
        value = self._values.pop(name, None)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e30:
            raise CorruptFile(f"{self._source}: {name} is {value!r}; it must be a number that is not negative.")
        return float(value)

    def cap(self, name: str, default: float) -> float:
        """A soft cap: 0 for none, which a config spells null."""
        return self.real(name, default) if self._values.get(name, default) is not None else 0.0

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self._values.pop(name, default)
        if not isinstance(value, bool):
            raise CorruptFile(f"{self._source}: {name} is {value!r}; it must be true or false.")
        return value

    def section(self, name: str) -> "Options | None":
        value = self._values.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise CorruptFile(f"{self._source}: {name} is {value!r}; it must be an object.")
        return Options(value, f"{self._source}: {name}")

    def sections(self) -> "list[Options]":
        """Every option that is left, as an object of its own."""
        return [each for name in list(self._values) if (each := self.section(name)) is not None]

    def value(self, name: str) -> Any:
        """Whatever is there, None where nothing is; the caller checks it."""
        return self._values.pop(name, None)

    def assume(self, name: str, value: Any) -> None:
        """What is meant where an option is absent or null."""
        if self._values.get(name) is None:
            self._values[name] = value

    def rename(self, other: str, name: str) -> None:
        """An option that some write under another name."""
        if self.has(other):
            self.assume(name, self._values.pop(other))

    def skip(self, *names: str) -> None:
        """Options that are known and change nothing here."""
        for name in names:
            self._values.pop(name, None)

    def choice(self, name: str, known: tuple[Any, ...], default: Any = None) -> Any:
        value = self._values.pop(name, None)
        value = default if value is None else value
        if value not in known:
            listed = ", ".join(map(str, known))
            raise UnsupportedModel(f"{self._source}: {name} is {value!r}; the known values are {listed}.")
        return value

    def reals(self, name: str) -> tuple[float, ...] | None:
        value = self._values.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(x, int | float) and 0 < x < 1e30 for x in value):
            raise CorruptFile(f"{self._source}: {name} must be a list of positive numbers.")
        return tuple(float(x) for x in value)

    def integers(self, name: str) -> tuple[int, ...]:
        """Whole numbers from 0; () where there is no list."""
        value = self._values.pop(name, None) or []
        if not isinstance(value, list) or not all(type(x) is int and 0 <= x < 2**31 for x in value):
            raise CorruptFile(f"{self._source}: {name} must be a list of whole numbers from 0.")
        return tuple(value)

    def words(self, name: str, known: tuple[str, ...]) -> tuple[str, ...] | None:
        value = self._values.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, list) or not all(word in known for word in value):
            raise CorruptFile(f"{self._source}: {name} must be a list of {', '.join(known)}.")
        return tuple(value)

    def finish(self, known: str) -> None:
        """Refuse what is left. `known` describes the reader, for the message."""
        left = [name for name, value in self._values.items() if value not in (None, False)]
        if left:
            value = self._values[left[0]]
            raise UnsupportedModel(f"{self._source}: {known} does not know the option {left[0]!r} ({value!r}).")
