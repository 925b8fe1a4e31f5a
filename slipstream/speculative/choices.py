"""Trees that are written down: a choice is the rank of a token at each place on its way down, [0, 2] the third child
of the likeliest one. TensorRT-LLM has them as --medusa_choices and --eagle_choices.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from slipstream.errors import UsageError

Choice = tuple[int, ...]


def read_choices(path: str) -> list[Choice]:
    """From a JSON file, or its text. Raises UsageError for what is no tree: a list of lists of ranks, each but for its
    last rank there as well."""
    try:
        given = json.loads(path if path.lstrip().startswith("[") else Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"choices {path} cannot be read as JSON ({error}); give [[0], [0, 0], [1], ...].") from None
    is_list = isinstance(given, list) and bool(given)
    if not is_list or not all(isinstance(each, list) and each and all(map(_is_rank, each)) for each in given):
        raise UsageError(f"choices {path} is no list of lists of ranks from 0; give [[0], [0, 0], [1], ...].")
    choices = list(dict.fromkeys(map(tuple, given)))
    rootless = next((each for each in choices if len(each) > 1 and each[:-1] not in choices), None)
    if rootless is not None:
        raise UsageError(f"choices {path} has {list(rootless)} without {list(rootless[:-1])}; add that one.")
    return choices


def _is_rank(value: object) -> bool:
    return type(value) is int and value >= 0


def fitting(choices: Sequence[Choice], deepest: int, num_ranks: int) -> list[Choice]:
    """Those at most so deep and of so many ranks, parents before their children, otherwise in their order."""
    kept = [choice for choice in choices if len(choice) <= deepest and max(choice) < num_ranks]
    placed: dict[Choice, None] = {}
    for choice in kept:
        placed |= dict.fromkeys(choice[:depth] for depth in range(1, len(choice) + 1))
    return list(placed)


def parents_of(choices: Sequence[Choice]) -> list[int]:
    """The node that each follows, as trees count them (speculative/tree.py)."""
    nodes = {choice: node for node, choice in enumerate(choices, 1)}
    return [nodes.get(choice[:-1], 0) for choice in choices]
