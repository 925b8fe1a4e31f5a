"""A model file's WEIGHTS table, read in both directions: Hugging Face's names and ours."""

import re
from collections.abc import Callable, Mapping


def translator(table: Mapping[str, str]) -> Callable[[str], str | None]:
    """A function from names that match a key of the table to the value filled in, or to None."""
    rules = [(pattern(key), value) for key, value in table.items()]

    def translate(name: str) -> str | None:
        return next((value.format(**m.groupdict()) for rule, value in rules if (m := rule.fullmatch(name))), None)

    return translate


def to_hugging_face(table: Mapping[str, str], ours: str) -> str:
    """The way back through a WEIGHTS table. Raises KeyError for a name that is not ours."""
    theirs = translator({value: key for key, value in table.items()})(ours)
    if theirs is None:
        raise KeyError(ours)
    return theirs


def pattern(name: str) -> re.Pattern[str]:
    """model.layers.{i}.mlp.{p}_proj.weight → a regular expression with the groups i (a number) and p (a word)."""
    text = re.escape(name).replace(r"\{i\}", r"(?P<i>\d{1,5})").replace(r"\{p\}", r"(?P<p>[a-z]{1,32})")
    return re.compile(text, re.ASCII)
