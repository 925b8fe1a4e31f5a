"""Speculation: how an engine drafts, as LLM(speculative=…) and --speculative say it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from slipstream.errors import UsageError

MAX_DRAFT_LEN = 256  # tokens; trees are rarely larger than 64


@dataclass(frozen=True, kw_only=True)
class Speculation:
    method: str  # a folder of slipstream/speculative, or a drafter of an installed package
    max_draft_len: int | None = None  # drafts of a sequence that one step verifies; None: as many as suit the method
    adaptive: bool = True  # fewer of them, or none, where that is faster
    options: Mapping[str, Any] = field(default_factory=dict)  # the method's own

    @classmethod
    def read(cls, given: Mapping[str, Any] | str) -> Self:
        """From {"method": "ngram", "max_draft_len": 8, …}, or that as JSON. Raises UsageError."""
        try:
            values = json.loads(given) if isinstance(given, str) else given
        except ValueError as error:
            raise UsageError(f"speculative is {given!r}, which is no JSON ({error}); {_EXAMPLE}.") from None
        if not isinstance(values, Mapping) or not isinstance(values.get("method"), str):
            raise UsageError(f"speculative is {given!r}, which names no method; {_EXAMPLE}.")
        options = dict(values)
        method, max_draft_len = options.pop("method"), options.pop("max_draft_len", None)
        adaptive = options.pop("adaptive", True)
        is_number = type(max_draft_len) is int and 1 <= max_draft_len <= MAX_DRAFT_LEN
        if max_draft_len is not None and not is_number:
            raise UsageError(
                f"speculative has max_draft_len {max_draft_len!r}; it must be a whole number from 1 to {MAX_DRAFT_LEN}."
            )
        if type(adaptive) is not bool:
            raise UsageError(f"speculative has adaptive {adaptive!r}; it must be true or false.")
        return cls(method=method, max_draft_len=max_draft_len, adaptive=adaptive, options=options)


_EXAMPLE = """give one such as {"method": "ngram", "max_draft_len": 8}"""
