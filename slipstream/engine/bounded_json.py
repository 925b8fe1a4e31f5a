"""JSON from files nobody vouches for: size, nesting and encoding are checked, and the top level must be an object."""

import json
import os
from pathlib import Path
from typing import Any

from slipstream.errors import CorruptFile, ModelError

JSON_LIMIT = 16 << 20  # bytes


def read_json(path: str | Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes. Raises CorruptFile, or ModelError where it cannot be read."""
    path = Path(path)
    try:
        if not path.is_file():
            raise ModelError(f"{path} is not a file.")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(size) if size <= limit else None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from None
    if data is None:
        raise CorruptFile(f"{path} is larger than {limit} bytes, the limit for a JSON file here.")
    return parse_object(data, str(path))


def parse_object(data: bytes, where: str, *, unique_keys: bool = False) -> dict[str, Any]:
    """Parse one JSON object. `where` names it in errors; `unique_keys` refuses an object that has a key twice."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique if unique_keys else None)
    except RecursionError:
        raise CorruptFile(f"{where} is JSON nested too deeply to be real.") from None
    except ValueError as error:  # a syntax error, invalid UTF-8, a number of thousands of digits
        raise CorruptFile(f"{where} is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise CorruptFile(f"{where} holds a JSON {type(value).__name__}; it must be an object.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} occurs twice")
        result[key] = value
    return result
