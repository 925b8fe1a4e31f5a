"""What the device does: one op a file, with its schema, a plain torch reference and candidates that may replace it.

The reference defines the op: it is right on any device, takes empty tensors, and is the fallback. A candidate declares
where it may run; `build/tune.py` measures those that may and the engine folder keeps the choice. Models call ops, the
build rewrites graphs of ops, the runtime runs them; nobody else computes on tensors.

Importing this package registers every op below `slipstream::`.
"""

from slipstream.kernels import activation, arithmetic, embedding, moe, norm, packed_experts, quantized, rope
from slipstream.kernels.attention import paged, streaming
from slipstream.kernels.linear import dense, fp8, heads, w4a16, w8a8, w8a16

__all__ = [
    "activation",
    "arithmetic",
    "dense",
    "embedding",
    "fp8",
    "heads",
    "moe",
    "norm",
    "packed_experts",
    "paged",
    "quantized",
    "rope",
    "streaming",
    "w4a16",
    "w8a8",
    "w8a16",
]
