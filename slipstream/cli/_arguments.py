"""A typed command line, before typer reads it: TensorRT-LLM's flags are answered, unknown ones are refused.

What each flag means, or why it means nothing here, is in the table of cli/_seed_flags.py.
"""

import difflib
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from slipstream.cli._seed_flags import ANY, BARE, FLAGS, Answers, Means, Note, Reads, Refusal
from slipstream.errors import UsageError


@dataclass(frozen=True)
class OwnOptions:
    """A verb's options as typer knows them, by their underscored names."""

    switches: Collection[str]  # take no value
    single: Collection[str]  # take a value
    repeatable: Collection[str]  # take a value, and may be given again


@dataclass
class _Reader:
    """Walks the arguments once: those of typer's options pass, those in the table are answered."""

    own: OwnOptions
    flags: Mapping[str, Answers]
    rest: list[str]
    kept: list[str] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)  # what is said → the flags it is said of

    def read(self) -> None:
        while self.rest:
            argument = self.rest.pop(0)
            if argument == "--":
                self.kept += [argument, *self.rest]
                return
            if not argument.startswith("--"):
                self.kept.append(argument)
                continue
            typed, has_value, value = argument.partition("=")
            name = underscored(typed)
            if not has_value and self.rest[:1] == ["="]:
                raise UsageError(f"{typed} is followed by a lone =; write {typed}=VALUE, without blanks.")
            if name in self.flags:
                self._answer(name, value if has_value else None)
            elif name in self.own.switches:
                self.kept.append(argument)
            elif name in self.own.single or name in self.own.repeatable:
                self._pass_on(argument, name, has_value=bool(has_value))
            else:
                raise UsageError(self._unknown(typed, name))

    def _pass_on(self, argument: str, name: str, *, has_value: bool) -> None:
        """An option with its value; a repeatable one may be followed by several values, as run.py's are."""
        self.kept.append(argument)
        if not has_value and self.rest:
            self.kept.append(self.rest.pop(0))
        while name in self.own.repeatable and self.rest and not self.rest[0].startswith("-"):
            self.kept += [name, self.rest.pop(0)]

    def _answer(self, name: str, value: str | None) -> None:
        answers = self.flags[name]
        if value is None:
            if set(answers) != {BARE} and self.rest and (BARE not in answers or not self.rest[0].startswith("-")):
                value = self.rest.pop(0)
            elif BARE in answers:
                value = BARE
            else:
                raise UsageError(f"{name} has no value; give one, or leave it out.")
        answer = answers.get(value, answers.get(ANY))
        shown = f"{name} {value}".strip()
        match answer:
            case None:
                possible = " or ".join(key for key in answers if key != BARE) or "given without a value"
                raise UsageError(f"{name} is {value!r}; it must be {possible}.")
            case Refusal(why):
                raise UsageError(f"{shown} is refused: {why}.")
            case Note(why):
                self.notes.setdefault(why, []).append(shown)
            case Means(arguments):
                self.kept += arguments
            case Reads(read, form):
                self._keep(_read(name, value, read, form))

    def _keep(self, arguments: tuple[str, ...]) -> None:
        """What several flags say of drafts is one option."""
        if arguments[:1] == ("--speculative",) and "--speculative" in self.kept:
            place = self.kept.index("--speculative") + 1
            arguments = ("--speculative", json.dumps(json.loads(self.kept[place]) | json.loads(arguments[1])))
            del self.kept[place - 1 : place + 1]
        self.kept += arguments

    def _unknown(self, typed: str, name: str) -> str:
        known = [*self.own.switches, *self.own.single, *self.own.repeatable, *self.flags]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "--help lists those there are."
        return f"There is no option {typed}; {hint}"


def _read(name: str, value: str, read: Callable[[str], tuple[str, ...]], form: str) -> tuple[str, ...]:
    try:
        return read(value)
    except (ValueError, TypeError):
        raise UsageError(f"{name} is {value!r}; it must be {form.partition(':')[0]}.") from None


def answer_seed_flags(verb: str, arguments: Sequence[str], own: OwnOptions) -> list[str]:
    """The arguments that are left for typer. Prints a note for each reason why flags mean nothing here.

    Raises UsageError for an unknown flag, naming the nearest one, and for a flag that asks for what is not there.
    """
    reader = _Reader(own, FLAGS.get(verb, {}), list(arguments))
    reader.read()
    for why, flags in reader.notes.items():
        print(f"note: no effect: {', '.join(flags)}: {why}.", file=sys.stderr)
    return reader.kept


def underscored(name: str) -> str:
    """--max-output-len is --max_output_len, the seeds' spelling; short options stay."""
    return "--" + name[2:].replace("-", "_") if name.startswith("--") else name
