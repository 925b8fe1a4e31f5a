"""The KV cache in fewer bits: the lowering, and the scales of 8 bits that it gives to the ops.

Passes before the lowering see caches as the model file has them, in the engine's dtype, so none of them knows of this.
"""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from slipstream.checkpoint.folder import Checkpoint
from slipstream.checkpoint.kv_cache import KVCache
from slipstream.engine.graph import Graph, Node, TensorType
from slipstream.errors import BuildError
from slipstream.kernels.registry import known_ops
from slipstream.schema.build import KV_DTYPES, KV_DTYPES_OF, BuildConfig
from slipstream.schema.format import QUANTIZES_ACTIVATIONS
from slipstream.schema.model import DecoderConfig


def chosen_cache(checkpoint: Checkpoint, graph: Graph, config: BuildConfig) -> KVCache:
    """How keys and values are kept: as asked; for auto as the model says, else float16 on a CPU where the build itself
    has products round what they read to 8 bits (benchmarks/2026-11-22-cpu-attention.md), else in the engine's dtype.

    A published format is left to compute what its tools do. Raises ModelError.
    """
    narrower = KV_DTYPES_OF.get(checkpoint.dtype, ())
    found = checkpoint.kv_cache.chosen(config.kv_cache_dtype, checkpoint.dtype, checkpoint.name, narrower)
    rounds = config.quantization and any(each.kind in QUANTIZES_ACTIVATIONS for each in graph.formats.values())
    is_free = config.kv_cache_dtype == "auto" and not found.dtype and graph.is_for_cpu and "float16" in narrower
    if rounds and is_free:
        caches = {name for name in graph.inputs if name.startswith("kv.")}
        if all(_takes_scales(node) for node in graph.nodes if caches.intersection(filter(None, node.inputs))):
            return KVCache("float16")
    return found


def _takes_scales(node: Node) -> bool:
    """Whether an op reads caches in fewer bits; a user's own may not."""
    return any(argument.name == "kv_scales" for argument in known_ops()[node.op].tensor_arguments)


def kv_scales(cache: KVCache, config: DecoderConfig) -> dict[str, Tensor]:
    """Scales [planes, heads] of each cache in 8 bits, by the names that they have as weights: the model's own, or 1."""
    ones = torch.ones(config.kv_planes, config.num_kv_heads)
    layers = cache.layers(config.num_layers) if cache.dtype in KV_DTYPES.values() else []
    return {scales_of(f"kv.{layer}"): cache.scales.get(layer, ones) for layer in layers}


def scales_of(cache: str) -> str:
    return f"{cache}.scales"


class QuantizeKV:
    name = "quantize_kv"
    benefit = "keys and values in fewer bits: more tokens fit, and each step reads less of them"

    def run(self, graph: Graph) -> int:
        for cache, dtype in graph.kv_dtypes.items():
            kind = graph.inputs[cache]
            graph.inputs[cache] = graph.types[cache] = replace(kind, dtype=dtype)
            if dtype in KV_DTYPES.values():
                scales = TensorType((kind.shape[0], kind.shape[3]), "float32")
                graph.weights[scales_of(cache)] = graph.types[scales_of(cache)] = scales
        graph.nodes[:] = [_with_scales(node, graph.kv_dtypes.keys(), graph.weights.keys()) for node in graph.nodes]
        return len(graph.kv_dtypes)


def _with_scales(node: Node, caches: Collection[str], weights: Collection[str]) -> Node:
    cache = next((name for name in node.inputs if name in caches), None)
    if cache is None:
        return node
    names = [argument.name for argument in known_ops()[node.op].tensor_arguments]
    if not _takes_scales(node):
        raise BuildError(
            f"the op {node.op} reads KV caches and takes no kv_scales; build with the kv_cache_dtype of the engine."
        )
    scales = scales_of(cache) if scales_of(cache) in weights else None  # 16 bits have none
    inputs = [scales if name == "kv_scales" else given for name, given in zip(names, node.inputs, strict=True)]
    return replace(node, inputs=tuple(inputs))


PASS = QuantizeKV()
