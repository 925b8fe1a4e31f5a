"""Tables and sizes on stdout."""

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from slipstream.schema.units import human_bytes

if TYPE_CHECKING:
    from slipstream.engine.manifest import Manifest

WIDTH_OF_A_FILE = 140  # where stdout is no terminal: wide enough for every table of ours, so that nothing wraps


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table; a column whose values are all numbers is aligned to the right. No columns: the first is the label."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[_cell(value) for value in row] for row in rows]
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=bool(columns)
    )
    for index in range(len(columns) or max(map(len, cells), default=0)):
        name = columns[index] if columns else ""
        is_number = bool(cells) and all(row[index].replace(" ", "").lstrip("-").isdigit() for row in cells)
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(value) for value in row))
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    console.print(table)
    console.print()


def _cell(value: object) -> str:
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else str(value)


def print_memory_plan(manifest: "Manifest", more: Iterable[Sequence[object]] = ()) -> None:
    """What an engine will take, before any of it is allocated."""
    per_sequence = manifest.max_kv_blocks(manifest.max_seq_len) * manifest.kv_block_bytes(manifest.kv_groups)
    rows: list[Sequence[object]] = [
        ("weights", human_bytes(manifest.memory.get("weights", 0))),
        ("activations of the largest step", human_bytes(manifest.memory.get("activations", 0))),
        ("steps that a GPU records", human_bytes(manifest.memory.get("recorded", 0))),
        ("KV cache, one token", human_bytes(manifest.kv_bytes_per_token)),
        (f"KV cache, one sequence of {manifest.max_seq_len} tokens", human_bytes(per_sequence)),
        (f"KV cache, {manifest.max_batch_size} such sequences", human_bytes(per_sequence * manifest.max_batch_size)),
        *more,
    ]
    print_table("Memory plan", (), rows)


def print_ranks(manifest: "Manifest") -> None:
    """Where there are several: what each of them has."""
    rows = [
        (
            rank, manifest.mapping.stage(rank), "{}–{}".format(facts["layers"][0], facts["layers"][1] - 1),
            facts["num_kv_heads"], *(human_bytes(facts["memory"].get(what, 0)) for what in ("weights", "activations")),
        )
        for rank, facts in enumerate(manifest.ranks)
    ]  # fmt: skip
    if rows:
        print_table("Ranks", ("rank", "stage", "layers", "KV heads", "weights", "activations"), rows)


def print_passes(passes: Iterable[Sequence[object]]) -> None:
    """Rows of (name, matches, ops before, ops after, benefit)."""
    rows = [
        (name, matches, _removed(before, after), after, benefit) for name, matches, before, after, benefit in passes
    ]
    print_table("Passes", ("pass", "matches", "ops removed", "ops left", "benefit"), rows)


def _removed(before: object, after: object) -> object:
    return before - after if isinstance(before, int) and isinstance(after, int) else ""
