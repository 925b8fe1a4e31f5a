"""What the device does: one op a file, with its schema, a plain torch reference and candidates that may replace it.

The reference defines the op: it is right on any device, takes empty tensors, and is the fallback. A candidate declares
where it may run; `build/tune.py` measures those that may and the engine folder keeps the choice. Models call ops, the
build rewrites graphs of ops, the runtime runs them; nobody else computes on tensors.

Importing this package registers every op below `slipstream::`.
"""

from slipstream.kernels import (
    activation,
    arithmetic,
    collectives,
    embedding,
    moe,
    norm,
    packed_experts,
    quantized,
    reduce_norm,
    rope,
    sampling,
)
from slipstream.kernels.attention import paged, streaming, tree
from slipstream.kernels.linear import dense, fp8, heads, nvfp4, panels, w4a8, w4a16, w4afp8, w8a8, w8a16

__all__ = [
    "activation",
    "arithmetic",
    "collectives",
    "dense",
    "embedding",
    "fp8",
    "heads",
    "moe",
    "norm",
    "nvfp4",
    "packed_experts",
    "paged",
    "panels",
    "quantized",
    "reduce_norm",
    "rope",
    "sampling",
    "streaming",
    "tree",
    "w4a8",
    "w4a16",
    "w4afp8",
    "w8a8",
    "w8a16",
]
