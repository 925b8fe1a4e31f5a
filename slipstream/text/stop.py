"""StopMatcher: cuts a stream of text at the first stop string."""

from collections.abc import Sequence


class StopMatcher:
    """Finds the match that starts earliest in the whole text, of several there the longest; the rest is dropped.

    Text is held back while it could be the start of a stop string, or while a match found could still lose to one that
    starts no later. The text may be cut into pushes anywhere. Time is linear in the text (Knuth, Morris, Pratt 1977).
    """

    matched: str | None  # the stop string that ended the text
    rest: str  # once it has matched: what followed it in what was pushed

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        """stops: strings that are not empty.  include_stop: keep the stop string at the end of the text."""
        self.matched, self.rest = None, ""
        self._include_stop = include_stop
        self._stops = [_Progress(stop) for stop in dict.fromkeys(stops)]
        self._length = 0  # characters looked at; positions below count from the start of the text
        self._held, self._held_from = "", 0  # the text not yet released, and its position
        self._best: tuple[int, str] | None = None  # where a complete stop string starts, and which

    def push(self, text: str) -> str:
        """Returns the text that is now safe to show; "" once a stop string has matched."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        self._held += text
        for character in text:
            self._length += 1
            self._advance(character)
            if self._best is not None and self._best[0] < self._earliest_open():
                return self._end_at_best()
        return self._release(self._earliest_open())

    def finish(self) -> str:
        """Returns the text still held back, now that no more will come; this may settle a match."""
        if self.matched is not None:
            return ""
        return self._release(self._length) if self._best is None else self._end_at_best()

    def _advance(self, character: str) -> None:
        for progress in self._stops:
            if progress.step(character):
                start = self._length - len(progress.stop)
                if self._best is None or (start, -len(progress.stop)) < (self._best[0], -len(self._best[1])):
                    self._best = (start, progress.stop)

    def _earliest_open(self) -> int:
        """The position of the earliest stop string that has begun and may yet be completed (the end if none has)."""
        return min((self._length - progress.num_matched for progress in self._stops), default=self._length)

    def _release(self, end: int) -> str:
        if self._best is not None:
            end = min(end, self._best[0])
        count = end - self._held_from
        released, self._held, self._held_from = self._held[:count], self._held[count:], end
        return released

    def _end_at_best(self) -> str:
        assert self._best is not None
        start, self.matched = self._best
        released = self._release(start)
        self.rest, self._held = self._held[len(self.matched) :], ""
        return released + self.matched if self._include_stop else released


class _Progress:
    """How much of one stop string the text ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        self._border = _border_lengths(stop)

    def step(self, character: str) -> bool:
        """Takes the next character of the text; True if the stop string ends there."""
        while self.num_matched and self.stop[self.num_matched] != character:
            self.num_matched = self._border[self.num_matched - 1]
        if self.stop[self.num_matched] == character:
            self.num_matched += 1
        if self.num_matched < len(self.stop):
            return False
        self.num_matched = self._border[-1]
        return True


def _border_lengths(pattern: str) -> list[int]:
    """For each prefix of the pattern, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = borders[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        borders[index] = length
    return borders
