"""torch modules made of ops. A model file composes them; nothing here knows a model, a device or a number format."""

from slipstream.kernels.activation import gelu, silu
from slipstream.kernels.arithmetic import scale, soft_cap
from slipstream.kernels.attention.metadata import StepTensors
from slipstream.kernels.rope import rope
from slipstream.layers.alibi import alibi_slopes
from slipstream.layers.attention import Attention, attend
from slipstream.layers.decoder import Decoder, PreNormLayer
from slipstream.layers.latent_attention import LatentAttention
from slipstream.layers.linear import Embedding, Linear, NormalizedLinear
from slipstream.layers.mlp import ACTIVATIONS, MLP, GatedMLP
from slipstream.layers.moe import Experts, MixtureOfExperts, SigmoidRouter, SoftmaxRouter
from slipstream.layers.norm import LayerNorm, RMSNorm
from slipstream.layers.rope import RotaryTable

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "Attention",
    "Decoder",
    "Embedding",
    "Experts",
    "GatedMLP",
    "LatentAttention",
    "LayerNorm",
    "Linear",
    "MixtureOfExperts",
    "NormalizedLinear",
    "PreNormLayer",
    "RMSNorm",
    "RotaryTable",
    "SigmoidRouter",
    "SoftmaxRouter",
    "StepTensors",
    "alibi_slopes",
    "attend",
    "gelu",
    "rope",
    "scale",
    "silu",
    "soft_cap",
]
