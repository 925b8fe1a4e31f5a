"""The engine folder: what the build leaves and the runtime reads.

config.json     Manifest: versions, shapes, limits, passes; written last, so a folder that has it is whole
rank0.engine    graph and weights in one safetensors file: the graph is JSON in its header, the weights are mapped;
                beside it the graph as captured, before the passes, which is for people and never run
model.cache     Choices: the kernels measured fastest on this device; made again on another
tokenizer/      tokenizer.json and its companions, so that the folder is all one needs
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slipstream.engine.bounded_json import read_json
from slipstream.engine.check import check_orders, check_program
from slipstream.engine.graph import Graph, TensorType, graph_from_json
from slipstream.engine.manifest import Manifest
from slipstream.engine.tensor_file import TensorFile, write_tensor_file
from slipstream.errors import EngineError, SlipstreamError

RANK_FILE = "rank0.engine"
CACHE_FILE = "model.cache"
TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class Engine:
    """An opened engine folder: nothing is read until it is used."""

    path: Path
    manifest: Manifest
    graph: Graph
    weights: TensorFile

    def captured(self) -> Graph:
        """The graph as it was before the passes. Raises EngineError where it cannot be read."""
        return graph_from_json(self.weights.metadata.get("captured", "null"))

    def close(self) -> None:
        self.weights.close()


def write_rank_file(
    path: Path, graph: Graph, captured: str, read_weight: Callable[[str], Tensor], progress: Callable[[int], None]
) -> None:
    """Weights in the order the step reads them, so that a cold start reads the disk forward."""
    order = dict.fromkeys(name for node in graph.nodes for name in node.inputs if name in graph.weights)
    entries = []
    for name in order:
        kind = graph.weights[name]
        shape = tuple(int(size) for size in kind.shape)
        entries.append((name, shape, getattr(torch, kind.dtype), lambda name=name: read_weight(name)))
    write_tensor_file(path, entries, {"graph": graph.to_json(), "captured": captured}, progress)


def open_engine(path: str | Path) -> Engine:
    """Open and check an engine folder. Raises EngineError where it cannot be run."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise EngineError(f"{path} is not an engine folder (it has no config.json); make one with slipstream build.")
    try:
        manifest = Manifest.from_dict(read_json(path / "config.json"), str(path))
        weights = TensorFile.open(path / RANK_FILE)
    except EngineError:
        raise
    except SlipstreamError as error:
        raise EngineError(str(error)) from None
    try:
        graph = graph_from_json(weights.metadata.get("graph", "null"))
        _check(path, manifest, graph, weights)
        check_program(graph, manifest)
        check_orders(graph, weights.read)
    except BaseException:
        weights.close()
        raise
    return Engine(path, manifest, graph, weights)


def _check(path: Path, manifest: Manifest, graph: Graph, weights: TensorFile) -> None:
    if graph.digest() != manifest.graph_sha256:
        raise EngineError(f"{path}: {RANK_FILE} and config.json are of different builds; build the engine again.")
    names = set(weights.names())
    for name, kind in graph.weights.items():
        if name not in names:
            raise EngineError(f"{path}/{RANK_FILE} lacks the weight {name}; build the engine again.")
        found = (weights.shape(name), str(weights.dtype(name)).removeprefix("torch."))
        if found != (kind.shape, kind.dtype):
            raise EngineError(f"{path}/{RANK_FILE}: {name} is {found[1]}{list(found[0])}; the graph asks for {kind}.")
    kv_shape = (manifest.kv_planes, "N", manifest.tokens_per_block, manifest.num_kv_heads, manifest.head_dim)
    cache = TensorType(kv_shape, manifest.kv_dtype)
    if any(graph.inputs.get(f"kv.{layer}") != cache for layer in range(manifest.num_layers)):
        raise EngineError(f"{path}: the graph's KV caches are not those of config.json; build the engine again.")
    rows = "R" if manifest.logits == "selected" else "T"
    made = [graph.types[name].shape for name in graph.outputs]
    if made != [(rows, manifest.vocab_size)]:
        raise EngineError(
            f"{path}: the graph's outputs are not the {manifest.logits} logits of config.json; build the engine again."
        )
