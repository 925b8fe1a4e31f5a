"""The command line: one verb a file.

A verb is a module in this folder that holds a function of its own name, written for typer:

    # cli/inspect.py
    def inspect(engine: Annotated[Path, typer.Argument(help="…")]) -> None:
        '''Show what is inside an engine.

        Example:
            slipstream inspect engines/smollm2
        '''

There is no list of verbs to keep: the folder is walked (names with a leading underscore are not verbs), and only the
verb that was called is imported. For `slipstream --help` all are, so a verb imports heavy things inside its function.
"""

import io
import os
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

from slipstream.cli._errors import plain_errors


def verbs() -> list[str]:
    """The names of all verbs, without importing one."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


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
        called = [verb for verb in arguments[:1] if verb in known]
        make_app(called or known)(args=arguments, prog_name="slipstream")
