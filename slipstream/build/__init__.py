"""Station 3: a checkpoint becomes an engine.

capture (the model's step as a graph) → rewrite (the ordered passes, verified after each stage) → tune (the fastest
kernel for each op here) → plan memory → write the engine folder, streaming the weights through.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipstream import __version__
from slipstream.build.capture import capture
from slipstream.build.extensions import load_passes
from slipstream.build.kv_cache import kv_scales
from slipstream.build.pipeline import PassReport, run_pipeline
from slipstream.build.tune import tune
from slipstream.checkpoint.folder import Checkpoint, new_folder
from slipstream.engine.choices import Choices
from slipstream.engine.folder import CACHE_FILE, RANK_FILE, TOKENIZER_FOLDER, write_rank_file
from slipstream.engine.graph import Graph, Node
from slipstream.engine.manifest import FORMAT, Manifest
from slipstream.engine.memory import plan_memory
from slipstream.errors import BuildError
from slipstream.kernels.registry import known_ops
from slipstream.progress import Progress, Stopwatch
from slipstream.schema.build import MAX_BATCH_SIZE, MAX_TOKENS_PER_BLOCK, PLUGINS, BuildConfig
from slipstream.schema.model import DecoderConfig


@dataclass(frozen=True)
class BuildReport:
    """What a build did: matches and benefits of the passes, ops before and after, bytes, seconds of each stage."""

    passes: list[PassReport]
    ops_captured: dict[str, int]
    ops_final: dict[str, int]
    memory: dict[str, int]
    seconds: dict[str, float]


@dataclass(frozen=True)
class BuildPlan:
    """A rewritten graph and what it will need; nothing is measured or written yet."""

    manifest: Manifest
    graph: Graph
    captured: str  # the graph before the passes, as JSON
    constants: dict[str, Tensor]
    passes: list[PassReport]
    ops_captured: dict[str, int]
    seconds: dict[str, float]


def build(
    checkpoint: Checkpoint,
    output_dir: str | Path,
    config: BuildConfig = BuildConfig(),  # noqa: B008 - frozen
    *,
    device: str = "cpu",
    progress: Progress = lambda stage, done, total: None,
) -> BuildReport:
    """Build an engine folder. Raises BuildError; leaves no config.json unless the folder is whole."""
    plan = plan_build(checkpoint, config, progress)
    return write_engine(plan, checkpoint, output_dir, device=device, progress=progress)


def plan_build(
    checkpoint: Checkpoint, config: BuildConfig, progress: Progress = lambda stage, done, total: None
) -> BuildPlan:
    """The first half of a build: capture, rewrite, plan the memory. Reads no weight but to find equal ones."""
    watch = Stopwatch()
    limits, extra = resolve_limits(config, checkpoint), load_passes(config.extra_passes)
    cache = checkpoint.kv_cache.chosen(config.kv_cache_dtype, checkpoint.dtype, checkpoint.name)
    for name in config.disabled_plugins:
        if name not in PLUGINS:
            raise BuildError(f"no plugin to disable is called {name!r}; the plugins are {', '.join(PLUGINS)}.")
    progress("capture", 0, 1)
    decoder = replace(checkpoint.config, max_seq_len=limits.max_seq_len)
    captured = capture(checkpoint.model.Model, decoder, checkpoint.dtype, limits.tokens_per_block)
    graph = captured.graph
    graph.formats, graph.equal = checkpoint.formats, checkpoint.equal_weights()
    graph.kv_dtype = cache.dtype
    captured_json, ops_captured = graph.to_json(), graph.count_ops()
    watch.lap("capture")
    passes = run_pipeline(
        graph, promised=checkpoint.model.PROMISED_PASSES, disabled=config.disabled_passes, extra=extra
    )
    memory = plan_memory(graph, max_num_tokens=limits.max_num_tokens, max_batch_size=limits.max_batch_size)
    watch.lap("rewrite")
    manifest = _manifest(checkpoint, decoder, limits, graph, passes, config.disabled_plugins, memory)
    constants = captured.constants | kv_scales(cache, decoder)
    return BuildPlan(manifest, graph, captured_json, constants, passes, ops_captured, watch.seconds)


def write_engine(
    plan: BuildPlan,
    checkpoint: Checkpoint,
    output_dir: str | Path,
    *,
    device: str = "cpu",
    known_choices: Choices | None = None,
    measure_kernels: bool = True,
    progress: Progress = lambda stage, done, total: None,
) -> BuildReport:
    """The second half: measure the kernels on this device and write the folder, streaming the weights through.

    known_choices: measured on this device before, for this model or one with ops like its own; not measured again.
    measure_kernels: False leaves each op with its newest candidate, for a build that cannot wait.
    """
    watch = Stopwatch()
    graph, manifest = plan.graph, plan.manifest
    folder, written = Path(output_dir), 0

    def count(num_bytes: int) -> None:
        nonlocal written
        written += num_bytes
        progress("write", written, manifest.memory["weights"])

    with new_folder(folder, FORMAT) as description:  # first of all: a folder that cannot be used is known at once
        choices = tune(
            graph, torch.device(device), max_num_tokens=manifest.max_num_tokens, max_batch_size=manifest.max_batch_size,
            disabled_plugins=manifest.disabled_plugins, known=known_choices.kernels if known_choices else {},
            measure=measure_kernels,
            progress=lambda done, total: progress("tune", done, total),
        )  # fmt: skip
        watch.lap("tune")
        reader = _weight_reader(graph, checkpoint, plan.constants)
        write_rank_file(folder / RANK_FILE, graph, plan.captured, reader, count)
        choices.save(folder / CACHE_FILE)
        checkpoint.write_tokenizer(folder / TOKENIZER_FOLDER)
        description |= manifest.to_dict()
    watch.lap("write")
    seconds = plan.seconds | watch.seconds
    return BuildReport(plan.passes, plan.ops_captured, graph.count_ops(), manifest.memory, seconds)


@dataclass(frozen=True)
class Limits:
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    tokens_per_block: int


def resolve_limits(config: BuildConfig, checkpoint: Checkpoint) -> Limits:
    longest = checkpoint.config.longest_seq_len
    max_seq_len = checkpoint.config.max_position_embeddings if config.max_seq_len is None else config.max_seq_len
    highest = {"max_batch_size": MAX_BATCH_SIZE, "max_num_tokens": 2**31, "tokens_per_block": MAX_TOKENS_PER_BLOCK}
    for name, high in highest.items():
        if not 1 <= getattr(config, name) <= high:
            raise BuildError(f"{name} is {getattr(config, name)}; it must be from 1 to {high}.")
    if not 1 <= max_seq_len <= longest:
        raise BuildError(f"max_seq_len is {max_seq_len}; {checkpoint.name} takes 1 to {longest}.")
    if config.max_num_tokens < config.max_batch_size:
        raise BuildError(
            f"max_num_tokens is {config.max_num_tokens}, less than one token for each of max_batch_size "
            f"{config.max_batch_size} sequences; raise it to {config.max_batch_size} or lower max_batch_size."
        )
    return Limits(config.max_batch_size, config.max_num_tokens, max_seq_len, config.tokens_per_block)


def _manifest(
    checkpoint: Checkpoint,
    decoder: DecoderConfig,
    limits: Limits,
    graph: Graph,
    passes: list[PassReport],
    disabled_plugins: tuple[str, ...],
    memory: dict[str, int],
) -> Manifest:
    selected = graph.types[graph.outputs[0]].shape[0] == "R"
    return Manifest(
        name=checkpoint.name,
        model_type=str(checkpoint.options["model_type"]),
        dtype=checkpoint.dtype,
        kv_dtype=graph.inputs["kv.0"].dtype,
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        num_layers=decoder.num_layers,
        num_heads=decoder.num_heads,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        kv_planes=decoder.kv_planes,
        windows=list(decoder.windows or (0,) * decoder.num_layers),
        max_batch_size=limits.max_batch_size,
        max_num_tokens=limits.max_num_tokens,
        max_seq_len=limits.max_seq_len,
        tokens_per_block=limits.tokens_per_block,
        logits="selected" if selected else "all",
        graph_sha256=graph.digest(),
        slipstream_version=__version__,
        torch_version=torch.__version__,
        passes=[asdict(report) for report in passes],
        op_modules=_op_modules(graph),
        plugins={name: "disabled" if name in disabled_plugins else "measured" for name in PLUGINS},
        memory=memory,
        generation=checkpoint.generation,
    )


def _op_modules(graph: Graph) -> list[str]:
    """The modules outside this package that declare ops of the graph."""
    modules = {known_ops()[op].reference.__module__ for op in graph.count_ops()}
    return sorted(module for module in modules if module.partition(".")[0] != "slipstream")


def _weight_reader(graph: Graph, checkpoint: Checkpoint, constants: dict[str, Tensor]) -> Callable[[str], Tensor]:
    """Weights by the engine's names: a constant, a prologue node's output, or the checkpoint's own."""
    made_by: dict[str, Node] = {name: node for node in graph.prologue for name in node.outputs}

    def read(name: str) -> Tensor:
        if name in constants:
            return constants[name]
        node = made_by.get(name)
        if node is None:
            return checkpoint.read(name)
        op = known_ops()[node.op]
        inputs: list[Any] = [None if each is None else read(each) for each in node.inputs]
        if any(argument.kind == "Tensor[]" for argument in op.arguments):
            inputs = [inputs]
        return op.reference(*inputs, **node.attributes)

    return read


__all__ = ["BuildPlan", "BuildReport", "build", "plan_build", "write_engine"]
