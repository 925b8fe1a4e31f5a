"""Station 3: a checkpoint becomes an engine.

capture (the model's step as a graph) → rewrite (the ordered passes, verified after each stage) → tune (the fastest
kernel for each op here) → plan memory → write the engine folder, streaming the weights through.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slipstream import __version__
from slipstream.build.capture import capture
from slipstream.build.cuts import Cut, Reader, cut_reader
from slipstream.build.extensions import load_passes
from slipstream.build.kv_cache import chosen_cache, kv_scales, scales_of
from slipstream.build.pipeline import Pass, PassReport, run_pipeline
from slipstream.build.shard import Shard
from slipstream.build.stages import Stage, stages_of
from slipstream.build.tune import tune
from slipstream.checkpoint.folder import Checkpoint, new_folder
from slipstream.engine.choices import Choices
from slipstream.engine.folder import CACHE_FILE, TOKENIZER_FOLDER, rank_file, write_rank_file
from slipstream.engine.graph import Graph, Node, TensorType
from slipstream.engine.manifest import FORMAT, Manifest
from slipstream.engine.memory import plan_memory
from slipstream.errors import BuildError
from slipstream.kernels.registry import known_ops
from slipstream.progress import Progress, Stopwatch
from slipstream.quantize.on_load import quantized_on_load
from slipstream.schema.build import MAX_BATCH_SIZE, MAX_RANKS, MAX_TOKENS_PER_BLOCK, PLUGINS, BuildConfig
from slipstream.schema.mapping import Mapping
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
class RankPlan:
    """What one rank will run, and how its weights are read; mostly the only one."""

    graph: Graph
    read: Reader
    passes: list[PassReport]
    memory: dict[str, int]


@dataclass(frozen=True)
class BuildPlan:
    """Rewritten graphs and what they will need; nothing is measured or written yet."""

    checkpoint: Checkpoint  # whose weights it reads: the one given, or that one rounded as it is read
    manifest: Manifest
    ranks: tuple[RankPlan, ...]
    captured: str  # the graph before the passes, as JSON
    ops_captured: dict[str, int]
    seconds: dict[str, float]

    @property
    def graph(self) -> Graph:
        """The first rank's."""
        return self.ranks[0].graph


def build(
    checkpoint: Checkpoint,
    output_dir: str | Path,
    config: BuildConfig = BuildConfig(),  # noqa: B008 - frozen
    *,
    device: str = "cpu",
    progress: Progress = lambda stage, done, total: None,
) -> BuildReport:
    """Build an engine folder. Raises BuildError; leaves no config.json unless the folder is whole."""
    plan = plan_build(checkpoint, config, progress, device=device)
    return write_engine(plan, output_dir, device=device, progress=progress)


def plan_build(
    checkpoint: Checkpoint,
    config: BuildConfig,
    progress: Progress = lambda stage, done, total: None,
    *,
    device: str = "cpu",
) -> BuildPlan:
    """The first half of a build: capture, rewrite, plan the memory. Reads no weight but to find equal ones."""
    watch = Stopwatch()
    limits, extra = resolve_limits(config, checkpoint), load_passes(config.extra_passes)
    for name in config.disabled_plugins:
        if name not in PLUGINS:
            raise BuildError(f"no plugin to disable is called {name!r}; the plugins are {', '.join(PLUGINS)}.")
    for name in ("tp_size", "pp_size"):
        if not 1 <= getattr(config, name) <= MAX_RANKS:
            raise BuildError(f"{name} is {getattr(config, name)}; it must be from 1 to {MAX_RANKS}.")
    if config.moe_ep_size not in (1, config.tp_size):
        raise BuildError(f"moe_ep_size is {config.moe_ep_size}; it must be 1, or {config.tp_size} as tp_size.")
    progress("capture", 0, 1)
    decoder = replace(checkpoint.config, max_seq_len=limits.max_seq_len)
    captured = capture(checkpoint.model.Model, decoder, checkpoint.dtype, limits.tokens_per_block)
    graph = captured.graph
    graph.is_for_cpu = torch.device(device).type == "cpu"
    if config.quantization is not None:
        checkpoint = quantized_on_load(checkpoint, graph, config.quantization)
    graph.formats, graph.equal = checkpoint.formats, checkpoint.equal_weights()
    cache = chosen_cache(checkpoint, graph, config)
    graph.kv_dtypes = {f"kv.{layer}": cache.dtype for layer in cache.layers(decoder.num_layers)}
    captured_json, ops_captured = graph.to_json(), graph.count_ops()
    watch.lap("capture")
    constants = captured.constants | kv_scales(cache, decoder)
    read = _reader_of(checkpoint, constants)
    mapping, stages = Mapping(config.tp_size, config.pp_size), stages_of(graph, config.pp_size)
    ranks = tuple(
        _plan_rank(mapping.place(rank), stages[mapping.stage(rank)], graph, checkpoint, read, config, limits, extra)
        for rank in range(mapping.num_ranks)
    )
    watch.lap("rewrite")
    manifest = _manifest(checkpoint, decoder, limits, ranks, config)
    return BuildPlan(checkpoint, manifest, ranks, captured_json, ops_captured, watch.seconds)


def _plan_rank(
    place: int,
    stage: Stage,
    captured: Graph,
    checkpoint: Checkpoint,
    read: Reader,
    config: BuildConfig,
    limits: "Limits",
    extra: Sequence[Pass],
) -> RankPlan:
    graph = captured.copy()
    shard = Shard(place, config.tp_size, config.moe_ep_size)
    sharing: list[Pass] = [stage] if config.pp_size > 1 else []
    sharing += [shard] if config.tp_size > 1 else []
    promised = () if config.pp_size > 1 else checkpoint.model.PROMISED_PASSES  # of the model, not of each stage
    passes = run_pipeline(
        graph, promised=promised, disabled=config.disabled_passes, extra=extra, sharing=sharing
    )  # fmt: skip
    if config.tp_size > 1:
        scales = {scales_of(cache): Cut(1, *heads) for cache, heads in shard.kv_heads.items()}
        read = cut_reader(read, shard.cuts | scales, checkpoint.formats, checkpoint.shapes)
    memory = plan_memory(graph, max_num_tokens=limits.max_num_tokens, max_batch_size=limits.max_batch_size)
    return RankPlan(graph, _with_prologue(graph, read), passes, memory)


def write_engine(
    plan: BuildPlan,
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
    manifest = plan.manifest
    folder, written = Path(output_dir), 0
    total = sum(rank.memory["weights"] for rank in plan.ranks)

    def count(num_bytes: int) -> None:
        nonlocal written
        written += num_bytes
        progress("write", written, total)

    with new_folder(folder, FORMAT) as description:  # first of all: a folder that cannot be used is known at once
        known = dict(known_choices.kernels) if known_choices else {}
        for rank in plan.ranks:  # whose ops are mostly of the same sizes
            choices = tune(
                rank.graph, torch.device(device), max_num_tokens=manifest.max_num_tokens,
                max_batch_size=manifest.max_batch_size, disabled_plugins=manifest.disabled_plugins, known=known,
                measure=measure_kernels,
                progress=lambda done, total: progress("tune", done, total),
            )  # fmt: skip
            known |= choices.kernels
        watch.lap("tune")
        for number, rank in enumerate(plan.ranks):
            write_rank_file(folder / rank_file(number), rank.graph, plan.captured, rank.read, count)
        Choices(choices.device, known).save(folder / CACHE_FILE)
        plan.checkpoint.write_tokenizer(folder / TOKENIZER_FOLDER)
        description |= manifest.to_dict()
    watch.lap("write")
    seconds = plan.seconds | watch.seconds
    first = plan.ranks[0]
    return BuildReport(first.passes, plan.ops_captured, first.graph.count_ops(), manifest.memory, seconds)


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
    ranks: Sequence[RankPlan],
    config: BuildConfig,
) -> Manifest:
    graph, passes = ranks[0].graph, ranks[0].passes
    selected = graph.types[graph.outputs[0]].shape[0] == "R"
    inputs = {name: kind for rank in ranks for name, kind in rank.graph.inputs.items()}
    caches = [inputs[f"kv.{layer}"] for layer in range(decoder.num_layers)]
    kv_dtype = next((kind.dtype for kind in caches if kind.dtype != checkpoint.dtype), checkpoint.dtype)
    return Manifest(
        name=checkpoint.name,
        model_type=str(checkpoint.options["model_type"]),
        dtype=checkpoint.dtype,
        kv_dtype=kv_dtype,
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden_size,
        num_layers=decoder.num_layers,
        num_heads=decoder.num_heads,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        kv_planes=decoder.kv_planes,
        kv_skip_layers=[layer for layer, kind in enumerate(caches) if kind.dtype != kv_dtype],
        windows=list(decoder.windows or (0,) * decoder.num_layers),
        max_batch_size=limits.max_batch_size,
        max_num_tokens=limits.max_num_tokens,
        max_seq_len=limits.max_seq_len,
        tokens_per_block=limits.tokens_per_block,
        logits="selected" if selected else "all",
        graph_sha256=graph.digest(),
        tp_size=config.tp_size,
        pp_size=config.pp_size,
        moe_ep_size=config.moe_ep_size,
        layers=[0, decoder.num_layers],
        ranks=[] if len(ranks) == 1 else [_facts_of_rank(rank) for rank in ranks],
        slipstream_version=__version__,
        torch_version=torch.__version__,
        passes=[asdict(report) for report in passes],
        op_modules=_op_modules(rank.graph for rank in ranks),
        plugins={name: "disabled" if name in config.disabled_plugins else "measured" for name in PLUGINS},
        memory=ranks[0].memory,
        generation=checkpoint.generation,
    )


def _op_modules(graphs: Iterable[Graph]) -> list[str]:
    """The modules outside this package that declare ops of the graphs."""
    modules = {known_ops()[op].reference.__module__ for graph in graphs for op in graph.count_ops()}
    return sorted(module for module in modules if module.partition(".")[0] != "slipstream")


def _facts_of_rank(rank: RankPlan) -> dict[str, Any]:
    """As RANK_KEYS has them."""
    layers = sorted(int(name.removeprefix("kv.")) for name in rank.graph.inputs if name.startswith("kv."))
    return {
        "num_kv_heads": _cache_of(rank.graph).shape[3], "layers": [layers[0], layers[-1] + 1],
        "graph_sha256": rank.graph.digest(), "memory": rank.memory,
    }  # fmt: skip


def _cache_of(graph: Graph) -> TensorType:
    """What each layer's is."""
    return next(kind for name, kind in graph.inputs.items() if name.startswith("kv."))


def _reader_of(checkpoint: Checkpoint, constants: dict[str, Tensor]) -> Reader:
    """Weights as the model has them: constants, or the checkpoint's."""
    return lambda name: constants[name] if name in constants else checkpoint.read(name)


def _with_prologue(graph: Graph, read: Reader) -> Reader:
    """Weights by the engine's names: also what the prologue makes of them."""
    made_by: dict[str, Node] = {name: node for node in graph.prologue for name in node.outputs}

    def read_or_make(name: str) -> Tensor:
        node = made_by.get(name)
        if node is None:
            return read(name)
        op = known_ops()[node.op]
        inputs: list[Any] = [None if each is None else read_or_make(each) for each in node.inputs]
        if any(argument.kind == "Tensor[]" for argument in op.arguments):
            inputs = [inputs]
        return op.reference(*inputs, **node.attributes)

    return read_or_make


__all__ = ["BuildPlan", "BuildReport", "build", "plan_build", "write_engine"]
