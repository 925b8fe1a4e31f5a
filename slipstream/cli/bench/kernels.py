"""slipstream bench kernels: every op of an engine by itself, beside the time that its bytes alone take."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli import _options as options
from slipstream.cli._tables import print_table
from slipstream.errors import UsageError
from slipstream.progress import progress_bar

if TYPE_CHECKING:
    from slipstream.bench.kernels import Line, Report, Total
    from slipstream.bench.machine import Machine
    from slipstream.engine.folder import Engine
    from slipstream.engine.manifest import Manifest

ROWS, CONTEXTS = (1, 8, 64, 2048), (256, 2048)


def kernels(
    model: Annotated[
        str, typer.Argument(metavar="ENGINE|MODEL", help="Engine folder; or a model, whose engine is built first.")
    ],
    rows: Annotated[
        str | None,
        typer.Option(
            help="Tokens in a step, several with commas: up to the engine's max_batch_size the next ones of as many "
            "sequences, more are prompts.  [default: of 1,8,64,2048 those that fit]"
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(help="Tokens of each sequence, for attention.  [default: of 256,2048 those that fit]"),
    ] = None,
    ops: Annotated[str, typer.Option(help="Only ops of these names; * stands for anything.")] = "*",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything to this file, too, in seconds, bytes and FLOPs.")
    ] = None,
    device: options.Device = "auto",
    plugin: options.Plugin = None,
) -> None:
    """Time every op of an engine by itself: the kernel that it runs, the others there are, and how near to its floor.

    The floor of an op is what this machine takes to move its bytes between memory and processor, or to compute its
    products, both measured first. Ops on a few numbers can be faster: those are in a cache.

    Example:
        slipstream bench kernels engines/smollm2 --rows 1,64 --context 256
        slipstream bench kernels smollm2 --ops 'linear*,attention' --json kernels.json
    """
    from slipstream.bench.kernels import bench_kernels
    from slipstream.build.cache import cached_engine, device_for, tuned_choices
    from slipstream.build.extensions import import_plugin
    from slipstream.checkpoint import resolve
    from slipstream.engine.folder import open_engine
    from slipstream.schema.build import BuildConfig

    where = device_for(device)
    for module in plugin or ():
        import_plugin(module)
    source = resolve(model)
    with progress_bar() as progress:
        path = source.path if source.kind == "engine" else cached_engine(source, BuildConfig(), where, progress)
    engine = open_engine(path)
    try:
        manifest = engine.manifest
        num_rows = _numbers("--rows", rows, ROWS, manifest.max_num_tokens, "max_num_tokens")
        contexts = _numbers("--context", context, CONTEXTS, manifest.max_seq_len, "max_seq_len")
        with progress_bar() as progress:
            report = bench_kernels(
                engine.graph, manifest, tuned_choices(engine, where), where,
                rows=num_rows, contexts=contexts, patterns=ops.split(","),
                progress=lambda done, total: progress("bench", done, total),
            )  # fmt: skip
    finally:
        engine.close()
    if json_file is not None:
        _write(json_file, engine, report)
    print_report(report, manifest)


def _numbers(flag: str, text: str | None, usual: Sequence[int], most: int, limit: str) -> list[int]:
    """ "1,8": each at most `most`. Without a text the usual ones that are; the limit itself where none is."""
    if text is None:
        return [number for number in usual if number <= most] or [most]
    parts = text.split(",")
    if not all(re.fullmatch(r" *[0-9]{1,9} *", part) and 0 < int(part) <= most for part in parts):
        raise UsageError(f"{flag} is {text!r}; it must be numbers from 1 to {most}, {limit}, such as 1,{min(8, most)}.")
    return list(dict.fromkeys(int(part) for part in parts))


def print_report(report: "Report", manifest: "Manifest") -> None:
    _print_machine(report.machine)
    for rows in dict.fromkeys(line.rows for line in report.lines):
        _print_lines(_title(rows, manifest), [_cells(line, report) for line in report.lines if line.rows == rows])
    _print_totals(report.totals)


def _title(rows: int, manifest: "Manifest") -> str:
    if rows > manifest.max_batch_size:
        return f"{rows} rows: prompts"
    return f"{rows} rows: the next token of as many sequences" if rows > 1 else "1 row: the next token of one sequence"


def _print_machine(machine: "Machine") -> None:
    products = ((f"{dtype} products", f"{rate / 1e12:.3g} TFLOP/s") for dtype, rate in machine.products.items())
    reads = ("reads", f"{machine.read / 1e9:.4g} GB/s"), ("copies", f"{machine.copy / 1e9:.4g} GB/s, both ways counted")
    print_table(machine.name, (), [*reads, *products])


def _print_lines(title: str, rows: Sequence[Sequence[object]]) -> None:
    columns = ("op", "of", "context", "times", "kernel", "µs", "of the floor", "MB", "MFLOP", "others, µs")
    print_table(title, columns, rows)


def _cells(line: "Line", report: "Report") -> tuple[object, ...]:
    others = (f"{name} {_us(seconds)}" for name, seconds in line.seconds.items() if name != line.kernel)
    time, fraction = _us(line.seconds[line.kernel]), f"{report.fraction(line):.0%}"
    work = f"{line.work.num_bytes / 1e6:.2f}", f"{line.work.flops / 1e6:.1f}"
    return line.op, line.shapes, line.context or "", line.times, line.kernel, time, fraction, *work, ", ".join(others)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def _print_totals(totals: Iterable["Total"]) -> None:
    rows = (
        (each.rows, each.context, f"{each.seconds * 1e3:.3f}", f"{each.floor * 1e3:.3f}", f"{each.fraction:.0%}")
        for each in totals
    )
    print_table("All ops of a step", ("rows", "context", "ms", "floor, ms", "of the floor"), rows)


def _write(path: Path, engine: "Engine", report: "Report") -> None:
    lines = [
        {
            "op": line.op, "shapes": line.shapes, "rows": line.rows, "context": line.context, "times": line.times,
            "kernel": line.kernel, "seconds": line.seconds, "bytes": line.work.num_bytes, "flops": line.work.flops,
            "floor_seconds": report.floor(line), "fraction_of_floor": report.fraction(line),
        }
        for line in report.lines
    ]  # fmt: skip
    totals = [
        {"rows": each.rows, "context": each.context, "seconds": each.seconds, "floor_seconds": each.floor}
        for each in report.totals
    ]
    digest = engine.manifest.graph_sha256
    facts = {"engine": str(engine.path), "graph_sha256": digest, "machine": asdict(report.machine)}
    try:
        path.write_text(json.dumps(facts | {"ops": lines, "steps": totals}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--json {path} cannot be written ({error.strerror}); name another file.") from None
