"""JsonObject: follows a JSON object (RFC 8259) character by character, and stops where it breaks."""

import json
import re
from collections.abc import Callable

_SPACE = frozenset(" \t\n\r")
_LITERALS = {"t": "true", "f": "false", "n": "null"}
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_MAX_NUMBER = 400  # characters; a float has at most 309 digits before its point


class JsonObject:
    """Takes the object's text and white space before it. Each state is the method that takes the next character."""

    def __init__(self) -> None:
        self.key: str | None = None  # the member of the outermost object that was last begun
        self.strings: dict[str, str] = {}  # the outermost object's members that are strings
        self.depth = 0  # brackets that are open
        self.done = False
        self._closers: list[str] = []
        self._is_key = False
        self._token: list[str] = []  # of the string, number or literal that is open
        self._hex_digits = 0  # of \uXXXX, still to come
        self._next: Callable[[str], None] = self._start

    def step(self, character: str) -> None:
        """Raises ValueError where no JSON object goes on like this; the character is then not taken."""
        self._next(character)

    def _start(self, character: str) -> None:
        if character == "{":
            self._open("}")
        elif character not in _SPACE:
            raise ValueError("expected an object")

    def _open(self, closer: str) -> None:
        self._closers.append(closer)
        self.depth += 1
        self._next = self._first_key if closer == "}" else self._first_value

    def _close(self, character: str) -> None:
        if character != self._closers[-1]:
            raise ValueError("expected the bracket that closes")
        self._closers.pop()
        self.depth -= 1
        self.done = self.depth == 0
        self._next = self._end if self.done else self._after_value

    def _end(self, character: str) -> None:
        raise ValueError("the object has ended")

    def _first_key(self, character: str) -> None:
        if character == "}":
            self._close(character)
        else:
            self._key(character)

    def _key(self, character: str) -> None:
        if character == '"':
            self._begin_string(is_key=True)
        elif character not in _SPACE:
            raise ValueError("expected a key")

    def _colon(self, character: str) -> None:
        if character == ":":
            self._next = self._value
        elif character not in _SPACE:
            raise ValueError("expected a colon")

    def _first_value(self, character: str) -> None:
        if character == "]":
            self._close(character)
        else:
            self._value(character)

    def _value(self, character: str) -> None:
        if character in "{[":
            self._open("}" if character == "{" else "]")
        elif character == '"':
            self._begin_string(is_key=False)
        elif character in _LITERALS:
            self._token, self._next = list(_LITERALS[character][:0:-1]), self._literal
        elif character in "-0123456789":
            self._token, self._next = [character], self._number
        elif character not in _SPACE:
            raise ValueError("expected a value")

    def _after_value(self, character: str) -> None:
        if character == ",":
            self._next = self._key if self._closers[-1] == "}" else self._value
        elif character not in _SPACE:
            self._close(character)

    def _literal(self, character: str) -> None:
        if character != self._token[-1]:
            raise ValueError("expected true, false or null")
        self._token.pop()
        if not self._token:
            self._next = self._after_value

    def _number(self, character: str) -> None:
        if character in "0123456789+-.eE" and len(self._token) < _MAX_NUMBER:
            self._token.append(character)
            return
        if _NUMBER.fullmatch("".join(self._token)) is None:
            raise ValueError("expected a number")
        self._next = self._after_value
        self._after_value(character)

    def _begin_string(self, is_key: bool) -> None:
        self._token, self._is_key, self._next = [], is_key, self._string

    def _string(self, character: str) -> None:
        if character == '"':
            self._end_string()
            return
        if character < " ":
            raise ValueError("a control character must be escaped")
        if character == "\\":
            self._next = self._escape
        self._token.append(character)

    def _escape(self, character: str) -> None:
        if character not in '"\\/bfnrtu':
            raise ValueError("no such escape")
        self._token.append(character)
        self._hex_digits = 4 if character == "u" else 0
        self._next = self._hex if character == "u" else self._string

    def _hex(self, character: str) -> None:
        if character not in "0123456789abcdefABCDEF":
            raise ValueError("expected a hexadecimal digit")
        self._token.append(character)
        self._hex_digits -= 1
        if self._hex_digits == 0:
            self._next = self._string

    def _end_string(self) -> None:
        self._next = self._colon if self._is_key else self._after_value
        if self.depth > 1:
            return
        text = json.loads(f'"{"".join(self._token)}"')
        if self._is_key:
            self.key = text
        elif self.key is not None:
            self.strings[self.key] = text
