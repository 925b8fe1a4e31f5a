"""Scanner: what the formats are read with. A format is a generator that yields where it needs more text.

    def read(text: Scanner) -> Steps[None]:
        while (yield from text.content_until("<tool_call>")):
            yield from text.call()

So each is written as if the whole text were there, and reads the same whatever the text is cut into.
"""

import re
from collections.abc import Callable, Collection, Generator
from typing import TypeVar

from slipstream.text.stop import StopMatcher
from slipstream.text.tools.deltas import CallArguments, CallEnd, CallStart, Content, Delta, Reasoning
from slipstream.text.tools.json_object import JsonObject

T = TypeVar("T")
Steps = Generator[None, None, T]

_ARGUMENTS = ("arguments", "parameters")
_CALL_KEYS = {"name", "id", "type", *_ARGUMENTS}  # another one, and the object is no call but an answer in JSON


class Scanner:
    """Text that was received and is not settled: neither given out as content nor understood as a call."""

    def __init__(self, names: Collection[str] = (), new_id: Callable[[], str] = str) -> None:
        """names: of the tools that may be called.  new_id: makes the id of a call."""
        self.names = frozenset(names)
        self.deltas: list[Delta] = []
        self._new_id = new_id
        self._text = ""
        self._at = 0  # how much of it has been read
        self._ended = False
        self._num_starts = 0
        self._after_call = False

    def receive(self, text: str, ended: bool) -> None:
        self._text += text
        self._ended = ended

    def settle(self) -> None:
        """What was read is understood."""
        self._text, self._at = self._text[self._at :], 0

    def give_back(self) -> None:
        """What was read is content after all."""
        self._give_out(self._text[: self._at])
        self.settle()

    def content_until(self, *markers: str) -> Steps[str]:
        """Gives out content; moves past the marker that comes first and returns it, "" at the end of the text.

        White space between a call and a marker or the end is dropped.
        """
        if self._after_call:
            if marker := (yield from self.next_of(*markers)):
                return marker
            if self._ended and not self._text.strip():
                self._text = ""
        matcher = StopMatcher(markers)
        while True:
            text, self._text = self._text, ""
            self._give_out(matcher.push(text))
            if self._ended:
                self._give_out(matcher.finish())
            if matcher.matched is not None:
                self._text, self._at = matcher.matched + matcher.rest, len(matcher.matched)
                return matcher.matched
            if self._ended:
                return ""
            yield

    def reasoning_until(self, marker: str) -> Steps[None]:
        """Gives out reasoning; moves past the marker, if it comes. Newlines before the marker belong to it."""
        matcher, newlines = StopMatcher([marker]), ""
        while True:
            text, self._text = newlines + matcher.push(self._text), ""
            if self._ended:
                text += matcher.finish()
            is_over = matcher.matched is not None
            body = text if self._ended and not is_over else text.rstrip("\n")
            newlines = text[len(body) :]
            if body:
                self.deltas.append(Reasoning(body))
            if is_over or self._ended:
                self._text, self._at = matcher.rest, 0
                return
            yield

    def next_of(self, *options: str) -> Steps[str]:
        """Moves past white space and the option after it, and returns that; "", and no move, if none comes next."""
        while True:
            rest = self._text[self._at :].lstrip()
            for option in options:
                if rest.startswith(option):
                    self._at = len(self._text) - len(rest) + len(option)
                    return option
            if self._ended or not any(option.startswith(rest) for option in options):
                return ""
            yield

    def read_while(self, characters: re.Pattern[str]) -> Steps[str]:
        """Moves past all that the pattern, a repeated class of characters, matches, and returns it."""
        start = self._at
        while True:
            match = characters.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text) or self._ended:
                return self._text[start : self._at]
            yield

    def call(self, name: str | None = None) -> Steps[bool]:
        """Reads {"name": …, "arguments": {…}}, or with a name given its arguments {…}; returns whether it is a call.

        If it is none, all that was read since the last call or content is given back, up to where JSON or call break.
        """
        reader = _CallReader(name, self.names)
        start: CallStart | None = None
        while True:
            self._at += reader.read(self._text, self._at)
            if arguments := reader.take_arguments():
                if start is None:
                    assert reader.name is not None
                    start = CallStart(self._num_starts, self._new_id(), reader.name)
                    self._num_starts += 1
                    self.deltas.append(start)
                self.deltas.append(CallArguments(start.index, arguments))
            if reader.is_whole and not reader.is_broken and start is not None:
                self.deltas.append(CallEnd(start.index))
                self.settle()
                self._after_call = True
                return True
            if reader.is_broken or reader.is_whole or self._ended:
                self.give_back()
                return False
            yield

    def _give_out(self, text: str) -> None:
        if text:
            self.deltas.append(Content(text))
            self._after_call = False


class _CallReader:
    """One call's JSON: its name, its arguments' text as it comes, and whether it is still one."""

    def __init__(self, name: str | None, names: Collection[str]) -> None:
        self.name = name
        self.is_broken = False
        self._names = names
        self._object = JsonObject()
        self._num_outer = 0 if name is not None else 1  # brackets around the arguments
        self._arguments: list[str] = []  # characters not yet taken
        self._begun = self._ended = False  # the arguments

    @property
    def is_whole(self) -> bool:
        return self._object.done

    def take_arguments(self) -> str:
        """What is new of them, once the name is known."""
        if self.name is None:
            return ""
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def read(self, text: str, at: int) -> int:
        """Takes text[at:] as far as the call goes; returns how many characters that was."""
        for position in range(at, len(text)):
            if self.is_whole or self.is_broken:
                return position - at
            depth_before = self._object.depth
            try:
                self._object.step(text[position])
            except ValueError:
                self.is_broken = True
                return position - at
            self._note(text[position], max(depth_before, self._object.depth))
        return len(text) - at

    def _note(self, character: str, depth: int) -> None:
        """depth: brackets around the character, which may be one of them."""
        key = self._object.key
        if depth > self._num_outer and (self._num_outer == 0 or key in _ARGUMENTS):
            self._note_argument(character)
        if self._num_outer == 0:
            return
        if key is not None and key not in _CALL_KEYS:
            self.is_broken = True
        elif self.name is None and (name := self._object.strings.get("name")) is not None:
            if name in self._names:
                self.name = name
            else:
                self.is_broken = True

    def _note_argument(self, character: str) -> None:
        if self._ended or (not self._begun and character != "{"):
            self.is_broken = True  # given twice, or no object
            return
        self._begun = True
        self._arguments.append(character)
        self._ended = self._object.depth == self._num_outer
