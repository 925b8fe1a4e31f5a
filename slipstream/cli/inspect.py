"""slipstream inspect: what is inside an engine."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli import _options as options
from slipstream.cli._drawing import save_drawing
from slipstream.cli._engine import engine_folder
from slipstream.cli._tables import print_memory_plan, print_passes, print_ranks, print_table
from slipstream.errors import CapacityError, UsageError
from slipstream.schema.units import human_bytes

if TYPE_CHECKING:
    import torch

    from slipstream.engine.folder import Engine


def inspect(
    engine_dir: Annotated[Path, typer.Argument(metavar="ENGINE", help="Engine folder.")],
    graph: Annotated[bool, typer.Option("--graph", help="Only the graph, as text: one op a line.")] = False,
    before: Annotated[bool, typer.Option("--before", help="The graph as captured, before the passes.")] = False,
    after: Annotated[bool, typer.Option("--after", help="The graph as the engine runs it (the default).")] = False,
    svg: Annotated[Path | None, typer.Option(help="Only draw the graph, to this file; equal layers once.")] = None,
    memory: Annotated[bool, typer.Option("--memory", help="Only the memory plan.")] = False,
    device: options.Device = "auto",
    plugin: options.Plugin = None,
) -> None:
    """Show what an engine is for, how it was made, which kernels it runs here, and what memory it takes.

    Example:
        slipstream inspect engines/smollm2
        slipstream inspect engines/smollm2 --graph | grep linear
        slipstream inspect engines/smollm2 --svg before.svg --before
    """
    if before and after:
        raise UsageError("--before and --after were both given; leave one of them out.")
    if (before or after) and not (graph or svg):
        raise UsageError("--before and --after say which graph; give --graph to print it or --svg FILE to draw it.")
    folder = engine_folder(engine_dir)
    from slipstream.build.cache import device_for
    from slipstream.build.extensions import import_plugin
    from slipstream.engine.folder import open_engine

    for module in plugin or ():
        import_plugin(module)
    engine = open_engine(folder)
    try:
        chosen = engine.captured() if before else engine.graph
        if graph:
            print(chosen.text())
        if svg is not None:
            stage = "as captured" if before else "as the engine runs it"
            save_drawing(svg, chosen, f"{engine.manifest.name}, {stage}")
        where = device_for(device)
        if not (graph or svg or memory):
            _print_facts(engine)
            print_ranks(engine.manifest)
            _print_passes(engine)
            _print_kernels(engine, where)
        if memory or not (graph or svg):
            _print_memory(engine, where)
    finally:
        engine.close()


def _print_facts(engine: "Engine") -> None:
    manifest = engine.manifest
    print_table(
        str(engine.path),
        (),
        [
            ("model", f"{manifest.name} ({manifest.model_type}, {manifest.dtype})"),
            ("layers", f"{manifest.num_layers} of width {manifest.hidden_size}"),
            ("heads", f"{manifest.num_heads}, {manifest.num_kv_heads} for keys and values, {manifest.head_dim} wide"),
            ("attention", _describe_windows(manifest.windows)),
            ("vocabulary", f"{manifest.vocab_size} tokens"),
            ("one step", f"at most {manifest.max_batch_size} sequences and {manifest.max_num_tokens} tokens"),
            ("one sequence", f"at most {manifest.max_seq_len} tokens"),
            ("KV block", f"{manifest.tokens_per_block} tokens in {manifest.kv_cache_dtype}"),
            ("made by", f"slipstream {manifest.slipstream_version}, torch {manifest.torch_version}"),
            ("graph", f"{len(engine.graph.nodes)} ops, sha256 {manifest.graph_sha256[:16]}…"),
        ],
    )


def _describe_windows(windows: Sequence[int]) -> str:
    """ "all layers see everything", "12 layers see everything, 12 layers see the newest 128 tokens"."""
    counts = Counter(windows)
    if set(counts) == {0}:
        return "all layers see everything"
    parts = [f"{counts[w]} layers see {f'the newest {w} tokens' if w else 'everything'}" for w in sorted(counts)]
    return ", ".join(parts)


def _print_passes(engine: "Engine") -> None:
    keys = ("name", "matches", "ops_before", "ops_after", "benefit")
    print_passes([each.get(key, "") for key in keys] for each in engine.manifest.passes if isinstance(each, dict))
    print_table("Ops", ("op", "count"), engine.graph.count_ops().items())


def _print_kernels(engine: "Engine", device: "torch.device") -> None:
    """The winners by number of rows; ops with one candidate have no line."""
    from slipstream.build.tune import describe_device
    from slipstream.engine.choices import ROW_BUCKETS, load_choices
    from slipstream.engine.folder import CACHE_FILE

    here = describe_device(device)
    choices = load_choices(engine.path / CACHE_FILE, here)
    if choices is None:
        print(f"Kernels: not measured on {here}; the first start there does it.\n")
        return
    rows = []
    for op, names in choices.kernels.items():
        spans = []
        for name, group in groupby(zip(names, ROW_BUCKETS, strict=True), key=lambda pair: pair[0]):
            sizes = [size for _, size in group]
            last = "more" if sizes[-1] == ROW_BUCKETS[-1] else str(sizes[-1])
            spans.append(f"{name} ({sizes[0]})" if str(sizes[0]) == last else f"{name} ({sizes[0]}–{last})")
        rows.append((op, ", ".join(spans)))
    print_table(f"Kernels on {here}", ("op", "kernel (rows)"), rows)


def _print_memory(engine: "Engine", device: "torch.device") -> None:
    from slipstream.runtime.worker.memory import count_blocks, free_memory, left_by_plan

    manifest = engine.manifest
    try:
        left = left_by_plan(manifest, device)
        num_blocks = count_blocks(manifest, manifest.kv_groups, device, left, fraction=0.9) - 1
    except CapacityError:
        num_blocks = 0
    num_tokens = num_blocks // len(manifest.kv_groups) * manifest.tokens_per_block
    size = human_bytes(num_blocks * manifest.kv_block_bytes(manifest.kv_groups))
    now = [
        (f"free on {device} now", human_bytes(free_memory(device))),
        ("KV cache of a start now", f"{num_tokens} tokens, {size}"),
    ]
    print_memory_plan(manifest, more=now)
