"""Where `slipstream run` gets its prompts: the command line, or a file of a kind its suffix names."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from slipstream.errors import UsageError

Prompt = str | list[int]


def gather_prompts(input_text: Sequence[str], input_file: Path | None) -> list[Prompt]:
    """The prompts of --input_text or --input_file. Raises UsageError unless exactly one of them was given."""
    if input_text and input_file is not None:
        raise UsageError("--input_text and --input_file were both given; leave one of them out.")
    if input_file is None:
        if not input_text:
            raise UsageError("There is no prompt; give --input_text TEXT (several make a batch) or --input_file FILE.")
        return list(input_text)
    prompts = read_prompts(input_file)
    if not prompts:
        raise UsageError(f"{input_file} holds no prompt; put one on each line.")
    return prompts


def read_prompts(path: Path) -> list[Prompt]:
    """.txt: a prompt a line. .jsonl: {"prompt": "…"} or {"input_ids": […]} a line. .csv: a row of token ids a line.

    Blank lines are no prompts. Other keys of a JSON object are left alone: benchmark data sets have some.
    """
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise UsageError(f"{path} ends in {path.suffix or 'no suffix'!r}; --input_file reads {', '.join(_READERS)}.")
    lines = read_text(path, "--input_file").splitlines()
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                prompts.append(read(line))
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{path}, line {number}: {error}.") from None
    return prompts


def read_text(path: Path, option: str) -> str:
    """A UTF-8 file that an option names. Raises UsageError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be read ({error.strerror}); give a file that can.") from None
    except ValueError as error:  # not UTF-8, or a NUL in the path
        raise UsageError(f"{option} {path} cannot be read ({error}); give a file of UTF-8 text.") from None


def _from_json(line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from None
    if isinstance(entry, dict):
        match entry.get("prompt"), entry.get("input_ids"):
            case str(text), None:
                return text
            case None, list(token_ids):
                return token_ids
    raise ValueError('expected an object with either a "prompt" (a string) or "input_ids" (a list)')


def _from_csv(line: str) -> Prompt:
    cells = next(csv.reader([line], skipinitialspace=True))
    try:
        return [int(cell) for cell in cells if cell.strip()]
    except ValueError:
        raise ValueError("expected token ids with commas between them") from None


_READERS: dict[str, Callable[[str], Prompt]] = {".txt": str, ".jsonl": _from_json, ".csv": _from_csv}
