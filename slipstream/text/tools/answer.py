"""AnswerParser: a model's text becomes content, reasoning and tool calls, as it streams."""

from collections.abc import Callable, Collection
from functools import partial
from itertools import chain

from slipstream.text.tools import reasoning
from slipstream.text.tools.deltas import Answer, CallEnd, Content, Delta
from slipstream.text.tools.formats import AnswerFormat
from slipstream.text.tools.scanner import Scanner, Steps


class AnswerParser:
    """Takes pieces of text, cut anywhere, and returns what each adds; only what may become a marker waits.

    The text must hold its special tokens (skip_special_tokens=False): some markers are.
    """

    def __init__(
        self,
        form: AnswerFormat,
        *,
        reasoning_in_prompt: bool = False,
        names: Collection[str] = (),
        parallel: bool = True,
    ) -> None:
        """reasoning_in_prompt: as `is_begun_by(prompt)` says.  names: of the tools that may be called.
        parallel: there may be several calls; otherwise the answer ends with its first one.
        """
        self._parallel, self._is_over = parallel, False
        self._stages: list[_Stage] = []
        if form.reasons:
            self._stages.append(_Stage(partial(reasoning.read, in_prompt=reasoning_in_prompt), Scanner()))
        if form.calls is not None and names:
            self._stages.append(_Stage(form.calls.read, Scanner(names, form.calls.new_id)))

    def push(self, text: str) -> list[Delta]:
        return self._run(text, ended=False)

    def finish(self) -> list[Delta]:
        """What was held back, now that no more text will come."""
        return self._run("", ended=True)

    def read(self, text: str) -> Answer:
        """A whole text at once."""
        return Answer.of([*self.push(text), *self.finish()])

    def _run(self, text: str, ended: bool) -> list[Delta]:
        """Each stage reads the content that the one before it leaves."""
        if self._is_over:
            return []
        deltas: list[Delta] = [Content(text)] if text else []
        for stage in self._stages:
            pieces = [stage.run(delta.text) if isinstance(delta, Content) else [delta] for delta in deltas]
            if ended:
                pieces.append(stage.run("", ended=True))
            deltas = list(chain.from_iterable(pieces))
        return deltas if self._parallel else self._up_to_first_call(deltas)

    def _up_to_first_call(self, deltas: list[Delta]) -> list[Delta]:
        ends = [number for number, delta in enumerate(deltas, 1) if isinstance(delta, CallEnd)]
        self._is_over = bool(ends)
        return deltas[: ends[0]] if ends else deltas


class _Stage:
    """One reader and where it is."""

    def __init__(self, read: Callable[[Scanner], Steps[None]], scanner: Scanner) -> None:
        self._scanner = scanner
        self._steps = read(scanner)
        next(self._steps)

    def run(self, text: str, ended: bool = False) -> list[Delta]:
        self._scanner.receive(text, ended)
        next(self._steps, None)
        deltas, self._scanner.deltas = self._scanner.deltas, []
        return deltas
