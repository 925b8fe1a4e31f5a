"""The ${keys} of a config.pbtxt: what they are, and values put in their place."""

import re
from collections.abc import Mapping
from pathlib import Path

from slipstream.errors import UsageError

_KEY = re.compile(r"\$\{(\w+)\}")
_PAIR = re.compile(r'\s*(?P<key>\w+):(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>[^",]*))\s*(?:,|$)')
_BARE_VALUE = re.compile(r"[\w.+-]+")


def parse_substitutions(text: str) -> dict[str, str]:
    """`key:value,key:value`; a value may hold colons, and within double quotes commas as well. Raises UsageError."""
    values: dict[str, str] = {}
    position = 0
    while position < len(text):
        pair = _PAIR.match(text, position)
        if pair is None:
            raise UsageError(
                f"{text[position:]!r} is not KEY:VALUE; write triton_max_batch_size:64,decoupled_mode:False, and a "
                'value with commas as KEY:"A,B".'
            )
        if pair["key"] in values:
            raise UsageError(f"{pair['key']} is given twice; leave one of them out.")
        quoted = pair["quoted"]
        values[pair["key"]] = pair["plain"] if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
        position = pair.end()
    return values


def open_keys(text: str) -> list[str]:
    """The keys that have no value yet, each once, in their order."""
    return list(dict.fromkeys(_KEY.findall(text)))


def fill(text: str, values: Mapping[str, str], name: str) -> str:
    """The text with values for some of its keys. Raises UsageError for keys that it lacks; `name` is the file's."""
    keys = open_keys(text)
    for key in values:
        if key not in keys:
            left = f"it has {', '.join(keys)}" if keys else "all of its keys are filled (init --force starts anew)"
            raise UsageError(f"{name} has no key ${{{key}}} to fill; {left}.")

    def value_of(found: re.Match[str]) -> str:
        key = found[1]
        if key not in values:
            return found[0]
        is_quoted = text[: found.start()].endswith('"')
        if is_quoted:
            return values[key].replace("\\", "\\\\").replace('"', '\\"')
        if not _BARE_VALUE.fullmatch(values[key]):
            raise UsageError(f"{key} is {values[key]!r}; {name} needs a number or a word there, such as 64 or False.")
        return values[key]

    return _KEY.sub(value_of, text)


def check_filled(model_repository: Path) -> None:
    """Raises UsageError for the first config.pbtxt with keys that have no value."""
    for path in sorted(model_repository.glob("*/config.pbtxt")):
        keys = open_keys(path.read_text(encoding="utf-8"))
        if keys:
            raise UsageError(
                f"{path} still has {', '.join(f'${{{key}}}' for key in keys)}; fill in with: slipstream triton "
                f"fill-template -i {path} {','.join(f'{key}:VALUE' for key in keys)} as docs/serving/triton.md shows."
            )
