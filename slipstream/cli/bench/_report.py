"""Options about what becomes of a measurement, and tables on the terminal."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli._tables import print_table
from slipstream.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slipstream.bench.plots import Plot
    from slipstream.bench.report import Table

Html = Annotated[Path | None, typer.Option("--html", help="Write a page with tables and plots to this file, too.")]
Record = Annotated[
    str | None,
    typer.Option("--record", help="Write benchmarks/DATE-NAME.md: machine, commit, command, tables. Gives the NAME."),
]


def check_record(name: str | None) -> None:
    if name is not None and not re.fullmatch(r"[\w.-]+", name):
        raise UsageError(f"--record is {name!r}; it must be a name for a file, such as serve-smollm2.")


def publish(
    title: str, tables: "Sequence[Table]", plots: "Sequence[Plot]", html: Path | None, record: str | None
) -> None:
    """Print the tables; write the page and the record where they are wanted."""
    for table in tables:
        print_table(table.title, table.columns, table.rows)
    if html is None and record is None:
        return
    from slipstream.bench.report import Report, facts_here, record_path, to_html, to_markdown

    report = Report(title, facts_here(sys.argv[1:]), tables, plots)
    if html is not None:
        _write("--html", html, to_html(report))
    if record is not None:
        _write("--record", record_path(record), to_markdown(report))


def _write(flag: str, path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{flag} {path} cannot be written ({error.strerror}); name another file.") from None
