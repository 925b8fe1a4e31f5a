"""slipstream build: a model becomes an engine folder."""

import resource
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slipstream.cli import _options as options
from slipstream.cli._drawing import save_drawing
from slipstream.cli._plan import print_fit, print_plan, this_machine
from slipstream.cli._tables import print_passes, print_table
from slipstream.errors import SlipstreamError, UsageError
from slipstream.progress import progress_bar
from slipstream.schema.build import PLUGINS, BuildConfig
from slipstream.schema.units import human_bytes

if TYPE_CHECKING:
    import torch

    from slipstream.build import BuildReport
    from slipstream.checkpoint import Source
    from slipstream.engine.choices import Choices


def build(
    checkpoint_dir: Annotated[Path | None, typer.Option(help="Checkpoint folder, from slipstream convert.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "--model_dir",
            help="Hugging Face folder, .gguf file, Hub id or smollm2: converted on the way.",
        ),
    ] = None,
    output_dir: Annotated[
        str | None, typer.Option(help="Engine folder to write; new, empty, or an older engine.")
    ] = None,
    model_cls_file: options.ModelClsFile = None,
    model_cls_name: options.ModelClsName = "Model",
    dtype: options.Dtype = "auto",
    kv_cache_dtype: options.KvCacheDtype = BuildConfig.kv_cache_dtype,
    quantization: options.Quantization = BuildConfig.quantization,
    max_batch_size: Annotated[
        int, typer.Option(min=1, help="Most sequences in one step.")
    ] = BuildConfig.max_batch_size,
    max_num_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens in one step, over all sequences.")
    ] = BuildConfig.max_num_tokens,
    max_seq_len: options.MaxSeqLen = BuildConfig.max_seq_len,
    max_input_len: Annotated[
        int | None, typer.Option(min=1, help="With --max_output_len: --max_seq_len is their sum.")
    ] = None,
    max_output_len: Annotated[int | None, typer.Option(min=1, help="With --max_input_len, see there.")] = None,
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
    disable_plugin: Annotated[
        list[str] | None,
        typer.Option(help=f"Compute by the plain reference: {', '.join(PLUGINS)}. May be given again."),
    ] = None,
    input_timing_cache: Annotated[
        Path | None, typer.Option(help="A model.cache of this machine; what it holds is not measured again.")
    ] = None,
    output_timing_cache: Annotated[Path | None, typer.Option(help="Copy the engine's model.cache there.")] = None,
    fast_build: Annotated[bool, typer.Option("--fast_build", help="Do not measure the kernels.")] = False,
    monitor_memory: Annotated[
        bool, typer.Option("--monitor_memory", help="Say how much memory the build took at most.")
    ] = False,
    visualize_network: Annotated[
        bool, typer.Option("--visualize_network", help="Draw the graph, too: graph.svg in the engine folder.")
    ] = False,
    device: options.Device = "auto",
    tp_size: Annotated[
        int, typer.Option(min=1, help="Processes that share each layer, on as many GPUs; a file is written for each.")
    ] = BuildConfig.tp_size,
    pp_size: Annotated[
        int, typer.Option(min=1, help="Stages of layers that follow each other, each of --tp_size processes.")
    ] = BuildConfig.pp_size,
    moe_ep_size: Annotated[
        int, typer.Option(min=1, help="As --tp_size to give each process some experts whole, or 1 for a part of each.")
    ] = BuildConfig.moe_ep_size,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="How many processes these make, to be sure: --tp_size × --pp_size.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", help="Print the memory plan and what fits; read no weight, write nothing.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option(help="With --dry_run: a GPU to plan for, such as H100-80GB, instead of this machine.")
    ] = None,
) -> None:
    """Build an engine: capture the model, rewrite its graph, choose kernels for this device, write the folder.

    Example:
        slipstream build --model smollm2 --output_dir engines/smollm2 --max_batch_size 16
        slipstream build --model meta-llama/Meta-Llama-3-8B --dry_run --gpu H100-80GB
    """
    if not (output_dir or dry_run):
        raise UsageError("There is no --output_dir for the engine; give one, or --dry_run to see the memory plan only.")
    if gpu is not None and not dry_run:
        raise UsageError(f"--gpu {gpu} is a GPU to plan for, which only --dry_run does; add that, or leave --gpu out.")
    if world_size not in (None, tp_size * pp_size):
        raise UsageError(
            f"--world_size is {world_size}, but --tp_size {tp_size} and --pp_size {pp_size} make {tp_size * pp_size} "
            "processes; leave it out or change one of them."
        )
    import torch

    from slipstream.build import plan_build, write_engine
    from slipstream.build.cache import device_for, dtype_for
    from slipstream.build.fit import gpu as named_gpu
    from slipstream.checkpoint import open_checkpoint
    from slipstream.checkpoint.folder import check_new_folder
    from slipstream.engine.manifest import FORMAT

    if output_dir:
        check_new_folder(Path(output_dir), FORMAT)  # before anything is said or done
    where = device_for(device) if gpu is None else torch.device("cuda")
    target = this_machine(where) if gpu is None else named_gpu(gpu)
    config = BuildConfig(
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        quantization=quantization,
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=_max_seq_len(max_seq_len, max_input_len, max_output_len),
        tokens_per_block=tokens_per_block,
        disabled_passes=tuple(disable_pass or ()),
        extra_passes=tuple(extra_pass or ()),
        disabled_plugins=tuple(disable_plugin or ()),
        tp_size=tp_size,
        pp_size=pp_size,
        moe_ep_size=moe_ep_size,
    )
    known = None if input_timing_cache is None else _known_choices(input_timing_cache, where)
    checkpoint = open_checkpoint(
        _source(checkpoint_dir, model, model_cls_file, model_cls_name), dtype_for(dtype, where)
    )
    try:
        with progress_bar() as progress:
            plan = plan_build(checkpoint, config, progress, device=str(where))
        print_plan(plan)
        if not output_dir or dry_run:
            print_fit(plan, target)
            return
        with progress_bar() as progress:
            report = write_engine(
                plan, output_dir, device=str(where), known_choices=known, measure_kernels=not fast_build,
                progress=progress,
            )  # fmt: skip
    finally:
        checkpoint.close()
    if output_timing_cache is not None:
        _copy_choices(Path(output_dir), output_timing_cache)
    if visualize_network:
        save_drawing(Path(output_dir) / "graph.svg", plan.graph, f"{plan.manifest.name}, as the engine runs it")
    _print_report(report)
    print(f"{output_dir}: {human_bytes(_size(Path(output_dir)))}, built in {sum(report.seconds.values()):.1f} s")
    if where.type == "cuda" and not fast_build:
        _compile_kernels(Path(output_dir), str(where))
    if monitor_memory:
        print(f"at most {human_bytes(_peak_memory())} of memory")


def _compile_kernels(engine: Path, device: str) -> None:
    """Start the engine once: what Triton compiles is kept (build/kept.py), so that no later start here waits for it."""
    from slipstream.api.llm import LLM

    start = time.perf_counter()
    print("compiling kernels and recording steps, up to a minute …", flush=True)
    try:
        with LLM(engine, device=device):
            print(f"kernels compiled, steps recorded in {time.perf_counter() - start:.1f} s")
    except SlipstreamError as error:  # the engine is whole: it may want a smaller KV cache, or a plugin's ops
        print(f"note: kernels are compiled at the first start, since here it fails: {error}", file=sys.stderr)


def _source(checkpoint_dir: Path | None, model: str | None, cls_file: Path | None, cls_name: str) -> "Source":
    from slipstream.checkpoint import OwnModel, resolve

    own = None if cls_file is None else OwnModel(cls_file, cls_name)
    if checkpoint_dir is None:
        if model is None:
            raise UsageError(
                "There is no model; give --model (a folder, .gguf file, Hub id or smollm2) or --checkpoint_dir."
            )
        return resolve(model, own)
    if model is not None:
        raise UsageError("--model and --checkpoint_dir were both given; leave one of them out.")
    if not checkpoint_dir.is_dir():
        raise UsageError(f"--checkpoint_dir {checkpoint_dir} is not a folder; slipstream convert makes one.")
    source = resolve(checkpoint_dir, own)
    if source.kind != "checkpoint":
        raise UsageError(
            f"--checkpoint_dir {checkpoint_dir} is no checkpoint; give it as --model, or convert it first."
        )
    return source


def _max_seq_len(given: int | None, max_input_len: int | None, max_output_len: int | None) -> int | None:
    """As before v0.10, where a build had a limit for either end; alone neither says how long a sequence is."""
    if max_input_len is None and max_output_len is None:
        return given
    if given is None and max_input_len is not None and max_output_len is not None:
        return max_input_len + max_output_len
    print(
        "note: no effect: --max_input_len, --max_output_len: a sequence has one limit, --max_seq_len, "
        "which is their sum if both are given and it is not.",
        file=sys.stderr,
    )
    return given


def _known_choices(path: Path, device: "torch.device") -> "Choices | None":
    from slipstream.build.tune import describe_device
    from slipstream.engine.choices import load_choices

    choices = load_choices(path, describe_device(device))
    if choices is None:
        print(
            f"note: --input_timing_cache {path} holds no choices made on {device} here; all are measured.",
            file=sys.stderr,
        )
    return choices


def _copy_choices(engine: Path, target: Path) -> None:
    from slipstream.engine.folder import CACHE_FILE

    try:
        shutil.copyfile(engine / CACHE_FILE, target)
    except OSError as error:
        raise UsageError(
            f"--output_timing_cache {target} cannot be written ({error.strerror}); the engine holds it as {CACHE_FILE}."
        ) from None


def _peak_memory() -> int:
    """Bytes this process had in memory at once; mapped files count where they are in memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
