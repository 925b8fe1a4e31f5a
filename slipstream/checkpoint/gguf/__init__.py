"""GGUF files, the format of llama.cpp, as models to convert.

file           the format: metadata and tensors, dequantized as they are read
blocks         or not: numbers and scales of some types as parts of our formats
header         what the metadata says of the model, each value checked
architectures  llama.cpp's name of an architecture → Hugging Face's options and our weights
model          the three together, and the vocabulary
"""

from slipstream.checkpoint.gguf.file import GGMLType, GGUFFile
from slipstream.checkpoint.gguf.model import GGUFModel, TokenizerFacts

__all__ = ["GGMLType", "GGUFFile", "GGUFModel", "TokenizerFacts"]
