"""The KV cache in 8 bits: its scales, and the lowering that gives them to the ops.

Passes before the lowering see caches as the model file has them, in the engine's dtype, so none of them knows of this.
"""

from dataclasses import replace

import torch
from torch import Tensor

from slipstream.checkpoint.kv_cache import KVCache
from slipstream.engine.graph import Graph, Node, TensorType
from slipstream.errors import BuildError
from slipstream.kernels.registry import known_ops
from slipstream.schema.model import DecoderConfig


def kv_scales(cache: KVCache, config: DecoderConfig) -> dict[str, Tensor]:
    """Each cache's scales [planes, heads], by the names that they have as weights: the model's own, or 1."""
    ones = torch.ones(config.kv_planes, config.num_kv_heads)
    layers = range(config.num_layers if cache.dtype else 0)
    return {_scales(f"kv.{layer}"): cache.scales.get(layer, ones) for layer in layers}


def _scales(cache: str) -> str:
    return f"{cache}.scales"


class QuantizeKV:
    name = "quantize_kv"
    benefit = "keys and values in 8 bits: twice as many tokens fit, and each step reads half as much of them"

    def run(self, graph: Graph) -> int:
        caches = [name for name in graph.inputs if name.startswith("kv.")] if graph.kv_dtype else []
        for cache in caches:
            kind = graph.inputs[cache]
            graph.inputs[cache] = graph.types[cache] = replace(kind, dtype=graph.kv_dtype)
            scales = TensorType((kind.shape[0], kind.shape[3]), "float32")
            graph.weights[_scales(cache)] = graph.types[_scales(cache)] = scales
        graph.nodes[:] = [_with_scales(node, set(caches)) for node in graph.nodes]
        return len(caches)


def _with_scales(node: Node, caches: set[str]) -> Node:
    cache = next((name for name in node.inputs if name in caches), None)
    if cache is None:
        return node
    names = [argument.name for argument in known_ops()[node.op].tensor_arguments]
    if "kv_scales" not in names:
        raise BuildError(
            f"the op {node.op} reads KV caches and takes no kv_scales; build with the kv_cache_dtype of the engine."
        )
    inputs = [_scales(cache) if name == "kv_scales" else given for name, given in zip(names, node.inputs, strict=True)]
    return replace(node, inputs=tuple(inputs))


PASS = QuantizeKV()
