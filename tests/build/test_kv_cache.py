"""Lowering caches to 8 bits: every op that takes one is given its scales, or the build ends in a sentence."""

import re

import pytest
import torch

from slipstream.build.capture import capture
from slipstream.build.kv_cache import PASS, kv_scales
from slipstream.build.pipeline import run_pipeline
from slipstream.checkpoint.kv_cache import KVCache
from slipstream.engine.graph import Graph, Node
from slipstream.engine.shapes import infer_types
from slipstream.errors import BuildError
from slipstream.kernels import registry
from slipstream.models import known_models, llama, model_file, read_config


def captured(model: object = llama) -> Graph:
    _, config = read_config(model.TINY, "tiny")  # type: ignore[attr-defined]
    return capture(model.Model, config, "float32", 16).graph  # type: ignore[attr-defined]


@pytest.mark.parametrize("model_type", known_models())
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_each_cache_has_its_own_scales(model_type: str, dtype: str) -> None:
    model = model_file(model_type)
    graph = captured(model)
    graph.kv_dtypes = {name: dtype for name in graph.inputs if name.startswith("kv.")}
    reports = run_pipeline(graph, promised=model.PROMISED_PASSES, disabled=())
    _, config = read_config(model.TINY, "tiny")
    scales = kv_scales(KVCache(dtype), config)
    assert {report.name: report.matches for report in reports}["quantize_kv"] == config.num_layers == len(scales)
    assert {name: (list(kind.shape), kind.dtype) for name, kind in graph.weights.items() if name in scales} == {
        name: (list(tensor.shape), "float32") for name, tensor in scales.items()
    }
    takers = [node for node in graph.nodes if any(str(name).startswith("kv.") for name in node.inputs)]
    assert len(takers) == 2 * config.num_layers
    for node in takers:
        (cache,) = {name for name in node.inputs if re.fullmatch(r"kv\.\d+", str(name))}
        assert graph.types[str(cache)].dtype == dtype
        assert node.inputs[-1] == f"{cache}.scales"


def test_where_it_is_not_asked_for_nothing_changes() -> None:
    graph = captured()
    before = graph.to_json()
    assert PASS.run(graph) == 0
    assert graph.to_json() == before


def test_an_op_that_cannot_read_8_bits_is_named() -> None:
    @registry.op("norm_of_cache(Tensor x, Tensor kv) -> Tensor")
    def norm_of_cache(x: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return x * kv.norm()

    try:
        graph = captured()
        output = graph.outputs[0]
        graph.nodes.append(Node("norm_of_cache", (output, "kv.0"), ("normed",)))
        graph.outputs, graph.types = ("normed",), infer_types(graph)
        graph.kv_dtypes = {"kv.0": "int8"}
        with pytest.raises(BuildError, match="norm_of_cache reads KV caches and takes no kv_scales; build with"):
            PASS.run(graph)
    finally:
        registry._OPS.pop("norm_of_cache")  # other tests walk the ops that are ours
