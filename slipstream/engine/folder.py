"""The engine folder: what the build leaves and the runtime reads.

config.json     Manifest: versions, shapes, limits, passes; written last, so a folder that has it is whole
rank0.engine    graph and weights in one safetensors file: the graph is JSON in its header, the weights are mapped;
                beside it the graph as captured, before the passes, which is for people and never run
rank1.engine    and so on, where ranks share the model: the part of each
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

CACHE_FILE = "model.cache"
TOKENIZER_FOLDER = "tokenizer"


def rank_file(rank: int) -> str:
    return f"rank{rank}.engine"


@dataclass(frozen=True)
class Engine:
    """One rank's part of an opened engine folder, mostly the only one: nothing is read until it is used."""

    path: Path
    rank: int
    manifest: Manifest
    graph: Graph
    weights: TensorFile

    @property
    def is_last_stage(self) -> bool:
        """Whether a step ends here with logits; otherwise it goes on in the next stage."""
        return self.manifest.mapping.is_last_stage(self.rank)

    @property
    def has_hidden_states(self) -> bool:
        """Whether a step gives them beside the logits; engines of older builds do not."""
        return len(self.graph.outputs) == 2

    @property
    def tokenizer_folder(self) -> Path | None:
        """None where the model came without a tokenizer."""
        folder = self.path / TOKENIZER_FOLDER
        return folder if folder.is_dir() and any(folder.iterdir()) else None

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


def open_engine(path: str | Path, rank: int = 0) -> Engine:
    """Open and check an engine folder, of several ranks one's part. Raises EngineError where it cannot be run."""
    path = Path(path)
    if not (path / "config.json").is_file():
        raise EngineError(f"{path} is not an engine folder (it has no config.json); make one with slipstream build.")
    try:
        manifest = Manifest.from_dict(read_json(path / "config.json"), str(path)).of_rank(rank)
        weights = TensorFile.open(path / rank_file(rank))
    except EngineError:
        raise
    except SlipstreamError as error:
        raise EngineError(str(error)) from None
    try:
        graph = graph_from_json(weights.metadata.get("graph", "null"))
        _check(path / rank_file(rank), manifest, rank, graph, weights)
        check_program(graph, manifest, rank)
        check_orders(graph, weights.read)
    except BaseException:
        weights.close()
        raise
    return Engine(path, rank, manifest, graph, weights)


def _check(file: Path, manifest: Manifest, rank: int, graph: Graph, weights: TensorFile) -> None:
    if graph.digest() != manifest.graph_sha256:
        raise EngineError(
            f"{file.parent}: {file.name} and config.json are of different builds; build the engine again."
        )
    names = set(weights.names())
    for name, kind in graph.weights.items():
        if name not in names:
            raise EngineError(f"{file} lacks the weight {name}; build the engine again.")
        found = (weights.shape(name), str(weights.dtype(name)).removeprefix("torch."))
        if found != (kind.shape, kind.dtype):
            raise EngineError(f"{file}: {name} is {found[1]}{list(found[0])}; the graph asks for {kind}.")
    kv_shape = (manifest.kv_planes, "N", manifest.tokens_per_block, manifest.num_kv_heads, manifest.head_dim)
    caches = {f"kv.{layer}": TensorType(kv_shape, manifest.kv_dtype_of(layer)) for layer in range(*manifest.layers)}
    if any(graph.inputs.get(name) != kind for name, kind in caches.items()):
        raise EngineError(f"{file.parent}: the graph's KV caches are not those of config.json; build the engine again.")
    if not manifest.mapping.is_last_stage(rank):
        producers = graph.producers()
        if not all(name in producers and producers[name].op == "send" for name in graph.outputs):
            raise EngineError(f"{file} keeps what it should send to the next stage; build the engine again.")
        return
    rows = "R" if manifest.logits == "selected" else "T"
    made = [graph.types[name].shape for name in graph.outputs]
    if made[:1] != [(rows, manifest.vocab_size)] or made[1:] not in ([], [("T", manifest.hidden_size)]):
        raise EngineError(
            f"{file.parent}: the graph's outputs are not the {manifest.logits} logits of config.json, and the hidden "
            "states; build the engine again."
        )
