"""Guided: what an output must be, checked as far as it can be without a vocabulary."""

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from slipstream.errors import RequestError

MAX_CHARS = 65536  # of a schema, regex, list of choices or grammar: what compiles in a fraction of a second

_EXAMPLES = {
    "json_schema": "a JSON schema as a dict or as text, such as {'type': 'object'}",
    "json_object": "True or False",
    "regex": "a regular expression, such as '[0-9]+'",
    "choice": "a list of texts, such as ['yes', 'no']",
    "grammar": 'a grammar in Lark or GBNF, such as \'start: "yes" | "no"\'',
}


@dataclass(frozen=True, kw_only=True)
class Guided:
    """What an output as a whole must match: exactly one of these is given. All of it is text, hashable and plain.

    The names are those of vLLM's guided_json, guided_regex, guided_choice and guided_grammar. Keys of an object come in
    the schema's order. Between the parts of JSON there may be blanks and line breaks, 20 at most. Whole numbers above
    2**53 in a schema are rounded to a float's, as JavaScript does.
    """

    json_schema: Mapping[str, Any] | str | None = None  # kept as text
    json_object: bool = False  # any JSON object
    regex: str | None = None  # the syntax of Rust's regex crate: no look-around, no backreferences
    choice: Sequence[str] | None = None  # one of these, to the letter
    grammar: str | None = None  # Lark as llguidance reads it, or llama.cpp's GBNF

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) != 1:
            raise RequestError(
                f"guided has {' and '.join(given) or 'nothing'}; give exactly one of {', '.join(_EXAMPLES)}."
            )
        plain = _PLAIN[self.kind](getattr(self, self.kind))
        if plain is None:
            shown = reprlib.repr(getattr(self, self.kind))  # of one too deep, too
            raise RequestError(f"guided.{self.kind} is {shown}; it must be {_EXAMPLES[self.kind]}.")
        object.__setattr__(self, self.kind, plain)
        _check_text(self.kind, plain)

    @property
    def kind(self) -> str:
        """The name of the one that is given."""
        return self._given()[0]

    def __repr__(self) -> str:
        return f"Guided({self.kind}={reprlib.repr(getattr(self, self.kind))})"

    def _given(self) -> list[str]:
        return [field.name for field in fields(self) if getattr(self, field.name) not in (None, False)]


def has_lone_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _check_text(name: str, plain: Any) -> None:
    texts = plain if isinstance(plain, tuple) else (str(plain),)
    num_chars = sum(map(len, texts))
    if num_chars > MAX_CHARS:
        raise RequestError(f"guided.{name} has {num_chars} characters; it must have at most {MAX_CHARS}.")
    if any(map(has_lone_surrogate, texts)):
        raise RequestError(f"guided.{name} holds a lone surrogate, which no text can have; send valid Unicode.")


def _plain_schema(schema: Any) -> str | None:
    """A schema's text, None where it is no JSON object."""
    try:
        if isinstance(schema, str):
            return schema if isinstance(json.loads(schema), dict) else None
        return json.dumps(dict(schema), ensure_ascii=False, allow_nan=False) if isinstance(schema, Mapping) else None
    except (ValueError, TypeError, RecursionError):
        return None


def _plain_choice(choice: Any) -> tuple[str, ...] | None:
    is_list = isinstance(choice, Sequence) and not isinstance(choice, str | bytes)
    return tuple(choice) if is_list and choice and all(isinstance(each, str) and each for each in choice) else None


def _plain_text(text: Any) -> str | None:
    return text if isinstance(text, str) and text else None


_PLAIN = {
    "json_schema": _plain_schema,
    "json_object": lambda value: value if isinstance(value, bool) else None,
    "regex": _plain_text,
    "choice": _plain_choice,
    "grammar": _plain_text,
}
