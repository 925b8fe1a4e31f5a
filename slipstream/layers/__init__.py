"""torch modules made of ops. A model file composes them; nothing here knows a model, a device or a number format."""

from slipstream.kernels.attention.metadata import StepTensors
from slipstream.layers.attention import Attention
from slipstream.layers.linear import Embedding, Linear
from slipstream.layers.mlp import GatedMLP
from slipstream.layers.norm import RMSNorm
from slipstream.layers.rope import RotaryTable

__all__ = ["Attention", "Embedding", "GatedMLP", "Linear", "RMSNorm", "RotaryTable", "StepTensors"]
