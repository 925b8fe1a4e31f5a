"""slipstream build: a model becomes an engine folder."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli import _options as options
from slipstream.cli._tables import human_bytes, print_memory_plan, print_passes, print_table
from slipstream.errors import UsageError
from slipstream.progress import progress_bar
from slipstream.schema.build import BuildConfig

if TYPE_CHECKING:
    from slipstream.build import BuildPlan, BuildReport
    from slipstream.checkpoint import Source


def build(
    checkpoint_dir: Annotated[Path | None, typer.Option(help="Checkpoint folder, from slipstream convert.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Hugging Face folder, .gguf file, Hub id or smollm2, instead of --checkpoint_dir."),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Engine folder to write; new, empty, or an older engine.")
    ] = None,
    dtype: options.Dtype = "auto",
    max_batch_size: Annotated[
        int, typer.Option(min=1, help="Most sequences in one step.")
    ] = BuildConfig.max_batch_size,
    max_num_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens in one step, over all sequences.")
    ] = BuildConfig.max_num_tokens,
    max_seq_len: options.MaxSeqLen = BuildConfig.max_seq_len,
    tokens_per_block: Annotated[
        int, typer.Option(min=1, help="Tokens in one KV block.")
    ] = BuildConfig.tokens_per_block,
    disable_pass: Annotated[list[str] | None, typer.Option(help="A rewrite to leave out; may be given again.")] = None,
    extra_pass: Annotated[
        list[str] | None,
        typer.Option(
            "--pass", help="A rewrite of your own, module:name, or the name of an installed one; may be given again."
        ),
    ] = None,
    device: options.Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry_run", help="Print the memory plan and write nothing.")] = False,
) -> None:
    """Build an engine: capture the model, rewrite its graph, choose kernels for this device, write the folder.

    Example:
        slipstream build --model smollm2 --output_dir engines/smollm2 --max_batch_size 16
        slipstream build --checkpoint_dir checkpoints/smollm2 --dry_run
    """
    if output_dir is None and not dry_run:
        raise UsageError("There is no --output_dir for the engine; give one, or --dry_run to see the memory plan only.")
    from slipstream.build import plan_build, write_engine
    from slipstream.build.cache import device_for, dtype_for
    from slipstream.checkpoint import open_checkpoint

    where = device_for(device)
    config = BuildConfig(
        dtype=dtype,
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len,
        tokens_per_block=tokens_per_block,
        disabled_passes=tuple(disable_pass or ()),
        extra_passes=tuple(extra_pass or ()),
    )
    checkpoint = open_checkpoint(_source(checkpoint_dir, model), dtype_for(dtype, where))
    try:
        with progress_bar() as progress:
            plan = plan_build(checkpoint, config, progress)
        _print_plan(plan)
        if output_dir is None or dry_run:
            return
        with progress_bar() as progress:
            report = write_engine(plan, checkpoint, output_dir, device=str(where), progress=progress)
    finally:
        checkpoint.close()
    _print_report(report)
    print(f"{output_dir}: {human_bytes(_size(output_dir))}, built in {sum(report.seconds.values()):.1f} s")


def _source(checkpoint_dir: Path | None, model: str | None) -> "Source":
    from slipstream.checkpoint import resolve

    if checkpoint_dir is None:
        if model is None:
            raise UsageError(
                "There is no model; give --model (a folder, .gguf file, Hub id or smollm2) or --checkpoint_dir."
            )
        return resolve(model)
    if model is not None:
        raise UsageError("--model and --checkpoint_dir were both given; leave one of them out.")
    if not checkpoint_dir.is_dir():
        raise UsageError(f"--checkpoint_dir {checkpoint_dir} is not a folder; slipstream convert makes one.")
    source = resolve(checkpoint_dir)
    if source.kind != "checkpoint":
        raise UsageError(
            f"--checkpoint_dir {checkpoint_dir} is no checkpoint; give it as --model, or convert it first."
        )
    return source


def _print_plan(plan: "BuildPlan") -> None:
    manifest = plan.manifest
    print(
        f"{manifest.name}: {manifest.model_type} in {manifest.dtype}, at most {manifest.max_batch_size} "
        f"sequences and {manifest.max_num_tokens} tokens a step, {manifest.max_seq_len} tokens a sequence\n"
    )
    print_memory_plan(manifest)


def _print_report(report: "BuildReport") -> None:
    print_passes((each.name, each.matches, each.ops_before, each.ops_after, each.benefit) for each in report.passes)
    print_table("Ops", ("op", "captured", "in the engine"), _op_counts(report.ops_captured, report.ops_final))
    print_table("Seconds", (), ((stage, f"{seconds:.2f}") for stage, seconds in report.seconds.items()))


def _op_counts(before: dict[str, int], after: dict[str, int]) -> Iterable[tuple[str, int, int]]:
    for op in sorted(before | after):
        yield op, before.get(op, 0), after.get(op, 0)
    yield "all", sum(before.values()), sum(after.values())


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
