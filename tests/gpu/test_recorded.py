"""No kernel that the models take on a GPU waits on the host for what the device computes: their steps are recorded."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from slipstream.build import plan_build
from slipstream.checkpoint import open_checkpoint, resolve
from slipstream.checkpoint.random import write_random_model
from slipstream.engine.choices import Choices
from slipstream.engine.graph import Graph
from slipstream.models import known_models, model_file
from slipstream.runtime.worker.graphs import compile_graph
from slipstream.runtime.worker.groups import with_groups
from slipstream.schema.build import BuildConfig
from slipstream.schema.kv import KVGroup

GPU = torch.device("cuda")  # nothing runs on it here


def graph_of(model_type: str, folder: Path) -> Graph:
    model = write_random_model(folder / "model", model_file(model_type).TINY)
    return plan_build(open_checkpoint(resolve(str(model))), BuildConfig()).graph


def can_be_recorded(graph: Graph) -> bool:
    """In deterministic runs, too: their kernels must be there, for one."""
    weights, choices = {name: torch.empty(0) for name in graph.weights}, Choices("", {})
    ordinary = compile_graph(graph, weights, choices, GPU)
    deterministic = compile_graph(graph, weights, choices, GPU, is_batch_invariant=True)
    return ordinary.can_be_recorded and deterministic.can_be_recorded


@pytest.mark.parametrize("model_type", known_models())
def test_every_model(model_type: str, tmp_path: Path) -> None:
    assert can_be_recorded(graph_of(model_type, tmp_path))


def test_windows_with_sinks(tmp_path: Path) -> None:
    graph = graph_of("llama", tmp_path)
    layers = tuple(range(sum(name.startswith("kv.") for name in graph.inputs)))
    with_sinks = with_groups(graph, [KVGroup(layers=layers, window=20, sink_tokens=4)])
    assert any(node.op == "streaming_attention" for node in with_sinks.nodes)
    assert can_be_recorded(with_sinks)
