"""A measurement as a page by itself (its plots inside, nothing asked of anybody), and as an entry of benchmarks/."""

import datetime
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import slipstream
from slipstream.bench.plots import COLOURS, Plot, svg_of

_SECRETS = ("--api_key", "--api-key")
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1c1e; --soft: #5a5a60; --line: #d8d8dc;
  --c0: #0b62d6; --c1: #b4530a; --c2: #1a7f37; --c3: #9a2fb5; --c4: #b3261e; --c5: #0f766e; }
@media (prefers-color-scheme: dark) { :root { --back: #151517; --text: #ececf0; --soft: #a5a5ae; --line: #3a3a40;
  --c0: #6ea8ff; --c1: #f0a35e; --c2: #6fd08c; --c3: #d79bf0; --c4: #ff8a80; --c5: #5eead4; } }
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 16px;
  max-width: 1180px; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin: 1.5em 0 .4em }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0 }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere; min-width: 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; white-space: nowrap }
th, td { padding: 4px 10px 4px 0; text-align: right; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left } th { color: var(--soft); font-weight: 500 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 8px 24px }
figure { margin: 0 } figcaption { font-weight: 600; margin: 8px 0 4px }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--soft); font-size: 12px }
@media (max-width: 480px) { svg text { font-size: 16px } }
.grid { stroke: var(--line) } path { fill: none; stroke-width: 2 }
ul { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 4px 0; padding: 0 }
li::before { content: ""; display: inline-block; width: 10px; height: 10px;
  border-radius: 50%; background: var(--own); margin-right: 6px }
""" + "".join(
    f"path.c{n} {{ stroke: var(--c{n}) }} circle.c{n} {{ fill: var(--c{n}) }} li.c{n} {{ --own: var(--c{n}) }}\n"
    for n in range(COLOURS)
)


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Report:
    title: str
    facts: Mapping[str, str]
    tables: Sequence[Table]
    plots: Sequence[Plot]


def facts_here(arguments: Sequence[str]) -> dict[str, str]:
    """When, where and how: what makes a number worth something later. arguments: of the command line."""
    cores, loads = f"{os.cpu_count()} cores", ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{_processor()}, {cores}; {platform.platform()}, Python {platform.python_version()}",
        "load": f"{loads} (average of 1, 5 and 15 minutes, at the end)",
        "version": f"slipstream {slipstream.__version__}, commit {_commit()}",
        "command": " ".join(["slipstream", *_without_secrets(arguments)]),
    }


def to_html(report: Report) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in report.facts.items())
    body = [f"<h1>{escape(report.title)}</h1>", f"<dl>{facts}</dl>", *map(_html_table, report.tables)]
    figures = "".join(_figure(plot) for plot in report.plots)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(report.title)}</title>\n<style>{_STYLE}</style></head>\n"
        f'<body><main>{"".join(body)}<div class="plots">{figures}</div></main></body></html>\n'
    )


def to_markdown(report: Report) -> str:
    lines = [f"# {report.title}", "", *(f"- {name}: {_code(name, value)}" for name, value in report.facts.items())]
    for table in report.tables:
        lines += ["", f"## {table.title}", "", _row(table.columns), _row(["---"] * len(table.columns))]
        lines += [_row(row) for row in table.rows]
    return "\n".join(lines) + "\n"


def record_path(name: str, folder: Path = Path("benchmarks")) -> Path:
    """benchmarks/2026-11-22-NAME.md, below the folder we are in."""
    return folder / f"{datetime.datetime.now(datetime.UTC).date()}-{name}.md"


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{escape(str(value))}</td>" for value in row) + "</tr>" for row in table.rows)
    return (
        f"<h2>{escape(table.title)}</h2>"
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(table.title)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _figure(plot: Plot) -> str:
    names = "".join(
        f'<li class="c{index % COLOURS}">{escape(each.name)}</li>' for index, each in enumerate(plot.series)
    )
    return f"<figure><figcaption>{escape(plot.title)}</figcaption>{svg_of(plot)}<ul>{names}</ul></figure>"


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _code(name: str, value: str) -> str:
    return f"`{value}`" if name == "command" else value


def _without_secrets(arguments: Sequence[str]) -> Iterator[str]:
    import shlex

    hide = False
    for argument in arguments:
        name, has_value, _ = argument.partition("=")
        is_secret = name in _SECRETS
        yield "***" if hide else f"{name}=***" if is_secret and has_value else shlex.quote(argument)
        hide = is_secret and not has_value


def _commit() -> str:
    """Of the checkout that this package is run from; an installed one has none."""
    folder = Path(slipstream.__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"], cwd=folder, capture_output=True,
            text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _processor() -> str:
    from slipstream.build.cache import device_for
    from slipstream.build.tune import describe_device

    return describe_device(device_for("auto"))
