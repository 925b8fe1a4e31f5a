"""The command line: one verb a file.

A verb is a module in this folder that holds a function of its own name, written for typer:

    # cli/inspect.py
    def inspect(engine: Annotated[Path, typer.Argument(help="…")]) -> None:
        '''Show what is inside an engine.

        Example:
            slipstream inspect engines/smollm2
        '''

There is no list of verbs to keep: the folder is walked (names with a leading underscore are not verbs), and only the
verb that was called is imported. For `slipstream --help` many are, so a verb imports heavy things inside its function.
A folder inside is a group, whose verbs are called after its name: cli/bench/kernels.py is `slipstream bench kernels`.
An underscore is a dash in the verb: cli/triton/fill_template.py is `slipstream triton fill-template`.
"""

import io
import os
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from slipstream.cli._errors import plain_errors


def verbs() -> list[str]:
    """The names of all verbs ("build", "bench kernels"), without importing one."""
    return sorted(_verbs_in(__path__, ""))


def _verbs_in(folders: Iterable[str], before: str) -> Iterator[str]:
    for module in pkgutil.iter_modules(folders):
        if module.ispkg:
            yield from _verbs_in([f"{folder}/{module.name}" for folder in folders], f"{module.name} ")
        elif not module.name.startswith("_"):
            yield before + module.name.replace("_", "-")


def _group_options_last(arguments: Sequence[str], known: Iterable[str]) -> list[str]:
    """trtllm-bench's `--model M latency …` is `latency --model M …`: options before a group's verb go behind it."""
    group, *rest = arguments or [""]
    before = list[str]()
    while rest and rest[0].startswith("-") and rest[0] not in ("-h", "--help"):
        before += rest[: 1 if "=" in rest[0] else 2]
        rest = rest[1 if "=" in rest[0] else 2 :]
    if before and rest and f"{group} {rest[0]}" in known:
        return [group, rest[0], *before, *rest[1:]]
    return list(arguments)


def _needed(arguments: Sequence[str], known: Sequence[str]) -> list[str]:
    """The verbs to import: the one that was called, those of a named group, or what `slipstream --help` lists."""
    called = [verb for verb in known if verb.split() == arguments[: len(verb.split())]]
    of_group = [verb for verb in known if verb.split()[:1] == arguments[:1]]
    if arguments[:1] == ["--version"]:
        return []
    return called or of_group or list({verb.split()[0]: verb for verb in known}.values())  # one names its group


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script. Ends with SystemExit, as command lines do."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever called, as in `slipstream … >&-`
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - open until the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without é shows ?, which beats a traceback
    with plain_errors():
        from slipstream.cli._app import make_app  # after plain_errors, so that Ctrl-C during imports is quiet, too

        known = verbs()
        arguments = _group_options_last(arguments, known)
        make_app(_needed(arguments, known))(args=arguments, prog_name="slipstream")
