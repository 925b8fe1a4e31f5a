"""Errors speak in sentences: one line that ends, names the value at fault, and says what would work."""

import ast
from collections.abc import Iterator

import pytest

from slipstream import errors
from tests.surface.sources import Source, sources

ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type)}
LONGEST = 400  # characters of literal text; more is a manual page

BLANK = "…"  # stands for a value put in at run time


def messages(source: Source) -> Iterator[tuple[int, str]]:
    """(line, text) of every `raise SomeError("…")` whose message is written there."""
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call) or not node.exc.args:
            continue
        function = node.exc.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        text = literal_text(node.exc.args[0])
        if name in ERRORS and text is not None:
            yield node.lineno, text


def literal_text(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else BLANK for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = literal_text(node.left), literal_text(node.right)
        return (left or BLANK) + (right or BLANK)
    return None


MESSAGES = [(source.path, line, text) for source in sources() for line, text in messages(source)]


def test_there_are_messages_to_check() -> None:
    assert len(MESSAGES) >= 10


@pytest.mark.parametrize(("path", "line", "text"), MESSAGES, ids=[f"{path}:{line}" for path, line, _ in MESSAGES])
def test_a_message_is_a_sentence(path: str, line: int, text: str) -> None:
    where = f"slipstream/{path}.py:{line}: {text!r}"
    assert "\n" not in text, f"{where} has more than one line"
    assert text == text.strip(), f"{where} has blanks around it"
    assert text[:1].isalnum() or text[:1] in (BLANK, "-", "'", '"'), f"{where} starts with {text[:1]!r}"
    assert text.endswith((".", "?")), f"{where} does not end as a sentence does"
    assert len(text.split()) >= 4, f"{where} is too short to name the value and what would work"
    assert len(text) <= LONGEST, f"{where} is too long"
    assert "!" not in text, f"{where} shouts"
